"""Distributions over tokens as they are known: in full, by their likeliest atoms, or by draws.

The trainer asks nothing its type; what depends on the kind of knowledge stands here.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rkl.checks import warn
from rkl.divergences import Divergence, FDivergence
from rkl.estimators import LinearHead, Sampled, TopK, effective_draws, products, sampled_terms

Known: TypeAlias = LinearHead | Float[Tensor, "tokens vocab"]  # of the student, and of a model
Observed: TypeAlias = Known | TopK | Sampled  # of a teacher

MIN_CAPTURED = 0.95  # of a teacher's mass in its top k, below which a warning is given
MIN_EFFECTIVE_DRAWS = 4.0  # a token, in the mean, below which a divergence is refused
FEW_EFFECTIVE_DRAWS = 16.0  # and below which a warning is given
_FAR = 50.0  # nats of log p/q at which the growth of an integrand is measured


def logits_of(known: Observed) -> Float[Tensor, "tokens vocab"]:
    """The logits, all at once; of a head in half precision they are single."""
    if isinstance(known, TopK | Sampled):
        part = "its top k" if isinstance(known, TopK) else "some drawn atoms"
        raise TypeError(
            f"teacher gives {part} alone, and not the whole distribution that is needed here. "
            "DistillTrainer, with its evaluation, takes them; rkl evaluate does not."
        )
    if isinstance(known, Tensor):
        return known
    logits = known.scale * products(known)
    if known.softcap is not None:
        logits = known.softcap * (logits / known.softcap).tanh()
    return logits / known.temperature


def log_softmax_of(known: Observed) -> Float[Tensor, "tokens vocab"]:
    """Log-probabilities of all tokens, in single precision or better."""
    return _at_least_single(logits_of(known)).log_softmax(-1)


def log_softmax_at(known: Known, tokens: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen vocab"]:
    """Log-probabilities at some tokens, in single precision or better, with a gradient."""
    part: Any = known[tokens] if isinstance(known, Tensor) else known.hidden[tokens]
    part = _at_least_single(part)
    if isinstance(known, Tensor):
        return part.log_softmax(-1)
    bias = None if known.bias is None else known.bias.to(part.dtype)
    wide = known._replace(hidden=part, weight=known.weight.to(part.dtype), bias=bias)
    with torch.autocast(part.device.type, enabled=False):  # it would round the products
        return logits_of(wide).log_softmax(-1)


def at_temperature(known: Any, temperature: float) -> Any:
    """The same, its logits divided by a temperature, which parts of a distribution have lost.

    It comes in addition to a temperature that a head has of its own.

    Logits in half precision become single first: rounded once more after the division, they
    would be off by as much as two close distributions differ.
    """
    if isinstance(known, TopK | Sampled):
        if temperature != 1:
            part = "its top k" if isinstance(known, TopK) else "drawn atoms"
            raise ValueError(
                f"temperature must be 1 for a teacher known by {part}, whose other "
                f"probabilities another temperature would need; got {temperature}."
            )
        return known
    if isinstance(known, Tensor):
        return known if temperature == 1 else _at_least_single(known) / temperature
    return known._replace(temperature=temperature * known.temperature)


def infinite_atoms(
    divergence: Divergence, p: Observed, q: Known, token: int, labels: Int[Tensor, " tokens"]
) -> Int[Tensor, " atoms"] | None:
    """The atoms that make the divergence of a token infinite; None where p is known in part."""
    if isinstance(p, TopK | Sampled):
        return None
    logp, logq = (log_softmax_of(_tokens(it, slice(token, token + 1))) for it in (p, q))
    inputs = divergence.held_inputs(logp, labels[token : token + 1])
    terms = divergence.by_atom(logp, logq, *divergence.held(logp, logq, *inputs))
    return (~terms.isfinite()).nonzero()[:, 1]


def token_weights(
    weigh: Callable[..., Any], p: Observed, q: Known, batch: Any
) -> Float[Tensor, " tokens"]:
    """Weights of the tokens, from both distributions, constant to autograd.

    Args:
        weigh: Called with log p and log q, [tokens, vocab] each, and the batch, whose ``targets``
            are the tokens themselves; gives a weight of at least 0 for each token.
        p: What is known of the teacher, which must be all.
        q: What is known of the student.
        batch: The batch.

    Raises:
        ValueError: A weight is negative, not finite, or missing.
    """
    with torch.no_grad():
        logp, logq = (log_softmax_of(it).detach() for it in (p, q))
        weights = weigh(logp, logq, batch)
    if not isinstance(weights, Tensor) or weights.shape != logp.shape[:1]:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"token_weight must give a tensor of [{len(logp)}], one weight for each token; "
            f"got {got}."
        )
    if not ((weights >= 0) & (weights < math.inf)).all():
        raise ValueError("token_weight must give weights of at least 0, all of them finite.")
    return weights.detach()


def captured_mass(p: Observed) -> Float[Tensor, " tokens"] | None:
    """The teacher's probability of the atoms that are known; None where all are."""
    if isinstance(p, TopK):
        return p.logp.exp().sum(-1).clamp_max(1.0)
    if isinstance(p, Sampled):
        index, order = p.index.sort(-1)
        mass = p.logp.gather(-1, order).exp()
        again = torch.zeros_like(index, dtype=torch.bool)
        again[:, 1:] = index[:, 1:] == index[:, :-1]
        return mass.masked_fill(again, 0.0).sum(-1).clamp_max(1.0)
    return None


def lost_in_the_rest(divergence: Divergence) -> str | None:
    """Reason why a divergence cannot be judged by a top k; None where little of it is lost.

    Coarsening rare atoms into one leaves a lower bound on f-divergences and on increasing
    functions of them. It is close where F(0, 1) is finite and F(1, e⁻ˣ) grows no faster than x,
    as for forward KL and Jensen-Shannon. Where one of them fails, what the divergence measures
    may lie in the rest: of 1,000 atoms with Gaussian logits of standard deviation 3, the first
    100 keep 36 % of reverse KL, 79 % of −log acceptance, 87 % of LK hybrid and 96 % of forward
    KL. Of what is no such function, as TAID (20 %), the coarsened value may even be larger.
    """
    if not (parts := divergence.increasing_in):
        return (
            "it weighs atoms by whole distributions or by their rank, so that the rest as one "
            "atom may change it either way"
        )
    far = torch.tensor([-_FAR, -2 * _FAR], dtype=torch.float64)
    for part in parts:
        if not math.isfinite(part.unseen[1]):
            return "it grows without bound where the teacher has little mass"
        once, twice = part.integrand(torch.zeros_like(far), far).tolist()
        if twice > 4 * max(once, 1.0):
            return "it grows faster than log(p/q) where the student has little mass"
    return None


def distinct_atoms(
    index: Int[Tensor, "tokens k"], missing: Bool[Tensor, "tokens k"], vocab: int
) -> Int[Tensor, "tokens k"]:
    """The atoms, and in the place of missing ones, which have no mass, any not there yet."""
    if not missing.any():
        return index
    candidates = torch.arange(min(2 * index.shape[-1], vocab), device=index.device)
    there = index.masked_fill(missing, -1)[..., None] == candidates
    unused = there.any(1).int().argsort(dim=-1, stable=True)
    place = (missing.cumsum(-1) - 1).clamp_min(0)
    return torch.where(missing, unused.gather(-1, place).to(index.dtype), index)


class Observations:
    """Checks of a teacher's first answers, and sums over all of them for the log.

    Args:
        allow_partial: Whether a divergence of which a top k keeps little is minimised
            nevertheless.
    """

    def __init__(self, *, allow_partial: bool = False):
        self.allow_partial = allow_partial
        self._judged: set[bool] = set()  # of data and of own text
        # The sums and the numbers of: captured mass and tokens, variance of the loss and batches.
        self._captured, self._variance = no_sums()
        self._figures: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, tuple[float, float]]) -> None:
        """Sum what a teacher logs of itself: of each name a sum and a count."""
        for name, pair in figures.items():
            total = self._figures.get(name, no_sums()[0])
            self._figures[name] = total + torch.tensor(pair, dtype=total.dtype)

    def note(
        self,
        divergence: Divergence,
        p: Observed,
        q: Known,
        weight: Float[Tensor, " tokens"],
        *,
        logged: bool,
        of_student: bool = False,
    ) -> None:
        """Judge the first tokens, and sum captured mass; of steps that are logged also errors.

        Tokens of which nothing is known are no part of the mean of captured mass.

        Args:
            divergence: What is minimised at tokens of weight above 0.
            p: What is known of the teacher, at temperature 1.
            q: What is known of the student.
            weight: Weight of each token in the loss of the step.
            logged: Whether the loss of this step is logged.
            of_student: Whether the student wrote these tokens.

        Raises:
            ValueError: The divergence says nothing on what is known of p.
        """
        if (captured := captured_mass(p)) is None or not len(captured):
            return
        self.judge(divergence, p, q, of_student=of_student)
        captured = captured[(weight.to(captured.device) > 0) & (captured > 0)]
        self._captured += self._captured.new_tensor([float(captured.sum()), len(captured)])
        if logged and isinstance(p, Sampled) and p.index.shape[-1] > 1:
            terms = sampled_terms(divergence, p=p, q=q)
            variance = (weight.square() * terms.var(-1).to(weight)).sum() / terms.shape[-1]
            self._variance += self._variance.new_tensor([float(variance), 1.0])

    def judge(
        self, divergence: Divergence, p: Observed, q: Known, *, of_student: bool = False
    ) -> None:
        """Refuse, or warn once of, a divergence that what is known of p says little about.

        Raises:
            ValueError: Most of the divergence may lie where nothing is known.
        """
        if not isinstance(p, TopK | Sampled) or not len(p.logp):
            return
        if of_student in self._judged:
            return
        self._judged.add(of_student)
        if isinstance(p, Sampled):
            self._judge_draws(divergence, p, q)
        elif not self._is_whole(p, q):
            self._judge_top(divergence, p)

    def pop(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call, for the log; nothing where the whole of p is known.

        Args:
            total: The sum of a tensor over all processes, all of which come here.
        """
        own = [*self._figures.values()]
        sums = total(torch.cat([self._captured, self._variance, *own])).tolist()
        self._captured, self._variance = no_sums()
        names, self._figures = [*self._figures], {}
        captured, tokens, variance, measured, *others = sums
        logs = {"captured_mass": captured / tokens} if tokens else {}
        logs |= {"loss_error": math.sqrt(variance)} if measured else {}
        pairs = zip(names, others[::2], others[1::2], strict=True)
        return logs | {name: value / count for name, value, count in pairs if count}

    @staticmethod
    def _is_whole(p: TopK, q: Known) -> bool:
        vocab = len(q.weight) if isinstance(q, LinearHead) else q.shape[-1]
        return p.index.shape[-1] == vocab

    def _judge_top(self, divergence: Divergence, p: TopK) -> None:
        known = p.logp.exp().sum(-1).clamp_max(1.0)
        captured = float(known[known > 0].mean()) if (known > 0).any() else 0.0
        mass = f"the {p.index.shape[-1]} likeliest atoms, with {captured:.3f} of its mass"
        reason = lost_in_the_rest(divergence)
        if reason is not None and not self.allow_partial:
            raise ValueError(
                f"divergence: {divergence} on a teacher known by {mass}: {reason}, so that "
                "most of it may lie among the atoms that are not known. Take KL() or "
                "JensenShannon(), ask for more atoms, or say allow_partial=True "
                "(--allow-partial) to minimise the part on these atoms and the rest as one."
            )
        if captured < MIN_CAPTURED:
            warn(
                f"teacher gives {mass}; below {MIN_CAPTURED} the divergence on these atoms and "
                "the rest as one may be far below the whole. Ask for more atoms."
            )

    def _judge_draws(self, divergence: Divergence, p: Sampled, q: Known) -> None:
        """Count effective draws of p alone, or of q where the terms grow with q/p."""
        f: Any = divergence
        unbounded = isinstance(f, FDivergence) and not math.isfinite(f.unseen[1])
        if not unbounded and p.log_weight is None:
            return
        if unbounded:
            draws = float(effective_draws(p, q).mean())
        else:
            log = torch.zeros_like(p.logp) if p.log_weight is None else p.log_weight
            log = log.double()
            draws = float((2 * log.logsumexp(-1) - (2 * log).logsumexp(-1)).exp().mean())
        what = (
            f"{divergence} on atoms drawn from the teacher: {p.index.shape[-1]} draws a "
            f"token are worth {draws:.1f} of the distribution that its terms weigh"
        )
        if draws < MIN_EFFECTIVE_DRAWS and not self.allow_partial:
            raise ValueError(
                f"divergence: {what}, of {MIN_EFFECTIVE_DRAWS:g} at least. Take KL() or "
                "JensenShannon(), or more draws."
            )
        if draws < FEW_EFFECTIVE_DRAWS:
            warn(f"{what}; loss_error in the log is its standard error, as far as these show it.")


def confidence(p: Observed, q: Known, most: int) -> Float[Tensor, "measured 3"]:
    """The entropies of q and p in nats, and the acceptance Σ min(p, q), at some tokens.

    Where p is known by its top k both are coarsened to these atoms and the rest. Of drawn atoms
    only q's entropy is known, and the others are NaN.

    Args:
        p: What is known of the teacher.
        q: What is known of the student.
        most: Tokens that are measured, evenly spaced, at most.
    """
    rows = q.hidden if isinstance(q, LinearHead) else q
    places = torch.arange(len(rows), device=rows.device)
    if isinstance(q, Tensor):  # a single atom is that of a token which is not compared
        places = places[(q > -math.inf).sum(-1) > 1]
    total = len(places)
    chosen = torch.linspace(0, max(total - 1, 0), min(most, total), device=rows.device).long()
    chosen = places[chosen]
    logq = logits_of(_tokens(q, chosen)).float().log_softmax(-1)
    if isinstance(p, Sampled):
        unknown = logq.new_full((len(chosen),), math.nan)
        return torch.stack([_entropy(logq), unknown, unknown], -1)
    if isinstance(p, TopK):
        logp, index = p.logp[chosen].float(), p.index[chosen]
        logp, logq = (_with_rest(it) for it in (logp, logq.gather(-1, index)))
    else:
        logp = logits_of(_tokens(p, chosen)).float().log_softmax(-1)
    return torch.stack([_entropy(logq), _entropy(logp), logp.minimum(logq).exp().sum(-1)], -1)


def _tokens(known: Known, chosen: Int[Tensor, " chosen"] | slice) -> Any:
    if isinstance(known, Tensor):
        return known[chosen]
    return known._replace(hidden=known.hidden[chosen])


def no_sums() -> Float[Tensor, "2 2"]:
    """Two sums with their counts, in single precision whatever torch's default dtype is."""
    return torch.zeros(2, 2, dtype=torch.float32)


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _with_rest(logp: Float[Tensor, "tokens atoms"]) -> Float[Tensor, "tokens more"]:
    """The log-probabilities of some atoms, and of all others as one."""
    rest = (1 - logp.exp().sum(-1, keepdim=True)).clamp_min(0.0).log()
    return torch.cat([logp, rest], -1)


def _entropy(logp: Float[Tensor, "tokens atoms"]) -> Float[Tensor, " tokens"]:
    return torch.special.entr(logp.exp()).sum(-1)
