"""The two base classes of divergences, sums of divergences, and logarithms safe at 0."""

import abc
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    OneHotCategorical,
)
from torch.func import grad

from rkl.checks import floats, number, short_repr
from rkl.divergences.rows import row_sum

_FAR, _END = 16.0, 600.0  # log-ratios between which a control variate is integrated
_NO_MASS = -745.0  # the logarithm of what is 0 in double precision
POLE = 0.13  # distance of a parameter from its limits within which forms without poles are used
_FACTOR = 1.5  # by which a field is changed to see whether it is a slope
NEAR = 0.02  # |log p/q| below which an excess is summed by its series


class Divergence(abc.ABC):
    r"""A divergence D(p ‖ q) = Σ F(p, q) over atoms, once its coefficients are held.

    To write one, make a frozen dataclass with

    - ``integrand``, the term F of one atom, from log p and log q;
    - ``__post_init__``, which refuses parameters out of range.

    If F depends on whole distributions, add some of

    - ``held``: coefficients without a gradient, and ``search`` if they need more than
      tensor operations of fixed shape;
    - ``statistics``: coefficients with a gradient, such as a normaliser that depends on q;
    - ``outer``: D as a function of the sum over atoms, such as its logarithm;
    - ``varying``: fields that change from step to step, given to ``held`` as tensors;
    - ``takes_labels``: whether the coefficients depend on the true token;
    - ``increasing_in``: the f-divergences of which it is an increasing function, if it is one;
    - ``reduces_rows``: True if they take sums over atoms only by :func:`rkl.row_sum` and its kin:
      processes may then share the vocabulary.

    Then test it by :func:`rkl.testing.check_divergence`. Every estimator, the trainer, the
    command line and the documentation find it by its name in kebab case, or by an alias.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    # Fields that reach held as tensors: compiled code is the same for all their values.
    varying: ClassVar[tuple[str, ...]] = ()
    takes_labels: ClassVar[bool] = False
    # The reason why the top k of p are not enough; empty where they are.
    needs_every_atom: ClassVar[str] = ""
    # True if coefficients look at atoms one by one, or by row_sum, row_logsumexp and row_max.
    reduces_rows: ClassVar[bool] = False

    @property
    def needs_whole_rows(self) -> str:
        """The reason why no process may have a part of the vocabulary alone; empty if one may.

        A method that overrides one of these looks at rows in a way that only its author knows, and
        a declaration above it says nothing of it.
        """
        if self.takes_labels:
            return "it looks at the true token, which lies in one of the parts"
        classes = type(self).mro()
        declared = next(i for i, cls in enumerate(classes) if "reduces_rows" in vars(cls))
        for name in _OF_ROWS:
            written = next(i for i, cls in enumerate(classes) if name in vars(cls))
            if classes[written] in _BASES:
                continue
            if not type(self).reduces_rows or written < declared:
                return (
                    f"its {name} may look at the whole row, such as to sort it; with "
                    "reduces_rows = True its class says that all it takes of a row are row_sum, "
                    "row_logsumexp and row_max"
                )
        return ""

    @property
    def increasing_in(self) -> "tuple[FDivergence, ...]":
        """F-divergences of which this is an increasing function, so that merging atoms lowers it.

        Over the top k of p and the rest as one atom it is then a lower bound. Empty where it is
        no such function.
        """
        return ()

    def search(self, logits: Float[Tensor, "*batch atoms"]) -> tuple:
        """Inputs of ``held`` that no compiler can trace, such as the end of the head of p.

        The logits are those of p, and need not be normalised.
        """
        return ()

    def held_inputs(
        self,
        logits: Float[Tensor, "*batch atoms"],
        labels: Int[Tensor, "*batch"] | None = None,
    ) -> tuple:
        """Inputs of ``held`` beside log p and log q, in this order.

        The ``varying`` fields as tensors without axes, what ``search`` returned, and the labels
        where the divergence takes them.

        Raises:
            ValueError: It takes labels, and there are none.
        """
        values = (logits.new_full((), getattr(self, name)) for name in self.varying)
        inputs = (*values, *self.search(logits))
        if not self.takes_labels:
            return inputs
        if labels is None:
            raise ValueError(f"labels must be given: {self} looks at the true token; got None.")
        return (*inputs, labels)

    def held(
        self, logp: Float[Tensor, "*batch atoms"], logq: Float[Tensor, "*batch atoms"], *inputs
    ) -> tuple:
        """The coefficients, [*batch, 1], [*batch, atoms] or [] each; constant to autograd.

        ``inputs`` are those of :meth:`held_inputs`.
        """
        return ()

    def statistics(
        self, logp: Float[Tensor, "*batch atoms"], logq: Float[Tensor, "*batch atoms"], *held
    ) -> tuple:
        """Coefficients with a gradient, shaped as those of ``held``, which they follow in F."""
        return ()

    @abc.abstractmethod
    def integrand(
        self, logp: Float[Tensor, "*shape"], logq: Float[Tensor, "*shape"], *coefficients
    ) -> Float[Tensor, "*shape"]:
        """F(p, q), elementwise. An atom with p = q = 0 contributes 0."""

    def outer(self, total: Float[Tensor, "*batch 1"], *coefficients) -> Float[Tensor, "*batch 1"]:
        """D as a function of Σ F; by default the sum itself."""
        return total

    def value(
        self, logp: Float[Tensor, "*batch atoms"], logq: Float[Tensor, "*batch atoms"], *held
    ) -> Float[Tensor, "*batch"]:
        """D(p ‖ q) in nats, where the coefficients without a gradient are known."""
        coefficients = (*held, *self.statistics(logp, logq, *held))
        total = row_sum(self.excess(logp, logq, *coefficients))
        return self.outer(total, *coefficients).squeeze(-1)

    def by_atom(
        self, logp: Float[Tensor, "*batch atoms"], logq: Float[Tensor, "*batch atoms"], *held
    ) -> Float[Tensor, "*batch atoms"]:
        """The share of each atom in D, in nats; those of an outer function in proportion to F."""
        coefficients = (*held, *self.statistics(logp, logq, *held))
        parts = self.excess(logp, logq, *coefficients)
        if type(self).outer is Divergence.outer:
            return parts
        total = row_sum(parts)
        factor = self.outer(total, *coefficients) / total
        return (parts * factor).masked_fill(parts == 0, 0.0)

    def template(self) -> "Divergence":
        """The same with its ``varying`` fields at their defaults: the form that is compiled."""
        if not self.varying:
            return self
        changing: Any = self
        fields = {field.name: field.default for field in dataclasses.fields(changing)}
        return dataclasses.replace(changing, **{name: fields[name] for name in self.varying})

    def __call__(
        self,
        logp: Float[Tensor, "*batch atoms"],
        logq: Float[Tensor, "*batch atoms"],
        labels: Int[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """D(p ‖ q) in nats, exactly, from normalised log-probabilities.

        It is computed, and returned, in single precision or better.

        Args:
            logp: Log-probabilities of the target.
            logq: Log-probabilities of the model.
            labels: The true token of each row, for a divergence that takes labels.

        Raises:
            TypeError: They are no tensors of floating-point numbers.
            ValueError: They are not over the same atoms, or labels are missing.
        """
        floats("logp", logp)
        floats("logq", logq)
        if logp.shape != logq.shape or 0 in logp.shape[-1:] or not logp.ndim:
            raise ValueError(
                "logp and logq must be [*batch, atoms], alike and not without atoms; "
                f"got {list(logp.shape)} and {list(logq.shape)}."
            )
        # In half precision the terms of close distributions would be lost in their rounding.
        logp, logq = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logp, logq))
        with torch.no_grad():
            held = self.held(logp, logq, *self.held_inputs(logp, labels))
        return self.value(logp, logq, *held)

    def excess(
        self, logp: Float[Tensor, "*shape"], logq: Float[Tensor, "*shape"], *coefficients
    ) -> Float[Tensor, "*shape"]:
        """F(p, q) in the form to sum over atoms; F itself where no better one is known."""
        return self.integrand(logp, logq, *coefficients)

    def between(self, p: Distribution, q: Distribution) -> Float[Tensor, "*batch"]:
        """D(p ‖ q) in nats between two distributions of torch, where a closed form is known.

        Between two of Bernoulli, Categorical or OneHotCategorical every divergence has one: the
        sum over their atoms.

        Raises:
            NotImplementedError: There is none; the message names an alternative.
            TypeError: One of them is no distribution.
            ValueError: They do not match: other events, or batches that do not broadcast.

        >>> from rkl import TotalVariation
        >>> TotalVariation().between(Bernoulli(probs=0.5), Bernoulli(probs=0.9))
        tensor(0.4000)
        """
        check_distributions(p, q)
        logp, logq = atoms(p), atoms(q)
        if logp is None or logq is None:
            raise NotImplementedError(
                f"{self} has no closed form between {type(p).__name__} and {type(q).__name__}; "
                "draw samples from one of them and use rkl.monte_carlo."
            )
        return self(*torch.broadcast_tensors(logp, logq))

    @functools.cached_property
    def symmetric(self) -> bool:
        """True if D(p ‖ q) = D(q ‖ p), to rounding, over a few hundred pairs."""
        logp, logq = _examples()
        labels = torch.zeros(len(logp), dtype=torch.long)
        there, back = self(logp, logq, labels), self(logq, logp, labels)
        return torch.allclose(there, back, rtol=1e-8, atol=1e-12)

    @functools.cached_property
    def bounded(self) -> bool:
        """True if D is finite between distributions that share no atom."""
        logp = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
        labels = torch.zeros(1, dtype=torch.long)
        return bool(self(logp, logp.flip(-1), labels).isfinite())

    def __rmul__(self, weight: float) -> "Divergence":
        number("the weight", weight, above=0, what=f" in {short_repr(weight)} * {self}")
        return combine(*((weight * w, term) for w, term in weighted_terms(self)))

    def __add__(self, other: "Divergence") -> "Divergence":
        if not isinstance(other, Divergence):
            return NotImplemented
        return combine(*weighted_terms(self), *weighted_terms(other))


class FDivergence(Divergence):
    r"""A divergence D(p ‖ q) = Σ q f(p/q), with f convex and f(1) = 0.

    A subclass writes the integrand F(p, q) = q f(p/q) rather than f itself. It promises
    that F is convex and homogeneous, F(cp, cq) = c F(p, q), and that nothing is held. So
    the one formula serves a sum over atoms, Σ F(p, q), samples from q, E_q[F(p/q, 1)],
    and samples from p, E_p[F(1, q/p)].
    """

    def terms_q(self, log_ratio: Float[Tensor, " samples"]) -> Float[Tensor, " samples"]:
        """F(r, 1) − F(1, 0) (r − 1) at samples of q, from log r = log p/q in float64.

        The second part is left out where F(1, 0) is infinite. Both may exceed the floating-point
        range and their difference not: override this with the difference in closed form.
        """
        return _terms_with_control(self.integrand, log_ratio, self.unseen[0])

    def terms_p(self, log_ratio: Float[Tensor, " samples"]) -> Float[Tensor, " samples"]:
        """F(1, u) − F(0, 1) (u − 1) at samples of p, from log u = log q/p in float64.

        As :meth:`terms_q`, with p and q exchanged.
        """

        def mirror(logq, logp):
            return self.integrand(logp, logq)

        return _terms_with_control(mirror, log_ratio, self.unseen[1])

    @functools.cached_property
    def unseen(self) -> tuple[float, float]:
        """F(1, 0) and F(0, 1), the price of mass that the other excludes; may be infinite."""
        one = torch.zeros(1, dtype=torch.float64)
        none = torch.full_like(one, -math.inf)
        return self.integrand(one, none).item(), self.integrand(none, one).item()

    @property
    def increasing_in(self):
        return (self,)

    def excess(self, logp, logq):
        """F(p, q) − c (p − q), F over its tangent plane at p = q: at least 0.

        Between distributions it sums to what F does, yet loses no digits where p ≈ q.
        """
        c, *series = self.taylor
        far = self.integrand(logp, logq)
        if c:
            far = far - c * (logp.exp() - logq.exp())
        return near_or_far(logp, logq, far, series)

    @functools.cached_property
    def taylor(self) -> tuple[float, ...]:
        """The slope c of F at p = q, and the series of the excess over q in log p/q."""
        return expansion(self.integrand, degree=1.0)

    @functools.cached_property
    def amari_orders(self) -> tuple[tuple[float, float], ...] | None:
        """The weights and orders of one or two Amari divergences of which this is the sum.

        Of order 1 is KL, of order 0 reverse KL; None where it is no such sum. With t = log p/q,
        F'' − F' = q Σ w exp(α t), whose derivatives at p = q give w and α by Prony's method.
        """
        _, *series = self.taylor
        if not series or not series[0] > 0:
            return None
        a, b, c, d = (math.factorial(n) * x for n, x in enumerate(series, start=2))
        orders = _exponentials(a, b - a, c - b, d - c)
        t = 2.0 ** torch.arange(-1, 10, dtype=torch.float64)  # also far out, where halves end
        t = torch.cat([-t, t])
        excess = self.integrand(t, torch.zeros_like(t)) - self.taylor[0] * t.expm1()
        expected = sum(w * _amari_excess(t, alpha) for w, alpha in orders)
        alike = bool(orders) and torch.allclose(
            torch.as_tensor(expected), excess, rtol=1e-8, atol=1e-10
        )
        return orders if alike else None

    @functools.cached_property
    def slope_field(self) -> str | None:
        """The field that is a slope λ of the precision-recall curve, up to a factor.

        With c times the field, F is that of (c p, q), but for multiples of F, p and q.
        """
        if self.scale_free:
            return None
        for name, value in vars(self).items():
            if isinstance(value, float | int) and not isinstance(value, bool) and value > 0:
                with contextlib.suppress(ValueError, TypeError):
                    changing: Any = self
                    other = dataclasses.replace(changing, **{name: _FACTOR * value})
                    if self._is_rescaled(other):
                        return name
        return None

    def _is_rescaled(self, other: "FDivergence") -> bool:
        logp, logq = _along(60)
        scaled = self.integrand(logp + math.log(_FACTOR), logq)
        return _is_affine_in(other.integrand(logp, logq), scaled, logp, logq)

    @property
    def slope(self) -> float | None:
        """The value of :attr:`slope_field`."""
        return None if self.slope_field is None else float(getattr(self, self.slope_field))

    @functools.cached_property
    def scale_free(self) -> bool:
        """True if an unknown constant in log p does not change the minimiser over q.

        This holds where F(cp, q) is a positive multiple of F(p, q) plus multiples of p and q:
        for both KLs and every Amari divergence.
        """
        logp, logq = _along(4)
        f = self.integrand(logp, logq)
        return _is_affine_in(self.integrand(logp + 1, logq), f, logp, logq)


def _along(reach: float) -> tuple[Tensor, Tensor]:
    """Masses whose log-ratio goes evenly from −reach to reach, and whose product is 1."""
    t = torch.linspace(-reach, reach, 401, dtype=torch.float64)
    return t / 2, -t / 2


def _is_affine_in(target: Tensor, f: Tensor, logp: Tensor, logq: Tensor) -> bool:
    """True if the target is a positive multiple of f plus multiples of p and q."""
    scale = logp.exp() + logq.exp()
    basis = torch.stack([f, logp.exp(), logq.exp()], -1) / scale[:, None]
    target = target / scale
    fit = torch.linalg.lstsq(basis, target, driver="gelsd").solution
    worst = (basis @ fit - target).abs().max()
    return bool(fit[0] > 0 and worst < 1e-8 * target.abs().max())


def _exponentials(*moments: float) -> tuple[tuple[float, float], ...]:
    """Weights w and exponents α of one or two terms whose Σ w αⁿ are these; rounded."""
    a, b, c, d = moments
    determinant = a * c - b * b
    if abs(determinant) < 1e-9 * (abs(a * c) + b * b + a * a):
        roots = [b / a]
    else:
        constant, linear = (b * d - c * c) / determinant, (b * c - a * d) / determinant
        square = linear * linear - 4 * constant
        if square < 0:
            return ()
        roots = [(-linear + sign * math.sqrt(square)) / 2 for sign in (1, -1)]
    if len(roots) == 1:
        weights = [a]
    else:
        first = (b - a * roots[1]) / (roots[0] - roots[1])
        weights = [first, a - first]
    terms = zip(weights, roots, strict=True)
    return tuple((float(f"{w:.10g}"), round(alpha, 9) + 0.0) for w, alpha in terms)


def _amari_excess(t: Tensor, alpha: float) -> Tensor:
    if alpha == 0:
        return t.expm1() - t
    if alpha == 1:
        return t * t.exp() - t.expm1()
    return ((alpha * t).expm1() - alpha * t.expm1()) / (alpha * (alpha - 1))


@dataclass(frozen=True, repr=False)
class _Combination(Divergence):
    """Σ wᵢ Dᵢ, flat: what 0.3 * KL() + 0.7 * AKL() makes."""

    terms: tuple[tuple[float, Divergence], ...]

    def __post_init__(self):
        for weight, term in self.terms:
            number("the weight", weight, above=0, what=f" in {weight} * {term}")

    def __repr__(self):
        return " + ".join(f"{term}" if w == 1 else f"{w} * {term}" for w, term in self.terms)

    @property
    def takes_labels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(term.takes_labels for _, term in self.terms)

    @property
    def needs_every_atom(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return next(filter(None, (term.needs_every_atom for _, term in self.terms)), "")

    @property
    def increasing_in(self):
        parts = [term.increasing_in for _, term in self.terms]
        return tuple(itertools.chain(*parts)) if all(parts) else ()

    @property
    def needs_whole_rows(self) -> str:
        reasons = ((term, term.needs_whole_rows) for _, term in self.terms)
        return next((f"of {term}, {reason}" for term, reason in reasons if reason), "")

    def held_inputs(self, logits, labels=None):
        return tuple(term.held_inputs(logits, labels) for _, term in self.terms)

    def held(self, logp, logq, *inputs):
        pairs = zip(self.terms, inputs or self.held_inputs(logp), strict=True)
        return tuple(term.held(logp, logq, *given) for (_, term), given in pairs)

    def integrand(self, logp, logq, *held):
        terms = self._with(logp, logq, held)
        return _sum(w * term.integrand(logp, logq, *given) for w, term, given in terms)

    def excess(self, logp, logq, *held):
        terms = self._with(logp, logq, held)
        return _sum(w * term.excess(logp, logq, *given) for w, term, given in terms)

    def value(self, logp, logq, *held):
        pairs = zip(self.terms, held, strict=True)
        return _sum(w * term.value(logp, logq, *given) for (w, term), given in pairs)

    def by_atom(self, logp, logq, *held):
        pairs = zip(self.terms, held, strict=True)
        return _sum(w * term.by_atom(logp, logq, *given) for (w, term), given in pairs)

    def template(self):
        return type(self)(tuple((w, term.template()) for w, term in self.terms))

    def between(self, p, q):
        return _sum(w * term.between(p, q) for w, term in self.terms)

    def _with(self, logp, logq, held):
        held = held or ((),) * len(self.terms)
        return [
            (w, term, (*given, *term.statistics(logp, logq, *given)))
            for (w, term), given in zip(self.terms, held, strict=True)
        ]


class _FCombination(_Combination, FDivergence):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Σ wᵢ Dᵢ of f-divergences, which is one."""

    @property
    def amari_orders(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        parts = [(w, _as_f(term).amari_orders) for w, term in self.terms]
        if any(orders is None for _, orders in parts):
            return None
        return tuple((w * v, alpha) for w, orders in parts for v, alpha in orders or ())

    def held_inputs(self, logits, labels=None):
        return ()

    def held(self, logp, logq, *inputs):
        return ()

    def value(self, logp, logq, *held):
        return row_sum(self.excess(logp, logq)).squeeze(-1)

    def by_atom(self, logp, logq, *held):
        return self.excess(logp, logq)

    def terms_q(self, log_ratio):
        return self._terms(log_ratio, 0)

    def terms_p(self, log_ratio):
        return self._terms(log_ratio, 1)

    def _terms(self, log_ratio, side):
        controlled = math.isfinite(self.unseen[side])

        def total(x):
            return _sum(w * _one_sided(term, x, side, controlled) for w, term in self.terms)

        # Terms that overflow with opposite signs have no sum: the one that wins 40 nats from
        # agreement, where all are finite, wins further out too.
        undecided = total(log_ratio.detach()).isnan() & ~log_ratio.isnan()
        winner = total(log_ratio.detach().clamp(-40.0, 40.0)).sign() * log_ratio.detach().sign()
        decided = torch.where(undecided, log_ratio, 1.0) * torch.where(
            undecided, math.inf * winner, 1.0
        )
        return torch.where(undecided, decided, total(torch.where(undecided, 1.0, log_ratio)))


_OF_ROWS = "held_inputs", "search", "held", "statistics", "value", "by_atom"
_BASES = Divergence, FDivergence, _Combination, _FCombination


def _as_f(term: Any) -> FDivergence:
    return term


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def weighted_terms(divergence: Divergence) -> tuple[tuple[float, Divergence], ...]:
    """The weights wᵢ and divergences Dᵢ of a sum; one of weight 1 for what is none."""
    return divergence.terms if isinstance(divergence, _Combination) else ((1.0, divergence),)


def combine(*terms: tuple[float, Divergence]) -> Divergence:
    """Σ wᵢ Dᵢ: an f-divergence where every Dᵢ is one."""
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    every_f = all(isinstance(term, FDivergence) for _, term in terms)
    return (_FCombination if every_f else _Combination)(terms)


def check_distributions(p: Distribution, q: Distribution) -> None:
    """Refuse anything but two distributions of torch over the same events.

    Raises:
        TypeError: One of them is no distribution.
        ValueError: Their events, or their batches, do not match.
    """
    for name, distribution in (("p", p), ("q", q)):
        if not isinstance(distribution, Distribution):
            raise TypeError(
                f"{name} must be a distribution of torch; got a {type(distribution).__name__}."
            )
    logp, logq = atoms(p), atoms(q)
    if logp is not None and logq is not None and logp.shape[-1] != logq.shape[-1]:
        raise ValueError(f"p has {logp.shape[-1]} atoms but q has {logq.shape[-1]}.")
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"p has events of shape {list(p.event_shape)} but q of {list(q.event_shape)}."
        )
    try:
        broadcast_shape(p.batch_shape, q.batch_shape)
    except RuntimeError:
        raise ValueError(
            f"p has the batch shape {list(p.batch_shape)} and q {list(q.batch_shape)}, "
            "which do not broadcast."
        ) from None


def occurs(case: Callable[[], Tensor]) -> bool:
    """True if a case occurs at any atom, so that extra passes are needed.

    Tested only where that is cheap: compiled, the passes are fused and cost nothing.
    """
    return torch.compiler.is_compiling() or bool(case().any())


def vanishes(logp: Float[Tensor, "*shape"]) -> bool:
    """True if a mass may be 0 in this dtype or is nan, and while compiling."""
    smallest = math.log(torch.finfo(logp.dtype).tiny)
    return logp.numel() > 0 and occurs(lambda: ~(logp.amin() > smallest))


def log_ratio(
    loga: Float[Tensor, "*shape"], logb: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """log(a/b), and −∞ where a = b = 0, silent in value and in gradient."""
    return loga - logb.masked_fill((loga == -math.inf) & (logb == -math.inf), 0.0)


def relative_entropy(
    loga: Float[Tensor, "*shape"], logb: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """A log(a/b), with 0 log(0/b) = 0 in value and in gradient, whatever the mask that says 0."""
    mass, ratio = loga.exp(), loga - logb
    return mass * (ratio.masked_fill(mass == 0, 0.0) if vanishes(loga) else ratio)


def power(
    logp: Float[Tensor, "*shape"], logq: Float[Tensor, "*shape"], a: float, b: float
) -> Float[Tensor, "*shape"]:
    """p^a q^b, and 0 where p = q = 0, silent in value and in gradient.

    The exponent knows masses that underflow. So p = q = 0 is taken to hold where neither has a
    mass in this dtype, and one of them none in double precision either: it is a mask.
    """
    low = torch.minimum(logp, logq)
    if not vanishes(low):
        return (a * logp + b * logq).exp()
    smallest = math.log(torch.finfo(low.dtype).smallest_normal * torch.finfo(low.dtype).eps)
    nowhere = (low < _NO_MASS) & (torch.maximum(logp, logq) < smallest)
    exponent = a * logp.masked_fill(nowhere, 0.0) + b * logq.masked_fill(nowhere, 0.0)
    return exponent.exp().masked_fill(nowhere, 0.0)


def power_excess(
    logp: Float[Tensor, "*shape"], logq: Float[Tensor, "*shape"], a: float, b: float
) -> Float[Tensor, "*shape"]:
    """(a p^d + b q^d − d p^a q^b)/(abd) with d = a + b, for any of a, b and d near 0.

    It is q^d t² times the divided difference of exp at 0, at and dt, with t = log p/q: summed
    as a series where these are small, and elsewhere in the form whose small divisor divides
    what is as small.
    """
    d, t = a + b, log_ratio(logp, logq)
    reach = 1.5 / max(abs(a), abs(b), d)
    of_p, of_q, mixed = (d * logp).exp(), (d * logq).exp(), power(logp, logq, a, b)

    def gap(high, low, exponent):  # high − low, where high = low exp(exponent t)
        inner = (exponent * t).clamp(-1.0, 1.0)
        return torch.where((exponent * t).abs() < 1, low * inner.expm1(), high - low)

    if d < min(abs(a), abs(b)):
        far = (gap(of_p, of_q, d) / d - gap(mixed, of_q, a) / a) / b
    elif abs(a) <= abs(b):
        far = (of_p - of_q) / (b * d) - gap(mixed, of_q, a) / (a * b)
    else:
        far = (of_q - of_p) / (a * d) - gap(mixed, of_p, -b) / (a * b)
    inner = t.clamp(-reach, reach)
    series = torch.zeros_like(inner)
    for coefficient in reversed(_divided_differences(a, d)):
        series = coefficient + inner * series
    return torch.where(t.abs() < reach, of_q * inner.square() * series, far)


def _divided_differences(a: float, d: float) -> list[float]:
    """Coefficients in t of that of exp, over t²: Σ aⁱ dʲ over i + j = n, by (n + 2)!"""
    return [
        sum(a**i * d ** (n - i) for i in range(n + 1)) / math.factorial(n + 2) for n in range(20)
    ]


def log_mixture(
    logp: Float[Tensor, "*shape"], logq: Float[Tensor, "*shape"], weight: float
) -> Float[Tensor, "*shape"]:
    """log(w p + (1 − w) q), finite where p = q = 0, silent in value and in gradient."""
    m = weight * logp.exp() + (1 - weight) * logq.exp()
    # Only where both masses underflow is this not the logarithm, and there they add nothing.
    return m.clamp_min(torch.finfo(m.dtype).tiny).log()


def exp_less_1(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(x) − 1, all of whose digits are right, and those of its derivative."""
    return torch.where(x < -1, x.clamp_max(0.0).exp() - 1, x.clamp_min(-1.0).expm1())


def slope_from_terms(divergence: FDivergence, x: Tensor, *, in_p: bool) -> Tensor:
    """∂F/∂q at p = eˣ and q = 1, or ∂F/∂p at q = eˣ and p = 1, in the dtype of x.

    With F = g(eˣ) it is g − g'(x), for F is homogeneous.
    """
    terms, unseen = _side(divergence, in_p)
    wide = x.to(widest(x))
    value, slope = terms(wide), grad(lambda at: terms(at).sum())(wide)
    finite = value.isfinite()
    slopes = torch.where(finite, value, 0.0) - torch.where(finite, slope, 0.0)
    if math.isfinite(unseen):
        slopes = slopes - unseen
    # F is convex: where g has overflown, its tangent lies above or below everything.
    beyond = torch.where(wide > 0, -math.inf, math.inf)
    return torch.where(finite, slopes, beyond).to(x.dtype)


def widest(x: Tensor) -> torch.dtype:
    """Double precision, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _side(divergence: FDivergence, from_p: bool) -> tuple[Callable, float]:
    terms = divergence.terms_p if from_p else divergence.terms_q
    return terms, divergence.unseen[from_p]


def _one_sided(divergence: Any, x: Tensor, side: int, controlled: bool) -> Tensor:
    """The terms of one summand, with the unseen mass put back if the sum has no control."""
    terms, unseen = _side(divergence, bool(side))
    if controlled or not math.isfinite(unseen) or unseen == 0:
        return terms(x)
    return terms(x) + unseen * exp_less_1(x)


def _terms_with_control(integrand: Callable, x: Tensor, unseen: float) -> Tensor:
    """F(eˣ, 1) − c (eˣ − 1) of any homogeneous integrand, c being F(1, 0) or, if infinite, 0.

    Far out the two cancel. There it is c + ∫ exp(−y) k(x + y) dy over y > 0, with k = ∂F/∂q
    at p/q = exp(x + y), as two integrations by parts show; beyond the range of exponentials,
    the straight line that this ends in.
    """
    if unseen == 0 or not math.isfinite(unseen):
        return integrand(x, torch.zeros_like(x))
    near = x.clamp_max(_FAR)
    direct = integrand(near, torch.zeros_like(x)) - unseen * exp_less_1(near)
    far = _far_terms(integrand, x.clamp(_FAR, _END), unseen)
    end = x.new_tensor([_END, _END - 1])
    last, before = _far_terms(integrand, end, unseen)
    straight = last + (x.clamp_min(_END) - _END) * (last - before)
    return torch.where(x < _FAR, direct, torch.where(x < _END, far, straight))


def _far_terms(integrand: Callable, x: Tensor, unseen: float) -> Tensor:
    nodes, weights = (x.new_tensor(it) for it in _laguerre())
    at = x[..., None] + nodes
    slope = grad(lambda log1: integrand(at, log1).sum())(torch.zeros_like(at))
    return unseen + slope @ weights


@functools.cache
def _laguerre() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.laguerre.laggauss(24)
    return nodes.tolist(), weights.tolist()


def near_or_far(
    logp: Float[Tensor, "*shape"],
    logq: Float[Tensor, "*shape"],
    far: Float[Tensor, "*shape"],
    series: Sequence[float | Float[Tensor, "*rows 1"]],
    degree: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """``far``, and q^degree times the series in log p/q where that is small.

    Its coefficients may differ from row to row.

    Uncompiled, the series is summed only at the atoms that need it, if they are few.
    """
    if not series:
        return far
    small = (logp - logq).abs() < NEAR  # not so where p = q = 0, and the ratio is no number
    if torch.compiler.is_compiling() or not small.ndim:
        return torch.where(small, _near(logp, logq, small, series, degree), far)
    places = small.nonzero(as_tuple=True)
    if 8 * len(places[0]) > small.numel():
        return torch.where(small, _near(logp, logq, small, series, degree), far)
    series = [x[places[:-1]].squeeze(-1) if isinstance(x, Tensor) else x for x in series]
    return far.index_put(places, _near(logp[places], logq[places], None, series, degree))


def _near(logp, logq, small, series, degree):
    t = logp - logq
    t = t if small is None else torch.where(small, t, 0.0)
    close = functools.reduce(lambda total, coefficient: coefficient + t * total, series[::-1])
    scale = logq if degree == 1 else degree * logq
    return scale.exp() * (t.square() * close)


def expansion(integrand, degree: float) -> tuple[float, ...]:
    """The slope of F at p = q, and the series of its excess over q^degree in log p/q.

    F must be homogeneous of that degree; for degree 1 the slope is c, and the excess is F
    less c (p − q). The series, of the powers 2 to 5, is left out where it misses F, as it
    does for a divergence with a kink.
    """

    def along(t):  # F / q^degree, for F is homogeneous
        return integrand(t, torch.zeros_like(t))

    slopes = []
    # By autograd: torch.func imports the compiler, which takes seconds.
    with torch.inference_mode(False), torch.enable_grad():
        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        slope = along(zero)
        for _ in range(5):
            if slope.requires_grad:
                (slope,) = torch.autograd.grad(
                    slope, zero, create_graph=True, materialize_grads=True
                )
            else:  # the one before was constant
                slope = torch.zeros_like(zero)
            slopes.append(slope.item())
    c, *higher = slopes
    c = c if degree == 1 else 0.0
    series = [(x - c) / math.factorial(n) for n, x in enumerate(higher, start=2)]
    t = torch.tensor([-NEAR, -NEAR / 4, NEAR / 4, NEAR], dtype=torch.float64)
    powers = torch.stack([t**n for n in range(2, 6)], -1)
    fitted = powers @ torch.tensor(series, dtype=t.dtype)
    smooth = torch.allclose(fitted, along(t) - c * t.expm1(), rtol=1e-4)
    return (c, *series) if smooth else (c,)


def atoms(distribution: Distribution) -> Tensor | None:
    """Log-probabilities of a distribution of finite support."""
    if isinstance(distribution, OneHotCategorical):
        distribution = distribution._categorical  # which has what it was made of
    if isinstance(distribution, Categorical):
        by_probs = _made_of_probs(distribution)
        return distribution.probs.log() if by_probs else distribution.logits
    return coin(distribution) if isinstance(distribution, Bernoulli) else None


def coin(distribution: Bernoulli | Binomial | Geometric) -> Float[Tensor, "*batch 2"]:
    """The log-probabilities of success and failure, −∞ at probabilities of 0."""
    if _made_of_probs(distribution):
        return torch.stack([distribution.probs.log(), torch.log1p(-distribution.probs)], -1)
    return torch.nn.functional.logsigmoid(
        torch.stack([distribution.logits, -distribution.logits], -1)
    )


def _made_of_probs(distribution: Distribution) -> bool:
    """True if a distribution was given its probabilities; torch clamps those that it computes."""
    return next(name for name in vars(distribution) if name in ("probs", "logits")) == "probs"


@functools.cache
def _examples() -> Float[Tensor, "2 pairs atoms"]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 200, 7, generator=generator, dtype=torch.float64)
    return (2 * logits).log_softmax(-1)


def broadcast_shape(*shapes: Sequence[int]) -> torch.Size:
    """The shape that tensors of these shapes broadcast to.

    torch.broadcast_shapes imports sympy when it is first called, which takes longer than many
    an estimate.

    >>> broadcast_shape((3, 1), (4,))
    torch.Size([3, 4])
    """
    first, *others = (tuple(shape) for shape in shapes)
    if all(shape == first for shape in others):
        return torch.Size(first)
    if torch.compiler.is_compiling():
        return torch.broadcast_shapes(*shapes)
    try:
        return torch.Size(np.broadcast_shapes(*map(tuple, shapes)))
    except ValueError:
        return torch.broadcast_shapes(*shapes)  # whose message it is
