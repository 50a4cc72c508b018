"""DistillKit's captures of a teacher's top k: bytes at each place, unpacked as its source says.

As of arcee-ai/DistillKit at commit b8ed189 (``distillkit.compression``, in the form of a byte
string for the log-probabilities of a place and another for the numbers of its tokens). Nothing of
it runs here: what follows was written from what its packing does.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from rkl.checks import integer
from rkl.distill.limits import COMPRESSED

LOGPROBS, INDICES = COMPRESSED, "bytepacked_indices"  # columns of a capture
DTYPES = {it: getattr(torch, it) for it in ("float16", "bfloat16", "float32", "float64")}
SPECIAL = "sqrt", "exp"  # terms of the approximation that are no powers
MAX_BITS = 62  # of a packed number
MAX_MASS = 1.1  # of a place, which an approximation may exceed 1 by


@dataclass(frozen=True)
class Bin:
    """Remainders of some places in the order of the top k, packed with one scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    def __post_init__(self):
        _check_dtype("scale_dtype", self.scale_dtype)
        integer("element_bits", self.element_bits, at_least=1, at_most=MAX_BITS)
        integer("num_elements", self.num_elements, at_least=1)

    @property
    def packed(self) -> int:
        """Bytes of the numbers."""
        return -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True)
class Compression:
    """The compression of a capture: ``logprob_compressor`` in DistillKit's settings.

    Log-probabilities fall with their rank. The first ``exact_k`` are stored as they are, the
    others as Σ c_i t^i over the terms at the rank t = 0, 1, ... behind them (with ``normalize_t``
    from 0 to 1), and what that leaves in bins. With ``delta_encoding`` they are differences to
    the one before. Names and defaults are DistillKit's.

    Args:
        d: Number of tokens of the vocabulary.
        k: Number of tokens at a place.
        exact_k: Number of them that are stored as they are.
        exact_dtype: In what.
        polynomial_terms: Powers of t, "sqrt" or "exp"; None for no approximation.
        term_dtype: What the coefficients are stored in.
        residual_bins: Bins of remainders, in the order of the ranks.
        delta_encoding: Whether differences are stored.
        error_diffusion: How remainders were rounded, which does not matter to who reads them.
        normalize_t: Whether t goes from 0 to 1.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: Sequence[int | str] | None = None
    term_dtype: str = "float32"
    residual_bins: Sequence[Bin] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self):
        integer("d", self.d, at_least=2)
        integer("k", self.k, at_least=1, at_most=self.d)
        integer("exact_k", self.exact_k, at_least=0, at_most=self.k)
        for name in ("exact_dtype", "term_dtype"):
            _check_dtype(name, getattr(self, name))
        for term in self.polynomial_terms or ():
            if term not in SPECIAL and (isinstance(term, bool) or not isinstance(term, int)):
                raise ValueError(
                    f"polynomial_terms must be powers, {' or '.join(SPECIAL)}; got {term!r}."
                )
        held = sum(it.num_elements for it in self.residual_bins)
        if held > self.k - self.exact_k:
            raise ValueError(
                f"residual_bins must hold at most k - exact_k = {self.k - self.exact_k} "
                f"remainders; got {held}."
            )

    @property
    def index_bits(self) -> int:
        """Bits of the number of a token; rounded as DistillKit does, in single precision."""
        return int(torch.tensor(float(self.d)).log2().ceil())

    @property
    def logprob_bytes(self) -> int:
        """Bytes of the log-probabilities of a place."""
        bins = sum(DTYPES[it.scale_dtype].itemsize + it.packed for it in self.residual_bins)
        terms = len(self.polynomial_terms or ()) * DTYPES[self.term_dtype].itemsize
        return self.exact_k * DTYPES[self.exact_dtype].itemsize + terms + bins


def read_compression(source: Mapping[str, Any] | str | os.PathLike | Compression) -> Compression:
    """The settings of a capture, from ``compression_config.yaml`` beside it or its entries.

    Raises:
        ValueError: An entry is unknown, missing, or out of range.
    """
    if isinstance(source, Compression):
        return source
    if not isinstance(source, Mapping):
        source = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    if not isinstance(source, Mapping):
        raise ValueError(f"compression must be entries such as d, k and exact_k; got {source!r}.")
    known = {it.name for it in fields(Compression)}
    if unknown := sorted(source.keys() - known):
        raise ValueError(f"compression has no entry {unknown[0]!r}; it has {', '.join(known)}.")
    if missing := [it for it in ("d", "k", "exact_k") if it not in source]:
        raise ValueError(f"compression must have {missing[0]!r}; got {sorted(source)}.")
    bins = tuple(Bin(**it) for it in source.get("residual_bins") or ())
    return Compression(**{**source, "residual_bins": bins})


def unpack(
    packed: UInt8[Tensor, "places bytes"], bits: int, count: int
) -> Int[Tensor, "places count"]:
    """Whole numbers of so many bits each, the highest bit first, packed without gaps.

    >>> unpack(torch.tensor([[0b10100011, 0b11000000]], dtype=torch.uint8), bits=5, count=2)
    tensor([[20, 15]])
    """
    stream = ((packed[..., None] >> torch.arange(7, -1, -1)) & 1).flatten(-2)
    numbers = stream[..., : bits * count].long().unflatten(-1, (count, bits))
    return (numbers << torch.arange(bits - 1, -1, -1)).sum(-1)


def log_probabilities(
    packed: UInt8[Tensor, "places bytes"], compression: Compression
) -> Float[Tensor, "places k"]:
    """Log-probabilities of the top k at each place, in nats, as the capture approximates them."""
    how, start = compression, 0

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal start
        end = start + count * dtype.itemsize
        part, start = packed[:, start:end], end
        return part.clone(memory_format=torch.contiguous_format).view(dtype)

    exact = take(how.exact_k, DTYPES[how.exact_dtype]).float()
    rest = torch.zeros(len(packed), how.k - how.exact_k)
    if how.polynomial_terms:
        dtype = DTYPES[how.term_dtype]
        coefficients = take(len(how.polynomial_terms), dtype)
        rest += (_terms(how, dtype) * coefficients[:, None]).sum(-1).float()
    place = 0
    for one in how.residual_bins:
        scale = take(1, DTYPES[one.scale_dtype]).float()
        numbers = unpack(take(one.packed, torch.uint8), one.element_bits, one.num_elements)
        middle = 2 ** (one.element_bits - 1)
        steps = 2 * numbers - 1 if one.element_bits == 1 else numbers - middle
        rest[:, place : place + one.num_elements] += steps * scale
        place += one.num_elements
    logp = torch.cat([exact, rest], -1)
    return logp.cumsum(-1) if how.delta_encoding else logp


def _terms(how: Compression, dtype: torch.dtype) -> Float[Tensor, "ranks terms"]:
    ranks = how.k - how.exact_k
    t = torch.linspace(0, 1, ranks, dtype=dtype) if how.normalize_t else torch.arange(ranks)
    t = t.to(dtype)
    terms = how.polynomial_terms or ()
    return torch.stack([getattr(t, it)() if isinstance(it, str) else t**it for it in terms], -1)


def places_of(
    row: Mapping[str, Any], compression: Compression, where: str
) -> Iterator[dict[int, float]]:
    """The atoms at each place of a row with their log-probabilities.

    An approximation whose masses sum to more than 1 is divided by the sum.

    Raises:
        ValueError: The row is no capture with these settings.
    """
    if "packed_indices" in row:
        raise ValueError(
            f"{where} is a capture of legacy_logit_compression, which keeps logits without "
            "what they are to be divided by: the teacher's mass in its top k cannot be told."
        )
    for name in (LOGPROBS, INDICES):
        if row.get(name) is None:
            raise ValueError(f"{where} has no column {name!r}; it has {[*row]}.")
    sizes = compression.logprob_bytes, -(-compression.k * compression.index_bits // 8)
    parts = []
    for name, size in zip((LOGPROBS, INDICES), sizes, strict=True):
        lengths = {len(it) for it in row[name]}
        if lengths - {size}:
            raise ValueError(
                f"{where}: column {name!r} has {min(lengths - {size})} bytes at a place; "
                f"expected {size} with these settings: is it the compression_config.yaml that the "
                "capture was made with?"
            )
        parts.append(torch.tensor(row[name], dtype=torch.uint8).view(-1, size))
    if len(parts[0]) != len(parts[1]):
        raise ValueError(
            f"{where} has {len(parts[0])} places of log-probabilities and {len(parts[1])} of "
            "tokens; expected as many of both."
        )
    logp = log_probabilities(parts[0], compression)
    tokens = unpack(parts[1], compression.index_bits, compression.k)
    mass = logp.exp().sum(-1)
    if not (mass <= MAX_MASS).all():
        place = int((~(mass <= MAX_MASS)).nonzero()[0])
        raise ValueError(
            f"{where}: the masses at place {place} sum to {float(mass[place]):.3g}; expected "
            f"at most 1, and {MAX_MASS} of an approximation."
        )
    logp = logp - mass.clamp_min(1.0).log()[:, None]
    for some, values in zip(tokens.tolist(), logp.tolist(), strict=True):
        atoms = zip(some, values, strict=True)
        yield {token: logp for token, logp in atoms if logp > -math.inf}


def apart(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The texts of a row in which DistillKit packed several, by their numbers in its mask."""
    mask = row.get("attention_mask")
    if mask is None or max(mask, default=1) <= 1:
        yield dict(row)
        return
    columns = {it: row[it] for it in ("input_ids", "labels", LOGPROBS, INDICES) if it in row}
    starts = [at for at in range(len(mask)) if not at or mask[at] != mask[at - 1]]
    for start, end in zip(starts, [*starts[1:], len(mask)], strict=True):
        if mask[start]:
            yield {name: values[start:end] for name, values in columns.items()}


def _check_dtype(name: str, value: Any) -> None:
    if value not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {value!r}.")
