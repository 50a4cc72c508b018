"""Students watched during training: their probabilities beside the teacher's, rank by rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rkl.distill.models.heads import inference
from rkl.distill.models.loading import load_model, load_tokenizer
from rkl.distill.text.data import TokenDataset, spread
from rkl.divergences import AKL

WATCHED = "head-tail.safetensors"
HEAD = AKL(mu=0.5)  # as in rkl evaluate


@dataclass(frozen=True)
class Watched:
    """Held-out tokens at which students are watched during training.

    Everything is by rank under the teacher, its likeliest token first.

    Attributes:
        tokens: Rows of text; probabilities are those of the token behind each.
        p: The teacher's probabilities, in descending order.
        ranking: The atoms in this order.
        one: The token at which the teacher's entropy is the median of all.
        at: The steps at which students are recorded.
        context: The text up to that one token.
        seen: Probabilities of the teacher, and of each student at each step: the mean over all
            tokens, and those at the one token.
    """

    tokens: Tensor
    p: Tensor
    ranking: Tensor
    one: int
    at: Sequence[int]
    context: str
    seen: dict[str, Tensor]

    def look(self, name: str, model: Any, step: int) -> None:
        """Record the probabilities of a student at this step, if it is one of ``at``."""
        if step in self.at:
            q = probabilities(model, self.tokens).gather(-1, self.ranking)
            self.seen[f"{name}.mean.{step}"] = q.mean(0)
            self.seen[f"{name}.single.{step}"] = q[self.one]

    def record(self) -> dict[str, Any]:
        """The entries of ``run.json``; the head is AKL's, in numbers of atoms."""
        _, chosen = HEAD.search(self.p[self.one].log()[None])
        rows, length = self.tokens.shape
        return {
            "tokens": rows * length,
            "steps": list(self.at),
            "context": self.context,
            "head": int(chosen.sum()),
        }


def watch(teacher: str, blocks: TokenDataset, count: int, steps: int) -> Watched:
    """The teacher's probabilities on some held-out blocks, for comparison with students later.

    Args:
        teacher: A name or folder for ``load_model``.
        blocks: The held-out text.
        count: Number of blocks, evenly spaced among those of full length.
        steps: Steps of the training; students are recorded before, early, half-way and at the end.
    """
    full = [it["input_ids"] for it in (blocks[i] for i in range(len(blocks)))]
    tokens = torch.stack(spread([ids for ids in full if len(ids) == len(full[0])], count))
    model = load_model(teacher, dtype="float32")
    p, ranking = probabilities(model, tokens).sort(descending=True, stable=True)
    entropy = torch.special.entr(p).sum(-1)
    one = int((entropy == entropy.median()).nonzero()[0])
    row, place = divmod(one, tokens.shape[1])
    context = str(load_tokenizer(teacher).decode(tokens[row, : place + 1].tolist()))
    at = sorted({0, max(1, steps // 10), steps // 2, steps})
    seen = {"teacher.mean": p.mean(0), "teacher.single": p[one]}
    return Watched(tokens, p, ranking, one, at, context, seen)


def probabilities(model: Any, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "tokens vocab"]:
    """A model's probabilities of the next token at each position, row after row, on the CPU."""
    with inference(model):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float().softmax(-1).flatten(0, 1).cpu()
