"""Simpler families as they were asked for: read, and held against the whole family."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from rkl.bayes.draws import Draws
from rkl.bayes.families.regression import Regression
from rkl.bayes.laws import Model, Theta, family_in, probe, read_family, support_of
from rkl.bayes.questions import Question, Variables
from rkl.divergences.parse import Stack


@dataclass(frozen=True, eq=False)
class Subfamily:
    """A simpler family, and how its variables follow from the posterior.

    Attributes:
        name: What it is called.
        model: Its laws.
        question: That of the whole family, its draws such that the model takes them.
        places: By variable, where in the whole family's the numbers go that are kept of it:
            [kept, all], of 0 and 1.
        zeros: By variable, the shape of those of which no number is kept.
    """

    name: str
    model: Model
    question: Question
    places: Mapping[str, Tensor] = field(default_factory=dict)
    zeros: Mapping[str, torch.Size] = field(default_factory=dict)

    @property
    def theta(self) -> Variables:
        """All draws of its variables [draws, *shape], in the shape that its act has."""
        draws = self.question.draws
        return {
            name: self.question.aligned(name, draws[name].flatten(0, 1), self.model)
            for name in self.model.names
        }

    def placed(self, variables: Mapping[str, Tensor]) -> Variables:
        """The variables [*lead, *shape] with zeros for what was left out."""
        name, first = next(iter(variables.items()))
        lead = first.shape[: first.ndim - len(self.question.shape(name, self.model))]
        found = {k: x @ self.places[k] if k in self.places else x for k, x in variables.items()}
        return found | {k: first.new_zeros((*lead, *size)) for k, size in self.zeros.items()}

    def within(self, whole: Question) -> bool:
        """Whether it lies in the exponential family of the whole, under the same wrappings."""
        law = self.model.law(probe(self.question.draws, self.model.names))
        base = self.model.unwrapped(law).base
        if whole.family is None or family_in(base) != whole.family:
            return False
        again = whole.unwrapped.wrap(base)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            x = law.sample()
            try:
                said, meant = law.log_prob(x), again.log_prob(x)
            except ValueError:  # over other events, or beyond the support
                return False
        return said.shape == meant.shape and torch.allclose(said, meant)


def read_subfamilies(whole: Question, given: Any) -> list[Subfamily]:
    """What one simpler family, a list of them, or a dict of them by name stands for.

    Raises:
        ValueError: One does not go with the whole family, or two have one name.
        TypeError: They are none of these.
    """
    match given:
        case Mapping():
            named = list(given.items())
        case list() | tuple():
            named = [(None, one) for one in given]
        case _ if isinstance(given, str) or callable(given):
            named = [(None, given)]
        case _:
            raise TypeError(
                f"subfamilies must be a family, a list or a dict of families; got {given!r}."
            )
    if not named:
        raise ValueError("subfamilies must hold at least one; got none.")
    found = [_read(whole, name, one) for name, one in named]
    names = [whole.model.text, *(one.name for one in found)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"subfamilies must have names of their own; got {twice[0]} twice. "
            "Hand over a dict by names that you choose."
        )
    return found


def _read(whole: Question, name: str | None, given: Any) -> Subfamily:
    if isinstance(given, list | tuple | range):
        return _of_columns(whole, name, list(given))
    if not (isinstance(given, str) or callable(given)):
        raise TypeError(
            "each subfamily must be a text, a class, a callable or a list of columns; "
            f"got {given!r}."
        )
    model = read_family(given, whole.draws, whole.model.design)
    found = Subfamily(name or model.text, model, whole)
    _refuse_unlike(found)
    return found


def _refuse_unlike(found: Subfamily) -> None:
    """Refuse laws over other events than those of the whole family, or of other batches."""
    whole, model = found.question, found.model
    law, other = model.law(probe(whole.draws, model.names)), whole.model.law(whole.few)
    shape, batch = law.batch_shape[1:], other.batch_shape[1:]
    # A text speaks of each member of a batch by itself; a callable says what they share.
    short = model.events is not None and len(shape) <= len(batch)
    fits = shape == batch or (
        short and all(n in (1, m) for n, m in zip(shape, batch, strict=False))
    )
    if _counts(law) != _counts(other):
        raise ValueError(
            f"subfamily {found.name} must make laws as {whole.model.text} does: one of them has "
            "a density and the other counts."
        )
    if law.event_shape != other.event_shape or not fits:
        raise ValueError(
            f"subfamily {found.name} must make laws as {whole.model.text} does, of a batch "
            f"{list(batch)} and events {list(other.event_shape)}; got {list(shape)} and "
            f"{list(law.event_shape)}."
        )


def _counts(law: Distribution) -> bool:
    support = support_of(law)
    return support is not None and support.is_discrete


def _of_columns(whole: Question, name: str | None, columns: list) -> Subfamily:
    """The same regression, with zeros for the coefficients of all other columns."""
    model, settings = whole.model, whole.model.settings or {}
    coefficients = settings.get("coefficients")
    regression = model.kind is not None and issubclass(model.kind, Regression)
    if not (regression and isinstance(coefficients, str | Stack)):
        raise ValueError(
            f"a list of columns, {columns!r}, needs a regression by its name, such as "
            f"'logistic-regression(coefficients=beta)', and its design=; got {model.text}."
        )
    parts = coefficients if isinstance(coefficients, Stack) else Stack([coefficients])
    kept = _kept(columns, settings["design"].shape[1], model.columns, parts)
    places, first = {}, 0
    for part in parts:
        size = (
            whole.draws.shape(part)[-1] if isinstance(part, str) and _is_vector(model, part) else 1
        )
        own = [i - first for i in kept if first <= i < first + size]
        first += size
        if isinstance(part, str):
            places[part] = torch.eye(size, dtype=torch.float64)[own]
    return _shorter(whole, name or f"columns {', '.join(map(str, columns))}", places)


def _is_vector(model: Model, name: str) -> bool:
    return bool((model.events or {}).get(name, 0))


def _shorter(whole: Question, name: str, places: Mapping[str, Tensor]) -> Subfamily:
    """The model with only some numbers of some variables, and zeros for the others."""
    model, shorter = whole.model, {k: whole.draws[k] for k in whole.model.names}
    zeros = {}
    for variable, place in places.items():
        if not len(place):
            zeros[variable] = whole.shape(variable)
            del shorter[variable]
        elif _is_vector(model, variable):
            shorter[variable] = shorter[variable] @ place.T
    partial = {k: x for k, x in places.items() if k in shorter and _is_vector(model, k)}
    names = tuple(shorter)

    def make(theta: Theta) -> Distribution:
        full = {k: theta[k] @ partial[k] if k in partial else theta[k] for k in names}
        like = full[names[0]]
        # without the axis of the draws, which others have
        full |= {k: like.new_zeros(whole.draws.shape(k)) for k in zeros}
        return model.make(Theta({k: full[k] for k in model.names}))

    draws = Draws(shorter, whole.draws.weights)
    events = {k: n for k, n in (model.events or {}).items() if k in names}
    few = probe(draws, names)
    reduced = Model(name, names, make, events=events, design=model.design, few=few)
    question = replace(whole, draws=draws, model=reduced)
    return Subfamily(name, reduced, question, partial, zeros)


def _kept(columns: list, count: int, labels: tuple[str, ...], parts: Stack) -> list[int]:
    """The columns by their numbers, of those given by number or by name.

    A name is that of a column of the design, or of a variable where each column has its own.
    """
    labels = labels if len(labels) == count else tuple(map(str, range(count)))
    known = dict(enumerate(range(count))) | {label: i for i, label in enumerate(labels)}
    if len(parts) == count:
        known |= {part: i for i, part in enumerate(parts) if isinstance(part, str)}
        labels = tuple(str(part) for part in parts)
    found = [known.get(column, -1) for column in columns]
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(
            f"columns must be some of {', '.join(labels)}, each once; got {columns!r}."
        )
    return found
