"""What ``rkl distill`` may be told, and what of it can be refused before anything is read."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rkl.distill.limits import check_counts, check_one_of, check_within, divergence_named
from rkl.divergences import Divergence


def _help(text: str, metavar: str | None = None) -> dict[str, Any]:
    return {"help": text} if metavar is None else {"help": text, "metavar": metavar}


@dataclass(frozen=True)
class DistillSettings:
    """Everything that decides what a run of :func:`rkl.distill.run.distill` ends in.

    Args: as the help of each field says; lengths and counts are in tokens, blocks of tokens,
    or steps, which are updates of the weights.
    """

    teacher: str = field(
        metadata=_help("folder, .gguf file, package:NAME or name on the Hub", "MODEL")
    )
    data: str = field(metadata=_help("text to learn on: a file or a data set", "D"))
    student: str | None = field(
        default=None,
        metadata=_help("as the teacher; or a config.json, for random weights to begin with", "S"),
    )
    drop_layers: str | None = field(
        default=None,
        metadata=_help("layers left out of the student, or of the teacher to make one", "13-18"),
    )
    split: str = field(default="train", metadata=_help("split of a data set that has several"))
    eval_data: str | None = field(
        default=None, metadata=_help("held-out text; by default a part of the data", "D")
    )
    eval_split: str = field(default="test", metadata=_help("the same for eval_data"))
    held_out: float = field(
        default=0.05, metadata=_help("share of the data held out where no eval_data is given")
    )
    eval_blocks: int | None = field(
        default=64, metadata=_help("held-out blocks looked at in each evaluation")
    )
    divergence: str = field(
        default="akl(mu=0.5)", metadata=_help("what is minimised; rkl divergences lists them")
    )
    temperature: float = field(default=1.0, metadata=_help("divides the logits of both"))
    hard_label_weight: float = field(
        default=0.0, metadata=_help("weight of the cross-entropy on the text itself")
    )
    max_steps: int | None = field(
        default=None, metadata=_help("number of steps; by default as epochs says")
    )
    epochs: float = field(default=1.0, metadata=_help("passes over the data"))
    max_length: int = field(default=512, metadata=_help("tokens in a block"))
    packing: bool = field(default=True, metadata=_help("let rows share blocks"))
    batch_size: int = field(default=8, metadata=_help("blocks run together"))
    gradient_accumulation: int = field(default=1, metadata=_help("batches in a step"))
    learning_rate: float = field(default=1e-4, metadata=_help("at its peak"))
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata=_help("of the learning rate after the warm-up")
    )
    warmup: float = field(default=0.05, metadata=_help("share of the steps it rises in"))
    weight_decay: float = field(default=0.0, metadata=_help("AdamW's"))
    max_gradient: float = field(default=1.0, metadata=_help("norm beyond which it is cut; 0: no"))
    eval_every: int | None = field(
        default=None, metadata=_help("steps between evaluations; a tenth of all by default")
    )
    save_every: int | None = field(
        default=None, metadata=_help("steps between checkpoints; a tenth of all by default")
    )
    keep_checkpoints: int = field(
        default=2, metadata=_help("how many stay on the disk, the best and the last among them")
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata=_help("to compute in; the student's weights stay float32")
    )
    compiled: bool | None = field(
        default=None, metadata=_help("compile the loss; by default where the work is worth it")
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_help("compute activations twice rather than keep them")
    )
    cache_teacher: bool = field(
        default=False, metadata=_help("run the teacher once over the data, and keep what it says")
    )
    seed: int = field(default=0, metadata=_help("of the order of blocks, and of new weights"))
    device: str | None = field(default=None, metadata=_help("cpu or cuda; the best by default"))

    def __post_init__(self):
        if self.student is None and self.drop_layers is None:
            raise ValueError(
                "student must be given, or drop_layers, which makes it out of the teacher."
            )
        _ = self.minimised
        check_counts(
            self,
            *("eval_blocks", "max_steps", "batch_size", "gradient_accumulation"),
            *("eval_every", "save_every"),
        )
        # Two checkpoints for the best and the last, two tokens for one and the next.
        check_counts(self, "keep_checkpoints", "max_length", at_least=2)
        check_within(self, "held_out", "warmup", high=1, ends="[)")
        check_within(self, "hard_label_weight", "weight_decay", "max_gradient", ends="[)")
        check_within(self, "temperature", "epochs", "learning_rate")
        check_one_of(self, "schedule", "cosine", "linear", "constant")
        check_one_of(self, "dtype", "float32", "bfloat16")
        check_counts(self, "seed", at_least=0)
        if self.seed >= 2**32:
            raise ValueError(f"seed must lie between 0 and 2³² − 1; got {self.seed}.")
        _check_device(self.device)

    @property
    def minimised(self) -> Divergence:
        """The divergence that the text means."""
        return divergence_named(self.divergence)

    def batches_per_epoch(self, blocks: int) -> int:
        """Batches in a pass over so many blocks."""
        return -(-blocks // self.batch_size)

    def steps(self, blocks: int) -> int:
        """Steps of a run on so many blocks."""
        if self.max_steps is not None:
            return self.max_steps
        per_epoch = -(-self.batches_per_epoch(blocks) // self.gradient_accumulation)
        return max(1, round(self.epochs * per_epoch))


def _check_device(device: str | None) -> None:
    if device in (None, "cpu"):
        return
    if device != "cuda":
        raise ValueError(
            f"device must be cpu or cuda; got {device!r}. CUDA_VISIBLE_DEVICES says which GPU."
        )
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU; expected cpu.")
