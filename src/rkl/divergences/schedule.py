"""Fields of a divergence that change from step to step of a training."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from rkl.divergences.base import Divergence, combine, weighted_terms
from rkl.divergences.parse import catalogue, same_name

_RAMP = re.compile(r"\s*([\w.:-]+)\.(\w+)\s*:\s*(\S+)\s*->\s*(\S+)\s*")


@dataclass(frozen=True)
class Ramp:
    """A field that moves on a straight line from its value at the first step to the last."""

    kind: type[Divergence]
    field: str
    first: float
    last: float
    name: str

    def at(self, progress: float) -> float:
        """The value at a progress between 0 and 1."""
        share = min(max(progress, 0.0), 1.0)
        return (1 - share) * self.first + share * self.last


@dataclass(frozen=True)
class Schedule:
    """A divergence whose fields move along ramps; without ramps it does not change."""

    divergence: Divergence
    ramps: tuple[Ramp, ...] = ()

    def at(self, progress: float) -> Divergence:
        """The divergence at a progress between 0, the first step, and 1, the last.

        >>> from rkl import TAID
        >>> read_schedule("taid.t: 0.2 -> 1.0", TAID()).at(0.5)
        TAID(t=0.6)
        """
        if not self.ramps:
            return self.divergence
        moved = (
            (w, self._replace_fields(term, progress))
            for w, term in weighted_terms(self.divergence)
        )
        return combine(*moved)

    def values(self, progress: float) -> dict[str, float]:
        """The fields that move, each at this progress."""
        return {ramp.name: ramp.at(progress) for ramp in self.ramps}

    def _replace_fields(self, term: Any, progress: float) -> Divergence:
        kind: Any = type(term)
        fields = {ramp.field: ramp.at(progress) for ramp in self.ramps if ramp.kind is kind}
        return dataclasses.replace(term, **fields) if fields else term


def read_schedule(text: str | None, divergence: Divergence) -> Schedule:
    """The schedule of a text such as "taid.t: 0.2 -> 1.0"; several are separated by ";".

    Args:
        text: Name of a divergence, a dot, its field, and the values at the first and the last
            step. Without a text nothing moves.
        divergence: The divergence that is minimised; the name must be its own or that of a term.

    Raises:
        ValueError: The text cannot be read, or names what does not vary.
    """
    if text is None:
        return Schedule(divergence)
    ramps = tuple(_ramp(part, divergence) for part in text.split(";"))
    names = [ramp.name for ramp in ramps]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"schedule names {twice[0]} twice; got {text!r}.")
    schedule = Schedule(divergence, ramps)
    for progress in (0.0, 1.0):
        try:
            schedule.at(progress)
        except ValueError as error:
            raise ValueError(f"schedule: {error}") from None
    return schedule


def _ramp(text: str, divergence: Divergence) -> Ramp:
    match = _RAMP.fullmatch(text)
    if match is None:
        raise ValueError(f"schedule must be as taid.t: 0.2 -> 1.0; got {text.strip()!r}.")
    name, field, *ends = match.groups()
    first, last = (_number(end, text) for end in ends)
    kinds = [type(term) for _, term in weighted_terms(divergence)]
    kind = next((kind for kind in kinds if same_name(name, kind)), None)
    if kind is None:
        raise ValueError(f"schedule names {name!r}, which is no term of {divergence}.")
    if (count := kinds.count(kind)) > 1:
        raise ValueError(
            f"schedule names {name!r}, of which {divergence} has {count} terms; expected "
            "one, for they would all move alike."
        )
    if field not in kind.varying:
        may = f"only {', '.join(kind.varying)} may" if kind.varying else "nothing may"
        movable = ", ".join(
            f"{known}.{it}" for known, cls in catalogue().items() for it in cls.varying
        )
        raise ValueError(
            f"schedule: {field!r} of {name} does not vary, {may}. Fields that may: {movable}."
        )
    return Ramp(kind, field, first, last, f"{name}.{field}")


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"schedule must go from number to number; got {text!r} in {whole!r}.")
    return value
