"""What the distillation wing must refuse."""

import math

import torch
from distill import material
from folders import of_runs
from reading import OTHER
from subjects import Lazy, Subject, fault

from rkl import KL
from rkl.distill import (
    CachedTeacher,
    CacheSettings,
    DistillConfig,
    DistillSettings,
    DistillTrainer,
    EvaluateSettings,
    GenerateSettings,
    JudgeSettings,
    PairSettings,
    Sampling,
    Shape,
    cache_teacher,
    compare_runs,
    distill,
    distill_loss,
    dry_run,
    dry_run_cache,
    evaluate_pair,
    evaluate_run,
    generate_run,
    judge_cost,
    judge_runs,
    load_model,
    load_run,
    load_tokenizer,
    new_model,
    new_tokenizer,
    report_runs,
    show_example,
    write_cache,
)
from rkl.distill.text.batches import shifted
from rkl.distill.text.data import tokenize
from rkl.distill.text.sources import read_rows


def student():
    return material.model(1, 8, seed=2)


ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2


def config(**changes):
    return DistillConfig("trained", use_cpu=True, report_to="none", **changes)


TRAINER = [
    Subject(
        "DistillConfig",
        config,
        lambda: {"max_length": 8},
        [
            fault("temperature", "zero", 0.0, "(0, ∞)", "0.0"),
            fault("temperature", "negative", -1.0, "(0, ∞)", "-1.0"),
            fault("temperature", "infinite", math.inf, "(0, ∞)", "inf"),
            fault("temperature", "nan", math.nan, "(0, ∞)", "nan"),
            fault("temperature", "a word", "hot", "number", "'hot'"),
            fault("temperature", "nothing", None, "number", "None"),
            fault("hard_label_weight", "negative", -0.5, "[0, ∞)", "-0.5"),
            fault("hard_label_weight", "nan", math.nan, "[0, ∞)", "nan"),
            fault("hard_label_weight", "a word", "half", "number", "'half'"),
            fault("max_length", "one", 1, "at least 2", "1"),
            fault("max_length", "a fraction", 8.5, "integer", "8.5"),
            fault("compiled", "a word", "yes", "'yes'"),
            fault("label_smoothing_factor", "some", 0.1, "0.1", "expected 0"),
        ],
    ),
    Subject(
        "DistillTrainer",
        DistillTrainer,
        lambda: {
            "model": student(),
            "args": config(),
            "teacher": material.model(1, 8, seed=1),
            "divergence": KL(),
            "train_dataset": ROWS,
        },
        [
            fault("model", "nothing", None, "student"),
            fault("model", "a name", "student", "'student'", "load_model"),
            fault("args", "a mapping", {"temperature": 2.0}, "DistillConfig", "dict"),
            fault("teacher", "nothing", None, "None", "load_model"),
            fault("teacher", "a name", "teacher", "'teacher'", "load_model"),
            fault("teacher", "base of no adapters", "base", "PEFT", "GPT2LMHeadModel"),
            fault(
                "teacher",
                "another vocabulary",
                Lazy(lambda: material.model(1, 8, seed=1, vocab_size=7)),
                "7",
                "300",
                "processing_class",
            ),
            fault("divergence", "its name", "kl", "Divergence", "'kl'"),
            fault("divergence", "its class", KL, "Divergence", "KL"),
            fault("compute_loss_func", "given", lambda *it: 0, "divergence is the loss"),
            fault("model_init", "given", student, "model"),
        ],
    ),
    Subject(
        "DistillTrainer",
        DistillTrainer,
        lambda: {
            "model": student(),
            "args": config(),
            "teacher": material.model(1, 8, seed=1),
            "processing_class": material.tokenizer(),
            "teacher_processing_class": material.tokenizer(),
        },
        [
            fault(
                "teacher_processing_class",
                "another tokenizer",
                OTHER,
                "'another'",
                named="teacher and student must share a tokenizer",
            )
        ],
    ),
]
OF_DISTILL = [
    fault("student", "none, and no layers dropped", None, "drop_layers"),
    fault("divergence", "unknown", "unheard-of", "unheard-of"),
    fault("divergence", "out of range", "akl(mu=2)", "mu", "below 1"),
    fault("divergence", "no text", KL(), "KL()"),
    *(
        fault(name, kind, value, f"{value}")
        for name in ("max_steps", "batch_size", "gradient_accumulation", "eval_blocks")
        for kind, value in (("zero", 0), ("negative", -1))
    ),
    fault("eval_every", "zero", 0, "at least 1", "0"),
    fault("save_every", "zero", 0, "at least 1", "0"),
    fault("max_steps", "a fraction", 1.5, "integer", "1.5"),
    fault("batch_size", "a word", "many", "integer", "'many'"),
    fault("keep_checkpoints", "one", 1, "at least 2", "1"),
    fault("max_length", "one", 1, "at least 2", "1"),
    fault("held_out", "all", 1.0, "[0, 1)", "1.0"),
    fault("held_out", "negative", -0.1, "[0, 1)", "-0.1"),
    fault("held_out", "nan", math.nan, "[0, 1)", "nan"),
    fault("warmup", "all", 1.0, "[0, 1)", "1.0"),
    fault("hard_label_weight", "negative", -1.0, "[0, ∞)", "-1.0"),
    fault("hard_label_weight", "a word", "half", "number", "'half'"),
    fault("weight_decay", "negative", -1.0, "[0, ∞)", "-1.0"),
    fault("max_gradient", "infinite", math.inf, "[0, ∞)", "inf"),
    fault("temperature", "zero", 0.0, "(0, ∞)", "0.0"),
    fault("temperature", "nan", math.nan, "(0, ∞)", "nan"),
    fault("epochs", "zero", 0.0, "(0, ∞)", "0.0"),
    fault("learning_rate", "zero", 0.0, "(0, ∞)", "0.0"),
    fault("learning_rate", "a word", "fast", "number", "'fast'"),
    fault("learning_rate_schedule", "unknown", "sine", "cosine", "'sine'"),
    fault("schedule", "unknown", "sine", "taid.t: 0.2 -> 1.0", "'sine'"),
    fault("schedule", "of another", "taid.t: 0.2 -> 1.0", "no term of"),
    fault("dtype", "unknown", "float64", "bfloat16", "'float64'"),
    fault("seed", "negative", -1, "at least 0", "-1"),
    fault("seed", "too large", 2**32, "between 0", "4294967296"),
    fault("device", "unknown", "abacus", "cpu or cuda", "'abacus'"),
]
OF_REPLIES = [
    fault("max_new_tokens", "zero", 0, "at least 1", "0"),
    fault("temperature", "negative", -1.0, "[0, ∞)", "-1.0"),
    fault("temperature", "nan", math.nan, "[0, ∞)", "nan"),
    fault("top_p", "zero", 0.0, "(0, ", "0.0"),
    fault("top_p", "beyond 1", 1.5, "(0, 1]", "1.5"),
]
SETTINGS = [
    Subject(
        "DistillSettings",
        DistillSettings,
        lambda: {"teacher": "teacher", "student": "student", "data": "text.txt"},
        OF_DISTILL,
    ),
    Subject(
        "EvaluateSettings",
        EvaluateSettings,
        lambda: {"data": "rows.jsonl"},
        [
            *OF_REPLIES,
            fault("max_blocks", "zero", 0, "at least 1", "0"),
            fault("batch_size", "zero", 0, "at least 1", "0"),
            fault("batch_size", "a fraction", 1.5, "integer", "1.5"),
            fault("seeds", "zero", 0, "at least 1", "0"),
            fault("prompts", "negative", -1, "at least 0", "-1"),
            fault("max_length", "one", 1, "at least 2", "1"),
            fault(
                "divergences", "unknown", ("kl", "unheard-of"), "unheard-of", named="divergence"
            ),
            fault("divergences", "a name alone", "kl", "tuple", "'kl'"),
            fault("device", "unknown", "abacus", "'abacus'"),
        ],
    ),
    Subject(
        "GenerateSettings",
        GenerateSettings,
        lambda: {"data": "rows.jsonl"},
        [
            *OF_REPLIES,
            fault("prompts", "zero", 0, "at least 1", "0"),
            fault("prompt_tokens", "zero", 0, "at least 1", "0"),
            fault("seeds", "zero", 0, "at least 1", "0"),
            fault("batch_size", "zero", 0, "at least 1", "0"),
            fault("device", "unknown", "abacus", "'abacus'"),
        ],
    ),
    Subject(
        "Sampling",
        Sampling,
        lambda: {"max_new_tokens": 4},
        [
            *OF_REPLIES,
            fault("max_new_tokens", "a fraction", 1.5, "integer", "1.5"),
            fault("temperature", "a word", "hot", "number", "'hot'"),
            fault("top_p", "nothing", None, "number", "None"),
        ],
    ),
]


def settings(**changes):
    quick = material.QUICK | {"max_steps": 1, "eval_blocks": 1}
    named = {"teacher": "teacher", "student": "student", "data": "text.txt"}
    return DistillSettings(**named | quick | changes)


def distilled(out, settings):
    return distill(settings, out)


RUNNING = [
    Subject(
        "distill",
        distilled,
        lambda: {"settings": settings(), "out": "new"},
        [
            fault("settings.teacher", "no model", "missing", "missing", named="model"),
            fault("settings.student", "no model", "missing", "missing", named="model"),
            fault("settings.student", "no file", "missing.json", "missing.json", named="student"),
            fault("settings.student", "no model's", "no-model.json", "no causal", named="student"),
            fault("settings.student", "torn", "broken-config.json", named="student"),
            fault("settings.student", "too narrow", "narrow", "7", "300", named="student"),
            fault("settings.data", "no file", "missing.txt", "missing.txt", named="data"),
            fault("settings.data", "blank", "blank.txt", "no rows", named="data"),
            fault("settings.data", "a chat", "chat.jsonl", "chat template", named="tokenizer"),
            fault("settings.data", "not UTF-8", "latin.txt", "UTF-8", named="latin.txt"),
            fault("settings.eval_data", "no file", "missing.txt", "missing.txt", named="data"),
            fault("settings.max_length", "beyond", 64, "at most 32", "64", named="max_length"),
            fault("settings.drop_layers", "all", "0", "leave a layer", named="drop_layers"),
            fault("out", "a run", "run", "--resume"),
            fault("out", "a file", "text.txt", "text.txt"),
            fault("out", "where the teacher is", "teacher", "teacher"),
        ],
    ),
    Subject(
        "dry_run",
        dry_run,
        lambda: {"settings": settings()},
        [
            fault("settings.teacher", "no model", "missing", "missing", named="model"),
            fault("settings.student", "too narrow", "narrow", "7", "300", named="student"),
            fault("settings.data", "no file", "missing.txt", "missing.txt", named="data"),
            fault("settings.max_length", "beyond", 64, "at most 32", "64", named="max_length"),
        ],
    ),
    Subject(
        "load_run",
        load_run,
        lambda: {"path": "run"},
        [*of_runs(), fault("path", "not finished", "begun", "begun", "--resume")],
    ),
    Subject(
        "evaluate_run",
        evaluate_run,
        lambda: {
            "path": "run",
            "settings": EvaluateSettings(
                "held.txt", max_length=16, max_blocks=1, prompts=0, device="cpu"
            ),
        },
        [
            *of_runs(),
            fault("path", "not finished", "begun", "begun"),
            fault("settings.data", "no file", "missing.jsonl", "missing", named="data"),
            fault("settings.data", "a broken line", "broken.jsonl", named="broken.jsonl, line 2"),
            fault("settings.teacher", "no model", "missing", "missing", named="model"),
            fault("settings.teacher", "too narrow", "narrow", "7", "300", named="teacher"),
            fault("settings.max_length", "beyond", 64, "at most 32", "64", named="max_length"),
        ],
    ),
    Subject(
        "generate_run",
        generate_run,
        lambda: {
            "path": "run",
            "settings": GenerateSettings(
                "prompts.jsonl", prompts=1, max_new_tokens=2, device="cpu"
            ),
        },
        [
            *of_runs(),
            fault("path", "not finished", "begun", "begun"),
            fault("settings.data", "no file", "missing.jsonl", "missing", named="data"),
            fault("settings.data", "too short", "letter.txt", "2 tokens", named="data"),
            fault("settings.max_new_tokens", "beyond", 40, "32", "40", named="max_new_tokens"),
            fault("settings.out", "no folder", "missing/replies.jsonl", "missing", named="out"),
        ],
    ),
    Subject(
        "compare_runs",
        compare_runs,
        lambda: {"paths": ["run"], "out": "new.html"},
        [
            fault("paths", "none", [], "at least one"),
            fault("paths", "one alone", "run", "list"),
            fault("paths", "no run", ["run", "nothing"], "nothing", named="path"),
            fault("paths", "not evaluated", ["begun"], "rkl evaluate begun", named="path"),
            fault(
                "paths", "a torn evaluation", ["torn-evaluation"], "evaluation.json", named="path"
            ),
            fault("out", "no folder", "missing/new.html", "missing", named="out"),
        ],
    ),
    Subject(
        "report_runs",
        report_runs,
        lambda: {"paths": ["run", "begun"], "out": "new.html"},
        [
            fault("paths", "none", [], "at least one"),
            fault("paths", "one alone", "run", "list"),
            fault("paths", "no run", ["nothing"], "nothing", named="path"),
            fault("paths", "torn metrics", ["torn-metrics"], "line 1", named="metrics.jsonl"),
            fault("out", "nowhere for two", None, "2 runs"),
            fault("out", "no folder", "missing/new.html", "missing", named="out"),
        ],
    ),
]
CACHES = [
    Subject(
        "CachedTeacher",
        CachedTeacher,
        lambda: {"path": "cache"},
        [
            fault("path", "no folder", "missing", "no cache.json"),
            fault("path", "no cache", "nothing", "no cache.json"),
            fault("path", "a file", "text.txt", "no cache.json"),
            fault("path", "a torn record", "torn-cache", "cannot be read"),
            fault("path", "too new", "later-cache", "99"),
            fault("path", "a list", "list-cache", "cannot be read"),
            fault("path", "a hollow record", "hollow-cache", "has no data"),
            fault("path", "not finished", "unfinished-cache", "is not finished", "--resume"),
            fault("path", "of rkl 0.1", "old-cache", "rkl 0.1", "rkl cache --teacher"),
            fault("path", "a torn head", "torn-head", "cannot be read"),
        ],
    ),
    Subject(
        "CachedTeacher.observe",
        lambda inputs, predicting: CachedTeacher("cache").observe(inputs, predicting),
        lambda: known(),
        [
            fault("inputs", "others", {"input_ids": torch.zeros(1, 16).long()}, named="row 0"),
        ],
    ),
    Subject(
        "CachedTeacher.observe",
        lambda path: CachedTeacher(path).observe(**known()),
        lambda: {"path": "cache"},
        [
            fault("path", "torn states", "torn-hidden", "shard-00000"),
            fault("path", "lost states", "lost-hidden", "shard-00000"),
        ],
    ),
    Subject(
        "cache_teacher",
        cache_teacher,
        lambda: {"teacher": material.model(2, 16, seed=5), "rows": ROWS, "path": "new-cache"},
        [
            fault("rows", "none", [], "at least one row"),
            fault("rows", "without labels", [{"input_ids": [1, 2]}], named="labels"),
            fault("teacher", "a name", "teacher", "str"),
            fault("path", "of another teacher", "cache", "another teacher"),
            fault("path", "no cache", "run", "other files than a cache"),
            fault("keep", "of no kind", "all", "top-k=64", "'all'"),
            fault("stored", "of no kind", "float16", "bfloat16", "'float16'"),
            fault("seed", "negative", -1, "at least 0", "-1"),
            fault("batch_size", "zero", 0, "at least 1", "0"),
            fault("max_length", "one", 1, "at least 2", "1"),
        ],
    ),
    Subject(
        "cache_teacher",
        cache_teacher,
        lambda: {"teacher": load_model("teacher"), "rows": cached_rows(), "path": "cache"},
        [
            fault("rows", "other than are there", ROWS, "another data", named="path"),
            fault("path", "torn", "torn-cache", "cannot be read"),
        ],
    ),
]


def cached_rows():
    return tokenize(read_rows("rows.jsonl")[:2], load_tokenizer("teacher"), max_length=16)


def known():
    rows = cached_rows()
    inputs, predicting, _ = shifted({name: value[None] for name, value in rows[0].items()})
    return {"inputs": inputs, "predicting": predicting}


LOSS = [
    Subject(
        "distill_loss",
        distill_loss,
        lambda: {
            "teacher": torch.zeros(2, 3, 5),
            "student": torch.zeros(2, 3, 5),
            "labels": torch.ones(2, 3, dtype=torch.long),
            "hard_label_weight": 0.5,
        },
        [
            fault("teacher", "a list", [[0.0]], "tensor", "list"),
            fault("teacher", "integers", torch.zeros(2, 3, 5, dtype=torch.long), "int64"),
            fault("teacher", "of another length", torch.zeros(2, 4, 5), "[2, 3]", "[2, 4]"),
            fault("teacher", "of another vocabulary", torch.zeros(2, 3, 6), "6", "5"),
            fault("student", "one token alone", torch.zeros(5), "[5]"),
            fault("student", "nothing", None, "tensor", "NoneType"),
            fault("divergence", "a word of no divergence", "nonsense", "nonsense"),
            fault("divergence", "a number", 0.5, "Divergence", "0.5"),
            fault("labels", "of another length", torch.ones(2, 4, dtype=torch.long), "[2, 4]"),
            fault("labels", "floats", torch.ones(2, 3), "integers", "float32"),
            fault("labels", "beyond", torch.full((2, 3), 5), "5"),
            fault("labels", "left out", None),
            fault("mask", "floats", torch.ones(2, 3), "booleans", "float32"),
            fault("temperature", "zero", 0.0, "0.0"),
            fault("temperature", "nan", math.nan, "nan"),
            fault("hard_label_weight", "negative", -0.5, "-0.5"),
            fault("num_items_in_batch", "negative", -1, "-1"),
            fault("num_items_in_batch", "a word", "many", "'many'"),
            fault("chunk", "zero", 0, "0"),
            fault("compiled", "a word", "yes", "'yes'"),
        ],
    ),
]

REPLIES = {"first": "first.jsonl", "second": "second.jsonl", "judge": "http://127.0.0.1:9/v1"}
NOT_REPLIES = [
    fault("first", "no file", "nowhere.jsonl", "nowhere.jsonl"),
    fault("second", "a run without replies", "run", "rkl generate"),
    fault("judge", "no address", "somewhere", "http://host:8000/v1", "'somewhere'"),
    fault("max_tokens", "zero", 0, "at least 1", "0"),
    fault("temperature", "negative", -1.0, "at least 0", "-1.0"),
    fault("concurrency", "a fraction", 1.5, "integer", "1.5"),
    fault("timeout", "zero", 0, "above 0", "0"),
    fault("seed", "negative", -1, "at least 0", "-1"),
]


def replied(**arguments):
    named = {name: arguments.pop(name) for name in ("first", "second")}
    return named | {"settings": JudgeSettings(**arguments)}


JUDGING = [
    Subject(
        "judge_cost",
        lambda **arguments: judge_cost(**replied(**arguments)),
        lambda: dict(REPLIES),
        NOT_REPLIES,
    ),
    Subject(
        "judge_runs",
        lambda out, **arguments: judge_runs(**replied(**arguments), out=out),
        lambda: REPLIES | {"out": "verdicts.jsonl"},
        [*NOT_REPLIES, fault("out", "a folder", "run", "must be a file")],
        costly=True,
    ),
]

CACHED = {"teacher": "teacher", "data": "rows.jsonl", "max_length": 16, "device": "cpu"}
MADE = [
    Subject(
        "dry_run_cache",
        lambda **settings: dry_run_cache(CacheSettings(**settings)),
        lambda: dict(CACHED),
        [
            fault("keep", "of no kind", "all", "top-k=64", "'all'"),
            fault("data", "no file", "nowhere.jsonl", "nowhere.jsonl"),
        ],
        costly=True,
    ),
    Subject(
        "write_cache",
        lambda out, **settings: write_cache(CacheSettings(**settings), out),
        lambda: CACHED | {"out": "written-cache"},
        [
            fault("out", "other files", "run", "is no cache"),
            fault("data", "no file", "nowhere.jsonl", "nowhere.jsonl"),
        ],
        costly=True,
    ),
    Subject(
        "evaluate_pair",
        lambda student, **settings: evaluate_pair(student, PairSettings(**settings)),
        lambda: {"student": "student", "contexts": 0} | CACHED,
        [
            fault("student", "no folder", "nowhere", "nowhere", named="model"),
            fault("divergences", "no divergence", ("nonsense",), "nonsense", named="divergence"),
            fault("cost", "negative", -1.0, "-1.0"),
            fault("draft_length", "zero", 0, "0"),
        ],
        costly=True,
    ),
    Subject(
        "new_tokenizer",
        new_tokenizer,
        lambda: {"texts": ["one and one"], "size": 300},
        [
            fault("texts", "one text", "one and one", "a str"),
            fault("texts", "a number among them", ["one", 1], "texts[1]"),
            fault("size", "too few for bytes", 100, "257", "100"),
        ],
    ),
    Subject(
        "new_model",
        new_model,
        lambda: {"tokenizer": new_tokenizer(["one"], 300), "shape": Shape(1, 32), "seed": 0},
        [
            fault("shape", "a pair", (1, 32), "(1, 32)"),
            fault("seed", "negative", -1, "-1"),
        ],
    ),
    Subject(
        "Shape",
        Shape,
        lambda: {"layers": 1, "width": 32, "context": 16},
        [
            fault("layers", "none", 0, "0"),
            fault("width", "no multiple of 32", 40, "40"),
            fault("context", "a fraction", 16.5, "16.5"),
        ],
    ),
    Subject(
        "show_example",
        show_example,
        lambda: {"dataset": ROWS, "tokenizer": load_tokenizer("teacher"), "index": 0},
        [
            fault("dataset", "without labels", [{"input_ids": [1, 2]}], "labels"),
            fault("index", "beyond", 5, "2 rows", "5"),
        ],
    ),
]

SUBJECTS = [*JUDGING, *TRAINER, *LOSS, *MADE, *SETTINGS, *RUNNING, *CACHES]
