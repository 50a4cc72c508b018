"""Distillation of language models: a teacher, a student, a divergence between them."""

import importlib

_HOMES = {
    "batches": "PadRows",
    "cache": "CachedTeacher cache_hidden_states",
    "compare": "Evaluations compare_runs",
    "evaluate": "EvaluateSettings evaluate_run",
    "generate": "GenerateSettings Sampling generate_run",
    "heads": "Head read_head",
    "report": "report_runs",
    "selection": "DivergedError",
    "run": "DistillSettings Distilled distill estimate load_run",
    "teachers": "Teacher load_model load_tokenizer",
    "trainer": "DistillConfig DistillTrainer",
}
_HOME = {
    name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names.split()
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
