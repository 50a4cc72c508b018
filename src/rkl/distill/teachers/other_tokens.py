"""Teachers with another tokenizer than the student: by their text, by bytes, by sorted masses."""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rkl.checks import choice, integer
from rkl.distill.known import Known, log_softmax_at
from rkl.distill.limits import context_of
from rkl.distill.models.heads import read_head
from rkl.distill.teachers.teacher import Teacher
from rkl.distill.text.alignment import Reading, Span, TokenTable, Translation
from rkl.distill.text.batches import texts_of
from rkl.distill.writing.rollouts import ModelWriter, ends_with_turn
from rkl.distill.writing.translated import TranslatedWriter, end_of_reply
from rkl.divergences import Divergence
from rkl.estimators import TopK

_SPANS = 256  # whose distributions of the teacher exist at one time


class Side(NamedTuple):
    """The tokens of some spans on one side, as rows of what is known of their distributions.

    Attributes:
        first: The row that predicts the first token of each span.
        token: That token.
        inner: The rows that predict the other tokens, span by span.
        inner_token: These tokens.
        inner_span: The number of the span of each.
        length: Tokens of each span.
    """

    first: Int[Tensor, " spans"]
    token: Int[Tensor, " spans"]
    inner: Int[Tensor, " inner"]
    inner_token: Int[Tensor, " inner"]
    inner_span: Int[Tensor, " inner"]
    length: Int[Tensor, " spans"]


class Compared(NamedTuple):
    """The spans of a batch at which teacher and student are compared.

    Attributes:
        student: Their tokens among the predicted ones of the batch.
        teacher: Their tokens among the predicted ones of the teacher's own batch.
        atom: The common atom with the bytes of each span; -1 where there is none.
        inputs: The teacher's batch; None where nothing is compared.
        predicting: Where the teacher predicts a token of a span.
    """

    student: Side
    teacher: Side
    atom: Int[Tensor, " spans"]
    inputs: dict[str, Tensor] | None
    predicting: Bool[Tensor, "texts steps"] | None


class OtherTokens(Teacher):
    """A model that reads the student's text in tokens of its own, and writes in them.

    Args:
        model: The teacher.
        tokenizer: Its tokenizer.
        student_tokenizer: The student's.

    Raises:
        ValueError: The bytes of the tokens of one of them cannot be told.
    """

    shares_tokens = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
    ):
        for name, given in (("tokenizer", tokenizer), ("student_tokenizer", student_tokenizer)):
            if not isinstance(given, PreTrainedTokenizerBase):
                raise TypeError(f"{name} must be a tokenizer of transformers; got {given!r}.")
        self.head = read_head(model, "teacher")
        self.model: nn.Module | None = model
        self.tokenizer, self.student_tokenizer = tokenizer, student_tokenizer
        self._of_student = TokenTable(student_tokenizer, "student_tokenizer")
        self._of_teacher = TokenTable(tokenizer, "tokenizer")
        self.vocab = len(self._of_student)
        self.translation = Translation(self._of_student, self._of_teacher, self.head.vocab)

    def writer(self, sampling, ends, *, context=math.inf, vocab=None, banned=()):
        """A writer in the teacher's tokens that gives the text in the student's."""
        model: Any = self.model
        own = ends_with_turn(model, self.tokenizer)
        if not own:
            raise ValueError(
                "teacher: neither its generation_config nor its tokenizer names a token that ends "
                "a text, so that replies would never end: set generation_config.eos_token_id."
            )
        return TranslatedWriter(
            ModelWriter(model, sampling, own, context=context_of(model), around=self.writing),
            self.translation,
            Translation(self._of_teacher, self._of_student),
            end=end_of_reply(self.student_tokenizer),
            longest=sampling.max_new_tokens,
        )

    def _check_vocab(self, vocab: int | None) -> None:
        if vocab is not None and vocab < self.vocab:
            raise ValueError(
                f"student has {vocab} logits, fewer than the {self.vocab} tokens of "
                "student_tokenizer."
            )


class TextTeacher(OtherTokens):
    """A teacher that is known by the text it writes alone: sequence-level distillation.

    At each token it puts all mass on the token that is there: KL(p ‖ q) is the cross-entropy of
    the text. With ``seq_kd`` that is the teacher's own text, read in the student's tokens, its
    end the student's end. Nothing is known of what it might have written otherwise, so that the
    estimate of KL(teacher ‖ student) over texts lacks the teacher's entropy, a constant, and has
    the noise of one draw a prompt.

    Source: Kim and Rush (2016), arXiv 1606.07947, section 3.2.
    """

    def observe(self, inputs, predicting, *, vocab=None) -> TopK:
        self._check_vocab(vocab)
        tokens = inputs["input_ids"][:, 1:][predicting]
        return TopK(torch.zeros(len(tokens), 1, device=tokens.device), tokens[:, None])


class AlignedTokens(OtherTokens):
    """A teacher compared where a token begins on both sides, at the same byte of the text."""

    _last: tuple[Any, Any, Compared] | None = None

    @abc.abstractmethod
    def _is_compared(self, span: Span, predicted: Sequence[bool]) -> bool:
        """True of a span at whose tokens enough is predicted; the flags are of its tokens."""

    def compared(self, inputs: Mapping[str, Any], predicting: Tensor) -> Compared:
        """The spans of a batch that are compared; the last batch is remembered."""
        ids = inputs["input_ids"]
        if self._last is not None and self._last[0] is ids and self._last[1] is predicting:
            return self._last[2]
        found = self._compare(inputs, predicting)
        self._last = ids, predicting, found
        return found

    def _compare(self, inputs: Mapping[str, Any], predicting: Tensor) -> Compared:
        ids, device = inputs["input_ids"].tolist(), predicting.device
        texts = [*texts_of(inputs)]
        tokens = [[ids[row][at] for at in places] for row, places in texts]
        readings = self.translation.read(tokens)
        flags, numbers = predicting.tolist(), _numbers(predicting).tolist()
        context = context_of(cast(Any, self.model))
        source, atoms, kept = _Rows(), [], []
        for (row, places), reading in zip(texts, readings, strict=True):
            spans = []
            for span in reading.spans:
                begin, end = span.source
                before = [places[at] - 1 for at in range(begin, end)]
                predicted = [at >= 0 and flags[row][at] for at in before]
                if begin == 0 or span.target[0] == 0 or span.target[1] > context:
                    continue
                if self._is_compared(span, predicted):
                    spans.append(span)
                    chosen = [ids[row][places[at]] for at in range(begin, end)]
                    source.add([numbers[row][at] for at in before], chosen)
                    atoms.append(span.atom)
            if spans:
                kept.append((reading, spans))
        teacher, batch, where = _teacher_rows(kept, device)
        return Compared(
            source.side(device), teacher, torch.tensor(atoms, device=device).long(), batch, where
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Single precision or better."""
        stored = next(cast(nn.Module, self.model).parameters()).dtype
        return torch.promote_types(stored, torch.float32)

    def _observed(self, compared: Compared) -> Known:
        inputs, predicting = compared.inputs, compared.predicting
        return self.head.observe(cast(Any, inputs), cast(Any, predicting))

    def __str__(self) -> str:
        shared = len(self.translation.source_atoms)
        return (
            f"{type(self.model).__name__} in its own tokens, of which {shared:,} are among the "
            f"student's {self.vocab:,}"
        )


class AlignedTeacher(AlignedTokens):
    """A teacher with another tokenizer, compared at the bytes that both divide the text at.

    The student's text is read in the teacher's tokens. Both texts are cut at the bytes where a
    token ends on both sides, into spans. A span is compared if all of its tokens are trained on
    and the teacher predicts all of its own: its first student token stands for it, and its other
    tokens have a divergence of 0. So the loss is the sum over spans, divided by the number of the
    student's tokens. Not compared are spans across the beginning of what is trained on, special
    tokens that the teacher lacks, what follows bytes that are no UTF-8, text that the teacher's
    tokenizer changes (as by NFC), and what passes the teacher's context.

    At the beginning of a span teacher and student are distributions over

    - the tokens whose bytes are a token on both sides, and special tokens that mean the same;
    - the span that is there, of more than one token on a side: Π p(tᵢ) and Π q(sⱼ) by the chain
      rule, both exact; this mass is taken from that of the first token;
    - the rest, as one atom.

    A token that one side alone has counts, by default, as the common token that the other begins
    the same bytes with: "hello" as "hel" for a student that writes "hel", "lo". With
    ``unmatched="rest"`` it counts to the rest, where the long tokens of the teacher meet tokens of
    the student that have nothing to do with them. Either way it is a coarsening, so that every
    f-divergence is a lower bound of the one over all tokens. Where the student has no token in
    the rest, the teacher's mass there, of special tokens, is left out by dividing by the others.

    What is told is a :class:`rkl.TopK`: what is refused of a top k is refused here too, and the
    temperature is 1. The log has ``captured_mass``, the teacher's mass outside of the rest at the
    spans that are compared; ``matched_mass``, its mass on tokens that the student has too;
    ``aligned_tokens``, the share of the trained tokens that lie in spans which are compared; and
    ``one_to_one``, the share of these spans with one token on both sides.

    What it cannot know: a student that has "there" writes "the" only where no "re" follows, and a
    teacher without it wherever "the" begins. But for the span that is there, such differences of
    the tokenizers count as differences of the distributions.

    Source: GOLD of TRL 1.x merges the probabilities of a span likewise, and takes sorted
    probabilities for the tokens that one side alone has.

    Args:
        model: The teacher.
        tokenizer: Its tokenizer.
        student_tokenizer: The student's.
        top_k: Number of likeliest common atoms that are told apart from the rest; None for all.
        unmatched: What tokens that one side alone has count as, "prefix" or "rest".
    """

    def __init__(
        self,
        model,
        tokenizer,
        student_tokenizer,
        *,
        top_k: int | None = None,
        unmatched: Literal["prefix", "rest"] = "prefix",
    ):
        super().__init__(model, tokenizer, student_tokenizer)
        if top_k is not None:
            integer("top_k", top_k, at_least=1)
        choice("unmatched", unmatched, ("prefix", "rest"))
        self.top_k, self.unmatched = top_k, unmatched
        self._atoms = _Atoms.of(self.translation, prefix=unmatched == "prefix")
        self._has_rest = unmatched == "rest" or self._atoms.student_has_rest
        self._matched = 0.0, 0.0

    @torch.no_grad()
    def observe(self, inputs, predicting, *, vocab=None) -> TopK:
        self._check_vocab(vocab)
        compared, device = self.compared(inputs, predicting), predicting.device
        tokens, atoms = int(predicting.sum()), self._atoms.to(device)
        columns = atoms.count + 1  # and the span
        size = min(self.top_k or columns, columns)
        logp = torch.full((tokens, size), -math.inf, device=device, dtype=self._dtype)
        index = torch.arange(size, device=device).expand(tokens, size)
        if not self._has_rest:
            logp[:, 0] = 0.0  # at tokens that are not compared, as for the student
        self._matched = 0.0, 0.0
        if compared.inputs is None:
            return TopK(logp, index)
        index = index if size == columns else index.clone()
        known, side = self._observed(compared), compared.teacher
        inner, matched = _inner(known, side), 0.0
        for spans in torch.arange(len(side.first), device=device).split(_SPANS):
            whole = log_softmax_at(known, side.first[spans])
            matched += float(whole[:, atoms.teacher].exp().sum())
            coarse = atoms.coarsen(
                whole,
                side.token[spans],
                inner[spans],
                compared.atom[spans],
                single=side.length[spans] == 1,
                of_teacher=True,
            )
            coarse = coarse[:, :-1].to(logp)
            if not self._has_rest:
                coarse = coarse.log_softmax(-1)
            places = compared.student.first[spans]
            if size == columns:
                logp[places] = coarse
            else:
                logp[places], index[places] = coarse.topk(size)
        self._matched = matched, float(len(side.first))
        return TopK(logp, index)

    def student_view(self, q, inputs, predicting):
        """The student over common atoms, the span and, if there is one, the rest."""
        compared, atoms = self.compared(inputs, predicting), self._atoms.to(predicting.device)
        side = compared.student
        coarse = atoms.coarsen(
            log_softmax_at(q, side.first),
            side.token,
            _inner(q, side),
            compared.atom,
            single=side.length == 1,
            of_teacher=False,
        )
        if not self._has_rest:
            coarse = coarse[:, :-1]
        other = coarse.new_full((int(predicting.sum()), coarse.shape[-1]), -math.inf)
        other[:, -1 if self._has_rest else 0] = 0.0  # at tokens that are not compared
        return other.index_copy(0, side.first, coarse)

    def figures(self, inputs, predicting):
        """Of the batch that was observed last."""
        compared = self.compared(inputs, predicting)
        of_student, of_teacher = compared.student.length, compared.teacher.length
        single = (of_student == 1) & (of_teacher == 1)
        return {
            "aligned_tokens": (float(of_student.sum()), float(predicting.sum())),
            "matched_mass": self._matched,
            "one_to_one": (float(single.sum()), float(len(single))),
        }

    def _is_compared(self, span, predicted):
        return all(predicted)


class SortedTeacher(AlignedTokens):
    """A teacher with another tokenizer, compared by its sorted probabilities: a baseline (ULD).

    Where a token begins on both sides, at the same byte, the largest probability of the teacher
    is compared with the student's largest, the second with the second, and so on; the shorter
    vocabulary is filled up with zeros. As f-divergences are linear where one side is 0, the ranks
    that one side alone has are one atom, from which nothing is lost.

    It does not know which token is which: a student that gives the teacher's probabilities to the
    wrong tokens has a divergence of 0. It teaches how sure to be, and of how many tokens, and
    nothing else: give a ``hard_label_weight`` beside it, as its authors do. Total variation is
    half of their loss. Its gradient is that of the probabilities as they are sorted now.

    A divergence that is infinite where one side has no mass, as KL(p ‖ q) is with a teacher of
    more tokens, is refused, and so is one that takes labels. The log has ``aligned_tokens``, the
    share of the trained tokens that are compared.

    Source: Boizard et al. (2024), arXiv 2402.12030, eq. (5); there places are compared by their
    number, here where they begin at the same byte.

    Args:
        model: The teacher.
        tokenizer: Its tokenizer.
        student_tokenizer: The student's.
    """

    def check_divergence(self, divergence: Divergence) -> None:
        if divergence.takes_labels:
            raise ValueError(
                f"divergence: {divergence} looks at the true token, and sorted probabilities "
                "have lost which one that is."
            )
        ours, theirs = self.vocab, self.head.vocab
        if ours == theirs:
            return
        whole = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
        part = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64).log()
        pair = (whole, part) if theirs > ours else (part, whole)
        if not bool(divergence(*pair).isfinite().all()):
            more = "teacher" if theirs > ours else "student"
            raise ValueError(
                f"divergence: {divergence} is infinite on sorted probabilities, for the {more} "
                f"has more tokens ({theirs:,} of the teacher, {ours:,} of the student), where the "
                "other has no mass. Take TotalVariation() or JensenShannon()."
            )

    @torch.no_grad()
    def observe(self, inputs, predicting, *, vocab=None) -> Float[Tensor, "tokens ranks"]:
        self._check_vocab(vocab)
        compared = self.compared(inputs, predicting)
        told = self._nowhere(predicting)
        if compared.inputs is None:
            return told
        known, first = self._observed(compared), compared.teacher.first
        for spans in torch.arange(len(first), device=first.device).split(_SPANS):
            ranked = self._ranked(log_softmax_at(known, first[spans]))
            told[compared.student.first[spans]] = ranked.to(told)
        return told

    def student_view(self, q, inputs, predicting):
        """The student's sorted log-probabilities, and those of its last ranks as one."""
        first = self.compared(inputs, predicting).student.first
        ranked = self._ranked(log_softmax_at(q, first))
        return self._nowhere(predicting).to(ranked).index_copy(0, first, ranked)

    def figures(self, inputs, predicting):
        count = len(self.compared(inputs, predicting).student.first)
        return {"aligned_tokens": (float(count), float(predicting.sum()))}

    def _is_compared(self, span, predicted):
        return predicted[0]

    def _ranked(self, logp: Float[Tensor, "spans vocab"]) -> Float[Tensor, "spans ranks"]:
        top, index = logp.topk(min(self.vocab, self.head.vocab), dim=-1)
        tail = logp.scatter(-1, index, -math.inf)
        one = torch.zeros(logp.shape[-1], dtype=torch.long, device=logp.device)
        return torch.cat([top, _grouped_logsumexp(tail, one, 1)], -1)

    def _nowhere(self, predicting: Tensor) -> Float[Tensor, "tokens ranks"]:
        """The same one atom for teacher and student, at tokens that are not compared."""
        ranks = min(self.vocab, self.head.vocab) + 1
        how: Any = {"device": predicting.device, "dtype": self._dtype}
        told = torch.full((int(predicting.sum()), ranks), -math.inf, **how)
        told[:, 0] = 0.0
        return told


def align_teacher(
    kind: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    *,
    top_k: int | None = None,
) -> OtherTokens:
    """The teacher of a kind of alignment.

    Args:
        kind: By the text that it writes, by bytes, or by sorted probabilities.
        model: The teacher.
        tokenizer: Its tokenizer.
        student_tokenizer: The student's.
        top_k: Number of common atoms, of an alignment by bytes.
    """
    if kind == "bytes":
        return AlignedTeacher(model, tokenizer, student_tokenizer, top_k=top_k)
    made = {"text": TextTeacher, "sorted": SortedTeacher}[kind]
    return made(model, tokenizer, student_tokenizer)


@dataclass(frozen=True)
class _Atoms:
    """The common atoms of student and teacher, by the tokens that count as each.

    Attributes:
        count: How many there are; what counts as none of them has this number.
        of_student: The atom of each of the student's tokens.
        of_teacher: The atom of each of the teacher's.
        student: The student's token that is each atom.
        teacher: The teacher's token that is each atom.
        student_has_rest: Whether one of the student's tokens counts as none.
    """

    count: int
    of_student: Int[Tensor, " ours"]
    of_teacher: Int[Tensor, " theirs"]
    student: Int[Tensor, " atoms"]
    teacher: Int[Tensor, " atoms"]
    student_has_rest: bool

    @classmethod
    def of(cls, translation: Translation, *, prefix: bool) -> "_Atoms":
        pair = translation.source_atoms, translation.target_atoms
        columns = translation.columns(prefix=prefix)
        tensors = (torch.from_numpy(it) for it in (*columns, *pair))
        has_rest = bool((columns[0] == len(pair[0])).any())
        return cls(len(pair[0]), *tensors, student_has_rest=has_rest)

    def to(self, device: torch.device) -> "_Atoms":
        fields = self.of_student, self.of_teacher, self.student, self.teacher
        moved = (it.to(device) for it in fields)
        return _Atoms(self.count, *moved, student_has_rest=self.student_has_rest)

    def coarsen(
        self,
        logp: Float[Tensor, "spans vocab"],
        token: Int[Tensor, " spans"],
        inner: Float[Tensor, " spans"],
        atom: Int[Tensor, " spans"],
        *,
        single: Bool[Tensor, " spans"],
        of_teacher: bool,
    ) -> Float[Tensor, "spans coarse"]:
        """Log-probabilities of the common atoms, of the span that is there, and of the rest.

        Args:
            logp: Of all tokens, where a span begins.
            token: The first token of the span.
            inner: Log-probability of its other tokens given the first; 0 without any.
            atom: The common atom that the span is; -1 where it is none.
            single: Where the span is one token.
            of_teacher: Whose tokens these are.
        """
        ids = self.teacher if of_teacher else self.student
        column = self.of_teacher if of_teacher else self.of_student
        rows = torch.arange(len(logp), device=logp.device)
        own = single & (atom >= 0)
        if self.count:
            own = own & (ids[atom.clamp_min(0)] == token)
        # The first token is divided in two: the span goes on from it, or other text does.
        first = logp[rows, token]
        moved = (~own).nonzero()[:, 0]
        less = first + _log_of_rest(inner)
        logp = logp.index_put((rows[moved], token[moved]), less[moved])
        coarse = _grouped_logsumexp(logp, column, self.count + 1)
        span = coarse.new_full((len(coarse), 1), -math.inf)
        coarse = torch.cat([coarse[:, :-1], span, coarse[:, -1:]], -1)
        here = rows[moved], atom.where(atom >= 0, self.count)[moved]
        return coarse.index_put(here, _logaddexp(coarse[here], (first + inner)[moved]))


def _grouped_logsumexp(
    logp: Float[Tensor, "spans vocab"], column: Int[Tensor, " vocab"], count: int
) -> Float[Tensor, "spans columns"]:
    """Log of the sums over the tokens of each column; of an empty one −inf, with no gradient."""
    columns = column.expand(len(logp), -1)
    empty = logp.new_full((len(logp), count), -math.inf)
    top = empty.scatter_reduce(1, columns, logp.detach(), "amax")
    there = top > -math.inf
    offset = top.masked_fill(~there, 0.0)
    terms = (logp - offset.gather(1, columns)).exp()
    total = torch.zeros_like(empty).index_add(1, column, terms)
    return (total.masked_fill(~there, 1.0).log() + offset).where(there, empty)


def _logaddexp(some: Tensor, others: Tensor) -> Tensor:
    """log(eˣ + eʸ), without a NaN in the gradient where x is −inf."""
    alone = some == -math.inf
    return torch.logaddexp(some.masked_fill(alone, 0.0), others).where(~alone, others)


def _log_of_rest(inner: Float[Tensor, " spans"]) -> Float[Tensor, " spans"]:
    """log(1 − eˣ) of log-probabilities; −inf, and no gradient, where x is 0."""
    below = inner < 0
    safe = inner.where(below, torch.full_like(inner, -1.0))
    return (-safe.expm1()).log().where(below, torch.full_like(inner, -math.inf))


def _inner(known: Known, side: Side) -> Float[Tensor, " spans"]:
    """Log-probability of the other tokens of each span, given its first."""
    parts = [
        log_softmax_at(known, rows).gather(-1, tokens[:, None])[:, 0]
        for rows, tokens in zip(
            side.inner.split(_SPANS), side.inner_token.split(_SPANS), strict=True
        )
    ]
    terms = torch.cat(parts)
    return terms.new_zeros(len(side.first)).index_add(0, side.inner_span, terms)


def _numbers(predicting: Tensor) -> Tensor:
    """The number of each predicted token, row after row."""
    return (predicting.flatten().cumsum(0) - 1).view_as(predicting)


class _Rows:
    """Collects the tokens of spans for a :class:`Side`."""

    def __init__(self):
        self.columns: list[list[int]] = [[], [], [], [], [], []]

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        first, token, inner, inner_token, inner_span, length = self.columns
        inner += rows[1:]
        inner_token += tokens[1:]
        inner_span += [len(first)] * (len(rows) - 1)
        length.append(len(rows))
        first.append(rows[0])
        token.append(tokens[0])

    def side(self, device: torch.device) -> Side:
        return Side(*(torch.tensor(it, dtype=torch.long, device=device) for it in self.columns))


def _teacher_rows(
    kept: list[tuple[Reading, list[Span]]], device: torch.device
) -> tuple[Side, dict[str, Tensor] | None, Tensor | None]:
    """The tokens of spans on the teacher's side, its batch, and what it predicts there."""
    rows = _Rows()
    if not kept:
        return rows.side(device), None, None
    lengths = [max(it.target[1] for it in spans) for _, spans in kept]
    texts = [
        torch.tensor(reading.tokens[:length])
        for (reading, _), length in zip(kept, lengths, strict=True)
    ]
    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(it) for it in texts], batch_first=True)
    predicting = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    for row, (_, spans) in enumerate(kept):
        for span in spans:
            predicting[row, span.target[0] - 1 : span.target[1] - 1] = True
    numbers = _numbers(predicting).tolist()
    for row, (reading, spans) in enumerate(kept):
        for span in spans:
            begin, end = span.target
            rows.add(numbers[row][begin - 1 : end - 1], reading.tokens[begin:end])
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return rows.side(device), batch, predicting.to(device)
