"""Signs that text of the student's own runs away: longer and longer, repeating, or too sure.

Known ways of collapse: replies grow until they are cut off, they repeat themselves, the student's
entropy vanishes, it is far surer than the teacher on the same tokens, or it writes nothing
(arXiv 2604.08527, 2603.07079, 2604.16830). A figure is judged by its mean over a window of steps
beside that of the first window, so that a student which begins badly is not stopped for it.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.distill.limits import check_within
from rkl.distill.progress import OWN_TEXT
from rkl.distill.selection import DivergedError
from rkl.distill.text.batches import DATA, SOURCES
from rkl.distill.text.data import IGNORED

MAX_MEASURED = 256  # tokens of a batch whose entropies are taken
MIN_ENTROPY = 1e-9  # nats, below which a teacher's is taken to be none
REPEATED = 4  # tokens of a stretch that counts as repeated
_BY_REPLY = 4  # of the figures are means over replies, the others over tokens


class CollapseError(DivergedError):
    """The student's own text collapses, so that training on it makes the student worse.

    Its ``step`` is the first of the steps in whose mean this shows.
    """

    when = "since"
    remedy = (
        "Try a smaller --lmbda or --learning-rate, or --guard mix; --guard off where this is "
        "meant to be."
    )


@dataclass(frozen=True)
class CollapseLimits:
    """Limits on the drift of the student's own text from that of the first steps.

    Args:
        truncated: How much the share of replies that are cut off may rise, where they also grow.
        length: Factor by which replies may grow in length, where more of them are cut off.
        repetition: How much the share of stretches of four tokens that occurred before in the
            same reply may rise.
        entropy: Share of its first entropy that the student must keep.
        confidence: Share of the teacher's entropy on the same tokens that the student must have,
            or else nearly the share that it began with.
        empty: Largest share of replies that hold nothing but the token that ends them.
    """

    truncated: float = 0.3
    length: float = 1.5
    repetition: float = 0.3
    entropy: float = 0.1
    confidence: float = 0.5
    empty: float = 0.9

    def __post_init__(self):
        names = [it.name for it in fields(self) if it.name != "length"]
        check_within(self, *names, high=1, ends="[]")
        check_within(self, "length", low=1, ends="[)")

    def reasons(self, first: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
        """Reasons, in words, why a window of steps counts as a collapse."""
        judged = (detect(self, first, now) for detect in DETECTORS)
        return [reason for reason in judged if reason]


Figures = Mapping[str, float]
Detector = Callable[[CollapseLimits, Figures, Figures], str]


def length_inflation(limits: CollapseLimits, first: Figures, now: Figures) -> str:
    """Replies grow, and ever more of them are cut off."""
    rise = now["truncated"] - first["truncated"]
    growth = now["completion_length"] / max(first["completion_length"], 1.0)
    if rise <= limits.truncated or growth <= limits.length:
        return ""
    return (
        f"length inflation: {now['truncated']:.0%} of replies are cut off, "
        f"{first['truncated']:.0%} in the beginning, at {growth:.1f} times the length"
    )


def more_repetition(limits: CollapseLimits, first: Figures, now: Figures) -> str:
    """Replies say the same again."""
    if now["repetition"] - first["repetition"] <= limits.repetition:
        return ""
    return (
        f"repetition: {now['repetition']:.0%} of a reply occurred in it before, "
        f"{first['repetition']:.0%} in the beginning"
    )


def entropy_collapse(limits: CollapseLimits, first: Figures, now: Figures) -> str:
    """The student is sure of nearly every token, whatever the teacher says."""
    if not now["student_entropy"] < limits.entropy * first["student_entropy"]:
        return ""
    return (
        f"entropy collapse: the student's entropy is {now['student_entropy']:.3g} nats, "
        f"{first['student_entropy']:.3g} in the beginning"
    )


def overconfidence(limits: CollapseLimits, first: Figures, now: Figures) -> str:
    """The student is far surer than the teacher on the same tokens."""
    share, before = (
        it["student_entropy"] / max(it["teacher_entropy"], MIN_ENTROPY) for it in (now, first)
    )
    if not share < limits.confidence * min(1.0, before):  # false where the teacher's is not known
        return ""
    return (
        f"overconfidence: the student's entropy is {share:.0%} of the teacher's on the same "
        f"tokens, {before:.0%} in the beginning"
    )


def empty_replies(limits: CollapseLimits, first: Figures, now: Figures) -> str:
    """Replies are empty."""
    if now["empty"] <= limits.empty:
        return ""
    return f"no text: {now['empty']:.0%} of replies hold nothing but the token that ends them"


DETECTORS: tuple[Detector, ...] = (
    length_inflation,
    more_repetition,
    entropy_collapse,
    overconfidence,
    empty_replies,
)


@dataclass
class Watch:
    """Sums the figures of a step's own text, and judges the last steps beside the first.

    Args:
        limits: How far figures may go.
        ends: The tokens that end a reply.
        window: Steps with own text in a mean.
    """

    limits: CollapseLimits
    ends: Collection[int]
    window: int = 20
    first: list[list[float]] = field(default_factory=list)  # sums of each of the first steps
    last: list[list[float]] = field(default_factory=list)  # and of the last ones
    _step: Tensor | None = None  # sums of the step that is being taken
    _logged: Tensor | None = None  # sums since the last row of the log

    def note(self, inputs: Mapping[str, Any], confidence: Float[Tensor, "measured 3"]) -> None:
        """Add the figures of a batch to those of the step.

        Args:
            inputs: The batch, with its labels and sources.
            confidence: Of some of its tokens the entropies of student and teacher in nats, and
                the mass that both give the same atoms.
        """
        figures = [[*self._figures(it), 1.0] for it in _replies(inputs)]
        replies = torch.tensor(figures, dtype=torch.float32)
        known = ~confidence.isnan()
        by_token = torch.stack([confidence.nan_to_num().sum(0), known.sum(0)]).cpu()
        sums = torch.cat([replies.reshape(-1, _BY_REPLY + 1).sum(0), by_token.flatten()])
        self._step = sums.double() if self._step is None else self._step + sums

    def _figures(self, reply: list[int]) -> tuple[float, float, float, float]:
        truncated = not reply or reply[-1] not in self.ends
        text = reply if truncated else reply[:-1]
        return float(truncated), float(len(reply)), repetition(text), float(not text)

    def end_step(self, total: Callable[[Tensor], Tensor]) -> list[str]:
        """Close a step, and say what is wrong by now; nothing before two windows are full.

        Args:
            total: The sum of a tensor over all processes, all of which come here.
        """
        sums = self._step
        self._step = None
        sums = total(torch.zeros(_BY_REPLY + 7, dtype=torch.double) if sums is None else sums)
        if not sums[_BY_REPLY]:
            return []  # no own text
        self._logged = sums if self._logged is None else self._logged + sums
        if len(self.first) < self.window:
            self.first.append(sums.tolist())
            return self._judge(self.first) if len(self.first) == self.window else []
        self.last = [*self.last, sums.tolist()][-self.window :]
        return self._judge(self.last) if len(self.last) == self.window else []

    def _judge(self, steps: Sequence[Sequence[float]]) -> list[str]:
        return self.limits.reasons(_means(self.first), _means(steps))

    def forget_last(self) -> None:
        """Begin a new window, after something was changed."""
        self.last = []

    def pop(self) -> dict[str, float]:
        """Means since the last call, for the log; nothing where there was no own text."""
        sums, self._logged = self._logged, None
        if sums is None:
            return {}
        return {name: it for name, it in _means([sums.tolist()]).items() if not math.isnan(it)}

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        logged = None if self._logged is None else self._logged.tolist()
        return {"first": self.first, "last": self.last, "logged": logged}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.first, self.last, logged = state["first"], state["last"], state["logged"]
        self._logged = None if logged is None else torch.tensor(logged, dtype=torch.double)


def repetition(tokens: Sequence[int]) -> float:
    """Share of the stretches of four tokens that occurred before in the same text.

    >>> repetition([1, 2, 3, 4, 5, 6]), repetition([1] * 9)
    (0.0, 0.8333333333333334)
    """
    stretches = [tuple(tokens[at : at + REPEATED]) for at in range(len(tokens) - REPEATED + 1)]
    return 1 - len({*stretches}) / len(stretches) if stretches else 0.0


def _replies(inputs: Mapping[str, Any]) -> list[list[int]]:
    mine = (inputs["labels"] != IGNORED) & (inputs[SOURCES] != DATA)
    pairs = zip(inputs["input_ids"], mine, strict=True)
    return [ids[chosen].tolist() for ids, chosen in pairs]


def _means(steps: Sequence[Sequence[float]]) -> dict[str, float]:
    """The means of all figures over some steps, by name; NaN where nothing was measured."""
    total = torch.tensor(steps, dtype=torch.double).sum(0)
    replies, sums, counts = total[: _BY_REPLY + 1], *total[_BY_REPLY + 1 :].view(2, 3)
    means = torch.cat([replies[:-1] / replies[-1], sums / counts])
    return dict(zip(OWN_TEXT, means.tolist(), strict=True))
