"""How near a student is to its teacher: exact, token by token, in one pass over held-out data."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rkl.distill.heads import Known, common_vocabulary, logits_of, read_head
from rkl.distill.teachers import ModelTeacher, Teacher
from rkl.distill.trainer import PadRows, shifted
from rkl.divergences import AKL, KL, Divergence, JensenShannon, ReverseKL, TotalVariation
from rkl.estimators import LinearHead
from rkl.metrics import Mean, clustered_mean
from rkl.metrics.precision_recall import SLOPES, pr_curve

DIVERGENCES: Mapping[str, Divergence] = {
    "forward-kl": KL(),
    "reverse-kl": ReverseKL(),
    "js": JensenShannon(),
    "tv": TotalVariation(),
}
HEAD = AKL(mu=0.5)  # its rule says which of the teacher's atoms are the head
NUCLEUS = AKL(mu=0.9, straddle="head")  # the smallest set of likeliest atoms with 90 % or more
RANKED = 4096  # ranks told apart; those behind them share a bin
ELEMENTS = 2**21  # of the logits of one model that exist at one time

Columns = dict[str, Float[Tensor, "tokens *columns"]]


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    dataset: Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    divergences: Mapping[str, Divergence] | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare a student with its teacher on the trained-on tokens of held-out blocks.

    Both models run once over each batch; logits exist for one chunk of tokens at a time, and
    all figures come from them. They are means per token, at temperature 1 and over the tokens
    that both vocabularies share, with standard errors that take blocks, not tokens, as
    independent (:func:`rkl.metrics.clustered_mean`): one block has none. A divergence that is
    infinite at any token is infinite; ``infinite_tokens`` says at how many.

    A divergence is also told by parts, which add up to it: the teacher's head (AKL's at
    mu = 0.5) and tail, and bins of ranks under the teacher. Parts are sums of the excess over
    the tangent plane at p = q, so that for f-divergences none of them is negative.

    Args:
        student: The model q.
        teacher: The model p, or anything else that can say it.
        dataset: Blocks with ``input_ids`` and ``labels``, as :func:`rkl.distill.data.tokenize`
            makes them.
        tokenizer: The one both share, needed where their numbers of logits differ.
        divergences: What to measure, by name; forward KL, reverse KL, JS and TV by default.
        batch_size: Blocks in a batch.
        progress: Called with the number of blocks done and of all.

    Returns:
        What JSON can hold; a mean is ``{"value", "error"}``, numbers or lists of them.
    """
    divergences = DIVERGENCES if divergences is None else divergences
    teacher = teacher if isinstance(teacher, Teacher) else ModelTeacher(teacher)
    head = read_head(student)
    vocab = common_vocabulary(teacher.vocab, head.vocab, student_tokenizer=tokenizer)
    sums = _Sums(len(dataset))  # pyright: ignore[reportArgumentType]
    first = 0
    for padded in DataLoader(dataset, batch_size, collate_fn=PadRows()):
        batch = shifted({name: values.to(student.device) for name, values in padded.items()})
        rows = batch.predicting.nonzero()[:, 0] + first
        p, q = (
            side.observe(batch.inputs, batch.predicting, vocab=vocab) for side in (teacher, head)
        )
        for part, logp, logq in _chunks(p, q):
            sums.add(rows[part], _columns(logp, logq, batch.targets[part], divergences))
        first += len(batch.predicting)
        if progress is not None:
            progress(first, sums.rows)
    return _result(sums, divergences, vocab)


class _Sums:
    """Sums over the tokens of each row, column by column, in double precision on the CPU."""

    def __init__(self, rows: int):
        self.rows = rows
        self.count = torch.zeros(rows, dtype=torch.float64)
        self.total: dict[str, Tensor] = {}

    def add(self, rows: Int[Tensor, " tokens"], columns: Columns) -> None:
        rows = rows.cpu()
        self.count.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
        for name, values in columns.items():
            values = values.double().cpu()
            shape = self.rows, *values.shape[1:]
            self.total.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            self.total[name].index_add_(0, rows, values)

    def mean(self, name: str) -> Mean:
        kept = self.count > 0
        return clustered_mean(self.total[name][kept], self.count[kept])


def _chunks(p: Known, q: Known) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The log-probabilities of some tokens at a time."""
    tokens, vocab = (len(q.hidden), len(q.weight)) if isinstance(q, LinearHead) else q.shape
    size = max(1, ELEMENTS // vocab)
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        with torch.no_grad():
            yield part, _log_probabilities(p, part), _log_probabilities(q, part)


def _log_probabilities(known: Known, part: slice) -> Float[Tensor, "chunk vocab"]:
    if isinstance(known, LinearHead):
        logits = logits_of(known._replace(hidden=known.hidden[part]))
    else:
        logits = known[part]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _columns(
    logp: Float[Tensor, "tokens vocab"],
    logq: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    divergences: Mapping[str, Divergence],
) -> Columns:
    """All that is measured of each token."""
    p, q = logp.exp(), logq.exp()
    index = targets[:, None]
    ranked = logp.topk(min(RANKED, logp.shape[-1])).indices
    head = _set_of(HEAD, logp)
    columns = {
        "teacher.cross_entropy": -logp.gather(-1, index).squeeze(-1),
        "student.cross_entropy": -logq.gather(-1, index).squeeze(-1),
        "teacher.entropy": torch.special.entr(p).sum(-1),
        "student.entropy": torch.special.entr(q).sum(-1),
        "top1": (ranked[:, 0] == logq.argmax(-1)).double(),
        "student.in_nucleus": (q * _set_of(NUCLEUS, logp)).sum(-1),
        "teacher.in_nucleus": (p * _set_of(NUCLEUS, logq)).sum(-1),
        "teacher.in_head": (p * head).sum(-1),
        "student.in_head": (q * head).sum(-1),
        "precision": pr_curve(p=logp, q=logq).precision,
        "teacher.by_rank": _by_rank(p, ranked),
        "student.by_rank": _by_rank(q, ranked),
    }
    for name, divergence in divergences.items():
        terms = divergence.excess(logp, logq, *divergence.held(logp, logq))
        columns[f"{name}:all"] = terms.sum(-1)
        columns[f"{name}:head"] = terms.masked_fill(~head, 0.0).sum(-1)
        columns[f"{name}:tail"] = terms.masked_fill(head, 0.0).sum(-1)
        columns[f"{name}:by_rank"] = _by_rank(terms, ranked)
        columns[f"{name}:infinite"] = columns[f"{name}:all"].isinf().double()
    return columns


def _set_of(rule: AKL, logp: Float[Tensor, "tokens vocab"]) -> Tensor:
    """The likeliest atoms that a rule picks, as a mask."""
    index, chosen = rule.search(logp)
    return torch.zeros_like(logp, dtype=torch.bool).scatter(-1, index, chosen)


def _edges(vocab: int) -> list[int]:
    """Where the bins of ranks begin, counted from 0, and where the last one ends."""
    edges, ranked = [0, 1], min(RANKED, vocab)
    while edges[-1] < ranked:
        edges.append(min(2 * edges[-1], ranked))
    return [*edges, vocab] if vocab > ranked else edges


def _by_rank(
    terms: Float[Tensor, "tokens vocab"], ranked: Int[Tensor, "tokens ranks"]
) -> Float[Tensor, "tokens bins"]:
    edges = [edge for edge in _edges(terms.shape[-1]) if edge <= ranked.shape[-1]]
    sizes = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
    parts = [part.sum(-1) for part in terms.gather(-1, ranked).split(sizes, -1)]
    if ranked.shape[-1] < terms.shape[-1]:
        parts.append(terms.scatter(-1, ranked, 0.0).sum(-1))
    return torch.stack(parts, -1)


def _result(sums: _Sums, divergences: Mapping[str, Divergence], vocab: int) -> dict[str, Any]:
    if not sums.count.sum():
        raise ValueError("dataset has no trained tokens: every label is -100.")
    sides = "teacher", "student"
    entropy = {side: sums.mean(f"{side}.cross_entropy") for side in sides}
    precision, slopes = sums.mean("precision"), torch.tensor(SLOPES)
    recall = Mean(*(part / slopes for part in precision))
    return {
        "tokens": int(sums.count.sum()),
        "blocks": int((sums.count > 0).sum()),
        "perplexity": {side: as_json(_exponential(it)) for side, it in entropy.items()},
        "cross_entropy": {side: as_json(it) for side, it in entropy.items()},
        "entropy": {side: as_json(sums.mean(f"{side}.entropy")) for side in sides},
        "top1_agreement": as_json(sums.mean("top1")),
        "mass_in_nucleus": {side: as_json(sums.mean(f"{side}.in_nucleus")) for side in sides},
        "mass_in_head": {side: as_json(sums.mean(f"{side}.in_head")) for side in sides},
        "divergences": {name: _divergence(sums, name, it) for name, it in divergences.items()},
        "precision_recall": {
            "slopes": list(SLOPES),
            "precision": as_json(precision),
            "recall": as_json(recall),
        },
        "ranks": {
            "edges": _edges(vocab),
            **{side: as_json(sums.mean(f"{side}.by_rank")) for side in sides},
        },
    }


def _divergence(sums: _Sums, name: str, divergence: Divergence) -> dict[str, Any]:
    return {
        "divergence": repr(divergence),
        **as_json(sums.mean(f"{name}:all")),
        "infinite_tokens": int(sums.total[f"{name}:infinite"].sum()),
        **{part: as_json(sums.mean(f"{name}:{part}")) for part in ("head", "tail", "by_rank")},
    }


def _exponential(mean: Mean) -> Mean:
    value = mean.value.exp()
    return Mean(value, value * mean.error)


def as_json(mean: Mean) -> dict[str, Any]:
    """A mean as JSON can hold it: numbers, or lists of them."""
    return {"value": mean.value.tolist(), "error": mean.error.tolist()}
