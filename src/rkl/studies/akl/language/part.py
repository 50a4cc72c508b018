"""The two scales of the study in language models; transformers is imported when one is run."""

import collections
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rkl.extras import require
from rkl.runs import fingerprint
from rkl.runs.progress import clock
from rkl.studies.akl.language import answers
from rkl.studies.akl.language.lessons import LONG, REAL, SMALL, Lesson
from rkl.studies.study import Outcome, Part, in_processes, torch_threads

if TYPE_CHECKING:
    from rkl.studies.akl.language.classroom import Classroom
    from rkl.studies.akl.language.texts import Texts


@dataclass(frozen=True)
class Language(Part):
    """Fits of language models under many divergences, at one scale.

    Attributes:
        room: The class of :mod:`rkl.studies.akl.language.classroom` with teacher and students.
        texts: What they read; none before the data are known.
        folder: Where teacher and students are, once they are there.
    """

    room: Literal["FromScratch", "Pretrained"]
    texts: "Texts | None" = field(default=None, kw_only=True)
    folder: Path | None = field(default=None, kw_only=True)

    def prepare(self, device: str, data: str | os.PathLike | None) -> "Language":
        require("distill", "The study in language models")
        from rkl.distill.encoder import check_encoder
        from rkl.studies.akl.language.texts import read_texts

        super().prepare(device, None)
        check_encoder()
        texts = read_texts(data)
        plan = replace(self.plan, text=fingerprint([*texts.plain(), *texts.plain(held_out=True)]))
        return replace(self, texts=texts, plan=plan)

    def begin(self, folder: Path, seed: int) -> "Language":
        from rkl.studies.akl.language.texts import read_texts

        part = replace(self, folder=folder)
        seeds, texts = self._seeds(seed), self.texts or read_texts(None)
        in_processes(part._furnish, [texts] * len(seeds), seeds, workers=self.workers)
        return part

    def _furnish(self, texts: "Texts", seed: int) -> None:
        from rkl.distill.progress import quiet

        with quiet():
            self._classroom(seed).furnish(texts)

    def _seeds(self, seed: int) -> range:
        return range(seed, seed + self.plan.seeds)

    def announce(self, jobs: Sequence[tuple[Lesson]]) -> str:
        from rkl.distill.progress import quiet
        from rkl.studies.akl.language.costs import seconds_of

        lessons = [lesson for (lesson,) in jobs]
        with torch_threads(1), quiet():
            room = self._classroom(lessons[0].seed)
            seconds = sum(seconds_of(lessons, room)) / self.workers
        counts = collections.Counter(it.question for it in lessons)
        questions = ", ".join(f"{count} of “{question}”" for question, count in counts.items())
        return (
            f"{len(lessons)} fits: {questions}; seeds: {self.plan.seeds}; processes: "
            f"{self.workers}. About {clock(seconds)}, by the time of one step, one look and one "
            "set of replies. Each that is done is kept: --resume goes on."
        )

    def jobs(self, seed: int) -> Sequence[tuple[Lesson]]:
        return [(lesson,) for lesson in self.plan.lessons(seed)]

    def compute(self, lesson: Lesson) -> list[dict[str, Any]]:
        from rkl.studies.akl.language.fits import fit

        return fit(self._classroom(lesson.seed), lesson)

    def so_far(self, results: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[Sequence[str], Any]:
        return answers.COLUMNS, answers.cells(row for rows in results for row in rows)

    def outcome(self, results: Sequence[Sequence[Mapping[str, Any]]], seed: int) -> Outcome:
        rows = [row for some in results for row in some]
        columns, lines = self.so_far(results)
        summary = f"{self.title}: {len(results)} fits, {self.plan.seeds} seeds."
        return Outcome(columns, lines, summary, answers.sections(rows))

    def _classroom(self, seed: int) -> "Classroom":
        from rkl.studies.akl.language import classroom

        if self.folder is None:
            raise RuntimeError("folder is None: begin comes before the first job.")
        return getattr(classroom, self.room)(self.folder / f"seed-{seed}", self.plan, seed)


PARTS: Mapping[str, Language] = {
    "language": Language("Language models trained from scratch", SMALL, "FromScratch"),
    "language-flat": Language("Language models trained until flat", LONG, "FromScratch"),
    "language-real": Language("SmolLM2-135M and half of its layers", REAL, "Pretrained"),
}
