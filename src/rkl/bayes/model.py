"""The family as it was asked for: a map from posterior draws to distributions."""

import contextlib
import difflib
import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributions
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Distribution,
    Independent,
    Laplace,
    Normal,
    StudentT,
    TransformedDistribution,
    constraints,
)
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    AffineTransform,
    IndependentTransform,
    Transform,
)

from rkl.bayes import families
from rkl.bayes.axes import insert_axes, labels_along, places_of_axes
from rkl.bayes.draws import Draws
from rkl.bayes.families import ExponentialFamily, family_of
from rkl.bayes.families.named import PoissonOrZero
from rkl.divergences import parse
from rkl.divergences.base import broadcast_shape
from rkl.importing import import_object
from rkl.names import Stack
from rkl.randomness import random_numbers
from rkl.readers import masked_numbers
from rkl.stats import resample

NOT_TORCH = ("numpy", "all be instances of number", "converted to python scalars")
LawOf = Callable[[dict[str, Tensor]], Distribution]
NUMBERS = 2**18  # log-densities computed at a time
PROBE = 16  # draws that are probed before the rest is read
PER_ROW = {"offset", "exposure", "trials"}  # known numbers of each row of a design
# Classes that no text can describe, or of which torch has neither a density nor a KL to work with.
_STRUCTURES = {
    "Distribution",
    "ExponentialFamily",
    "Independent",
    "LKJCholesky",
    "LogisticNormal",
    "MixtureSameFamily",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "TransformedDistribution",
    "Wishart",
}
_ALIASES = {
    "beta-bin": "beta-binomial",
    "binomial-regression": "logistic-regression",
    "linear-regression": "gaussian-regression",
    "chi-squared": "chi2",
    "chisquare": "chi2",
    "gaussian": "normal",
    "gpd": "generalized-pareto",
    "inv-gamma": "inverse-gamma",
    "mvn": "multivariate-normal",
    "neg-binomial": "negative-binomial",
    "neg-binomial-2": "negative-binomial2",
    "student": "student-t",
    "t": "student-t",
    "zinb": "zero-inflated-negative-binomial",
    "zip": "zero-inflated-poisson",
}
_PARAMETERS = {  # as Stan, PyMC and brms call them
    "a": ("concentration1",),
    "alpha": ("concentration1", "concentration"),
    "b": ("concentration0",),
    "beta": ("concentration0", "rate", "scale"),
    "chol": ("scale_tril",),
    "cov": ("covariance_matrix",),
    "kappa": ("concentration",),
    "lam": ("rate",),
    "lower": ("low",),
    "mu": ("loc", "mean"),
    "n": ("total_count", "trials"),
    "total_count": ("trials",),
    "nu": ("df",),
    "p": ("probs",),
    "phi": ("concentration",),
    "sd": ("scale",),
    "sigma": ("scale",),
    "upper": ("high",),
    "xi": ("concentration",),
    "hu": ("gate",),
    "zi": ("gate",),
}
_COUNTS = "Poisson", "ZeroInflatedPoisson", "HurdlePoisson"  # whose mu is their rate
# Names that other libraries give to the complement of torch's parameter.
_GATES = (
    "psi of PyMC is the share of the counts, 1 − gate, and of others that of the zeros: say "
    "gate=, the probability of an additional zero, with a function for gate = 1 − psi"
)
_AMBIGUOUS = {
    "NegativeBinomial": {
        "p": "p of Stan, PyMC and SciPy is 1 − probs of torch: give mu and phi, or a function "
        "lambda theta: NegativeBinomial(theta.n, 1 - theta.p)"
    },
    "ZeroInflatedPoisson": {"psi": _GATES},
    "ZeroInflatedNegativeBinomial": {"psi": _GATES},
    "HurdlePoisson": {"psi": _GATES},
}


class Theta(Mapping):
    """A few draws by name, [n, ...] each: theta["mu"] and theta.mu are the same."""

    def __init__(self, drawn: Mapping[str, Tensor]):
        self._drawn = drawn
        self._seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._drawn:
            raise KeyError(f"no variable is called {name!r}; there are {', '.join(self)}")
        self._seen.add(name)
        return self._drawn[name]

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._drawn)

    def __len__(self) -> int:
        return len(self._drawn)


@dataclass(frozen=True)
class Model:
    """A family of distributions, and the variables of the posterior that its members take."""

    text: str
    names: tuple[str, ...]
    make: Callable[[Theta], Distribution]
    settings: Mapping[str, Any] | None = None  # parameter of torch -> variable, or fixed value
    kind: type[Distribution] | None = None
    events: Mapping[str, int] | None = None  # variable -> its event axes, where a text names it
    design: Any = None
    few: Mapping[str, Tensor] | None = None  # draws that show what the distributions are made of
    columns: tuple[str, ...] = ()  # those of the design that have a coefficient
    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of axes, if not first

    def law(self, theta: Mapping[str, Tensor]) -> Distribution:
        """The distributions of n draws, of batch shape [n, *batch].

        Raises:
            ValueError: The family refuses them, or ignores how many they are.
            TypeError: It makes no distribution of torch.
        """
        return self.check(Theta(theta))

    def check(self, theta: Theta) -> Distribution:
        """The distributions of draws that record which variables are read."""
        rows = len(next(iter(theta._drawn.values())))
        self._check_domain(theta)
        try:
            with _validation():
                law = self.make(theta)
        except (
            AttributeError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            shapes = ", ".join(f"{k} {list(x.shape[1:])}" for k, x in theta._drawn.items())
            raise ValueError(
                f"family {self.text} cannot take {shapes}: {self._reason(error, theta)}"
            ) from error
        if not isinstance(law, Distribution):
            raise TypeError(f"family {self.text} must make a distribution of torch; got {law!r}.")
        if law.batch_shape[:1] != (rows,):
            raise ValueError(
                f"family {self.text} must make one distribution for each of {rows} draws, with "
                f"the batch shape [{rows}, ...]; got {list(law.batch_shape)}."
            )
        return law

    def _reason(self, error: Exception, theta: Theta) -> str:
        reason = str(error).partition("\n")[0]
        if any(words in reason.lower() for words in NOT_TORCH):
            return f"write it in torch, which knows slopes, not in NumPy or math ({reason})"
        if self.settings is not None and not self._fit(theta):
            return "their axes must agree, the first of one with the first of the other"
        return reason

    def _fit(self, theta: Theta) -> bool:
        """True if the axes of the variables agree, flush left, without those of events."""
        events = self.events or {}
        batches = [x.shape[: x.ndim - events.get(k, 0)] for k, x in theta._drawn.items()]
        return all(
            len({*sizes} - {1}) <= 1 for sizes in itertools.zip_longest(*batches, fillvalue=1)
        )

    def _check_domain(self, theta: Theta) -> None:
        if self.kind is None or self.settings is None:
            return
        constraints_by_name = _constraints(self.kind)
        for parameter, name in self.settings.items():
            if isinstance(name, Stack) and parameter in constraints_by_name:
                value = stack_columns(theta, name, self.events or {})
                if not bool(constraints_by_name[parameter].check(value).all()):
                    raise ValueError(
                        f"{name} must satisfy {constraints_by_name[parameter]}, as {parameter} of "
                        f"{self.kind.__name__}, in every draw."
                    )
            if not isinstance(name, str) or parameter not in constraints_by_name:
                continue
            if theta[name].ndim <= constraints_by_name[parameter].event_dim:
                raise ValueError(
                    f"{name} must have as many axes as {parameter} of {self.kind.__name__}, "
                    f"{constraints_by_name[parameter].event_dim}; got "
                    f"{list(theta[name].shape[1:])}."
                )
            inside = (
                constraints_by_name[parameter]
                .check(theta[name])
                .reshape(len(theta[name]), -1)
                .all(-1)
            )
            if not inside.all():
                value = theta[name][~inside][0].tolist()
                raise ValueError(
                    f"{name} must satisfy {constraints_by_name[parameter]}, as {parameter} of "
                    f"{self.kind.__name__}; got {value}."
                )

    def at(self, variables: Mapping[str, Tensor]) -> Distribution:
        """The distribution of single values of the variables.

        A callable expects draws; of one that cannot do without, the distribution of one draw is
        wrapped.
        """
        if self.settings is not None:
            return self.make(Theta(variables))
        return alone(
            self.law({name: x[None] for name, x in variables.items()}),
            lambda: self.make(Theta(variables)),
        )

    @functools.cached_property
    def layers(self) -> int | None:
        """The number of wrappers to take off every distribution of the family.

        The draws decide, once: a bijection that moves from draw to draw is constant in the one
        row of a candidate act, and must stay there as it stays on the draws.
        """
        if self.few is None:
            return None
        try:
            return unwrap(simplify(self.law(self.few))).layers
        except ValueError:  # a draw is at fault, and will be named where it is met
            return None

    def unwrap(self, law: Distribution) -> "Unwrapped":
        """A distribution of the family without ``Independent`` and fixed bijections."""
        return unwrap(simplify(law), self.layers)

    def bare(self, theta: Mapping[str, Tensor]) -> Distribution:
        """The base distributions of draws that are checked elsewhere."""
        return self.unwrap(self.make(Theta(theta))).base

    def base(self, theta: Mapping[str, Tensor]) -> Distribution:
        """The distributions without what leaves divergences unchanged."""
        return self.unwrap(self.law(theta)).base


class Unwrapped(NamedTuple):
    """The innermost part of a distribution, and the way back.

    Attributes:
        base: The innermost part.
        joint: How many of its batch axes make one event.
        wrap: From a base to a distribution like the one it was taken from.
        layers: How many wrappers were taken off.
    """

    base: Distribution
    joint: int
    wrap: Callable[[Distribution], Distribution]
    layers: int = 0


def unwrap(law: Distribution, layers: int | None = None) -> Unwrapped:
    """Take off Independent, and bijections that do not depend on the draw.

    Args:
        law: The distributions of many draws, [draws, *batch].
        layers: How many wrappers to take off; by default as many as ``law`` allows. Of one row
            nothing moves: give the number found on the draws.

    >>> normal = torch.distributions.Normal(torch.zeros(4, 3), 1.0)
    >>> base, joint, wrap, layers = unwrap(Independent(normal, 1))
    >>> base, joint, layers, wrap(normal)
    (Normal(loc: torch.Size([4, 3]), scale: torch.Size([4, 3])), 1, 1, Independent(Normal(loc: torch.Size([4, 3]), scale: torch.Size([4, 3])), 1))
    """  # noqa: E501
    if layers == 0 or (layers is None and family_in(law) is not None):
        return Unwrapped(law, 0, lambda base: base)
    if isinstance(law, Independent):
        inner = unwrap(law.base_dist, layers and layers - 1)
        axes, wrap = law.reinterpreted_batch_ndims, inner.wrap
        return Unwrapped(
            inner.base,
            inner.joint + axes,
            lambda base: Independent(wrap(base), axes),
            inner.layers + 1,
        )
    if isinstance(law, TransformedDistribution) and (layers is not None or _is_constant(law)):
        inner = unwrap(law.base_dist, layers and layers - 1)
        transforms, wrap = law.transforms, inner.wrap
        if layers is not None or family_in(inner.base) is not None:
            return Unwrapped(
                inner.base,
                inner.joint,
                lambda base: TransformedDistribution(wrap(base), transforms),
                inner.layers + 1,
            )
    return Unwrapped(law, 0, lambda base: base)


def family_in(law: Distribution) -> ExponentialFamily | None:
    """The exponential family of n distributions; None where no family holds them all."""
    try:
        return family_of(law)
    except ValueError:  # what would be fixed in it moves from draw to draw
        return None


def _is_constant(law: TransformedDistribution) -> bool:
    """True if the transforms are bijections, and the same for every draw."""
    if not all(transform.bijective for transform in law.transforms):
        return False
    with random_numbers(0), torch.no_grad():
        x = law.base_dist.sample()
    x = x[:1].expand(x.shape)
    for transform in law.transforms:
        x = torch.as_tensor(transform(x))
    # not bit by bit: vector instructions round otherwise than those for what is left over
    return torch.allclose(x, x[:1].expand_as(x), rtol=1e-12, atol=1e-14)


def simplify(law: Distribution) -> Distribution:
    """The same distribution, with elementwise transforms inside ``Independent`` and affine maps
    of a symmetric location-scale family absorbed, for which there are closed forms.

    >>> from torch.distributions.transforms import AffineTransform
    >>> simplify(TransformedDistribution(Normal(0.0, 1.0), [AffineTransform(3.0, -2.0)]))
    Normal(loc: 3.0, scale: 2.0)
    """
    if type(law) in _REPLACED:
        return _REPLACED[type(law)](law)
    if type(law) is Independent:
        base = simplify(law.base_dist)
        same = base is law.base_dist
        return law if same else Independent(base, law.reinterpreted_batch_ndims)
    if type(law) is not TransformedDistribution:
        return law
    base, transforms = simplify(law.base_dist), list(law.transforms)
    inner = [_elementwise(transform) for transform in transforms]
    if type(base) is Independent and None not in inner:
        axes = base.reinterpreted_batch_ndims
        moved = TransformedDistribution(base.base_dist, [x for x in inner if x is not None])
        return Independent(simplify(moved), axes)
    while transforms and type(base) in _LOCATION_SCALE and _is_affine(transforms[0]):
        base = _absorb_affine(base, transforms.pop(0))
    if base is law.base_dist:
        return law
    return TransformedDistribution(base, transforms) if transforms else base


# torch's log-densities of these are nan or -inf where there is mass.
_REPLACED: dict[type, Callable[[Any], Distribution]] = {
    torch.distributions.Kumaraswamy: lambda x: families.Kumaraswamy(
        x.concentration1, x.concentration0, validate_args=False
    ),
    torch.distributions.Weibull: lambda x: families.Weibull(
        x.scale, x.concentration, validate_args=False
    ),
}
_REPLACED[torch.distributions.MixtureSameFamily] = lambda x: (
    torch.distributions.MixtureSameFamily(
        x.mixture_distribution,
        PoissonOrZero(x.component_distribution.rate, validate_args=False),
        validate_args=False,
    )
    if type(x.component_distribution) is torch.distributions.Poisson
    else x
)
if hasattr(torch.distributions, "GeneralizedPareto"):
    _REPLACED[torch.distributions.GeneralizedPareto] = lambda x: families.GeneralizedPareto(
        x.loc, x.scale, x.concentration, validate_args=False
    )
_LOCATION_SCALE = Normal, Laplace, Cauchy, StudentT  # symmetric: a scale below 0 is one above


def _absorb_affine(base: Any, transform: Any) -> Distribution:
    parts = {key: getattr(base, key) for key in base.arg_constraints}
    parts["loc"] = transform.loc + transform.scale * base.loc
    parts["scale"] = torch.as_tensor(transform.scale).abs() * base.scale
    return type(base)(**parts, validate_args=False)


def _is_affine(transform: Transform) -> bool:
    return type(transform) is AffineTransform and transform.event_dim == 0


def _elementwise(transform: Transform) -> Transform | None:
    """The transform of single numbers that this one applies to each; None where it mixes them."""
    if isinstance(transform, IndependentTransform):
        return _elementwise(transform.base_transform)
    if type(transform) is AffineTransform:
        return AffineTransform(transform.loc, transform.scale)
    return transform if transform.domain.event_dim == transform.codomain.event_dim == 0 else None


def support_of(law: Distribution) -> Constraint | None:
    """The support of a distribution; torch gives "real" for an affine image of a half-line.

    >>> from torch.distributions.transforms import AffineTransform
    >>> half = torch.distributions.Exponential(torch.tensor(1.0))
    >>> half = TransformedDistribution(half, AffineTransform(2.0, -1.0))
    >>> half.support, support_of(half)
    (Real(), Interval(lower_bound=-inf, upper_bound=2.0))
    """
    if isinstance(law, Independent):
        inner = support_of(law.base_dist)
        axes = law.reinterpreted_batch_ndims
        return inner if inner is None or not axes else constraints.independent(inner, axes)
    if type(law) is not TransformedDistribution or law.event_shape:
        return law.support
    support = support_of(law.base_dist)
    if support is None or support.is_discrete:
        return law.support
    points = _bounds(support)
    for transform in law.transforms:
        points = [_image(transform, x) for x in points]
    low, high = torch.minimum(*points), torch.maximum(*points)
    if bool(low.isinf().all() & high.isinf().all()):
        return constraints.real
    if bool(high.isinf().all()):
        return constraints.greater_than(low)
    return constraints.interval(low, high)


def _image(transform: Transform, end: Tensor) -> Tensor:
    """The image of the end of a support under a monotone transform.

    The end of its domain goes to an end of its codomain: torch clamps what it computes there.
    """
    sides = [_bounds(transform.domain), _bounds(transform.codomain)]
    rising = torch.as_tensor(transform.sign, dtype=end.dtype) > 0
    image = torch.as_tensor(transform(end)).to(end.dtype)
    for i in range(2):
        there = torch.where(rising, sides[1][i], sides[1][1 - i])
        image = torch.where(end == sides[0][i], there, image)
    return image


def _bounds(support: Constraint) -> list[Tensor]:
    ends = (getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf))
    return [torch.as_tensor(end, dtype=torch.float64) for end in ends]


def moving_edge(law: Distribution) -> str | None:
    """The edge of the support that differs from draw to draw, or None.

    >>> moving_edge(torch.distributions.Uniform(0.0, torch.tensor([1.0, 2.0])))
    'upper_bound'
    """
    return _moving(support_of(law))


def _moving(support: Constraint | None) -> str | None:
    for name, value in ({} if support is None else vars(support)).items():
        if isinstance(value, Tensor) and value.ndim and bool((value != value[:1]).any()):
            return name.lstrip("_")
        if isinstance(value, Constraint) and (inner := _moving(value)):
            return inner
    return None


def read_family(family: Any, draws: Draws, design: Any = None) -> Model:
    """The model that a text, a class, a partial of one, or a callable stands for.

    Args:
        family: "normal(loc=mu, scale=sigma)", whose names are variables and whose numbers are
            fixed; a class, whose parameters are called as the variables are; a callable from
            theta, n draws by name, to their distributions; a callable from theta and the design.
        draws: The posterior.
        design: What the callable or the regression is told beside the draws.

    Raises:
        ValueError: It names no family, or variables that the posterior lacks.
        TypeError: It is none of these.
    """
    columns = list(design.values()) if isinstance(design, Mapping) else design
    if masked := masked_numbers(columns):
        raise ValueError(f"design must hold finite numbers: {masked}.")
    if isinstance(family, str) and ":" in family.partition("(")[0]:
        family = _import_family(family, draws, design)
    if isinstance(family, Model):
        return family
    if isinstance(family, str):
        kind, settings = _parse(family, family, _catalogue(), draws, design)
        return _model_of_class(family, kind, settings, draws, design)
    if isinstance(family, functools.partial) and _is_law(family.func) and not family.args:
        return _from_class(family.func, dict(family.keywords), draws, design)
    if _is_law(family):
        return _from_class(family, {}, draws, design)
    if callable(family):
        return _from_callable(family, draws, design)
    raise TypeError(
        "family must be a text such as 'normal(loc=mu, scale=sigma)', a class of "
        f"torch.distributions, or a callable from draws to distributions; got {family!r}."
    )


def _parse(text: str, read: str, catalogue: Mapping[str, Callable], draws: Draws, design: Any):
    names = (*draws.names, "design", *labels_of(design)) if design is not None else draws.names
    try:
        return parse(_with_torch_name(read, catalogue), catalogue, names)
    except ValueError as error:
        reason = str(error).partition(": ")[2].rstrip(".")
        if "must be a number or a string" in reason:
            reason += (
                ". A text names variables and numbers, and computes nothing: write a function, "
                "lambda theta: Normal(theta.mu, 1 / theta.sigma)"
            )
        elif not any(words in reason for words in ("is called", "must be one of", "1 − ")):
            reason += ". Write it like normal(loc=mu, scale=sigma)"
        raise ValueError(f"family {text!r} cannot be read: {reason}.") from None


def _with_torch_name(text: str, catalogue: Mapping[str, Callable]) -> str:
    name, opening, rest = text.partition("(")
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    names = {re.sub(r"[^a-z0-9]", "", k): v for k, v in _ALIASES.items()}
    names |= {re.sub(r"[^a-z0-9]", "", k): k for k in catalogue}
    torch_name = names.get(plain)
    if torch_name is None and opening and ":" not in name and plain:
        near = difflib.get_close_matches(plain, names, 1, 0.75)
        meant = f" (did you mean {names[near[0]]}?)" if near else ""
        raise ValueError(
            f"{text}: none is called {name!r}{meant}; there are {', '.join(catalogue)}"
        )
    if torch_name == "negative-binomial" and re.search(r"\b(mu|mean|phi)\s*=", rest):
        torch_name = "negative-binomial2"
    return f"{torch_name}{opening}{rest}" if torch_name in catalogue else text


def _is_law(family: Any) -> bool:
    return isinstance(family, type) and issubclass(family, Distribution)


@functools.cache
def _catalogue() -> dict[str, Callable[..., tuple[type[Distribution], dict[str, Any]]]]:
    candidates = [*vars(torch.distributions).values(), *vars(families).values()]
    return {
        re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower(): _binder(cls)
        for cls in candidates
        if _is_law(cls) and cls.__name__ not in _STRUCTURES
    }


def _binder(cls: type[Distribution]) -> Callable[..., tuple[type[Distribution], dict[str, Any]]]:
    """A maker with the signature of a class, which keeps the settings instead of calling it."""
    signature = inspect.signature(cls)
    parameters = [p for p in signature.parameters.values() if p.name != "validate_args"]
    parameter_names = {p.name for p in parameters}
    others = {
        alias: next(name for name in names if name in parameter_names)
        for alias, names in _PARAMETERS.items()
        if alias not in parameter_names and parameter_names & {*names}
    }
    if cls.__name__ in _COUNTS:
        others["mu"] = "rate"
    ambiguous = _AMBIGUOUS.get(cls.__name__, {})
    others = {alias: name for alias, name in others.items() if alias not in ambiguous}

    def bind(**settings):
        for name in settings.keys() & ambiguous.keys():
            raise ValueError(f"{cls.__name__}: {ambiguous[name]}")
        named = [others.get(name, name) for name in settings]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"{cls.__name__} is given {twice[0]} twice.")
        return cls, dict(zip(named, settings.values(), strict=True))

    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in (*others, *ambiguous)
    ]
    bind.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    bind.__name__ = cls.__name__
    return bind


def _import_family(text: str, draws: Draws, design: Any) -> Any:
    path, opening, rest = text.partition("(")
    try:
        imported = import_object(path.strip())
    except ValueError as error:
        raise ValueError(f"family {text!r}: {error}") from error
    made: Any = imported.func if isinstance(imported, functools.partial) else imported
    function = callable(made) and not isinstance(made, type | BuiltinFunctionType)
    if not (
        _is_law(imported) if opening else _is_law(made) or function or isinstance(made, Model)
    ):
        wanted = "a class of distributions"
        wanted += "" if opening else ", or a function from draws to distributions"
        raise ValueError(f"family {text!r} must name {wanted}; got {imported!r}.")
    if not opening:
        return imported
    law: Any = imported
    catalogue = {"imported": _binder(law)}
    kind, settings = _parse(text, f"imported({rest}", catalogue, draws, design)
    return _model_of_class(text, kind, settings, draws, design)


def _from_class(cls, settings: dict[str, Any], draws: Draws, design: Any) -> Model:
    parameters = inspect.signature(cls).parameters
    missing = set(parameters) - (PER_ROW if "design" in parameters else set()) - settings.keys()
    variables = {name: name for name in parameters if name in draws.names and name in missing}
    required = {
        name
        for name, p in parameters.items()
        if p.default is p.empty and name not in settings and name != "design"
    }
    if not variables or required - variables.keys():
        needs = ", ".join(sorted(required) or [n for n in parameters if n != "validate_args"])
        raise ValueError(
            f"{cls.__name__} takes {needs}, but the draws have {', '.join(draws.names)}; "
            "say which is which, as in family='normal(loc=mu, scale=sigma)'."
        )
    settings_text = ", ".join(f"{k}={v}" for k, v in (variables | settings).items())
    return _model_of_class(
        f"{cls.__name__}({settings_text})", cls, variables | settings, draws, design
    )


def _model_of_class(text: str, cls, settings: dict[str, Any], draws: Draws, design: Any) -> Model:
    columns: tuple[str, ...] = ()
    if design is not None and "design" in inspect.signature(cls).parameters:
        settings, columns = _with_design(text, settings, design)
        settings, columns = _in_order_of_coefficients(text, settings, columns, draws)
    names = tuple(dict.fromkeys(name for v in settings.values() for name in _names_in(v)))
    if not names:
        raise ValueError(f"family {text} must take a variable of the posterior; got none.")
    _refuse_incomplete(text, cls, settings)
    stacks = {k: v for k, v in settings.items() if isinstance(v, Stack) and _names_in(v)}
    variables = {k: v for k, v in settings.items() if isinstance(v, str)}
    fixed = {k: _constant(v) for k, v in settings.items() if k not in {*stacks, *variables}}
    constraints_by_name = _constraints(cls)
    for key, value in fixed.items():
        vector = key in constraints_by_name and constraints_by_name[key].event_dim == 1
        if vector and isinstance(value, int | float):
            raise ValueError(
                f"family {text}: {key} must be a variable or a list of numbers, such as "
                f"[{value}, {value}]; got {value}."
            )
    ranks = {
        k: constraints_by_name[k].event_dim if k in constraints_by_name else 0
        for k in (*variables, *stacks)
    }
    # an unknown name is refused here, with the names there are
    events = {
        name: min(1, len(draws.shape(name))) for v in stacks.values() for name in _names_in(v)
    }
    events |= {v: ranks[k] for k, v in variables.items()}
    for parameter, parts in stacks.items():
        simplex = constraints_by_name.get(parameter) is constraints.simplex
        _refuse_unstackable(text, parameter, parts, ranks[parameter], simplex, draws)

    places = places_of_axes({name: draws.of(name) for name in names}, events)
    make = _Named(cls, names, variables, stacks, fixed, ranks, events, places)
    some_draws = probe(draws, names)
    settings = variables | stacks | fixed
    return Model(text, names, make, settings, cls, events, design, some_draws, columns, places)


@dataclass(frozen=True, eq=False)
class _Named:
    """The distributions of a class whose parameters are named; as an object it can be pickled."""

    kind: Callable[..., Distribution]
    names: tuple[str, ...]
    variables: Mapping[str, str]  # parameter -> variable
    stacks: Mapping[str, Stack]
    fixed: Mapping[str, Any]
    ranks: Mapping[str, int]  # parameter -> its event axes
    events: Mapping[str, int]  # variable -> its event axes
    places: Mapping[str, tuple[int, ...]]

    def __call__(self, theta: Theta) -> Distribution:
        batch = max(theta[name].ndim - self.events[name] for name in self.names)
        aligned = {
            k: align(theta[v], self.ranks[k], batch, self.places.get(v))
            for k, v in self.variables.items()
        }
        aligned |= {k: stack_columns(theta, v, self.events) for k, v in self.stacks.items()}
        checked = False if _constraints(self.kind) else None
        return self.kind(**aligned, **self.fixed, validate_args=checked)


@dataclass(frozen=True, eq=False)
class _Called:
    """The distributions that a callable makes of draws and, where there is one, the design."""

    family: Callable[..., Distribution]
    design: tuple[Any, ...] = ()

    def __call__(self, theta: Theta) -> Distribution:
        return self.family(theta, *self.design)


def _names_in(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(x for x in value if isinstance(x, str)) if isinstance(value, Stack) else ()


def stack_columns(theta: Theta, parts: Stack, events: Mapping[str, int]) -> Tensor:
    """Variables and numbers side by side along a last axis; vectors give several columns each."""
    columns = {name: theta[name] for name in _names_in(parts)}
    columns = {k: x if events[k] else x[..., None] for k, x in columns.items()}
    lead = broadcast_shape(*(x.shape[:-1] for x in columns.values()))
    first = next(iter(columns.values()))
    pieces = [columns[p] if isinstance(p, str) else first.new_tensor([p]) for p in parts]
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in pieces], -1)


def _refuse_unstackable(
    text: str, parameter: str, parts: Stack, rank: int, simplex: bool, draws: Draws
) -> None:
    if rank != 1:
        raise ValueError(
            f"family {text}: a list of variables makes a vector, which {parameter} is not; got "
            f"{parts}."
        )
    if simplex:
        raise ValueError(
            f"family {text}: {parameter} must be one variable of the posterior, a vector that "
            f"sums to 1; the variables in {parts} cannot move by themselves. Stack them before."
        )
    for name in _names_in(parts):
        if len(draws.shape(name)) > 1:
            raise ValueError(
                f"family {text}: each variable in {parts} must be one number or a vector; "
                f"{name} is {list(draws.shape(name))}."
            )


def labels_of(design: Any) -> tuple[str, ...]:
    """The names of the columns of a design: of a data frame, a dict of columns, a DataArray."""
    if isinstance(design, Mapping):
        return tuple(map(str, design))
    if isinstance(design, xr.DataArray) and design.ndim == 2:
        return tuple(labels_along(design, design.dims[1]) or ())
    columns = getattr(design, "columns", None)
    return () if columns is None or callable(columns) else tuple(map(str, columns))


def _with_design(
    text: str, settings: dict[str, Any], design: Any
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings with the matrix of the design, and the names of its columns.

    Columns that are named as offset, exposure or trials are taken out of the matrix.
    """
    try:
        columns = list(design.values()) if isinstance(design, Mapping) else None
        values = design if columns is None else np.column_stack(columns)
        matrix = torch.from_numpy(np.asarray(values, np.float64).copy())
    except (TypeError, ValueError) as error:
        raise TypeError(f"design must hold numbers; got {design!r:.60}.") from error
    labels = labels_of(design)
    if matrix.ndim == 2 and len(labels) != matrix.shape[1]:
        labels = tuple(map(str, range(matrix.shape[1])))
    updated, taken = dict(settings), set()
    for key in PER_ROW & settings.keys():
        column = settings[key]
        if not isinstance(column, str | Stack):
            continue
        if column not in labels:
            raise ValueError(
                f"family {text}: {key} must be a column of the design, one of "
                f"{', '.join(labels)}, or numbers, one for each of its rows; got {column}."
            )
        place = labels.index(column)
        updated[key] = matrix[:, place]
        taken.add(place)
    if taken:
        kept_columns = [i for i in range(len(labels)) if i not in taken]
        matrix, labels = matrix[:, kept_columns], tuple(labels[i] for i in kept_columns)
    return updated | {"design": matrix}, labels


def _in_order_of_coefficients(
    text: str, settings: dict[str, Any], columns: tuple[str, ...], draws: Draws
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings and columns with the design's columns in the order of the coefficients.

    Columns go to the coefficients of their names, the others in order to those without a name.
    """
    coefficients = settings.get("coefficients")
    labels = _coefficient_labels(coefficients, columns, draws)
    named = [label for label in labels if label is not None]
    counted = all(label.isdecimal() for label in named)
    distinct = len({*named}) == len(named) and len({*columns}) == len(columns)
    if not named or not distinct or len(labels) != len(columns):
        return settings, columns
    if counted or all(column.isdecimal() for column in columns):
        if {*named} != {*columns}:
            return settings, columns
    elif unknown := [label for label in named if label not in columns]:
        raise ValueError(
            f"family {text}: the columns of the design must be called as the coefficients are; "
            f"{coefficients} has {', '.join(named)}, of which {unknown[0]} is none of the columns "
            f"{', '.join(columns)}. Rename one of them, or give the design as numbers without "
            "names, in the order of the coefficients."
        )
    others = iter([column for column in columns if column not in named])
    ordered = [next(others) if label is None else label for label in labels]
    places = [columns.index(column) for column in ordered]
    return settings | {"design": settings["design"][:, places]}, tuple(ordered)


def _coefficient_labels(
    coefficients: Any, columns: tuple[str, ...], draws: Draws
) -> list[str | None]:
    """The label of each coefficient; of a number, the name of its variable if a column has it."""
    parts = coefficients if isinstance(coefficients, Stack) else [coefficients]
    labels: list[str | None] = []
    for part in parts:
        if not isinstance(part, str):
            labels.append(None)
        elif shape := draws.shape(part):
            labels += draws.labels(part)[-1] or [None] * shape[-1]
        else:
            labels.append(part if part in columns else None)
    return labels


def _refuse_incomplete(text: str, cls, settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters.items()
    missing = [k for k, p in parameters if p.default is p.empty and k not in settings]
    if missing:
        how = "design=X (--design FILE), its matrix" if missing[0] == "design" else "it by name"
        raise ValueError(
            f"family {text} must say {' and '.join(missing)} of {cls.__name__}: give {how}."
        )


def _constant(value: Any) -> Any:
    """Lists as tensors; a whole number stays one, as torch requires in places."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, list | tuple) else value


def _constraints(cls) -> Mapping[str, Constraint]:
    """Constraints of the parameters, unless they depend on one another, as those of Uniform."""
    return cls.arg_constraints if isinstance(cls.arg_constraints, Mapping) else {}


def align(x: Tensor, event: int, batch: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Batch axes at their places, else flush left: sigma [n] beside mu [n, 8] is [n, 1]."""
    if places is not None:
        return insert_axes(x, places, batch, event)
    lead = x.ndim - event
    return x.reshape(x.shape[:lead] + (1,) * (batch - lead) + x.shape[lead:])


def _from_callable(family: Callable, draws: Draws, design: Any) -> Model:
    """A model of a callable, whose variables are those that it reads when shown a few draws."""
    text = getattr(family, "__qualname__", repr(family)).replace("<locals>.", "")
    # NumPy would take the slopes of what it touches away; whole numbers stay indices
    numbers = isinstance(design, np.ndarray) and design.dtype.kind in "biuf"
    shown_design = torch.tensor(design) if numbers else design
    shown_design = (
        shown_design.double()
        if isinstance(shown_design, Tensor) and shown_design.is_floating_point()
        else shown_design
    )

    make = _Called(family, () if design is None else (shown_design,))
    some_draws = Theta(probe(draws, draws.names, unread=True))
    model = Model(text, draws.names, make, design=design)
    _check_some(model, some_draws)
    names = tuple(name for name in draws.names if name in some_draws._seen)
    if not names:
        raise ValueError(f"family {text} must look at a variable of the posterior; it saw none.")
    return Model(text, names, make, design=design, few=probe(draws, names))


def _check_some(model: Model, some_draws: Theta) -> None:
    """Check all draws, or one, if a draw alone is at fault; with slopes, to find uses of NumPy."""
    drawn = some_draws._drawn
    rows, failed = range(len(next(iter(drawn.values())))), []
    with torch.enable_grad():
        for part in (slice(None), *(slice(i, i + 1) for i in rows)):
            theta = Theta({name: x[part].clone().requires_grad_() for name, x in drawn.items()})
            try:
                model.check(theta)
            except ValueError as error:
                failed.append(error)
            else:
                some_draws._seen |= theta._seen
                return
    raise failed[0]


def probe(draws: Draws, names: Sequence[str], unread: bool = False) -> dict[str, Tensor]:
    """A few draws by name, [n, *shape]: some of every chain, and the extremes of each variable.

    They decide what kind of distributions the family makes, and what moves from draw to draw:
    what is constant in most of the draws, such as an indicator, must be seen to move.

    Args:
        draws: The posterior.
        names: Of the variables.
        unread: True to leave out extremes for which a file would be read to its end. Else this
            is done where a number is the same in some draws of every chain.
    """
    chains = slice(None, None, -(-draws.chains // PROBE))
    step = max(1, draws.draws * len(range(draws.chains)[chains]) // PROBE)
    try:
        spread = {name: draws.some(name, chains, slice(None, None, step)) for name in names}
    except ValueError:
        for _ in draws.chunks(names):  # raises too, naming the draw
            pass
        raise
    looked_at = [
        name
        for name, x in spread.items()
        if draws.in_memory(name) or not (unread or _moves(x.flatten(0, 1)))
    ]
    places = [draws.extremes(name) for name in looked_at if math.prod(draws.shape(name))]
    places = torch.cat(places).unique(dim=0) if places else torch.empty(0, 2).long()
    rows_by_name = {}
    for name, x in spread.items():
        more = draws.at(name, places) if len(places) else x[:0, 0]
        rows_by_name[name] = torch.cat([x.flatten(0, 1), more])
    return rows_by_name


def _moves(x: Tensor) -> bool:
    """True if every number of draws [n, *shape] differs between some of them."""
    return bool((x != x[:1]).any(0).all())


def alone(law: Distribution, again: Callable[[], Distribution]) -> Distribution:
    """The distribution of batch shape [*batch] that a distribution of batch shape [1, *batch] is.

    Args:
        law: Of one draw.
        again: The distribution made once more, from parameters without the axis of the draws; a
            family that needs that axis fails, or makes another distribution.
    """
    wrapped = OfOneDraw(law)
    with random_numbers(0), torch.no_grad():
        x = wrapped.sample()
        try:
            made = again()
            same = made.batch_shape == wrapped.batch_shape and made.event_shape == law.event_shape
            if same and torch.equal(made.log_prob(x), wrapped.log_prob(x)):
                return made
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            pass
    return wrapped


class OfOneDraw(Distribution):
    """A distribution of batch shape [1, *batch], without its first axis."""

    arg_constraints = {}  # pyright: ignore

    def __init__(self, law: Distribution):
        self.law = law
        super().__init__(law.batch_shape[1:], law.event_shape, validate_args=False)

    @property
    def support(self):
        return self.law.support

    @property
    def has_rsample(self) -> bool:  # pyright: ignore
        return self.law.has_rsample

    @property
    def mean(self) -> Tensor:
        return self.law.mean[0]

    @property
    def mode(self) -> Tensor:
        return self.law.mode[0]

    @property
    def variance(self) -> Tensor:
        return self.law.variance[0]

    def sample(self, sample_shape=()) -> Tensor:
        return self.law.sample(sample_shape).squeeze(len(sample_shape))

    def rsample(self, sample_shape=()) -> Tensor:
        return self.law.rsample(sample_shape).squeeze(len(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._on_values(self.law.log_prob, value)

    def cdf(self, value: Tensor) -> Tensor:
        return self._on_values(self.law.cdf, value)

    def icdf(self, value: Tensor) -> Tensor:
        return self._on_values(self.law.icdf, value)

    def entropy(self) -> Tensor:
        return self.law.entropy()[0]

    def _on_values(self, of: Callable[[Tensor], Any], value: Tensor) -> Tensor:
        axes = len(self.batch_shape)
        lead = max(0, axes + len(self.event_shape) - value.ndim)
        value = value.reshape((1,) * lead + value.shape)
        place = value.ndim - axes - len(self.event_shape)
        return of(value.unsqueeze(place)).squeeze(place)


@dataclass(frozen=True)
class Laws:
    """Posterior draws, as the distributions that they are the parameters of."""

    theta: Mapping[str, Tensor]  # [draws, *shape] each
    law: LawOf
    weights: Float[Tensor, " draws"]  # sum 1

    def __len__(self) -> int:
        return len(self.weights)

    def at(self, index: slice | Tensor) -> Distribution:
        """The distributions of some draws, of batch shape [n, *batch].

        Raises:
            ValueError: There is not one distribution for each draw.
        """
        return self.of({name: x[index] for name, x in self.theta.items()})

    def of(self, theta: Mapping[str, Tensor]) -> Distribution:
        """The distributions of parameters [n, *shape] each."""
        law, n = self.law(dict(theta)), len(next(iter(theta.values())))
        if law.batch_shape[:1] != (n,):
            raise ValueError(
                f"family must make one distribution for each of {n} draws, of batch shape "
                f"[{n}, ...]; got {list(law.batch_shape)}."
            )
        return law

    def chunks(self, numbers: int) -> Iterator[slice]:
        """Slices of the draws, for which ``numbers`` of each fit in memory."""
        step = max(1, NUMBERS // max(1, numbers))
        return (slice(i, min(i + step, len(self))) for i in range(0, len(self), step))

    def only(self, rows: Tensor) -> "Laws":
        """Some of the draws, with the weights that they have."""
        return Laws({k: x[rows] for k, x in self.theta.items()}, self.law, self.weights[rows])

    def thin(self, count: int) -> "Laws":
        """A subsample of draws, of equal weights, evenly over the weights of all."""
        rows = resample(self.weights.log(), count=count, offset=0.5)
        equal = torch.full((count,), 1 / count, dtype=torch.float64)
        return replace(self.only(rows), weights=equal)

    def spread(self, count: int) -> Tensor:
        """The places of up to ``count`` draws, from the first to the last."""
        return torch.linspace(0, len(self) - 1, min(count, len(self))).long()


@contextlib.contextmanager
def _validation() -> Iterator[None]:
    """Let distributions check their parameters, also where an import such as zuko's ended that."""
    before = Distribution._validate_args
    Distribution._validate_args = True
    try:
        yield
    finally:
        Distribution._validate_args = before


def laws_of(theta: Mapping[str, Tensor], law: LawOf, weights: Tensor | None = None) -> Laws:
    """The distributions of posterior draws, in double precision.

    Raises:
        ValueError: There are none, they are not as many of each parameter, or not finite; or the
            weights do not go with them.
    """
    if not theta:
        raise ValueError("theta must hold the draws of at least one parameter; got none.")
    counts = {name: len(x) if x.ndim else 0 for name, x in theta.items()}
    draws = next(iter(counts.values()))
    if draws == 0 or set(counts.values()) != {draws}:
        raise ValueError(f"theta must hold as many draws of each parameter; got {counts}.")
    for name, x in theta.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} must be finite; got {x[~x.isfinite()][0].item()}.")
    weights = torch.ones(draws) if weights is None else weights
    if weights.shape != (draws,) or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"weights must be {draws} finite numbers, none negative; got {weights}.")
    if not weights.sum() > 0:
        raise ValueError("weights must not all be 0.")
    weights = weights.double() / weights.double().sum()
    reals = {k: x.double() if x.is_floating_point() else x for k, x in theta.items()}
    return Laws(reals, law, weights)


def whole_parameters(laws: Laws) -> tuple[str, ...]:
    """The parameters that are whole numbers in all draws and move the end of a finite support.

    >>> theta = {"n": torch.tensor([5.0, 6.0]), "p": torch.tensor([0.0, 1.0])}
    >>> law = lambda t: torch.distributions.Binomial(t["n"], t["p"])
    >>> whole_parameters(Laws(theta, law, torch.ones(2) / 2))
    ('n',)
    """
    law = laws.at(slice(None))
    support = None if law.event_shape else support_of(law)
    if support is None or not support.is_discrete or not moving_edge(law):
        return ()
    return tuple(
        name
        for name, x in laws.theta.items()
        if bool((x == x.round()).all()) and moving_edge(_moved_alone(laws, name))
    )


def _moved_alone(laws: Laws, name: str) -> Distribution:
    theta = {key: x if key == name else x[:1].expand_as(x) for key, x in laws.theta.items()}
    return laws.of(theta)
