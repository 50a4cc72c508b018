"""Distillation of language models: a teacher, a student, a divergence between them."""

from rkl.lazy import lazily

HOMES = {
    "adapters.automodel": "KDLoss",
    "batches": "PadRows",
    "cache": "CachedTeacher cache_teacher",
    "cache_run": "CacheSettings dry_run_cache write_cache",
    "compare": "Evaluations compare_runs",
    "data": "show_example tokenize",
    "evaluate": "EvaluateSettings evaluate_run",
    "generate": "GenerateSettings generate_run",
    "judge": "Judged JudgeSettings judge_cost judge_runs",
    "loss": "distill_loss",
    "guard": "CollapseError CollapseLimits",
    "heads": "Head read_head",
    "pair": "Comparison PairSettings evaluate_pair",
    "published": "PublishedTeacher",
    "report": "report_runs",
    "rollouts": "ModelWriter Reply Writer",
    "sampling": "Sampling",
    "scratch": "Shape new_model new_tokenizer",
    "selection": "DivergedError",
    "server": "ServerError ServerTeacher",
    "settings": "DistillSettings",
    "run": "Distilled distill dry_run load_run",
    "teachers": "Teacher load_model load_tokenizer",
    "trainer": "DistillConfig DistillTrainer",
    "writing_server": "ServerWriter",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)
