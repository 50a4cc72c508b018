"""Exact distances of a student from its teacher, per token, in one pass over held-out data."""

import os
import shlex
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rkl import checks
from rkl.checks import warn
from rkl.distill.compare import BY_BLOCK, Evaluations
from rkl.distill.generate import (
    Prompt,
    choose_prompts,
    finished,
    measure,
    reply_to,
    sampling_of,
    save,
)
from rkl.distill.known import Known, Observed, logits_of
from rkl.distill.limits import (
    check_context,
    check_counts,
    context_of,
    default_length,
    divergence_named,
    is_address,
    is_cache,
    published_column,
    template_variables,
)
from rkl.distill.models.heads import read_head, why_not_apart
from rkl.distill.models.layers import without_layers
from rkl.distill.models.loading import (
    in_hub_cache,
    is_adapter,
    load_model,
    load_tokenizer,
    model_input,
)
from rkl.distill.processes import Processes, joined
from rkl.distill.progress import quiet
from rkl.distill.settings import DistillSettings
from rkl.distill.teachers import self_teacher
from rkl.distill.teachers.several import RouteRows, SeveralTeachers
from rkl.distill.teachers.teacher import ModelTeacher, Teacher
from rkl.distill.text.batches import PadRows, attended, for_teacher, shifted
from rkl.distill.text.data import TokenDataset, passages, tokenize
from rkl.distill.text.sources import Row, Rows, read_rows
from rkl.distill.text.vocabulary import SAMPLE, check_splits_alike, share_vocabulary
from rkl.divergences import AKL, KL, Divergence, JensenShannon, ReverseKL, TotalVariation
from rkl.divergences.schedule import read_schedule
from rkl.estimators import LinearHead
from rkl.importing import names_in, only
from rkl.metrics.precision_recall import SLOPES, pr_curve
from rkl.runs import Run, fingerprint, finite_or_null, save_tensors, write_json
from rkl.runs.integrity import check_inputs, hub_name, inputs_before, local_path
from rkl.runs.progress import Progress
from rkl.stats import Mean, clustered_mean, to_json

DIVERGENCES: Mapping[str, Divergence] = {
    "forward-kl": KL(),
    "reverse-kl": ReverseKL(),
    "js": JensenShannon(),
    "tv": TotalVariation(),
    "akl": AKL(),
}
HEAD = AKL(mu=0.5)  # its rule says which of the teacher's atoms are the head
NUCLEUS = AKL(mu=0.9, straddle="head")  # the smallest set of likeliest atoms with 90 % or more
RANKED = 4096  # ranks told apart; those behind them share a bin
ELEMENTS = 2**23  # of the logits of one model that exist at one time
CACHED = 2**19  # of those that are measured together

Columns = dict[str, Float[Tensor, "tokens *columns"]]


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of ``rkl evaluate`` for a distilled student.

    Args:
        data: The held-out text: a file (.jsonl, .json, .csv, .parquet, .txt), a folder of
            datasets' save_to_disk, or the name of a data set on the Hub.
        split: Which split of --data is read, where it has several.
        teacher: The model to compare the student with: a folder, a .gguf file, package:NAME or a
            name on the Hub; by default the run's teacher.
        divergences: What to measure beside forward KL, reverse KL, JS, TV, AKL and what the run
            minimised, such as todi "skew-kl(alpha=0.3)"; nothing else by default.
        max_length: Longest block, in tokens; by default as long as in training.
        packing: Let short rows share a block; by default as in training.
        train_on: Of a chat, all turns of the assistant or the last; by default as in training.
        max_blocks: Number of blocks to measure, from the first on; by default all.
        batch_size: Blocks run together, which decides the memory needed.
        prompts: Number of prompts out of the data that the student replies to, at most; 0 leaves
            the replies out, which take most of the time.
        seeds: Replies to each prompt, drawn under --seed and the seeds that follow it.
        max_new_tokens: Longest reply, in tokens.
        temperature: What the logits of replies are divided by; 0 takes the likeliest token.
        top_p: Probability mass of the likeliest tokens that a reply is drawn from, above 0.
        seed: Of the first reply to each prompt.
        device: Such as "cpu" or "cuda:1"; by default a GPU if there is one.
    """

    data: str
    split: str = "test"
    teacher: str | None = None
    divergences: tuple[str, ...] = ()
    max_length: int | None = None
    packing: bool | None = None
    train_on: Literal["all", "last"] | None = None
    max_blocks: int | None = None
    batch_size: int = 8
    prompts: int = 16
    seeds: int = 3
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        check_counts(self, "max_blocks", "batch_size", "seeds")
        check_counts(self, "prompts", at_least=0)
        check_counts(self, "max_length", at_least=2)
        if isinstance(self.divergences, str):
            raise TypeError(f"divergences must be a tuple of names; got {self.divergences!r}.")
        for text in self.divergences:
            divergence_named(text)
        checks.device(self.device)
        sampling_of(self)


@quiet()
def evaluate_run(
    path: str | os.PathLike, settings: EvaluateSettings, *, allow: Collection[str] = ()
) -> Evaluations:
    """Evaluate the student of a run on held-out data, and let it write.

    The run keeps the result as ``evaluation.json`` and the replies as ``generations.jsonl``; the
    comparison is kept before the replies are drawn. Rows are cut and packed as in training. Rows
    that the run was trained on are warned of, for on them it is not held to anything, and so are
    rows that give no prompt, which are passed over.

    Args:
        path: The folder of the run.
        settings: What to evaluate, and how.
        allow: What its ``run.json`` may have imported, each "module:name".

    Returns:
        The result, which prints as a table.
    """
    with joined(settings.device) as processes:
        return _evaluate_run(path, settings, allow, processes)


def _evaluate_run(
    path: str | os.PathLike,
    settings: EvaluateSettings,
    allow: Collection[str],
    processes: Processes,
) -> Evaluations:
    parts = processes.together(lambda: _load(path, settings, allow))
    run, student, rows, blocks = parts.run, parts.student, parts.rows, parts.blocks
    places = range(min(len(blocks), settings.max_blocks or len(blocks)))
    with Progress("evaluating block", shown=processes.main) as shown:
        sums, vocab = processes.together(
            lambda: _summed(
                student,
                parts.teacher,
                blocks,
                places[processes.world.rank :: processes.count],
                len(places),
                tokenizer=parts.tokenizer,
                teacher_tokenizer=parts.teacher_tokenizer,
                divergences=parts.divergences,
                batch_size=settings.batch_size,
                progress=shown.update,
                collate=parts.collate,
            )
        )
    sums.merge(processes.gather(sums))
    result = processes.together(lambda: _result(sums, parts.divergences, vocab))
    result["data"] = {"fingerprint": fingerprint(rows), "rows": len(rows)}
    result["data"] |= {"left_out": blocks.left_out, "reasons": blocks.reasons}
    result["settings"] = asdict(settings) | parts.shape
    by_block = {
        name: torch.tensor(it, dtype=torch.float64) for name, it in result.pop("by_block").items()
    }

    def keep() -> None:  # before the replies, which may fail
        run.record_files([BY_BLOCK, "evaluation.json"])
        save_tensors(run.path / BY_BLOCK, by_block)
        write_json(run.path / "evaluation.json", finite_or_null(result))

    processes.on_main(keep)
    prompts = parts.prompts
    if prompts:
        seeds = range(settings.seed, settings.seed + settings.seeds)
        chosen = seeds[processes.world.rank :: processes.count]
        said = processes.together(
            lambda: reply_to(prompts, student, parts.tokenizer, settings, seeds=chosen)
        )
        by_seed = [it for replies in processes.gather(said) for it in replies]
        replies = sorted(by_seed, key=lambda reply: reply.seed)
        result["generations"] = {name: to_json(it) for name, it in measure(replies).items()}
        result["prompts"] = {"count": len(prompts), "passed_over": parts.passed_over}

        def keep_replies() -> None:
            run.record_files(["generations.jsonl"])
            save(run.path / "generations.jsonl", replies)
            write_json(run.path / "evaluation.json", finite_or_null(result))
            run.measure_files(["generations.jsonl"])

        processes.on_main(keep_replies)
    processes.on_main(lambda: run.measure_files([BY_BLOCK, "evaluation.json"]))
    return Evaluations({Path(path).name or str(path): result})


class _Parts(NamedTuple):
    run: Run
    divergences: dict[str, Divergence]
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    student: PreTrainedModel
    teacher: Any
    shape: dict[str, Any]
    blocks: TokenDataset
    prompts: list[Prompt]
    passed_over: str
    collate: Callable[[Any], Any]


def _load(path: str | os.PathLike, settings: EvaluateSettings, allow: Collection[str]) -> _Parts:
    run = finished(path)
    divergences = _divergences(run, settings, allow)
    several = _teachers_of(run, settings)
    column = (run.settings.get("teacher_routing_column") or "teacher_id") if several else None
    rows = read_rows(settings.data, split=settings.split, column=column)
    _warn_of_seen(run, rows)
    tokenizer = load_tokenizer(run.path)
    student, (teacher, of_teacher) = load_model(run.path), _load_teacher(run, settings)
    teachers: dict[str, Any] = {"teacher": teacher}
    if isinstance(teacher, SeveralTeachers):
        teachers = {f"teacher {name}": it.model for name, it in teacher.teachers.items()}
    measured = {"student": student} | teachers
    max_length: int = (
        settings.max_length
        or run.settings.get("max_length")
        or default_length(map(context_of, measured.values()))
    )
    for name, model in measured.items():
        check_context(name, model, max_length)
        cast(nn.Module, model).to(checks.device(settings.device))
    shape: dict[str, Any] = {"max_length": max_length}
    for name in ("packing", "train_on"):
        chosen, default = getattr(settings, name), getattr(DistillSettings, name)
        shape[name] = run.settings.get(name, default) if chosen is None else chosen
    variables = template_variables(run.settings.get("chat_template_kwargs"))
    how: Any = {"chat_template_kwargs": variables, "column": column}
    blocks = tokenize(rows, tokenizer, **how, **shape)
    models = [it for it in (student, *teachers.values()) if isinstance(it, nn.Module)]
    if blocks.begins is not None and any(map(why_not_apart, models)):
        blocks = blocks.unpacked()
    if of_teacher is not None:
        told = check_splits_alike(blocks.sample(SAMPLE), of_teacher, tokenizer)
        if told:
            warn(told)
    prompts, passed_over = _prompts(rows, tokenizer, student, settings, variables)
    models = tokenizer, of_teacher, student, teacher
    collate = PadRows() if column is None else RouteRows(PadRows(), column, [*several])
    return _Parts(run, divergences, rows, *models, shape, blocks, prompts, passed_over, collate)


def _prompts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    settings: EvaluateSettings,
    variables: Mapping[str, Any],
) -> tuple[list[Prompt], str]:
    """Prompts for the student's replies; warns of rows that give none."""
    if not settings.prompts:
        return [], ""
    try:
        prompts, passed_over = choose_prompts(
            rows, tokenizer, student, settings, chat_template_kwargs=variables
        )
    except ValueError as error:
        prompts, passed_over = [], str(error)
    if passed_over:
        what = "Rows that give no prompt are passed over" if prompts else "No replies are measured"
        warn(f"{what}: {passed_over.rstrip('.')}.")
    return prompts, passed_over


def _warn_of_seen(run: Run, rows: Sequence[Row]) -> None:
    parts = list(passages(rows))
    if seen := run.count_seen(parts):
        warn(
            f"{seen:,} of {len(parts):,} passages were trained on by {run.path}: the student is "
            "not held to what it has not seen. Evaluate on other data."
        )


def _load_teacher(
    run: Run, settings: EvaluateSettings
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The teacher that is asked for, or those that the run learned from; a tokenizer of it."""
    if settings.teacher is not None:
        return load_model(settings.teacher), tokenizer_of(settings.teacher)
    if (kind := run.settings.get("teacher_model_kind")) is not None:
        return _load_self_teacher(run, kind)
    if several := _teachers_of(run, settings):
        found = {name: _recorded(run, f"teacher {name}", it) for name, it in several.items()}
        teachers = {name: ModelTeacher(cast(nn.Module, it)) for name, (it, _) in found.items()}
        return SeveralTeachers(teachers), next(iter(found.values()))[1]
    name = run.settings.get("teacher")
    if not isinstance(name, str):
        raise ValueError(f"teacher must be given: {run.path} does not say which it had.")
    quoted = shlex.quote(str(run.path))
    if (kind := run.settings.get("teacher_alignment")) is not None:
        raise ValueError(
            f"teacher must be given: {run.path} learned from {name} with teacher_alignment="
            f"{kind}, whose tokens are not the student's. Compare with a model that has them: "
            f"rkl evaluate {quoted} --data DATA --teacher FOLDER"
        )
    if is_address(name):
        raise ValueError(
            f"teacher must be given: {run.path} learned from {name}, a server that gives part of "
            "each distribution, and the whole is needed. Of the same weights here: "
            f"rkl evaluate {quoted} --data DATA --teacher FOLDER"
        )
    if is_cache(name):
        raise ValueError(
            f"teacher must be given: {run.path} learned from {name}, a cache of the rows that it "
            f"was trained on. Of the same weights: rkl evaluate {quoted} --data DATA --teacher "
            "FOLDER"
        )
    if published_column(name) is not None:
        raise ValueError(
            f"teacher must be given: {run.path} learned from {name}, a column of the rows that it "
            f"was trained on. Of the same weights: rkl evaluate {quoted} --data DATA --teacher "
            "FOLDER"
        )
    return _recorded(run, "teacher", name)


def _teachers_of(run: Run, settings: EvaluateSettings) -> dict[str, str]:
    """Several teachers of a run by their names, unless another is asked for."""
    given = run.settings.get("teachers") or ()
    if settings.teacher is not None:
        return {}
    return {name: path for name, _, path in (text.partition("=") for text in given)}


def _load_self_teacher(run: Run, kind: str) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The student of a run as its own teacher was when the student that is kept was saved."""
    tokenizer = load_tokenizer(run.path)
    if kind == "base":
        name, dropped = str(run.settings.get("student")), run.settings.get("drop_layers")
        if name.endswith(".json"):
            raise ValueError(
                f"teacher must be given: {run.path} learned from itself with random weights, "
                "which are kept nowhere."
            )
        model, _ = _recorded(run, "student", name)
        return (model if dropped is None else without_layers(model, dropped)), tokenizer
    model = load_model(run.path)
    if kind == "ema":
        if not (file := run.path / self_teacher.FILE).is_file():
            raise ValueError(
                f"teacher must be given: {run.path} learned from its moving average, and holds no "
                f"{self_teacher.FILE}."
            )
        self_teacher.load_average(cast(nn.Module, model), file)
    return model, tokenizer


def _recorded(run: Run, key: str, name: str) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The very model that a run began with, and its tokenizer.

    Args:
        run: The run.
        key: Under which ``run.json`` has its digests.
        name: As the settings have it.
    """
    quoted = shlex.quote(str(run.path))
    hint = f"Say where it is now: rkl evaluate {quoted} --data DATA --teacher FOLDER"
    known = inputs_before(run.path).get(key)
    if known is None:  # of an older run: whether the name is one of the Hub, nobody noted
        if local_path(name) is None and not name.startswith(("package:", "hub:")):
            hub_name("teacher", name)
            if not in_hub_cache(name):
                raise FileNotFoundError(
                    f"teacher: {run.path} learned from {name!r}, which is no folder here. {hint}, "
                    f"or, if it is a name on the Hub, --teacher hub:{name}"
                )
        return load_model(name), tokenizer_of(name)
    if known["local"] and local_path(known["path"]) is None:
        raise FileNotFoundError(
            f"teacher: {run.path} learned from {known['path']}, which is no longer there. {hint}"
        )
    name = f"hub:{known['hub']}" if "hub" in known else known.get("package", known["path"])
    teacher = load_model(name, revision=known.get("commit"))
    check_inputs(
        run.path,
        {key: known},
        {key: model_input(name, revision=known.get("commit"))},
        argument="teacher",
        advice="Put it back, or compare with what is there on purpose: --teacher FOLDER",
    )
    return teacher, tokenizer_of(name, revision=known.get("commit"))


def tokenizer_of(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a teacher; None where its folder holds only the model."""
    folder = local_path(name)
    has_none = folder is not None and folder.is_dir() and not any(folder.glob("tokenizer*"))
    if has_none and not is_adapter(name):
        return None  # transformers would make one of the model's kind, without its tokens
    return load_tokenizer(name, revision=revision)


def _divergences(
    run: Run, settings: EvaluateSettings, allow: Collection[str]
) -> dict[str, Divergence]:
    wanted = [divergence_named(text) for text in settings.divergences]
    if text := run.settings.get("divergence"):
        said = names_in(*settings.divergences)
        with only([*allow, *said], source=run.path / "run.json"):
            schedule = run.settings.get("schedule")
            moving = schedule if isinstance(schedule, str) and "->" in schedule else None
            wanted.insert(0, read_schedule(moving, divergence_named(text)).at(1.0))
            if own := run.settings.get("on_policy_divergence"):
                wanted.insert(1, divergence_named(own))
    return {**DIVERGENCES, **{repr(it): it for it in wanted if it not in DIVERGENCES.values()}}


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    dataset: Dataset | Sequence[Mapping[str, Any]],
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
    independent (:func:`rkl.stats.clustered_mean`): one block has none. A divergence that is
    infinite at any token is infinite; ``infinite_tokens`` says at how many.

    A divergence is also told by parts, which add up to it: the teacher's head (AKL's at
    mu = 0.5) and tail, and bins of ranks under the teacher. Parts are sums of the excess over
    the tangent plane at p = q, so that for f-divergences none of them is negative.

    Args:
        student: The model q.
        teacher: The model p, or anything else that can say it.
        dataset: Blocks with ``input_ids`` and ``labels``, as
            :func:`rkl.distill.tokenize` makes them.
        tokenizer: The one both share, needed where their numbers of logits differ.
        divergences: What to measure, by name; forward KL, reverse KL, JS, TV, AKL by default.
        batch_size: Blocks in a batch.
        progress: Called with the number of blocks done and of all.

    Returns:
        What JSON can hold; a mean is ``{"value", "error"}``, numbers or lists of them.
        ``by_block`` has the sums over each block, its number of tokens, and a digest of these:
        students measured on the same blocks are compared by their differences.
    """
    divergences = DIVERGENCES if divergences is None else divergences
    blocks = cast(TokenDataset, dataset)  # or whatever else has a length and items
    sums, vocab = _summed(
        student,
        teacher,
        blocks,
        range(len(blocks)),
        len(blocks),
        tokenizer=tokenizer,
        divergences=divergences,
        batch_size=batch_size,
        progress=progress,
    )
    return _result(sums, divergences, vocab)


def _summed(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    blocks: Dataset | Sequence[Mapping[str, Any]],
    places: Sequence[int],
    rows: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    divergences: Mapping[str, Divergence],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    collate: Callable[[Any], Any] | None = None,
) -> tuple["_Sums", int]:
    """Sums over the blocks at some places among so many, and the size of the vocabulary."""
    teacher = teacher if isinstance(teacher, Teacher) else ModelTeacher(teacher)
    head = read_head(student)
    shared = share_vocabulary(teacher.vocab, head.vocab, teacher_tokenizer, tokenizer)
    vocab = shared.size
    sums, first, numbers = _Sums(rows), 0, torch.tensor(places, dtype=torch.int64)
    some = Subset(cast(TokenDataset, blocks), places)
    for padded in DataLoader(some, batch_size, collate_fn=collate or PadRows()):
        inputs = {name: values.to(student.device) for name, values in padded.items()}
        batch = shifted(inputs)
        rows_of_batch = numbers[first : first + len(batch.predicting)].to(batch.predicting.device)
        if shared.differing:
            shared.check("data", batch.inputs["input_ids"][attended(batch.inputs)])
        row = rows_of_batch[batch.predicting.nonzero()[:, 0]]
        read, predicting = for_teacher(batch, inputs, routed=teacher.is_routed)
        p = teacher.observe(read, predicting, vocab=vocab)
        q = head.observe(batch.inputs, batch.predicting, vocab=vocab)
        for part, logp, logq in log_probabilities(p, q):
            sums.add(row[part], _columns(logp, logq, batch.targets[part], divergences))
        sums.sign(row, batch.targets)
        first += len(batch.predicting)
        if progress is not None:
            progress(first, len(numbers))
    return sums, vocab


class _Sums:
    """Sums over the tokens of each row, column by column, in double precision on the CPU."""

    def __init__(self, rows: int):
        self.rows = rows
        self.count = torch.zeros(rows, dtype=torch.float64)
        self.total: dict[str, Tensor] = {}
        self.digest = torch.zeros(rows, dtype=torch.int64)

    def add(self, rows: Int[Tensor, " tokens"], columns: Columns) -> None:
        rows = rows.cpu()
        self.count.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
        for name, values in columns.items():
            values = values.double().cpu()
            shape = self.rows, *values.shape[1:]
            self.total.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            self.total[name].index_add_(0, rows, values)

    def sign(self, rows: Int[Tensor, " tokens"], targets: Int[Tensor, " tokens"]) -> None:
        """Keep a digest of the tokens of each row, to know the same row again."""
        rows, targets = rows.cpu(), targets.cpu().to(torch.int32)
        for row in rows.unique().tolist():
            self.digest[row] = zlib.crc32(targets[rows == row].numpy().tobytes())

    def merge(self, parts: Sequence["_Sums"]) -> None:
        """Take in the sums over other rows, of other processes; this one is among the parts."""
        self.count = torch.stack([it.count for it in parts]).sum(0)
        self.digest = torch.stack([it.digest for it in parts]).sum(0)
        total: dict[str, Tensor] = {}
        for part in parts:
            for name, sums in part.total.items():
                total[name] = total[name] + sums if name in total else sums
        self.total = total

    def by_block(self) -> dict[str, list[float]]:
        """Sums over each block of what has one number a token, for paired comparisons."""
        sums = {name: total for name, total in self.total.items() if total.ndim == 1}
        columns = {"tokens": self.count, "digest": self.digest} | sums
        return {name: column.tolist() for name, column in columns.items()}

    def mean(self, name: str) -> Mean:
        kept = self.count > 0
        return clustered_mean(self.total[name][kept], self.count[kept])


def log_probabilities(p: Observed, q: Known) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The log-probabilities of some tokens at a time, few enough to stay in a core's cache."""
    if isinstance(q, LinearHead):
        tokens, vocab = len(q.hidden), len(q.weight)
    else:
        tokens, vocab = logits_of(q).shape
    size = max(1, ELEMENTS // vocab)
    for start in range(0, tokens, size):
        with torch.no_grad():
            logits = [_logits(known, slice(start, start + size)) for known in (p, q)]
        for name, it in zip(("teacher", "student"), logits, strict=True):
            if bool(it.isnan().any()):
                count = int(it.isnan().any(-1).sum())
                raise FloatingPointError(
                    f"{name}: its logits are NaN at {count:,} of {len(it):,} tokens, so that no "
                    "divergence can be measured. Compute in float32, or take another checkpoint."
                )
        block = max(1, CACHED // vocab) if logits[0].device.type == "cpu" else size
        for few in zip(*(it.split(block) for it in logits), strict=True):
            stop = start + len(few[0])
            yield slice(start, stop), few[0].log_softmax(-1), few[1].log_softmax(-1)
            start = stop


def _logits(known: Observed, part: slice) -> Float[Tensor, "chunk vocab"]:
    if isinstance(known, LinearHead):
        logits = logits_of(known._replace(hidden=known.hidden[part]))
    else:
        logits = logits_of(known)[part]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _columns(
    logp: Float[Tensor, "tokens vocab"],
    logq: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    divergences: Mapping[str, Divergence],
) -> Columns:
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
        inputs = divergence.held_inputs(logp, targets)
        held = divergence.held(logp, logq, *inputs)
        terms = divergence.by_atom(logp, logq, *held)
        columns[f"{name}:all"] = divergence.value(logp, logq, *held)
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
    """Edges of the bins of ranks, counted from 0."""
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
        "by_block": sums.by_block(),
        "tokens": int(sums.count.sum()),
        "blocks": int((sums.count > 0).sum()),
        "perplexity": {side: to_json(_exponential(it)) for side, it in entropy.items()},
        "cross_entropy": {side: to_json(it) for side, it in entropy.items()},
        "entropy": {side: to_json(sums.mean(f"{side}.entropy")) for side in sides},
        "top1_agreement": to_json(sums.mean("top1")),
        "mass_in_nucleus": {side: to_json(sums.mean(f"{side}.in_nucleus")) for side in sides},
        "mass_in_head": {side: to_json(sums.mean(f"{side}.in_head")) for side in sides},
        "divergences": {name: _divergence(sums, name, it) for name, it in divergences.items()},
        "precision_recall": {
            "slopes": list(SLOPES),
            "precision": to_json(precision),
            "recall": to_json(recall),
        },
        "ranks": {
            "edges": _edges(vocab),
            **{side: to_json(sums.mean(f"{side}.by_rank")) for side in sides},
        },
    }


def _divergence(sums: _Sums, name: str, divergence: Divergence) -> dict[str, Any]:
    return {
        "divergence": repr(divergence),
        **to_json(sums.mean(f"{name}:all")),
        "infinite_tokens": int(sums.total[f"{name}:infinite"].sum()),
        **{part: to_json(sums.mean(f"{name}:{part}")) for part in ("head", "tail", "by_rank")},
    }


def _exponential(mean: Mean) -> Mean:
    value = mean.value.exp()
    return Mean(value, value * mean.error)
