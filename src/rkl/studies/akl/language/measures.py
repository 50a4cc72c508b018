"""Measures of a student in the study in language models: on held-out text, and of its replies."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Subset

from rkl.distill import ModelWriter, Sampling, load_model
from rkl.distill.encoder import embed
from rkl.distill.evaluate import evaluate
from rkl.distill.generate import Generation, choose_prompts, measure
from rkl.distill.text.data import IGNORED
from rkl.distill.text.sources import read_rows
from rkl.distill.writing.rollouts import ends_with_turn
from rkl.metrics.neighbours import prdc
from rkl.studies.akl.language.classroom import HELD_OUT, PROSE, Classroom

NEIGHBOUR = 5  # that a ball of precision and recall reaches to
WRITTEN = 32  # replies at a time
Figures = dict[str, float]


@dataclass(frozen=True)
class Judge:
    """Held-out text, prompts, and replies of the teacher to them.

    Attributes:
        room: Teacher, text and sizes.
    """

    room: Classroom

    @functools.cached_property
    def teacher(self) -> Any:
        """The teacher, which is measured against."""
        return load_model(self.room.teacher, dtype="float32")

    @functools.cached_property
    def text(self) -> Subset:
        """Blocks of held-out text."""
        return _some(self.room.blocks(HELD_OUT), self.room.plan)

    @functools.cached_property
    def prose(self) -> Subset | None:
        """Blocks of held-out prose, where the other text is instructions."""
        if not (self.room.folder / PROSE).exists():
            return None
        return _some(self.room.blocks(PROSE), self.room.plan)

    @functools.cached_property
    def _at_first(self) -> dict[str, Figures]:
        return {}

    def at_first(self, name: str, student: Any) -> Figures:
        """Distances of a student before its first step, which all fits of it share."""
        if name not in self._at_first:
            self._at_first[name] = self.on_text(student)
        return self._at_first[name]

    def on_text(self, student: Any, *, first: Any = None) -> Figures:
        """Distances of a student from its teacher per token, and from another student."""
        figures = figures_of(evaluate(student, self.teacher, self.text))
        if first is not None:
            between = evaluate(student, first, self.text)
            figures["tv_between_students"] = between["divergences"]["tv"]["value"]
        return figures

    def on_prose(self, student: Any) -> Figures:
        """Distances of a student from its teacher on prose; nothing where there is none."""
        if self.prose is None:
            return {}
        found = figures_of(evaluate(student, self.teacher, self.prose))
        return {f"prose_{name}": value for name, value in found.items()}

    def on_replies(self, student: Any, seed: int) -> Figures:
        """Distances on what a student writes, and how good and how various it is."""
        replies, blocks = self.write(student, seed)
        own = evaluate(student, self.teacher, blocks)["divergences"]
        figures = {"own_reverse_kl": own["reverse-kl"]["value"], "own_tv": own["tv"]["value"]}
        for name, value in measure(replies).items():
            if name in ("rouge_l", "length", "distinct_2", "self_bleu"):
                figures[name] = float(value.value)
        real, fake = self.of_teacher, embed([it.text for it in replies])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "in high dimension|.* balls have a radius of 0")
            scores = prdc(real=real, fake=fake, k=NEIGHBOUR, subsamples=0)
        for name in ("precision", "recall", "density", "coverage"):
            figures[name] = float(getattr(scores, name).value)
        return figures

    @functools.cached_property
    def of_teacher(self) -> Float[Tensor, "replies features"]:
        """Replies of the teacher in the space of the encoder."""
        return embed([it.text for it in self.write(self.teacher, 1000)[0]])

    def write(self, model: Any, seed: int) -> tuple[list[Generation], list[dict]]:
        """Replies of a model, and the same as blocks of which the replies are trained on."""
        plan, tokenizer = self.room.plan, self.room.tokenizer
        sampling = Sampling(plan.reply_tokens)
        writer = ModelWriter(model, sampling, ends_with_turn(model, tokenizer))
        replies, blocks = [], []
        for repeat in range(plan.replies):
            for start in range(0, len(self.prompts), WRITTEN):
                some = self.prompts[start : start + WRITTEN]
                number = (seed * plan.replies + repeat) * 1000 + start
                written = writer.write([it.tokens for it in some], seed=number)
                for prompt, reply in zip(some, written, strict=True):
                    ids = reply.tokens[: len(reply.tokens) - reply.ended]
                    text = str(tokenizer.decode(ids, skip_special_tokens=True))
                    said = prompt.text, prompt.reference, text, len(ids)
                    replies.append(Generation(repeat, *said))
                    blocks.append(_block(prompt.tokens, reply.tokens))
        return replies, blocks

    @functools.cached_property
    def prompts(self) -> list[Any]:
        """Prompts that are replied to."""
        plan = self.room.plan
        rows = read_rows(str(self.room.folder / HELD_OUT))
        wanted = _Wanted(plan.prompts, plan.reply_tokens)
        found, _ = choose_prompts(
            rows, self.room.tokenizer, self.teacher, wanted, prompt_tokens=plan.prompt_tokens
        )
        return found


@dataclass(frozen=True)
class _Wanted:
    prompts: int
    max_new_tokens: int


def figures_of(result: Mapping[str, Any]) -> Figures:
    """The figures of :func:`rkl.distill.evaluate.evaluate` that the study keeps.

    A gap is Σ |p − q| over the teacher's head, or over the rest.
    """
    divergences = result["divergences"]
    parts = divergences["tv"]
    return {
        **{name.replace("-", "_"): it["value"] for name, it in divergences.items()},
        "head_gap": 2 * parts["head"]["value"],
        "tail_gap": 2 * parts["tail"]["value"],
        "cross_entropy": result["cross_entropy"]["student"]["value"],
        "agreement": result["top1_agreement"]["value"],
        "entropy": result["entropy"]["student"]["value"],
        "in_teachers_nucleus": result["mass_in_nucleus"]["student"]["value"],
        "in_students_nucleus": result["mass_in_nucleus"]["teacher"]["value"],
    }


def _some(blocks: Any, plan: Any) -> Subset:
    count = min(len(blocks), plan.held_out_blocks)
    return Subset(blocks, [i * len(blocks) // count for i in range(count)])


def _block(prompt: Sequence[int], reply: Sequence[int]) -> dict[str, Tensor]:
    labels = [IGNORED] * len(prompt) + [*reply]
    return {"input_ids": torch.tensor([*prompt, *reply]), "labels": torch.tensor(labels)}
