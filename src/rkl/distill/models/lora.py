"""LoRA adapters on a student: put on, and merged into it again."""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.import_utils import is_peft_available

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


def check_peft() -> None:
    """Refuse a peft older than transformers needs to save a model that it put adapters into.

    A ``PeftModel`` saves itself, with any peft.

    Raises:
        ImportError: It is; names both versions. A training would end at its first checkpoint.
    """
    found = importlib.metadata.version("peft")
    if Version(found) < Version(MIN_PEFT_VERSION):
        raise ImportError(
            f"model: transformers {transformers.__version__} saves a model that it put adapters "
            f"into with peft {MIN_PEFT_VERSION} or newer; got peft {found}. "
            f"Type: pip install 'peft>={MIN_PEFT_VERSION}', or wrap it with peft.get_peft_model."
        )


def is_adapted(model: object) -> bool:
    """True if a model is PEFT's wrapper around another one."""
    if not is_peft_available():
        return False
    from peft import PeftModel  # pyright: ignore[reportMissingImports]: an extra

    return isinstance(model, PeftModel)


def without_wrapper(model: Any) -> Any:
    """The model within PEFT's wrapper, its adapters included; any other model as it is."""
    return model.get_base_model() if is_adapted(model) else model


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """A PEFT model as its base, and what is trainable of it left as it was."""
    # PEFT, on its way back, marks every active adapter as trainable: also one that was frozen.
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, wants in trainable.items():
            parameter.requires_grad_(wants)
