"""Any two models, without a run: how far apart they are, and what one is worth as a draft."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rkl import checks
from rkl.checks import number, warn
from rkl.distill.evaluate import log_probabilities, tokenizer_of
from rkl.distill.limits import (
    check_context,
    check_counts,
    check_temperature,
    context_of,
    default_length,
    divergence_named,
)
from rkl.distill.models.heads import read_head, why_not_apart
from rkl.distill.models.loading import load_model
from rkl.distill.progress import quiet
from rkl.distill.teachers.teacher import ModelTeacher
from rkl.distill.text.batches import PadRows, attended, shifted
from rkl.distill.text.chats import choose_template
from rkl.distill.text.data import TEACHER_IDS, TokenDataset, holds_chats, spread, tokenize
from rkl.distill.text.sources import read_rows
from rkl.distill.text.vocabulary import SAMPLE, check_splits_alike, share_vocabulary
from rkl.distill.writing.rollouts import ModelWriter, Reply
from rkl.distill.writing.sampling import Sampling
from rkl.divergences import KL, Divergence, ReverseKL, TotalVariation
from rkl.runs import check_out_file, write_json
from rkl.runs.processes import world
from rkl.runs.progress import Progress
from rkl.stats import Mean, clustered_mean, mean, to_json
from rkl.tables import Table, pair_of

DIVERGENCES: Mapping[str, Divergence] = {
    "forward-kl": KL(),
    "reverse-kl": ReverseKL(),
    "tv": TotalVariation(),
}
PERCENTILES = 50, 90, 99, 99.9, 100
BINS = 15  # of confidence, for the calibration error
RESAMPLES = 200  # of the blocks, for the errors of percentiles and of the calibration error


@dataclass(frozen=True)
class PairSettings:
    """Settings of ``rkl evaluate`` for any two models.

    Args:
        teacher: The model to compare with, p, whose drafts the student may write: a folder, a
            .gguf file, package:NAME or a name on the Hub.
        data: The text: a file (.jsonl, .json, .csv, .parquet, .txt), a folder of datasets'
            save_to_disk, or the name of a data set on the Hub.
        split: Which split of --data is read, where it has several.
        divergences: What to measure beside forward KL, reverse KL and TV, such as
            neg-log-acceptance; nothing else by default.
        chat_template: A file with the chat template to use; by default the student's, or the
            teacher's where the student has none.
        max_length: Longest block, in tokens, at most the models' context; by default 512, or the
            context where that is shorter.
        max_blocks: Number of blocks to measure, from the first on; by default all.
        batch_size: Blocks run together, which decides the memory needed.
        vocab: The tokens that the student may draft: a file with their numbers, in JSON or one
            a line, or how many, from the first on; by default all. The teacher is renormalised
            over them in the divergences, and the mass that it has elsewhere is shown.
        contexts: Texts after which a draft is written, at most one in each block; 0 leaves the
            drafts out.
        prefix: Length in tokens of what a context takes from the data.
        own: Tokens that the teacher then writes, so that the context is its own text.
        draft_length: Longest draft, in tokens.
        cost: Time of one token of the student as a share of the teacher's, for the speed-up; by
            default the share of their numbers of parameters.
        temperature: What the logits of both are divided by while drafting, above 0.
        seed: Of the texts that are written.
        device: Such as "cpu" or "cuda:1"; by default a GPU if there is one.
        out: File for the result in JSON; by default none is written.
    """

    teacher: str
    data: str
    split: str = "test"
    divergences: tuple[str, ...] = ()
    chat_template: str | None = None
    max_length: int | None = None
    max_blocks: int | None = None
    batch_size: int = 8
    vocab: str | None = None
    contexts: int = 256
    prefix: int = 32
    own: int = 16
    draft_length: int = 8
    cost: float | None = None
    temperature: float = 1.0
    seed: int = 0
    device: str | None = None
    out: Path | None = None

    def __post_init__(self):
        check_counts(self, "max_blocks", "batch_size", "prefix", "draft_length")
        check_counts(self, "contexts", "own", "seed", at_least=0)
        check_counts(self, "max_length", at_least=2)
        check_temperature(self)
        if self.cost is not None:
            number("cost", self.cost, at_least=0)
        if isinstance(self.divergences, str):
            raise TypeError(f"divergences must be a tuple of names; got {self.divergences!r}.")
        for text in self.divergences:
            if divergence_named(text).takes_labels and self.vocab is not None:
                raise ValueError(f"divergences: {text} looks at the true token; leave out vocab.")
        checks.device(self.device)


@dataclass(frozen=True)
class Comparison:
    """A student compared with a teacher; prints as a table.

    Attributes:
        result: All figures, as JSON holds them; ``{"value", "error"}`` each.
    """

    result: Mapping[str, Any]

    def rows(self) -> list[tuple[Any, ...]]:
        """Names of the measurements, and their values with errors."""
        found = self.result
        rows: list[tuple[Any, ...]] = [
            ("perplexity of the teacher", pair_of(found["perplexity"]["teacher"])),
            ("perplexity of the student", pair_of(found["perplexity"]["student"])),
            ("ratio of the perplexities", pair_of(found["perplexity"]["ratio"])),
            ("same likeliest token", pair_of(found["top1_agreement"])),
            ("calibration error of the teacher", pair_of(found["calibration_error"]["teacher"])),
            ("calibration error of the student", pair_of(found["calibration_error"]["student"])),
        ]
        for name, it in found["divergences"].items():
            unit = "share of mass" if name == "tv" else "nats/token"
            rows.append((f"{name} ({unit})", pair_of(it)))
            rows += [(f"  {at} %", pair_of(value)) for at, value in it["percentiles"].items()]
        if "mass_left_out" in found:
            rows.append(("mass of the teacher left out", pair_of(found["mass_left_out"])))
        rows.append(("acceptance of a token", pair_of(found["acceptance"])))
        if "drafts" in found:
            drafts = found["drafts"]
            for length, accepted, speed_up in zip(
                drafts["lengths"], drafts["accepted"], drafts["speed_up"], strict=True
            ):
                rows.append((f"accepted of {length} drafted", pair_of(accepted)))
                rows.append(("  speed-up", pair_of(speed_up)))
        return rows

    def table(self) -> Table:
        """The figures with their standard errors, and what they are."""
        notes = ["Standard errors in units of the last digit, from block to block."]
        if drafts := self.result.get("drafts"):
            notes.append(
                f"Speed-ups count a drafted token as {drafts['cost']:.3g} of a token of the "
                f"teacher's; {drafts['contexts']} contexts."
            )
        columns = "", Path(self.result["student"]).name
        return Table(f"Beside {self.result['teacher']}", columns, self.rows(), notes)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@quiet()
def evaluate_pair(student: str | os.PathLike, settings: PairSettings) -> Comparison:
    """Compare any two models on text, as distributions and as a draft with its target.

    Args:
        student: The model q, given as --teacher is.
        settings: What to compare it with, and how.

    Returns:
        The result, which prints as a table.
    """
    if world().size > 1:
        raise ValueError(f"two models are compared in one process; {world().size} were started.")
    if settings.out is not None:
        check_out_file(settings.out, inputs={"data": settings.data})
    name = os.fspath(student)
    q, p = load_model(name), load_model(settings.teacher)
    max_length = settings.max_length or default_length(map(context_of, (q, p)))
    settings = replace(settings, max_length=max_length)
    for side, model in (("student", q), ("teacher", p)):
        check_context(side, model, max_length)
        cast(nn.Module, model).eval().to(checks.device(settings.device))
    of_p, of_q = tokenizer_of(settings.teacher), tokenizer_of(name)
    if (tokenizer := of_q or of_p) is None:
        raise ValueError(
            f"neither {name} nor {settings.teacher} has a tokenizer to read text with."
        )
    rows = read_rows(settings.data, split=settings.split)
    template = choose_template(of_p or tokenizer, tokenizer, settings.chat_template)
    if template and holds_chats(rows):
        warn(template)
    blocks = tokenize(rows, tokenizer, max_length=max_length)
    if TEACHER_IDS in blocks.columns:
        raise ValueError(
            f"data: {settings.data} has prompts for the teacher (teacher_prompt or "
            "privileged_context), and two models are compared on the same text. Leave them out."
        )
    if of_p is not None and (told := check_splits_alike(blocks.sample(SAMPLE), of_p, tokenizer)):
        warn(told)
    with Progress("comparing block") as shown:
        compared = compare_models(
            student=q,
            teacher=p,
            blocks=blocks,
            settings=settings,
            tokenizers=(of_p, of_q),
            progress=shown.update,
        )
    result = {"student": name, "teacher": settings.teacher} | compared
    result["settings"] = asdict(settings) | {"out": None}
    if settings.out is not None:
        write_json(settings.out, result)
    return Comparison(result)


def compare_models(
    *,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: TokenDataset,
    settings: PairSettings,
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The figures of :func:`evaluate_pair`, of models and blocks that are at hand."""
    p, q = ModelTeacher(teacher), read_head(student)
    shared = share_vocabulary(p.vocab, q.vocab, *tokenizers)
    if blocks.begins is not None and any(map(why_not_apart, (student, teacher))):
        blocks = blocks.unpacked()
    allowed = _allowed(settings.vocab, shared.size)
    divergences = {**DIVERGENCES, **{it: divergence_named(it) for it in settings.divergences}}
    places = range(min(len(blocks), settings.max_blocks or len(blocks)))
    columns, rows, first = [], [], 0
    for padded in DataLoader(Subset(blocks, places), settings.batch_size, collate_fn=PadRows()):
        batch = shifted({name: x.to(student.device) for name, x in padded.items()})
        if shared.differing:
            shared.check("data", batch.inputs["input_ids"][attended(batch.inputs)])
        known = (it.observe(batch.inputs, batch.predicting, vocab=shared.size) for it in (p, q))
        for part, logp, logq in log_probabilities(*known):
            columns.append(_columns(logp, logq, batch.targets[part], divergences, allowed))
        rows.append(first + batch.predicting.nonzero()[:, 0].cpu())
        first += len(batch.predicting)
        if progress is not None:
            progress(first, len(places))
    if not columns:
        raise ValueError("data has no tokens to compare the models on.")
    by_token = {name: torch.cat([it[name] for it in columns]) for name in columns[0]}
    result = _summarise(by_token, torch.cat(rows), divergences)
    if settings.contexts:
        passed = draft_survival(
            student=student,
            teacher=teacher,
            prefixes=_prefixes(blocks, places, settings),
            settings=settings,
            vocab=shared.size,
            allowed=allowed,
        )
        cost = settings.cost
        if cost is None:
            cost = student.num_parameters() / teacher.num_parameters()
        result["drafts"] = _drafts(passed, cost)
    return result


def _allowed(text: str | None, vocab: int) -> Int[Tensor, " allowed"] | None:
    """The tokens that may be drafted, by number; None where all may."""
    if text is None:
        return None
    if text.isdecimal():
        numbers: Any = list(range(int(text)))
    else:
        try:
            written = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise type(error)(f"vocab: {text}: {error.strerror}") from None
        try:
            numbers = json.loads(written)
        except ValueError:
            numbers = written.split()
    try:
        tokens = sorted({int(it) for it in numbers})
    except (TypeError, ValueError):
        raise ValueError(f"vocab must hold numbers of tokens; {text} does not.") from None
    if not tokens or tokens[0] < 0 or tokens[-1] >= vocab:
        span = f"{tokens[0]} to {tokens[-1]}" if tokens else "none"
        raise ValueError(f"vocab must hold numbers of tokens in [0, {vocab}); got {span}.")
    return torch.tensor(tokens)


def _columns(
    logp: Float[Tensor, "tokens vocab"],
    logq: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    divergences: Mapping[str, Divergence],
    allowed: Int[Tensor, " allowed"] | None,
) -> dict[str, Float[Tensor, " tokens"]]:
    best = {"teacher": logp.max(-1), "student": logq.max(-1)}
    columns = {"top1": best["teacher"].indices == best["student"].indices}
    for name, log in (("teacher", logp), ("student", logq)):
        columns[f"{name}.cross_entropy"] = -log.gather(-1, targets[:, None]).squeeze(-1)
        columns[f"{name}.confidence"] = best[name].values.exp()
        columns[f"{name}.hit"] = best[name].indices == targets
    if allowed is not None:
        logp, logq = (x[:, allowed.to(x.device)] for x in (logp, logq))
        logq = logq.log_softmax(-1)
    columns["acceptance"] = torch.minimum(logp, logq).exp().sum(-1)
    if allowed is not None:
        inside = logp.logsumexp(-1, keepdim=True)
        columns["left_out"] = -inside.squeeze(-1).clamp_max(0.0).expm1()
        logp = logp - inside
    for name, divergence in divergences.items():
        labels = targets if divergence.takes_labels else None
        columns[name] = divergence(logp, logq, labels)
    return {name: values.double().cpu() for name, values in columns.items()}


def _summarise(
    by_token: Mapping[str, Float[Tensor, " tokens"]],
    rows: Int[Tensor, " tokens"],
    divergences: Mapping[str, Divergence],
) -> dict[str, Any]:
    """Means, percentiles and calibration errors; blocks are what is independent."""
    row, rows = rows.unique(return_inverse=True)
    blocks = len(row)
    count = rows.bincount(minlength=blocks).double()
    draws = torch.Generator().manual_seed(0)
    chosen = torch.randint(blocks, (RESAMPLES, blocks), generator=draws)
    weights = torch.zeros(RESAMPLES, blocks, dtype=torch.float64)
    weights.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))

    def mean_of(values: Tensor) -> Mean:
        sums = torch.zeros(blocks, dtype=torch.float64).index_add_(0, rows, values)
        return clustered_mean(sums, count)

    entropy = {side: mean_of(by_token[f"{side}.cross_entropy"]) for side in ("teacher", "student")}
    gap = mean_of(by_token["student.cross_entropy"] - by_token["teacher.cross_entropy"])
    result: dict[str, Any] = {
        "tokens": len(rows),
        "blocks": blocks,
        "perplexity": {side: to_json(_exponential(it)) for side, it in entropy.items()},
        "top1_agreement": to_json(mean_of(by_token["top1"])),
        "calibration_error": {
            side: to_json(_calibration(by_token, side, rows, weights)) for side in entropy
        },
        "acceptance": to_json(mean_of(by_token["acceptance"])),
        "divergences": {
            name: {
                "divergence": repr(it),
                **to_json(mean_of(by_token[name])),
                "infinite_tokens": int(by_token[name].isinf().sum()),
                "percentiles": _percentiles(by_token[name], rows, weights),
            }
            for name, it in divergences.items()
        },
    }
    result["perplexity"]["ratio"] = to_json(_exponential(gap))
    if "left_out" in by_token:
        result["mass_left_out"] = to_json(mean_of(by_token["left_out"]))
    return result


def _percentiles(
    values: Float[Tensor, " tokens"],
    rows: Int[Tensor, " tokens"],
    weights: Float[Tensor, "resamples blocks"],
) -> dict[str, Any]:
    """Percentiles over tokens, their errors from blocks drawn again."""
    ordered, order = values.sort()
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100

    def at(of_token: Tensor) -> Tensor:
        total = of_token.cumsum(0)
        places = torch.searchsorted(total, shares * total[-1] * (1 - 1e-12))
        return ordered[places.clamp_max(len(ordered) - 1)]

    value = at(torch.ones_like(ordered))
    again = torch.stack([at(weight[rows[order]]) for weight in weights])
    found = zip(PERCENTILES, value, again.std(0), strict=True)
    return {f"{share:g}": to_json(Mean(value, error)) for share, value, error in found}


def _calibration(
    by_token: Mapping[str, Tensor],
    side: str,
    rows: Int[Tensor, " tokens"],
    weights: Float[Tensor, "resamples blocks"],
) -> Mean:
    """Expected calibration error: |accuracy − confidence| of the likeliest token, over bins.

    Source: Guo et al. (2017), arXiv 1706.04599, eq. (3).
    """
    confidence, hit = by_token[f"{side}.confidence"], by_token[f"{side}.hit"]
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    gaps = torch.zeros(weights.shape[1] * BINS, dtype=torch.float64)
    gaps = gaps.index_add_(0, rows * BINS + bins, hit - confidence).reshape(-1, BINS)
    counts = rows.bincount(minlength=weights.shape[1]).double()
    again = (weights @ gaps).abs().sum(-1) / (weights @ counts)
    return Mean(gaps.sum(0).abs().sum() / counts.sum(), again.std())


def _exponential(it: Mean) -> Mean:
    value = it.value.exp()
    return Mean(value, value * it.error)


def _prefixes(
    blocks: TokenDataset, places: Sequence[int], settings: PairSettings
) -> Int[Tensor, "contexts prefix"]:
    """The beginnings of blocks, evenly spread over those that are long enough."""
    length = settings.prefix
    needed = length + settings.own + settings.draft_length
    if settings.max_length is not None and needed > settings.max_length:
        raise ValueError(
            f"prefix + own + draft_length must be at most max_length, {settings.max_length} "
            f"tokens; got {needed}."
        )
    long = [place for place in places if len(blocks[place]["input_ids"]) >= length]
    if not long:
        raise ValueError(
            f"prefix must be at most the length of a block; none of {len(places)} blocks has "
            f"{length} tokens."
        )
    return torch.stack(
        [blocks[place]["input_ids"][:length] for place in spread(long, settings.contexts)]
    )


class _Side(NamedTuple):
    """A model that writes, and what may be written."""

    model: PreTrainedModel
    temperature: float
    ends: Sequence[int]
    vocab: int
    banned: Sequence[int] = ()

    def write(self, texts: Int[Tensor, "texts length"], count: int, seed: int) -> list[Reply]:
        """So many tokens behind each text, or fewer where one ends it."""
        if not count:
            return [Reply([], False)] * len(texts)
        sampling = Sampling(count, self.temperature)
        how: Any = {"vocab": self.vocab, "banned": self.banned}
        return ModelWriter(self.model, sampling, self.ends, **how).write(texts.tolist(), seed=seed)

    def log_probabilities(
        self, texts: Int[Tensor, "texts length"], first: int
    ) -> Float[Tensor, "texts drafted vocab"]:
        """Those of the tokens from a place on, in double precision."""
        output = self.model(input_ids=texts, attention_mask=torch.ones_like(texts))
        logits = output.logits[:, first - 1 : -1, : self.vocab].double()
        logits[..., list(self.banned)] = -math.inf
        return (logits / self.temperature).log_softmax(-1)


@torch.no_grad()
def draft_survival(
    *,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prefixes: Int[Tensor, "texts prefix"],
    settings: PairSettings,
    vocab: int,
    allowed: Int[Tensor, " allowed"] | None = None,
) -> Float[Tensor, "contexts draft_length"]:
    """Chance that the first 1, 2, ... tokens of a draft all pass, context by context.

    The teacher goes on with each prefix, the student drafts x₁ ... x_k after that, and
    Π_{j<i} min(1, p(xⱼ)/q(xⱼ)) · Σ min(p, q) at the i-th place is an unbiased estimate of the
    chance that i tokens pass: the last factor is the mean of min(1, p/q) over its token. Contexts
    that the teacher ended are left out, and a draft that ends has no further tokens.
    """
    ends = _ends(teacher)
    p = _Side(teacher, settings.temperature, ends, vocab)
    may = range(vocab) if allowed is None else allowed.tolist()
    q = p._replace(model=student, banned=sorted({*range(vocab)} - {*may}))
    seeds = torch.Generator().manual_seed(settings.seed)
    found = []
    for part in prefixes.to(student.device).split(settings.batch_size):
        of_p, of_q = torch.randint(2**62, (2,), generator=seeds).tolist()
        replies = p.write(part, settings.own, of_p)
        going_on = [place for place, reply in enumerate(replies) if not reply.ended]
        if not going_on:
            continue
        own = part.new_tensor([replies[place].tokens for place in going_on])
        contexts = torch.cat([part[going_on], own.reshape(len(going_on), -1)], -1)
        drafts = q.write(contexts, settings.draft_length, of_q)
        found.append(_survival(p, q, contexts, drafts, settings.draft_length))
    if not found:
        raise ValueError(
            f"own must be shorter: the teacher ended all texts within {settings.own}."
        )
    return torch.cat(found).cpu()


def _survival(
    p: _Side, q: _Side, contexts: Int[Tensor, "texts length"], drafts: Sequence[Reply], length: int
) -> Float[Tensor, "texts drafted"]:
    tokens = torch.zeros(len(drafts), length, dtype=contexts.dtype, device=contexts.device)
    goes_on = torch.zeros_like(tokens, dtype=torch.bool)
    for row, draft in enumerate(drafts):
        tokens[row, : len(draft.tokens)] = tokens.new_tensor(draft.tokens)
        goes_on[row, : len(draft.tokens) - draft.ended] = True
    texts, first = torch.cat([contexts, tokens], -1), contexts.shape[1]
    logp, logq = (side.log_probabilities(texts, first) for side in (p, q))
    ratio = (logp - logq).gather(-1, tokens[..., None]).squeeze(-1).clamp_max(0.0).exp()
    before = torch.where(goes_on, ratio, 0.0).cumprod(-1).roll(1, -1)
    before[:, 0] = 1.0
    return before * torch.minimum(logp, logq).exp().sum(-1)


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def _drafts(passed: Float[Tensor, "contexts draft_length"], cost: float) -> dict[str, Any]:
    """Accepted tokens and speed-ups by the length of a draft.

    A round of k drafted tokens takes 1 + k · cost times as long as one token of the teacher, and
    gives the accepted ones and one more.
    """
    lengths = range(1, passed.shape[1] + 1)
    accepted = [mean(passed[:, :length].sum(-1)) for length in lengths]
    times = [1 + length * cost for length in lengths]
    return {
        "contexts": len(passed),
        "cost": cost,
        "lengths": list(lengths),
        "passed": [to_json(mean(column)) for column in passed.T],
        "accepted": [to_json(it) for it in accepted],
        "speed_up": [
            to_json(Mean((1 + it.value) / time, it.error / time))
            for it, time in zip(accepted, times, strict=True)
        ],
    }
