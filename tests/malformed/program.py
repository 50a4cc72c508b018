"""What the command line must refuse, command by command."""

from folders import of_runs
from subjects import ABSENT, Subject, command, fault

EVERYWHERE = [
    fault("seed", "a word", "one", "'one'"),
    fault("seed", "a fraction", "0.5", "'0.5'"),
    fault("sed", "an unknown flag", "1", named="--sed"),
    fault("_too_many", "a word too many", ["more"], named="more"),
]
OF_DISTILL = [
    fault("out", "left out", ABSENT, "--out"),
    fault("out", "a run", "run", "exists", "--resume", "--overwrite"),
    fault("out", "a folder of others", "narrow", "exists"),
    fault("out", "where the data are", "nothing/..", "holds"),
    fault("out", "a file", "text.txt", "folder"),
    fault("out", "where the student is", "student", "student"),
    fault("teacher", "left out", ABSENT, "--teacher", "must be given"),
    fault("teacher", "no model", "missing", "missing", named="model"),
    fault("teacher", "no GGUF file", "missing.gguf", "no file", named="model"),
    fault(
        "teacher",
        "a garbled GGUF file",
        "garbage.gguf",
        "garbage.gguf",
        named="model",
        needs="gguf",
    ),
    fault("teacher", "torn weights", "torn-weights", "torn-weights", named="model"),
    fault("data", "left out", ABSENT, "--data", "must be given"),
    fault("data", "no file", "missing.jsonl", "missing.jsonl"),
    fault("data", "a broken line", "broken.jsonl", "not JSON", named="broken.jsonl, line 2"),
    fault("data", "not UTF-8", "latin.txt", "UTF-8", named="latin.txt"),
    fault("data", "two kinds of rows", "mixed.jsonl", named="mixed.jsonl, line 2"),
    fault("data", "an empty file", "empty.jsonl", "no rows"),
    fault("data", "another format", "garbage.gguf", ".jsonl", "garbage.gguf"),
    fault("student", "left out", ABSENT, "drop_layers"),
    fault("student", "no model", "missing", "missing", named="model"),
    fault("student", "too narrow", "narrow", "7", "300"),
    fault("divergence", "unknown", "unheard-of", "unheard-of"),
    fault("divergence", "unclosed", "akl(mu=0.5", "never closed"),
    fault("divergence", "out of range", "akl(mu=2)", "mu", "below 1"),
    fault("divergence", "an unknown setting", "akl(nu=1)", "'nu'"),
    fault("max_steps", "a word", "many", "'many'"),
    fault("max_steps", "zero", 0, "at least 1", "0"),
    fault("batch_size", "negative", -1, "at least 1", "-1"),
    fault("max_length", "beyond the context", 64, "at most 32", "64"),
    fault("learning_rate", "a word", "fast", "'fast'"),
    fault("learning_rate", "negative", -1.0, "(0, ∞)", "-1.0"),
    fault("temperature", "nan", "nan", "number", "nan"),
    fault("learning_rate_schedule", "unknown", "sine", "'sine'", "cosine"),
    fault("schedule", "unknown", "sine", "'sine'", "taid.t"),
    fault("dtype", "unknown", "float7", "'float7'", "bfloat16"),
    fault("held_out", "all", 1, "[0, 1)", "1.0"),
    fault("keep_checkpoints", "one", 1, "at least 2", "1"),
    fault("drop_layers", "words", "middle", "'middle'"),
    fault("drop_layers", "all", "0", "leave a layer"),
    fault("device", "unknown", "abacus", "'abacus'"),
    fault("config", "no file", "missing.yaml", "missing.yaml"),
    fault("config", "broken", "broken.yaml", "broken.yaml"),
    fault("config", "an object in it", "object.yaml", "object.yaml"),
    fault("config", "a list", "no-mapping.yaml", "no-mapping.yaml"),
    fault("config", "an unknown key", "unknown.yaml", "'learnin_rate'"),
    fault("config", "a word for a number", "typed.yaml", "'many'", named="max_steps"),
    fault("config", "not UTF-8", "latin.txt", "latin.txt"),
    fault("config", "a folder without run", "nothing", "nothing"),
    fault("max_stepz", "a misspelt flag", 1, named="--max-stepz"),
]
QUICK = {"max_steps": 1, "max_length": 16, "batch_size": 2, "eval_blocks": 1, "device": "cpu"}
OF_GENERATE = [
    fault("data", "left out", ABSENT, "--data"),
    fault("data", "no file", "missing.jsonl", "missing.jsonl"),
    fault("data", "a broken line", "broken.jsonl", named="broken.jsonl, line 2"),
    fault("data", "too short", "letter.txt", "2 tokens"),
    fault("prompts", "a word", "few", "'few'"),
    fault("prompts", "zero", 0, "at least 1", "0"),
    fault("seeds", "zero", 0, "at least 1", "0"),
    fault("temperature", "negative", "-1", "-1"),
    fault("top_p", "beyond 1", 1.5, "(0, 1]", "1.5"),
    fault("max_new_tokens", "beyond the context", 64, "32", "64"),
    fault("out", "no folder", "missing/replies.jsonl", "missing", named="out"),
    fault("device", "unknown", "abacus", "'abacus'"),
    fault("config", "an unknown key", "unknown.yaml", "'learnin_rate'"),
]
OF_EVALUATE = [
    fault("data", "left out", ABSENT, "--data"),
    fault("data", "no file", "missing.jsonl", "missing.jsonl"),
    fault("data", "other columns", "columns.jsonl", "'body'", named="columns.jsonl, line 1"),
    fault("teacher", "no model", "missing", "missing", named="model"),
    fault("teacher", "too narrow", "narrow", "7", "300"),
    fault("divergences", "unknown", "unheard-of", "unheard-of", named="divergence"),
    fault("max_length", "beyond the context", 64, "at most 32", "64"),
    fault("max_blocks", "zero", 0, "at least 1", "0"),
    fault("batch_size", "a fraction", 1.5, "'1.5'"),
    fault("prompts", "negative", -1, "at least 0", "-1"),
    fault("device", "unknown", "abacus", "'abacus'"),
    fault("config", "no file", "missing.yaml", "missing.yaml"),
]
ACROSS = [
    fault("_runs", "left out", ABSENT, named="RUN"),
    fault("_runs", "no run", ["run", "nothing"], "nothing", named="path"),
    fault("_runs", "a torn run", ["run-torn"], "corrupt", named="path"),
    fault("_runs", "two kinds", ["run", "other"], "one kind", named="paths"),
    fault("_runs", "an unknown kind", ["run-unheard"], "'unheard_of'", named="path"),
    fault("out", "no folder", "missing/new.html", "missing", named="out"),
    fault("out", "a folder", "nothing", "folder"),
]
OUT = [
    fault("out", "a run", "run", "exists", "--overwrite"),
    fault("out", "a file", "text.txt", "folder"),
]


def of_one_run():
    """A run that is none, given first."""
    return [it._replace(value=[it.value]) for it in of_runs("_run")]


SUBJECTS = [
    Subject(
        "rkl",
        command(),
        lambda: {"_command": ["divergences"]},
        [
            fault("_command", "left out", ABSENT, named="COMMAND"),
            fault("_command", "unknown", ["dance"], "distill", named="'dance'"),
            fault("_command", "a flag", ["--dance"], named="COMMAND"),
        ],
    ),
    Subject(
        "rkl divergences",
        command("divergences"),
        lambda: {"_name": ["kl"]},
        [
            *EVERYWHERE,
            fault("_name", "unknown", ["unheard-of"], named="'unheard-of'"),
            fault("_name", "positional", ["akl(0.5)"], "by name", named="'akl(0.5)'"),
            fault("_name", "out of range", ["akl(mu=2)"], "mu", "below 1", named="'akl(mu=2)'"),
            fault("_name", "no divergence", ["os:getcwd"], named="os:getcwd"),
        ],
    ),
    Subject(
        "rkl distill",
        command("distill", "--no-compiled"),
        lambda: (
            {"teacher": "teacher", "student": "student", "data": "text.txt", "out": "new"} | QUICK
        ),
        [*EVERYWHERE, *OF_DISTILL],
    ),
    Subject(
        "rkl judge",
        lambda first, second, **flags: command("judge", first, second)(**flags),
        lambda: {
            "first": "first.jsonl",
            "second": "second.jsonl",
            "judge": "http://127.0.0.1:9/v1",
            "out": "verdicts.jsonl",
            "dry_run": True,
        },
        [
            fault("first", "no replies", "rows.jsonl", "prompt and text"),
            fault("judge", "no address", "somewhere", "http://host:8000/v1"),
            fault("instruction", "no file", "nowhere.txt", "nowhere.txt"),
            fault("max_tokens", "zero", "0", "at least 1"),
        ],
    ),
    Subject(
        "rkl cache",
        command("cache"),
        lambda: {"teacher": "teacher", "data": "rows.jsonl", "out": "new-kept", "max_length": 16},
        [
            fault("keep", "of no kind", "all", "top-k=64", "'all'"),
            fault("data", "no file", "nowhere.jsonl", "nowhere.jsonl"),
            fault("out", "no cache", "run", "is no cache"),
        ],
    ),
    Subject(
        "rkl distill --resume",
        command("distill", "--resume"),
        lambda: {"out": "run"},
        [
            fault("out", "nothing to go on with", "nothing", "must be given", named="--data"),
            fault("overwrite", "beside resume", True, "resume"),
            fault("out", "a torn run", "run-torn", "cannot be read"),
            fault("learning_rate", "another than before", 0.5, "0.5"),
            fault("data", "another than before", "held.txt", "held.txt"),
        ],
    ),
    Subject(
        "rkl generate",
        command("generate"),
        lambda: {
            "_run": ["run"],
            "data": "prompts.jsonl",
            "max_new_tokens": 2,
            "device": "cpu",
        },
        [*EVERYWHERE, *OF_GENERATE, *of_one_run(), fault("_run", "left out", ABSENT, named="RUN")],
    ),
    Subject(
        "rkl evaluate",
        command("evaluate"),
        lambda: {
            "_run": ["run"],
            "data": "held.txt",
            "max_length": 16,
            "max_blocks": 1,
            "prompts": 0,
            "device": "cpu",
        },
        [*EVERYWHERE, *OF_EVALUATE, *of_one_run(), fault("_run", "left out", ABSENT, named="RUN")],
    ),
    Subject(
        "rkl compare",
        command("compare"),
        lambda: {"_runs": ["run"], "out": "new.html"},
        [
            *ACROSS,
            fault("_runs", "not evaluated", ["begun"], "rkl evaluate", named="path"),
            fault("_runs", "a torn evaluation", ["torn-evaluation"], named="evaluation.json"),
            fault("seed", "a word", "one", "'one'"),
        ],
    ),
    Subject(
        "rkl report",
        command("report"),
        lambda: {"_runs": ["run"], "out": "new.html"},
        [
            *ACROSS,
            fault("_runs", "torn metrics", ["torn-metrics"], named="metrics.jsonl, line 1"),
            fault("seed", "a word", "one", "'one'"),
        ],
    ),
    Subject(
        "rkl demo",
        command("demo"),
        lambda: {"_name": ["distill"], "out": "new"},
        [
            *EVERYWHERE,
            *OUT,
            fault("_name", "unknown", ["dance"], "'dance'", "'distill'", named="name"),
            fault("device", "unknown", "abacus", "'abacus'"),
        ],
        costly=True,
    ),
    Subject(
        "rkl study",
        command("study"),
        lambda: {"_name": ["akl"], "part": "toy", "out": "new"},
        [
            *EVERYWHERE,
            *OUT,
            fault("_name", "unknown", ["dance"], "akl", named="'dance'"),
            fault("_name", "left out", ABSENT, named="name"),
            fault("part", "unknown", "whole", "toy", "'whole'"),
            fault("device", "unknown", "abacus", "'abacus'"),
        ],
        costly=True,
    ),
]
