"""The precision of flows: single, whatever torch's default is."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def single_precision() -> Iterator[None]:
    """What is made without a dtype within the block is single, as flows and their draws are.

    ``torch.set_default_dtype(torch.float64)`` elsewhere in a program would give a fit other
    random numbers, and some flows weights of two kinds. Threads share torch's default: where it
    is not float32, fits in several threads may see each other's.
    """
    before = torch.get_default_dtype()
    if before == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
