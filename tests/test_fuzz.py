"""Random texts, tables, settings and run folders: read, or refused in one line; nothing else.

RKL_FUZZ_SEED chooses other inputs and RKL_FUZZ_EXAMPLES how many there are; the head of the report
of pytest prints both, so that what fails can be tried again.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import fuzzing
import jaxtyping
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import rkl
from rkl import cli, readers
from rkl.bayes.loss.between import parse_loss
from rkl.fit.data import read_data
from rkl.fit.run import fit
from rkl.fit.settings import FitSettings
from rkl.flows.architectures import parse_architecture
from rkl.sample import parse_objective
from rkl.sample.targets import parse_target

SOURCE = str(Path(rkl.__file__).parent)
REFUSALS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotImplementedError,
    ImportError,
)
HOSTILE = [
    "os:system('touch executed')",
    "subprocess:Popen(args=('touch','executed'))",
    "subprocess:Popen(args='touch executed', shell=1)",
    'builtins:exec(\'open("executed","w")\')',
    "pathlib:Path('executed').touch()",
    "__import__('os').system('touch executed')",
    "payload:Mine",
    "payload:Mine()",
    "!!python/object/apply:os.system ['touch executed']",
    "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    "../../../etc/passwd",
    "/dev/null",
    "package:payload",
]
TEXTS = {
    "divergence": [
        "akl(mu=0.5)",
        "0.5*kl + 0.5*akl(mu=0.3)",
        "KL()",
        "alpha-beta(alpha=2,beta=-1)",
    ],
    "loss": ["intrinsic", "jensen-shannon(beta=0.3)", "reverse-kl"],
    "objective": ["0.5*target:reverse-kl + 1.0*data:kl", "critic:jensen-shannon", "kl"],
    "flow": [
        "coupling(transforms=2, hidden=(8,))",
        "nsf(bins=4)",
        "maf",
        "coarse-to-fine(bins=4)",
    ],
    "target": ["xy(side=4, coupling=1.0)", "mog4(radius=2.0)", "rings", "phi4(side=2)"],
}
READ = {
    "divergence": rkl.parse,
    "loss": parse_loss,
    "objective": parse_objective,
    "flow": parse_architecture,
    "target": parse_target,
}
PIECES = [
    *"()[]{},;:=+-*/.\"'\\ _|\n\t\0#@%",
    *(
        "nan",
        "inf",
        "-1",
        "0",
        "1e400",
        "1e-400",
        "10**9",
        "9" * 400,
        "None",
        "True",
        "é",
        "\ud83d",
    ),
    *(
        "\ufeff",
        "0x1f",
        "1_0",
        "lambda: 0",
        "mu=",
        "alpha=2",
        "side=4",
        "kl",
        "data:",
        "((((",
        "−1",
    ),
    *HOSTILE,
]
TABLES = [
    "a,b\n1,2\n3,4.5\n5,7\n8,9\n",
    "0.1;0.2\n0.3;0.4\n1;2\n",
    "1,5;2,5\n3,5;4,5\n",
    '"x","y","label"\n1,2,a\n3,4,b\n',
    ",a,b\n0,1,2\n1,3,4\n2,5,6\n",
    "1 2 3\n4 5 6\n",
]
CELLS = [
    *",;\t\n\r\" '#",
    "NA",
    "nan",
    "-inf",
    "1e999",
    "",
    "\ufeff",
    "a",
    "1,5",
    "TRUE",
    "\0",
    "é",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, -(2**63), 2**64, 10**400]),
    st.floats(),
    st.sampled_from(HOSTILE),
    st.sampled_from([it for texts in TEXTS.values() for it in texts]),
    st.text(max_size=20),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["mu", "name", "loc"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def fuzzed(share):
    """Run a test over its share of the inputs, chosen by the seed."""

    def wrapped(test):
        # a thousand inputs at a few milliseconds; what each test shrinks to is printed anyway
        chosen = settings(
            max_examples=max(1, round(share * fuzzing.EXAMPLES)),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        return seed(fuzzing.SEED)(chosen(test))

    return wrapped


@st.composite
def edited(draw, samples, pieces):
    """A sample with a few pieces put in, cut out or put in the place of others."""
    text = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 1, 2, 5])))
        text = text[:start] + draw(st.sampled_from(pieces)) + text[end:]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, a run that was fitted to them, and a module that no input may import."""
    here = tmp_path_factory.mktemp("fuzz")
    np.save(here / "rows.npy", np.random.default_rng(0).normal(size=(60, 2)))
    (here / "payload.py").write_text("open('executed', 'w').close()\nclass Mine: pass\n")
    chosen = FitSettings(here / "rows.npy", flow="coupling(transforms=1, hidden=(4,))", steps=2)
    fit(chosen, here / "run")
    return here


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    # what rkl itself says is asked for, not what the checks of its signatures say in tests
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    yield
    assert not (folder / "executed").exists()
    assert "payload" not in sys.modules


def refused_or_read(read, *words, **settings):
    """Call, with nothing executed and nothing written outside; what is refused is said well."""
    with fuzzing.watched(Path.cwd()), contextlib.redirect_stdout(io.StringIO()):
        try:
            read(*words, **settings)
        except REFUSALS as error:
            refusal = error
        else:
            return
    last = traceback.extract_tb(refusal.__traceback__)[-1].filename
    assert last.startswith(SOURCE), f"not raised by rkl: {refusal!r}"
    assert str(refusal).strip()
    assert "\n" not in str(refusal)


def command(*words):
    """Run a command line; its code is 0, or 2 with one line that says why."""
    errors = io.StringIO()
    with (
        fuzzing.watched(Path.cwd()),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        code = cli.main(list(words))
    said = errors.getvalue()
    assert code in (0, 2), said
    if code:
        assert said.startswith("rkl: error: ")
        assert said.count("\n") == 1


@pytest.mark.parametrize("kind", TEXTS)
@fuzzed(0.1)
@given(data=st.data())
def test_texts_are_read_or_refused(kind, data):
    everything = [it for texts in TEXTS.values() for it in texts] + HOSTILE
    text = data.draw(edited(TEXTS[kind] * 3 + everything, PIECES) | st.text(max_size=40))
    if "payload" in text:  # in Python a name may be imported; what it names is never called
        text = text.replace("payload", "collections").replace("Mine", "OrderedDict")
    refused_or_read(READ[kind], text)


@fuzzed(0.2)
@given(text=edited(TABLES, CELLS))
def test_tables_are_read_or_refused(text):
    Path("table.csv").write_text(text, encoding="utf-8", errors="surrogatepass")
    refused_or_read(readers.read_columns, "table.csv")
    refused_or_read(readers.read_labels, "table.csv", rows=3)
    refused_or_read(read_data, "table.csv")


@st.composite
def spoilt_records(draw):
    """A run.json with up to three of its values, at any depth, replaced or taken away."""
    record = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    for _ in range(draw(st.integers(1, 3))):
        place = record
        while True:
            key = draw(st.sampled_from(sorted(place)))
            if not (isinstance(place[key], dict) and place[key]) or draw(st.integers(0, 4)) == 0:
                break
            place = place[key]
        if draw(st.integers(0, 5)):
            place[key] = draw(VALUES)
        else:
            del place[key]
        if not record:
            break
    text = json.dumps(record)
    return draw(st.just(text) | edited([text], [*'[]{},:"0', "[" * 9_999, "NaN", "\ud83d"]))


@fuzzed(0.15)
@given(data=st.data())
def test_runs_are_loaded_or_refused(data):
    text = data.draw(spoilt_records())
    if not Path("spoilt").exists():
        shutil.copytree("run", "spoilt")
    Path("spoilt/run.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    refused_or_read(rkl.load, "spoilt")


@fuzzed(0.15)
@given(
    chosen=st.dictionaries(
        st.sampled_from([it.replace("-", "_") for it in ("flow", "divergence", "batch", "lr")])
        | st.sampled_from(["steps", "labels", "held_out", "anchor", "seed", "device", "estimator"])
        | st.text(max_size=6),
        VALUES,
        max_size=4,
    ),
    raw=st.none() | edited(["flow: maf\nsteps: 3\n", "[1, 2]", "{}"], PIECES),
)
def test_settings_from_a_file_are_taken_or_refused(chosen, raw):
    text = yaml.safe_dump(chosen, allow_unicode=False) if raw is None else raw
    Path("chosen.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    shutil.rmtree("out", ignore_errors=True)
    words = ["fit", "--data", "rows.npy", "--config", "chosen.yaml", "--dry-run", "--out", "out"]
    command(*words)


@pytest.mark.parametrize(
    ("kind", "text"),
    [(kind, text) for kind in TEXTS for text in HOSTILE if "payload" not in text],
)
def test_nothing_that_a_text_names_is_called(kind, text):
    refused_or_read(READ[kind], text)


def test_the_watch_sees_what_is_executed_and_written_outside(tmp_path):
    outside = tmp_path / "outside"
    with pytest.raises(AssertionError, match="outside"), fuzzing.watched(Path.cwd()):
        outside.write_text("x")
    with pytest.raises(AssertionError, match=r"os\.system"), fuzzing.watched(Path.cwd()):
        os.system("true")
    Path("inside").write_text("x")
    with fuzzing.watched(Path.cwd()):
        Path("inside").write_text("y")
