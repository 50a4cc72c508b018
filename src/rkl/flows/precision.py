"""The precision of flows: single, whatever torch's default dtype."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def single_precision() -> Iterator[None]:
    """Set torch's default dtype to float32 within the block, the precision of flows.

    ``torch.set_default_dtype(torch.float64)`` elsewhere in a program would give a fit other
    random numbers, and some flows weights of two kinds. Threads share torch's default: where it
    is not float32, fits in several threads affect one another.
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
