"""Distillation of language models: a teacher, a student, a divergence between them."""

from rkl.lazy import lazily

HOMES = {
    "adapters.automodel": "KDLoss",
    "cache_run": "CacheSettings dry_run_cache write_cache",
    "client": "ServerError",
    "compare": "Evaluations compare_runs",
    "config": "DistillConfig",
    "evaluate": "EvaluateSettings evaluate_run",
    "generate": "GenerateSettings generate_run",
    "guard": "CollapseError CollapseLimits",
    "judge": "Judged JudgeSettings judge_cost judge_runs",
    "loss": "distill_loss",
    "models.heads": "Head read_head",
    "models.loading": "load_model load_tokenizer",
    "models.scratch": "Shape new_model new_tokenizer",
    "pair": "Comparison PairSettings evaluate_pair",
    "report": "report_runs",
    "run": "Distilled distill dry_run load_run",
    "selection": "DivergedError",
    "settings": "DistillSettings",
    "teachers.cache": "CachedTeacher cache_teacher",
    "teachers.other_tokens": "AlignedTeacher SortedTeacher TextTeacher",
    "teachers.published": "PublishedTeacher",
    "teachers.server": "ServerTeacher",
    "teachers.teacher": "Teacher",
    "text.batches": "PadRows",
    "text.data": "show_example tokenize",
    "trainer": "DistillTrainer",
    "writing.rollouts": "ModelWriter Reply Writer",
    "writing.sampling": "Sampling",
    "writing.server": "ServerWriter",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)
