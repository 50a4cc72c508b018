"""``rkl cache``: what a teacher tells of the text of a run, kept once for any number of runs."""

import os
import shlex
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import ConcatDataset

from rkl import checks
from rkl.distill.limits import check_one_of, is_address, is_cache, published_column
from rkl.distill.prepare import load_for_cache, with_length
from rkl.distill.progress import in_words, quiet
from rkl.distill.settings import DistillSettings
from rkl.distill.teachers.cache import (
    CachedTeacher,
    Source,
    cache_teacher,
    parse_keep,
    stored_tensors,
    written,
)
from rkl.distill.teachers.teacher import ModelTeacher, Teacher
from rkl.runs import save_tensors
from rkl.runs.ownership import refuse_inputs
from rkl.runs.progress import Progress, clock, say

SAID = "max_length", "packing", "train_on", "held_out", "eval_data", "split", "seed"  # of the rows


@dataclass(frozen=True)
class CacheSettings:
    """Everything that decides what a cache holds.

    Args:
        teacher: The model, or the address of a server, given as to rkl distill.
        data: The text, given as to rkl distill.
        student: What the runs will train, whose tokenizer and chat template make the rows; by
            default the teacher's.
        keep: What is kept of each trained token: hidden, its hidden state, from which nothing is
            lost; top-k=64, its likeliest tokens; or sampled=50, tokens drawn from the teacher.
        stored: Precision of hidden states on the disk: float32 loses nothing of a teacher that
            computes in it, bfloat16 takes half the room and rounds to 3 digits.
        split: Which split of --data is read, where it has several.
        eval_data: Held-out text; by default a share of --data.
        eval_split: Which split of --eval-data is read, where it has several.
        held_out: Share of --data held out where there is no --eval-data, at least 0 and below 1.
        eval_blocks: Held-out blocks looked at in each evaluation, at most.
        max_length: Longest block, in tokens, at most the models' context; by default 512, or the
            context where that is shorter.
        packing: Let short rows share a block.
        train_on: Of a chat, all turns of the assistant or the last.
        chat_template: A file with the chat template to use; by default the student's.
        chat_template_kwargs: What else the chat template is called with, as JSON, such as
            '{"enable_thinking": false}'; nothing by default.
        batch_size: Blocks run together; where it is that of the runs, their losses are to the bit
            those beside the live teacher, on a CPU and with blocks of one length.
        dtype: What the teacher computes in.
        loss_top_k: Of a teacher on a server, the number of likeliest tokens asked for at each
            place; by default as many as --keep says.
        teacher_timeout: Seconds that an answer of a server may take.
        seed: Of the blocks held out, and of drawn tokens.
        device: "cpu" or "cuda"; by default a GPU if there is one.
    """

    teacher: str
    data: str
    student: str | None = None
    keep: str = "hidden"
    stored: Literal["float32", "bfloat16"] = "float32"
    split: str = "train"
    eval_data: str | None = None
    eval_split: str = "test"
    held_out: float = 0.05
    eval_blocks: int | None = 64
    max_length: int | None = None
    packing: bool = True
    train_on: Literal["all", "last"] = "all"
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    loss_top_k: int | None = None
    teacher_timeout: float = 120.0
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        check_one_of(self, "stored", "float32", "bfloat16")
        if is_cache(self.teacher):
            raise ValueError(f"teacher: {self.teacher} is a cache already.")
        if published_column(self.teacher) is not None:
            raise ValueError(
                f"teacher: {self.teacher} is kept in the data already, from where rkl distill "
                "reads it."
            )
        if is_address(self.teacher) and parse_keep(self.keep).kind != "top-k":
            raise ValueError(
                f"keep must be a top k, such as top-k=64, of a teacher on a server, which gives "
                f"its likeliest tokens alone; got {self.keep!r}."
            )
        if is_address(self.teacher) and self.student is None:
            raise ValueError(
                f"student must be given where the teacher is on a server; got {self.teacher}."
            )
        _ = parse_keep(self.keep), self.of_run

    @property
    def of_run(self) -> DistillSettings:
        """Settings of a run that reads the same text."""
        named = {it.name for it in fields(DistillSettings)}
        own = {it.name: getattr(self, it.name) for it in fields(self) if it.name in named}
        if is_address(self.teacher) and own["loss_top_k"] is None:
            own["loss_top_k"] = parse_keep(self.keep).count
        own["student"] = self.student or self.teacher
        return DistillSettings(**own, divergence="kl")


@dataclass(frozen=True)
class CacheEstimate:
    """Size and time of a cache, and the epochs after which it pays; prints as a list.

    Attributes:
        bytes_per_token: On the disk, for each trained token.
        size: Of all of it, in bytes.
        seconds: Of the teacher over all rows.
        pays_after: Epochs from which on a run from the cache takes less time than one beside the
            teacher, the making of the cache counted; infinite where it never does.
        lines: All of it in words, by what it is about.
    """

    bytes_per_token: int
    size: int
    seconds: float
    pays_after: float
    lines: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(f"{name:10}{value}" for name, value in self.lines.items())


@quiet()
def dry_run_cache(settings: CacheSettings) -> CacheEstimate:
    """Estimate the size and time of a cache with these settings; nothing is written."""
    settings = _with_length(settings)
    _, source, _ = _load(settings)
    with tempfile.TemporaryDirectory() as folder:
        return _estimate(settings, source, Path(folder))


@quiet()
def write_cache(
    settings: CacheSettings,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> CachedTeacher:
    """Run the teacher over the text of a run, once, and keep what it tells in a folder.

    Args:
        settings: Which teacher, which text, and what is kept.
        out: The folder.
        resume: Goes on with a cache that was begun there.
        overwrite: Replaces a cache that is there.
    """
    path = Path(out)
    if resume and overwrite:
        raise ValueError("overwrite and resume exclude one another; got both.")
    named = {name: getattr(settings, name) for name in ("teacher", "student", "data", "eval_data")}
    refuse_inputs(path, named)
    if path.exists() and not is_cache(path) and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"out: {path} is there, and is no cache; choose another folder.")
    if is_cache(path) and not (resume or overwrite):
        raise FileExistsError(
            f"out: {path} holds a cache; --resume to go on with it, --overwrite to replace it."
        )
    settings = _with_length(settings)
    text, source, tokenizer = _load(settings)
    made = {name: getattr(settings, name) for name in SAID}
    made["apart"] = text.apart
    if overwrite:
        for file in written(path) if path.is_dir() else ():
            file.unlink()
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        say(f"{text.blocks}\n{_estimate(settings, source, Path(folder))}")
    with Progress("row", kept=True) as shown:
        return cache_teacher(
            source.teacher,
            source.rows,
            path,
            keep=settings.keep,
            stored=settings.stored if settings.keep == "hidden" else None,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            tokenizer=tokenizer,
            seed=settings.seed,
            made=made,
            progress=shown.update,
        )


def told(cached: CachedTeacher) -> str:
    """The result, and the next command to type."""
    quoted = shlex.quote(str(cached.path))
    return (
        f"{cached}\nTrain with: rkl distill --teacher {quoted} --student S --data D --out RUN, "
        "and the settings of the data as here."
    )


def _with_length(settings: CacheSettings) -> CacheSettings:
    return replace(settings, max_length=with_length(settings.of_run).max_length)


def _load(settings: CacheSettings) -> tuple[Any, Source, Any]:
    text, teacher, tokenizer = load_for_cache(settings.of_run)
    if not isinstance(teacher, Teacher):
        model: Any = teacher
        teacher = ModelTeacher(model.to(checks.device(settings.device)))
    rows = ConcatDataset(text.observed(settings.of_run))
    return text, Source(teacher, rows, settings.batch_size, settings.max_length), tokenizer


def _estimate(settings: CacheSettings, source: Source, folder: Path) -> CacheEstimate:
    keep, stored = parse_keep(settings.keep), settings.stored
    batch = next(iter(source.batches()))
    source.observe(batch)  # what is done once, such as choosing kernels
    began = time.perf_counter()
    known = source.observe(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    teacher = time.perf_counter() - began
    tensors = stored_tensors(known, keep, stored, torch.Generator().manual_seed(0))
    save_tensors(folder / "one.safetensors", tensors)
    writing = time.perf_counter() - began - teacher
    began = time.perf_counter()
    _ = (folder / "one.safetensors").read_bytes()
    reading = time.perf_counter() - began
    tokens = int(batch.predicting.sum())
    per_token = sum(it.nbytes for it in tensors.values()) // max(tokens, 1)
    head = source.head_bytes if keep.kind == "hidden" else 0
    size = per_token * source.tokens + head
    saved = teacher - reading
    pays = (teacher + writing) / saved if saved > 0 else float("inf")
    seconds = teacher * source.tokens / max(tokens, 1)
    epochs = max(2, int(pays) + 1) if pays < 1e6 else 0
    when = f"with {epochs} epochs or more, or runs that add up to them" if epochs else "never"
    lines = {
        "keeps": f"{keep}: {per_token:,} bytes a token",
        "size": f"{in_words(size)}: {source.tokens:,} tokens of {len(source.counts):,} rows"
        + (f", and {in_words(head)} of the head" if head else ""),
        "time": f"{clock(seconds)} of the teacher",
        "pays": when,
    }
    return CacheEstimate(per_token, size, seconds, pays, lines)
