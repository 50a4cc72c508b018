"""What metrics, figures and reports must refuse."""

import math

import torch
from subjects import Subject, fault

from rkl import plots, report
from rkl.metrics.precision_recall import pr_curve
from rkl.metrics.text import distinct_n, distinct_n_together, length, rouge_l, self_bleu, words
from rkl.stats import clustered_mean, mean

LOGP = torch.zeros(2, 4).log_softmax(-1)
OF_SAMPLES = [
    fault("samples", "one text", "a b", "list of texts", "'a b'"),
    fault("samples", "nothing", None, "list of texts", "NoneType"),
    fault("samples", "numbers", [3, 4], "text or a list of tokens", "int"),
]
OF_ORDER = [
    fault("n", "zero", 0, "at least 1", "0"),
    fault("n", "a fraction", 1.5, "integer", "1.5"),
    fault("n", "a truth value", True, "integer", "True"),
]


def of_law(name):
    return [
        fault(name, "a list", [0.0], "tensor", "list"),
        fault(name, "integers", torch.zeros(2, 1).long(), "floating-point", "int64"),
        fault(name, "logits", torch.zeros(2, 4), "normalised", "4", "log_softmax"),
        fault(name, "probabilities", LOGP.exp(), "normalised", "log_softmax"),
        fault(name, "nan", LOGP * math.nan, "normalised"),
        fault(name, "another shape", torch.zeros(2, 1), "alike", "[2, 1]"),
    ]


METRICS = [
    Subject(
        "pr_curve",
        pr_curve,
        lambda: {"p": LOGP, "q": LOGP, "slopes": torch.ones(1)},
        [
            *of_law("p"),
            *of_law("q"),
            fault("slopes", "a list", [1.0], "tensor", "list"),
            fault("slopes", "integers", torch.tensor([1, 2]), "floating-point", "int64"),
            fault("slopes", "none", torch.ones(0), "positive", "[]"),
            fault("slopes", "one number", torch.tensor(1.0), "[slopes]", "[]"),
            fault("slopes", "a table", torch.ones(1, 1), "[slopes]", "[1, 1]"),
            fault("slopes", "negative", torch.tensor([-1.0]), "positive", "-1.0"),
            fault("slopes", "infinite", torch.tensor([math.inf]), "finite", "inf"),
        ],
    ),
    Subject(
        "mean",
        mean,
        lambda: {"values": torch.ones(2)},
        [
            fault("values", "a list", [1.0], "tensor", "list"),
            fault("values", "integers", torch.tensor([1]), "floating-point", "int64"),
            fault("values", "none", torch.ones(0), "one draw", "none"),
            fault("values", "one number", torch.tensor(1.0), "one draw"),
        ],
    ),
    Subject(
        "clustered_mean",
        clustered_mean,
        lambda: {"total": torch.ones(2), "count": torch.ones(2)},
        [
            fault("total", "a list", [1.0, 1.0], "tensor", "list"),
            fault("total", "one number", torch.tensor(1.0), "[clusters, ...]", "[]"),
            fault("total", "a cluster too many", torch.ones(3), "3 clusters", "2"),
            fault("count", "a list", [1.0, 1.0], "tensor", "list"),
            fault("count", "a table", torch.ones(2, 2), "[clusters]", "[2, 2]"),
            fault("count", "zero", torch.zeros(2), "one member", "0"),
            fault("count", "negative", torch.tensor([3.0, -1.0]), "at least 0", "-1"),
            fault("count", "nan", torch.full((2,), math.nan), "one member", "nan"),
        ],
    ),
    Subject(
        "words",
        words,
        lambda: {"text": "one two"},
        [
            fault("text", "a number", 3, "string", "3"),
            fault("text", "bytes", b"one", "string", "b'one'"),
        ],
    ),
    Subject(
        "rouge_l",
        rouge_l,
        lambda: {"candidates": ["a b"], "references": ["a c"]},
        [
            it
            for name in ("candidates", "references")
            for it in [
                fault(name, "one text", "a", "list of texts", "'a'"),
                fault(name, "nothing", None, "list of texts", "NoneType"),
                fault(name, "numbers", [3], "text or a list of tokens", "int"),
                fault(name, "another number of them", ["a", "b"], "2", "1"),
            ]
        ],
    ),
    *(
        Subject(measure.__name__, measure, lambda: {"samples": ["a b", "c d"], "n": 1}, faults)
        for measure, faults in [
            (distinct_n, [*OF_SAMPLES, *OF_ORDER]),
            (distinct_n_together, [*OF_SAMPLES, *OF_ORDER]),
            (
                self_bleu,
                [
                    *OF_SAMPLES,
                    *OF_ORDER,
                    fault("samples", "one of them", ["a b"], "two at least", "1"),
                    fault("samples", "none", [], "two at least", "0"),
                ],
            ),
        ]
    ),
    Subject("length", length, lambda: {"samples": ["a b"]}, OF_SAMPLES),
]

CURVE = [0.0, 0.5, 1.0]


def of_vector(name, *inside):
    """What a vector of a figure may not be; ``inside`` puts it where it belongs."""
    put = inside[0] if inside else lambda values: values
    return [
        fault(name, "none", put([]), "non-empty vector"),
        fault(name, "a table", put([[1.0], [2.0], [3.0]]), "non-empty vector", "(3, 1)"),
        fault(name, "words", put(["a", "b", "c"]), "numbers"),
    ]


PLOTS = [
    Subject(
        "training_curves",
        plots.training_curves,
        lambda: {"runs": {"a": (CURVE, CURVE)}, "window": 2},
        [
            *of_vector("runs", lambda values: {"a": (CURVE, values)}),
            fault("runs", "no run", {}, "empty"),
            fault("runs", "a list", [CURVE], "mapping", "list"),
            fault("runs", "values alone", {"a": CURVE}, "a pair", "3"),
            fault("runs", "a step too few", {"a": ([0, 1], CURVE)}, "3", "2"),
            fault("window", "zero", 0, "at least 1", "0"),
            fault("window", "a fraction", 2.5, "at least 1", "2.5"),
        ],
    ),
    Subject(
        "head_tail",
        plots.head_tail,
        lambda: {"teacher": [0.5, 0.3, 0.2], "students": {"a": {0: CURVE}}, "head": 1},
        [
            *of_vector("teacher"),
            *of_vector("students", lambda values: {"a": {0: values}}),
            fault("students", "no student", {}, "empty"),
            fault("students", "no step", {"a": {}}, "empty"),
            fault("students", "an atom too few", {"a": {0: CURVE[1:]}}, "3", "2"),
            fault("head", "a word", "one", "number of atoms", "'one'"),
            fault("head", "negative", -1, "number of atoms", "-1"),
        ],
    ),
    Subject(
        "divergence_by_rank",
        plots.divergence_by_rank,
        lambda: {"edges": [0, 1, 2, 3], "students": {"a": CURVE}, "errors": {"a": CURVE}},
        [
            *of_vector("edges"),
            *of_vector("students", lambda values: {"a": values}),
            *of_vector("errors", lambda values: {"a": values}),
            fault("edges", "falling", [3, 2, 1, 0], "growing", "3.0"),
            fault("edges", "one of them", [3], "two", "3.0"),
            fault("edges", "an edge too many", [0, 1, 2, 3, 4], "4", "3", named="students"),
            fault("students", "no student", {}, "empty"),
            fault("errors", "a bin too few", {"a": CURVE[1:]}, "3", "2"),
        ],
    ),
    Subject(
        "precision_recall",
        plots.precision_recall,
        lambda: {"students": {"a": (CURVE, CURVE)}, "bands": {"a": (CURVE, CURVE)}},
        [
            *of_vector("students", lambda values: {"a": (values, CURVE)}),
            fault("students", "no student", {}, "empty"),
            fault("students", "precision alone", {"a": CURVE}, "a pair", "3"),
            fault("students", "a slope too few", {"a": (CURVE, CURVE[1:])}, "3", "2"),
            fault("bands", "a slope too few", {"a": (CURVE, CURVE[1:])}, "3", "2"),
            fault("bands", "one bound", {"a": [CURVE]}, "a pair", "1"),
        ],
    ),
    Subject(
        "head_tail_by_step",
        plots.head_tail_by_step,
        lambda: {"steps": [0, 1, 2], "runs": {"a": (CURVE, CURVE)}},
        [
            *of_vector("steps"),
            *of_vector("runs", lambda values: {"a": (CURVE, values)}),
            fault("runs", "no run", {}, "empty"),
            fault("runs", "the head alone", {"a": [CURVE]}, "a pair", "1"),
            fault("runs", "a step too few", {"a": (CURVE, CURVE[1:])}, "3", "2"),
        ],
    ),
    Subject(
        "bars",
        plots.bars,
        lambda: {"values": {"a": 1.0}, "errors": {"a": 0.1}, "label": "nats"},
        [
            fault("values", "no run", {}, "empty"),
            fault("values", "words", {"a": "much"}, "numbers"),
            fault("errors", "words", {"a": "little"}, "numbers"),
        ],
    ),
]

REPORT = [
    Subject(
        "Table",
        report.Table,
        lambda: {"title": "T", "columns": ["", "a"], "rows": [["x", 1.0]]},
        [
            fault("rows", "a cell too few", [["x", 1.0], ["y"]], "rows[1]", "2", "1"),
            fault("rows", "a cell too many", [["x", 1.0, 2.0]], "rows[0]", "2", "3"),
            fault("rows", "no cells", [[]], "rows[0]", "0"),
            fault("rows", "a list for a cell", [["x", [1.0]]], "rows[0]", "list"),
            fault("rows", "a pair too long", [["x", (1.0, 2.0, 3.0)]], "rows[0]", "pair", "3"),
            fault("columns", "a column too few", ["a"], "1", "2", named="columns"),
        ],
    ),
    Subject(
        "Figure",
        report.Figure,
        lambda: {"title": "T", "svg": "<svg></svg>"},
        [
            fault("svg", "text", "a figure", "<svg>", "'a figure'"),
            fault("svg", "empty", "", "<svg>", "''"),
            fault("svg", "nothing", None, "<svg>", "None"),
            fault("svg", "with a prologue", "<?xml?><svg></svg>", "<svg>", "<?xml"),
        ],
    ),
    Subject(
        "Generations",
        report.Generations,
        lambda: {"title": "T", "prompts": ["a"], "columns": {"m": ["x"]}},
        [
            fault("columns", "a text too few", {"m": []}, "1", "0"),
            fault("columns", "a text too many", {"m": ["x", "y"]}, "1", "2"),
            fault("prompts", "a prompt too many", ["a", "b"], "2", "1"),
        ],
    ),
    Subject(
        "render",
        report.render,
        lambda: {"title": "T", "sections": [report.Section("S")]},
        [
            fault("sections", "strings", ["S"], "list of Sections", "str"),
            fault("sections", "one alone", report.Section("S"), "list of Sections"),
        ],
    ),
    Subject(
        "Section",
        report.Section,
        lambda: {"title": "T", "blocks": [report.Settings({})]},
        [fault("blocks", "strings", ["b"], "Blocks", "str")],
    ),
]
SUBJECTS = [*METRICS, *PLOTS, *REPORT]
