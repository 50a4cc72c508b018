"""What divergences, estimators and parse must refuse."""

import functools
import math

import torch
from subjects import Subject, fault
from torch.distributions import Bernoulli, Categorical, Normal

import rkl
from rkl import LinearHead, TopK
from rkl.testing import check_divergence

TOKENS, VOCAB, WIDTH = 3, 5, 4


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head():
    return LinearHead(random(TOKENS, WIDTH), random(VOCAB, WIDTH, seed=1), random(VOCAB, seed=2))


def top():
    return TopK(*random(TOKENS, VOCAB).log_softmax(-1).topk(2))


def drawn():
    return rkl.draw(random(TOKENS, VOCAB), 2, generator=torch.Generator().manual_seed(0))


LOGITS = random(TOKENS, VOCAB)
LONGER = random(TOKENS + 1, VOCAB)
WIDER = random(TOKENS, VOCAB + 1)
NORMAL = Normal(0.0, 1.0)
WHOLE = torch.zeros(TOKENS, VOCAB, dtype=torch.long)
ELSEWHERE = torch.zeros(TOKENS, VOCAB, device="meta")


def of_logits(name):
    """What either side may not be, given as logits."""
    return [
        fault(name, "nothing", None, "LinearHead", "NoneType"),
        fault(name, "a list", [[0.0]], "tensor", "list"),
        fault(name, "a tuple that is no head", (LOGITS, LOGITS), "LinearHead", "tuple"),
        fault(name, "an array", LOGITS.numpy(), "tensor", "ndarray"),
        fault(name, "integers", WHOLE, "floating-point", "int64"),
        fault(name, "complex numbers", LOGITS.to(torch.complex64), "floating-point", "complex64"),
        fault(name, "a batch too many", LOGITS[None], "[tokens, vocab]", "[1, 3, 5]"),
        fault(name, "one token alone", LOGITS[0], "[tokens, vocab]", "[5]"),
        fault(name, "no vocabulary", LOGITS[:, :0], "[tokens, vocab]", "[3, 0]"),
        fault(name, "a token too many", LONGER, "3", "4"),
        fault(name, "an atom too many", WIDER, "5", "6"),
        fault(name, "on another device", ELSEWHERE, "meta", "cpu"),
    ]


def of_heads(name):
    """What the fields of a head may not be, on either side."""
    h = head()
    return [
        fault(f"{name}.hidden", "nothing", None, "tensor", "NoneType"),
        fault(f"{name}.hidden", "integers", h.hidden.long(), "floating-point", "int64"),
        fault(f"{name}.hidden", "one token alone", h.hidden[0], "[tokens, width]", "[4]"),
        fault(f"{name}.hidden", "a token too many", random(4, WIDTH), "3", "4", named=name),
        fault(f"{name}.weight", "nothing", None, "tensor", "NoneType"),
        fault(f"{name}.weight", "a list", [[0.0] * WIDTH] * VOCAB, "tensor", "list"),
        fault(f"{name}.weight", "integers", h.weight.long(), "floating-point", "int64"),
        fault(f"{name}.weight", "a vector", h.weight[0], "[vocab, 4]", "[4]"),
        fault(f"{name}.weight", "another width", random(VOCAB, 7), "[vocab, 4]", "[5, 7]"),
        fault(f"{name}.weight", "transposed", random(WIDTH, VOCAB), "[vocab, 4]", "[4, 5]"),
        fault(f"{name}.weight", "no vocabulary", h.weight[:0], "[vocab, 4]", "[0, 4]"),
        fault(f"{name}.weight", "another precision", h.weight.half(), "float32", "float16"),
        fault(f"{name}.bias", "a list", [0.0] * VOCAB, "tensor", "list"),
        fault(f"{name}.bias", "integers", h.bias.long(), "floating-point", "int64"),
        fault(f"{name}.bias", "an atom too few", h.bias[1:], "[5]", "[4]"),
        fault(f"{name}.bias", "another precision", h.bias.double(), "float32", "float64"),
        fault(f"{name}.scale", "nothing", None, "number", "None"),
        fault(f"{name}.scale", "a string", "2", "number", "'2'"),
        fault(f"{name}.scale", "negative", -2.0, "above 0", "-2.0"),
        fault(f"{name}.scale", "nan", math.nan, "finite", "nan"),
        fault(f"{name}.softcap", "a string", "30", "number", "'30'"),
        fault(f"{name}.softcap", "zero", 0.0, "above 0", "0.0"),
        fault(f"{name}.softcap", "infinite", math.inf, "finite", "inf"),
        fault(f"{name}.temperature", "nothing", None, "number", "None"),
        fault(f"{name}.temperature", "a tensor", torch.ones(()), "number", "tensor"),
        fault(f"{name}.temperature", "zero", 0, "above 0", "0"),
        fault(f"{name}.temperature", "a truth value", True, "number", "True"),
    ]


OF_TOP = [
    fault("p.logp", "a list", [[-1.0, -2.0]] * TOKENS, "tensor", "list"),
    fault("p.logp", "integers", WHOLE[:, :2], "floating-point", "int64"),
    fault("p.logp", "one token alone", top().logp[0], "[tokens, k]", "[2]"),
    fault("p.logp", "logits", torch.full((TOKENS, 2), 3.0), "at most 1", "40.17"),
    fault("p.index", "a list", [[0, 1]] * TOKENS, "integers", "list"),
    fault("p.index", "floats", top().index.float(), "integers", "float32"),
    fault("p.index", "truth values", top().index.bool(), "integers", "bool"),
    fault("p.index", "an atom too few", top().index[:, :1], "[3, 2]", "[3, 1]"),
    fault("p.index", "beyond the vocabulary", torch.tensor([[1, 9]] * TOKENS), "[0, 5)", "1 to 9"),
    fault("p.index", "negative", torch.tensor([[-5, 1]] * TOKENS), "[0, 5)", "-5 to 1"),
    fault("p.index", "an atom twice", torch.zeros_like(top().index), "twice"),
]
OF_EXACT = [
    fault("divergence", "its name", "kl", "Divergence", "'kl'", "rkl.parse"),
    fault("divergence", "its class", rkl.KL, "Divergence", "KL"),
    fault("q", "a top k", top(), "only p may be"),
    fault("weight", "a list", [1.0] * TOKENS, "tensor", "list"),
    fault("weight", "integers", torch.ones(TOKENS, dtype=torch.long), "floating-point", "int64"),
    fault("weight", "truth values", torch.ones(TOKENS, dtype=torch.bool), "floating", "bool"),
    fault("weight", "complex numbers", torch.ones(TOKENS) * 1j, "floating-point", "complex64"),
    fault("weight", "a token too few", torch.ones(2), "[3]", "[2]"),
    fault("weight", "a column", torch.ones(TOKENS, 1), "[3]", "[3, 1]"),
    fault("weight", "negative", torch.tensor([1.0, -1.0, 1.0]), "at least 0"),
    fault("weight", "nan", torch.tensor([1.0, math.nan, 1.0]), "finite"),
    fault("weight", "infinite", torch.tensor([1.0, math.inf, 1.0]), "finite"),
    fault("weight", "zero everywhere", torch.zeros(TOKENS), "None of the 3 tokens"),
    fault("weight", "on another device", torch.ones(TOKENS, device="meta"), "cpu", "meta"),
    fault("chunk", "zero", 0, "at least 1", "0"),
    fault("chunk", "a fraction", 1.5, "at least 1", "1.5"),
    fault("chunk", "a truth value", True, "at least 1", "True"),
    fault("compiled", "a string", "yes", "'yes'"),
    fault("labels", "nothing", None, "hard_label_weight", "None"),
    fault("labels", "a list", [0] * TOKENS, "integers", "list"),
    fault("labels", "floats", torch.zeros(TOKENS), "integers", "float32"),
    fault("labels", "truth values", torch.ones(TOKENS, dtype=torch.bool), "integers", "bool"),
    fault("labels", "a token too many", torch.zeros(4, dtype=torch.long), "[3]", "[4]"),
    fault("labels", "beyond the vocabulary", torch.tensor([0, 5, 1]), "[0, 5)", "0 to 5"),
    fault("labels", "ignored ones", torch.tensor([0, -100, 1]), "[0, 5)", "-100 to 1"),
    fault("hard_label_weight", "nothing", None, "number", "None"),
    fault("hard_label_weight", "a string", "0.5", "number", "'0.5'"),
    fault("hard_label_weight", "a truth value", True, "number", "True"),
    fault("hard_label_weight", "negative", -0.5, "at least 0", "-0.5"),
    fault("hard_label_weight", "nan", math.nan, "at least 0", "nan"),
    fault("hard_label_weight", "infinite", math.inf, "at least 0", "inf"),
]
OF_PER_TOKEN = [
    fault("divergences", "one alone", rkl.KL(), "map names", "KL()"),
    fault("divergences", "a list", [rkl.KL()], "map names", "[KL()]"),
    fault("divergences", "none", {}, "one divergence at least", "{}"),
    fault("divergences", "a name among them", {"kl": "kl"}, "'kl'", named="divergence"),
    fault("chunk", "negative", -1, "at least 1", "-1"),
    fault("q", "a top k", top(), "only p may be"),
]
SAMPLES = random(6)
OF_SAMPLES = [
    ("a list", [0.1], "tensor", "list"),
    ("integers", torch.ones(6, dtype=torch.long), "floating-point", "int64"),
    ("none", SAMPLES[:0], "one sample at least", "[0]"),
    ("a batch", SAMPLES[None], "[samples]", "[1, 6]"),
    ("one number", SAMPLES[0], "[samples]", "[]"),
]
NO_F = [
    fault("divergence", "no f-divergence", rkl.AKL(), "f-divergence", "AKL", "rkl.exact"),
    fault("divergence", "its name", "kl", "f-divergence", "'kl'"),
]

ESTIMATORS = [
    Subject(
        "exact",
        rkl.exact,
        lambda: {
            "divergence": rkl.KL(),
            "p": LOGITS,
            "q": LOGITS,
            "labels": torch.zeros(TOKENS, dtype=torch.long),
            "hard_label_weight": 0.5,
        },
        [*OF_EXACT, *of_logits("p"), *of_logits("q")],
    ),
    Subject(
        "exact",
        rkl.exact,
        lambda: {"divergence": rkl.AKL(), "p": head(), "q": head()},
        [*of_heads("p"), *of_heads("q")],
    ),
    Subject(
        "exact",
        rkl.exact,
        lambda: {"divergence": rkl.KL(), "p": top(), "q": LOGITS},
        OF_TOP,
    ),
    Subject(
        "per_token",
        rkl.per_token,
        lambda: {"divergences": {"kl": rkl.KL()}, "p": LOGITS, "q": LOGITS},
        [*OF_PER_TOKEN, *of_logits("p")],
    ),
    Subject(
        "per_token",
        rkl.per_token,
        lambda: {"divergences": {"kl": rkl.KL()}, "p": top(), "q": head()},
        [*of_heads("q")],
    ),
    Subject(
        "sampled_terms",
        rkl.sampled_terms,
        lambda: {"divergence": rkl.KL(), "p": drawn(), "q": LOGITS},
        [
            fault("divergence", "no f-divergence", rkl.AKL(), "f-divergence", "AKL"),
            fault("p", "logits", LOGITS, "Sampled", "Tensor"),
            fault("p.logp", "logits", torch.full((TOKENS, 2), 3.0), "at most 0", "3"),
            fault("p.index", "floats", drawn().index.float(), "integers", "float32"),
            fault("p.index", "beyond", torch.tensor([[1, 9]] * TOKENS), "[0, 5)", "1 to 9"),
            fault("p.log_weight", "a draw too few", LOGITS[:, :1], "[3, 2]", "[3, 1]"),
            fault("p.log_weight", "integers", WHOLE[:, :2], "floating-point", "int64"),
            fault("q", "draws", drawn(), "only p may be"),
            fault("chunk", "zero", 0, "at least 1", "0"),
        ],
    ),
    *(
        Subject(
            name,
            getattr(rkl, name),
            lambda: {"x": LOGITS},
            [
                fault("x", "a list", [[0.0]], "tensor", "list"),
                fault("x", "integers", LOGITS.long(), "floating-point", "int64"),
                fault("x", "a number", LOGITS[0, 0], "[*batch, atoms]"),
            ],
        )
        for name in ("row_sum", "row_max", "row_logsumexp")
    ),
    Subject(
        "draw",
        rkl.draw,
        lambda: {"logits": LOGITS, "draws": 2},
        [
            fault("logits", "a list", [[0.0]], "tensor", "list"),
            fault("logits", "one token alone", LOGITS[0], "[tokens, vocab]", "[5]"),
            fault("draws", "none", 0, "at least 1", "0"),
            fault("draws", "a fraction", 1.5, "at least 1", "1.5"),
            fault("temperature", "zero", 0, "above 0", "0"),
            fault("temperature", "a string", "hot", "number", "'hot'"),
        ],
    ),
    Subject(
        "monte_carlo",
        rkl.monte_carlo,
        lambda: {"divergence": rkl.KL(), "log_ratio": SAMPLES, "sampled_from": "p"},
        [
            *NO_F,
            *(fault("log_ratio", *it) for it in OF_SAMPLES),
            fault("sampled_from", "another side", "r", "'p' or 'q'", "'r'"),
            fault("sampled_from", "nothing", None, "'p' or 'q'", "None"),
        ],
    ),
    Subject(
        "variational_bound",
        rkl.variational_bound,
        lambda: {"divergence": rkl.KL(), "score_p": SAMPLES, "score_q": SAMPLES},
        [
            *NO_F,
            *(fault("score_p", *it) for it in OF_SAMPLES),
            *(fault("score_q", *it) for it in OF_SAMPLES),
        ],
    ),
]


def of_number(name, *beyond):
    """What a parameter may not be: no number, not finite, or beyond its range."""
    return [
        fault(name, "a string", "0.5", "number", "'0.5'"),
        fault(name, "nothing", None, "number", "None"),
        fault(name, "a truth value", True, "number", "True"),
        fault(name, "nan", math.nan, "finite", "nan"),
        fault(name, "infinite", math.inf, "finite", "inf"),
        *(fault(name, f"{value:g}", value, f"{value}") for value in beyond),
    ]


# Every divergence with parameters, and for each of these values beyond its range.
BEYOND = {
    rkl.JensenShannon: {"beta": (0.0, 1.0, -0.5)},
    rkl.SkewKL: {"alpha": (0.0, 1.0)},
    rkl.SkewReverseKL: {"alpha": (0.0, 1.0)},
    rkl.Amari: {"alpha": (0.0, 1.0)},
    rkl.AlphaBeta: {"alpha": (0.0,), "beta": (0.0,)},
    rkl.PrecisionRecall: {"lam": (0.0, -1.0)},
    rkl.PrecisionHalf: {"lam": (0.0,)},
    rkl.RecallHalf: {"lam": (0.0,)},
    rkl.AKL: {"mu": (1.0, -0.1)},
}
PARAMETERS = [
    Subject(
        kind.__name__,
        kind,
        lambda ranges=ranges: {name: 0.4 for name in ranges},
        [it for name, values in ranges.items() for it in of_number(name, *values)],
    )
    for kind, ranges in BEYOND.items()
]
LOGP = LOGITS.log_softmax(-1)
DIVERGENCES = [
    *PARAMETERS,
    Subject(
        "AlphaBeta",
        rkl.AlphaBeta,
        lambda: {"alpha": 0.5, "beta": 0.5},
        [fault("alpha", "a sum below 0", -0.75, "alpha + beta", "-0.25")],
    ),
    Subject(
        "AKL",
        rkl.AKL,
        lambda: {"straddle": "head"},
        [
            fault("straddle", "another word", "neck", "'head' or 'tail'", "'neck'"),
            fault("straddle", "nothing", None, "'head' or 'tail'", "None"),
        ],
    ),
    Subject(
        "Divergence.__rmul__",
        lambda weight: weight * rkl.KL(),
        lambda: {"weight": 0.5},
        [
            fault("weight", "zero", 0, "above 0", "got 0 "),
            fault("weight", "negative", -1.0, "above 0", "-1.0"),
            fault("weight", "nan", math.nan, "finite", "nan"),
            fault("weight", "infinite", math.inf, "finite", "inf"),
        ],
    ),
    Subject(
        "Divergence.__call__",
        lambda logp, logq: rkl.KL()(logp, logq),
        lambda: {"logp": LOGP, "logq": LOGP},
        [
            it
            for name in ("logp", "logq")
            for it in [
                fault(name, "a list", [0.0], "tensor", "list"),
                fault(name, "integers", WHOLE, "floating-point", "int64"),
                fault(name, "an atom too few", LOGP[:, 1:], "[3, 5]", "[3, 4]"),
                fault(name, "a token too few", LOGP[1:], "[3, 5]", "[2, 5]"),
            ]
        ],
    ),
    Subject(
        "KL.between",
        rkl.KL().between,
        lambda: {"p": Categorical(logits=LOGP), "q": Categorical(logits=LOGP)},
        [
            fault("p", "logits", LOGP, "distribution", "Tensor"),
            fault("q", "nothing", None, "distribution", "NoneType"),
            fault("p", "other atoms", Bernoulli(torch.ones(TOKENS) / 2), "2 atoms", "5"),
            fault("q", "another batch", Categorical(logits=LONGER), "[3]", "[4]"),
            fault(
                "q", "no closed form", Normal(0.0, 1.0), "Normal", "rkl.monte_carlo", named="No"
            ),
        ],
    ),
    Subject(
        "JensenShannon.between",
        rkl.JensenShannon().between,
        lambda: {"p": Categorical(logits=LOGP), "q": Categorical(logits=LOGP)},
        [
            fault("p", "a string", "normal", "distribution", "str"),
            fault("q", "other atoms", Categorical(logits=WIDER), "5 atoms", "6"),
            fault(
                "q", "no closed form", Normal(0.0, 1.0), "Normal", "rkl.monte_carlo", named="No"
            ),
        ],
    ),
    Subject(
        "check_divergence",
        functools.partial(check_divergence, rows=2),
        lambda: {"divergence": rkl.KL(), "atoms": 2},
        [
            fault("divergence", "its name", "kl", "Divergence", "'kl'"),
            fault("divergence", "its class", rkl.KL, "Divergence", "KL"),
            fault("atoms", "odd", 3, "even", "3"),
            fault("atoms", "zero", 0, "even", "0"),
            fault("atoms", "a fraction", 4.0, "even", "4.0"),
            fault("rows", "zero", 0, "2 or more", "0"),
            fault("rows", "a fraction", 2.5, "2 or more", "2.5"),
        ],
    ),
]


def text_fault(kind, text, *says):
    named = repr(text)[:100] if isinstance(text, str) else None  # the text itself is named
    return fault("text", kind, text, *says, named=named)


PARSE = Subject(
    "parse",
    rkl.parse,
    lambda: {"text": "akl(mu=0.3)"},
    [
        text_fault("a number", 3, "string", "3"),
        text_fault("nothing", None, "string", "None"),
        text_fault("bytes", b"kl", "string", "b'kl'"),
        text_fault("empty", "", "empty"),
        text_fault("blanks", "   ", "empty"),
        text_fault("an unknown name", "unheard-of", "akl"),
        text_fault("an unclosed bracket", "akl(mu=0.5", "never closed"),
        text_fault("an unopened bracket", "akl mu=0.5)", "Cannot read"),
        text_fault("positional", "akl(0.5)", "by name"),
        text_fault("an unknown setting", "akl(nu=0.5)", "no setting 'nu'", "mu"),
        text_fault("a setting too many", "kl(mu=0.5)", "no setting 'mu'"),
        text_fault("a setting twice", "akl(mu=0.5, mu=0.6)", "mu"),
        text_fault("out of range", "akl(mu=2)", "mu", "below 1", "2"),
        text_fault("a word for a number", "akl(mu=half)", "mu", "half"),
        text_fault("a call for a number", "akl(mu=abs(1))", "mu", "abs(1)"),
        text_fault("settings unpacked", "akl(**kwargs)", "**"),
        text_fault("a negative weight", "-0.5*kl", "positive"),
        text_fault("a zero weight", "0*kl", "above 0"),
        text_fault("a difference", "kl - js", "expected"),
        text_fault("a product", "kl*js", "expected"),
        text_fault("a weight behind", "kl*0.5", "expected"),
        text_fault("a number alone", "0.5", "expected"),
        text_fault("code", "__import__('os').getcwd()", "Cannot read"),
        text_fault("an import of a function", "os:getcwd", "not a Divergence"),
        text_fault("an import of another class", "pathlib:Path", "not a Divergence"),
        text_fault("an import of nothing", "no_such_module:Name", "cannot be imported"),
        text_fault("an import of no name", "os:no_such_name", "cannot be imported"),
        text_fault("a null byte", "k\0l", "null"),
        text_fault("too deep", "(" * 500 + "kl" + ")" * 500, "Cannot read"),
        fault("catalogue", "a list", ["kl"], "map names", "['kl']"),
        fault("names", "one word", "mu", "tuple", "'mu'"),
        fault("names", "numbers", (1,), "tuple of strings", "(1,)"),
        fault("kind", "a string", "Divergence", "class", "'Divergence'"),
    ],
)
SUBJECTS = [*ESTIMATORS, *DIVERGENCES, PARSE]
