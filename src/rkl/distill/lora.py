"""LoRA adapters on a student: put on, and merged into it again."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rkl.distill.teachers import is_adapted

ADAPTER = "adapter"  # folder of the run that holds the adapters alone


def check_installed() -> None:
    """Refuse adapters where peft is missing.

    Raises:
        ModuleNotFoundError: It is not installed; says what to type.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(
            "lora_rank: adapters need the package peft: pip install 'rkl[peft]'"
        )


def with_adapters(
    student: PreTrainedModel, rank: int, targets: str | None, *, seed: int
) -> Any:  # a PeftModel
    """The student with new adapters, which alone are trained.

    Args:
        student: A model, which is changed in place.
        rank: Of the adapters.
        targets: Names of modules, with commas; None for all linear layers but the head.
        seed: Of their weights.

    Raises:
        ValueError: No module has one of the names, or the student has adapters already.
    """
    import peft  # pyright: ignore[reportMissingImports]: an extra

    if is_adapted(student) or getattr(student, "_hf_peft_config_loaded", False):
        raise ValueError("lora_rank: the student is a folder of adapters; expected a whole model.")
    names = "all-linear" if targets is None else targets.replace(" ", "").split(",")
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    if not student.config.name_or_path or student.config.name_or_path == "None":
        student.name_or_path = ""  # or peft would ask the Hub for a model called None
    modules = {name.rpartition(".")[2] for name, _ in student.named_modules()}
    missing = [] if targets is None else [name for name in names if name not in modules]
    if missing:
        raise ValueError(
            f"lora_targets: a {type(student).__name__} has no module {missing[0]!r}; it has "
            f"{', '.join(sorted(_linear(student)))}."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses what transformers deprecates
        return peft.get_peft_model(student, config)


def _linear(model: PreTrainedModel) -> set[str]:
    """The last names of layers that multiply by a matrix."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }


def merged(student: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The student with the adapters in a folder added to its weights.

    Args:
        student: The model that the adapters were trained on; changed in place.
        adapter: What peft saved.
    """
    import peft  # pyright: ignore[reportMissingImports]: an extra

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.PeftModel.from_pretrained(student, str(adapter))
        return adapted.merge_and_unload()
