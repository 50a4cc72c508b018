"""The objective of a fit, written as a sum: 1.0*critic:jensen-shannon + 1.0*data:kl."""

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from rkl.checks import number
from rkl.divergences import KL, FDivergence, JensenShannon, ReverseKL, parse

Source = Literal["target", "data", "critic"]
_TERM = re.compile(r"\s*(?:([\d.]+(?:e-?\d+)?)\s*\*)?\s*(?:([a-z]+):)?(?!:)(.+)", re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A weight, a divergence D(p ‖ q), and the estimator of its gradient.

    Args:
        weight: Above 0.
        divergence: Any f-divergence.
        estimator: "target", draws of the flow and the log-density of the target; "data", draws
            of the target; "critic", a learnt ratio between draws of both.
    """

    weight: float
    divergence: FDivergence
    estimator: Source = "target"

    def __post_init__(self):
        number("weight", self.weight, above=0)
        if not isinstance(self.divergence, FDivergence):
            raise TypeError(f"divergence must be an f-divergence; got {self.divergence!r}.")
        if self.estimator not in get_args(Source):
            raise ValueError(
                f"estimator must be one of {', '.join(get_args(Source))}; got {self.estimator!r}."
            )

    def __repr__(self):
        return f"{self.weight}*{self.estimator}:{self.divergence}"


@dataclass(frozen=True)
class Objective:
    """A sum of terms.

    >>> Objective((Term(0.5, ReverseKL()), Term(1.0, KL(), "data")))
    0.5*target:ReverseKL() + 1.0*data:KL()
    """

    terms: tuple[Term, ...]

    def __post_init__(self):
        if not self.terms:
            raise ValueError("terms must be one at least; got none.")

    def __repr__(self):
        return " + ".join(map(repr, self.terms))

    def uses(self, estimator: Source) -> bool:
        """True if any term has this estimator."""
        return any(term.estimator == estimator for term in self.terms)


_ADVERSARIAL = Term(1.0, JensenShannon(), "critic")
_REVERSE, _FORWARD = Term(0.5, ReverseKL(), "target"), Term(1.0, KL(), "data")

# V. Kanaujia et al. (2024), arXiv 2401.15948: the seven ways to combine its three losses.
VARIANTS: dict[str, Objective] = {
    "rkl": Objective((_REVERSE,)),
    "fkl": Objective((_FORWARD,)),
    "fkl-rkl": Objective((_REVERSE, _FORWARD)),
    "adv": Objective((_ADVERSARIAL,)),
    "advnf-rkl": Objective((_ADVERSARIAL, _REVERSE)),
    "advnf-fkl": Objective((_ADVERSARIAL, _FORWARD)),
    "advnf": Objective((_ADVERSARIAL, _REVERSE, _FORWARD)),
}


def parse_objective(text: str, default: Source = "target") -> Objective:
    """An objective from its repr, from the same in kebab case, or from the name of a variant.

    Args:
        text: Such as "0.5*target:reverse-kl + 1.0*data:kl", or "advnf".
        default: The estimator of terms that name none.

    Raises:
        ValueError: It cannot be read; the message names the term at fault.
        TypeError: It is not a string.

    >>> parse_objective("reverse-kl + 2*data:kl")
    1.0*target:ReverseKL() + 2.0*data:KL()
    """
    if not isinstance(text, str):
        raise TypeError(f"objective must be a string such as 'data:kl'; got {text!r}.")
    if text.strip() in VARIANTS:
        return VARIANTS[text.strip()]
    return Objective(tuple(_term(it, default) for it in re.split(r"\+(?![^(]*\))", text)))


def as_objective(objective: Objective | FDivergence | str) -> Objective:
    """An objective of a divergence on the target, of a text, or of itself."""
    if isinstance(objective, str):
        objective = parse_objective(objective)
    if isinstance(objective, FDivergence):
        objective = Objective((Term(1.0, objective),))
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a divergence or a sum of terms; got {objective!r}.")
    return objective


def _term(text: str, default: Source) -> Term:
    match = _TERM.fullmatch(text)
    if match is None:
        raise ValueError(
            f"objective: cannot read the term {text.strip()!r}; expected one such as "
            "'0.5*target:reverse-kl'."
        )
    weight, source, divergence = match.groups()
    if source is not None and source not in get_args(Source):
        raise ValueError(
            f"objective: {source!r} in {text.strip()!r} is none of {', '.join(get_args(Source))}."
        )
    try:
        return Term(float(weight or 1), parse(divergence.strip()), cast(Source, source or default))
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective: the term {text.strip()!r}: {error}") from None
