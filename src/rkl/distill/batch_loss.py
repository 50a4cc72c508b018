"""The loss of one batch: what is minimised at each of its tokens, and what of it is not finite."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rkl.checks import warn
from rkl.distill.config import DistillConfig
from rkl.distill.known import (
    Known,
    Observations,
    Observed,
    at_temperature,
    infinite_atoms,
    no_sums,
    token_weights,
)
from rkl.distill.loss import weighted_loss
from rkl.distill.text.batches import DATA, STUDENT, TEACHER, Batch
from rkl.divergences import KL, Divergence
from rkl.estimators import LinearHead, TopK, exact, per_token


class BatchLoss:
    """The loss of a batch, whose divergence depends on who wrote each token.

    Args:
        args: The settings of the training.
        divergence: What is minimised; a schedule puts another in its place.
        of_own_text: In its place at the tokens that the student wrote; None for the same.
        token_weight: Weighs the tokens; None weighs all alike.
        tokenizer: Spells tokens in warnings; None gives their numbers.

    Attributes:
        observations: What was known of the teacher since the last log.
        infinite: Number of tokens of infinite divergence since the last log.
        nan_at: The first token whose divergence is NaN, in words; empty without one.
    """

    def __init__(
        self,
        args: DistillConfig,
        divergence: Divergence,
        of_own_text: Divergence | None = None,
        token_weight: Callable[..., Any] | None = None,
        tokenizer: Any = None,
    ):
        self.args, self.divergence, self.of_own_text = args, divergence, of_own_text
        self.token_weight, self.tokenizer = token_weight, tokenizer
        self.observations = Observations(allow_partial=args.allow_partial)
        self.infinite, self.nan_at = 0, ""
        self._named = False  # whether a token of infinite divergence was
        self._by_source = no_sums()  # of data and own text: loss times tokens, tokens

    def of_step(
        self,
        batch: Batch,
        sources: Tensor | None,
        p: Observed,
        q: Known,
        count: Tensor | int,
        *,
        own: Known | None = None,
        logged: bool = False,
    ) -> Tensor:
        """The sum over a batch's tokens of what is minimised, over the tokens of the whole step.

        Args:
            batch: Its T predicted tokens.
            sources: Who wrote each of them, [T]; None where all are of the data.
            p: What the teacher says of them.
            q: What the student says of them, over the atoms that the teacher tells of.
            count: Tokens of the step.
            own: What the student says of its own tokens, for labels, where its atoms are others.
            logged: Whether the standard error of a teacher known by draws is wanted.
        """
        if not len(batch.targets):
            return _zero(q)
        like = q.hidden if isinstance(q, LinearHead) else q
        dtype = torch.promote_types(like.dtype, torch.float32)
        weight = torch.ones(len(batch.targets), dtype=dtype, device=like.device) / count
        if self.token_weight is not None:
            cooled_p, cooled_q = (at_temperature(it, self.args.temperature) for it in (p, q))
            weights = token_weights(self.token_weight, cooled_p, cooled_q, batch)
            weight = weight * weights.to(weight)
            if not weight.any():
                return _zero(q)
        for terms in self._terms(sources, weight):
            how: Any = {"logged": logged, "of_student": terms.of_student}
            self.observations.note(terms.divergence, p, q, terms.weight, **how)
        loss = self._weighted(batch, sources, p, q, weight, count, own)
        if loss.isfinite():
            return loss
        values = self._values(batch, p, q, sources)
        if loss.isnan():
            self._note_nan(batch, values, sources)
            return loss
        infinite = values.isinf()
        if not infinite.any():  # the sum over tokens, or the term of hard labels, overflowed
            return loss
        self.infinite += int(infinite.sum())
        self._name(batch, p, q, infinite, sources, spelt=own is None)
        finite = weight.masked_fill(infinite, 0.0)
        return self._weighted(batch, sources, p, q, finite, count, own) if finite.any() else loss

    def _weighted(
        self,
        batch: Batch,
        sources: Tensor | None,
        p: Observed,
        q: Known,
        weight: Tensor,
        count: Tensor | int,
        own: Known | None,
    ) -> Tensor:
        """Sum over tokens of their weight times what is minimised."""
        losses = []
        for terms in self._terms(sources, weight):
            hard = terms.hard_label_weight
            loss = weighted_loss(
                terms.divergence,
                p=p,
                q=q,
                weight=terms.weight,
                labels=batch.targets,
                temperature=self.args.temperature,
                hard_label_weight=hard if own is None else 0.0,
                compiled=self.args.compiled,
            )
            if own is not None and hard:
                label = _label(batch, loss.dtype)
                loss = loss + hard * exact(KL(), p=label, q=own, weight=terms.weight)
            losses.append(loss)
            if self.of_own_text is not None and loss.isfinite():
                tokens = (terms.weight > 0).sum()
                sums = torch.stack([loss.detach() * count, tokens.to(loss.dtype)])
                self._by_source[int(terms.of_student)] += sums.float().cpu()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _terms(self, sources: Tensor | None, weight: Tensor) -> list["_Terms"]:
        """The divergence and the weights for the tokens of each source, without those of weight 0.

        Labels count where the data set wrote the token: other text is no answer.
        """
        hard, own = self.args.hard_label_weight, self.of_own_text
        if sources is None or (not hard and own is None):
            return [_Terms(self.divergence, weight, hard if sources is None else 0.0)]
        of_student = sources == STUDENT
        parts = [
            (sources == DATA, self.divergence, hard),
            (sources == TEACHER, self.divergence, 0.0),
            (of_student, own or self.divergence, 0.0),
        ]
        return [
            _Terms(divergence, weight.masked_fill(~chosen, 0.0), share, chosen is of_student)
            for chosen, divergence, share in parts
            if (weight[chosen] > 0).any()
        ]

    def _values(
        self, batch: Batch, p: Observed, q: Known, sources: Tensor | None = None
    ) -> Tensor:
        """The divergence of each token, under the one of its source."""
        p, q = (at_temperature(it, self.args.temperature) for it in (p, q))
        divergences = {"data": self.divergence}
        if sources is not None and self.of_own_text is not None:
            divergences["own"] = self.of_own_text
        takes_labels = any(it.takes_labels for it in divergences.values())
        labels = batch.targets if takes_labels else None
        values = per_token(divergences, p=p, q=q, labels=labels)
        if "own" not in values:
            return values["data"]
        return values["own"].where(cast(Tensor, sources) == STUDENT, values["data"])

    def _divergence_at(self, sources: Tensor | None, token: int) -> Divergence:
        own = sources is not None and int(sources[token]) == STUDENT
        return (self.of_own_text if own else None) or self.divergence

    def score(self, batch: Batch, p: Observed, q: Known, *, own: Known | None = None) -> Tensor:
        """Of each row: the sums of finite divergences and of cross-entropies, two counts.

        Those are of tokens with an infinite divergence, and of all tokens. ``own`` is what the
        student says of its own tokens, where those of ``q`` are others.
        """
        how: Any = {"dtype": torch.float32, "device": batch.predicting.device}
        totals = torch.zeros(len(batch.predicting), 4, **how)
        if not len(batch.targets):
            return totals
        self.observations.judge(self.divergence, p, q)
        value = self._values(batch, p, q)
        label = _label(batch, value.dtype)
        entropy = per_token({"label": KL()}, p=label, q=q if own is None else own)["label"]
        self._note_nan(batch, value)
        infinite = value.isinf()
        scores = [value.masked_fill(infinite, 0.0), entropy, infinite, torch.ones_like(value)]
        row = batch.predicting.nonzero()[:, 0]
        return totals.index_add_(0, row, torch.stack(scores, 1).to(totals.dtype))

    def _name(
        self,
        batch: Batch,
        p: Observed,
        q: Known,
        infinite: Tensor,
        sources: Tensor | None,
        *,
        spelt: bool,
    ) -> None:
        """Warn, once, of the first token whose divergence is infinite, and say where and why."""
        if self._named:
            return
        self._named = True
        first = int(infinite.nonzero()[0])
        p, q = (at_temperature(it, self.args.temperature) for it in (p, q))
        divergence = self._divergence_at(sources, first)
        atoms = infinite_atoms(divergence, p, q, first, batch.targets) if spelt else None
        if atoms is None:
            warn(
                f"{divergence} is infinite at {self._place(batch, first)}: among the atoms "
                "known of the teacher and the rest, one of the distributions is 0 where the other "
                "is not. Such tokens have no gradient and are left out of the loss; their number "
                "is logged as infinite_tokens."
            )
            return
        warn(
            f"{divergence} is infinite at {self._place(batch, first)}, because of "
            f"{len(atoms)} atoms where one of the distributions is 0 and the other is not: "
            f"{', '.join(map(self._spell, atoms[:5]))}. "
            "Such tokens have no gradient and are left out of the loss; their number is logged "
            "as infinite_tokens."
        )

    def _note_nan(self, batch: Batch, value: Tensor, sources: Tensor | None = None) -> None:
        """Keep the place of the first token whose divergence is NaN, for what ends the run."""
        lost = value.isnan()
        if not self.nan_at and lost.any():
            first = int(lost.nonzero()[0])
            divergence, place = self._divergence_at(sources, first), self._place(batch, first)
            such = f"the first of {int(lost.sum())} such tokens"
            self.nan_at = f" ({divergence} is NaN at {place}, {such})"

    def _place(self, batch: Batch, token: int) -> str:
        row, position = batch.predicting.nonzero()[token].tolist()
        target = self._spell(batch.targets[token])
        return f"token {position + 1} of row {row} of the batch, {target}"

    def _spell(self, token: Tensor) -> str:
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return str(int(token))
        return f"{int(token)} {tokenizer.decode([int(token)])!r}"

    def pop_by_source(self) -> Tensor:
        """Loss times tokens, and tokens, of data and of own text since the last log: [2, 2]."""
        sums, self._by_source = self._by_source, no_sums()
        return sums


class _Terms(NamedTuple):
    """A divergence, the weights of its tokens in the loss, and the weight of their labels."""

    divergence: Divergence
    weight: Tensor
    hard_label_weight: float
    of_student: bool = False


def _label(batch: Batch, dtype: torch.dtype) -> TopK:
    """All mass on the token that is there: KL(p ‖ q) is its cross-entropy."""
    return TopK(torch.zeros_like(batch.targets, dtype=dtype)[:, None], batch.targets[:, None])


def _zero(q: Known) -> Tensor:
    """A loss of 0 in which every parameter takes part, as DDP demands."""
    parts = q[:3] if isinstance(q, LinearHead) else (q,)
    return torch.stack([part[:0].sum() for part in parts if part is not None]).sum()
