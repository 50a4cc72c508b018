"""What a text may have imported: the class it must be, from where, and what is never imported."""

import json
import os
import re
import subprocess
import sys
from contextvars import copy_context
from pathlib import Path

import numpy as np
import pytest
import torch

import rkl
from rkl.bayes import bayes_act
from rkl.bayes.loss.between import parse_loss
from rkl.cli import main
from rkl.distill.settings import DistillSettings
from rkl.fit.settings import FitSettings
from rkl.flows.architectures import parse_architecture
from rkl.importing import import_object, names_in, only
from rkl.sample.objectives import parse_objective
from rkl.sample.settings import TargetSettings
from rkl.sample.targets import parse_target

MINE = """
import torch
from dataclasses import dataclass
from torch.distributions import Distribution, Normal
from rkl import FDivergence, KL
from rkl.flows import NSF
from rkl.flows.architectures import Architecture
from rkl.sample import Target

class Loss(KL):
    aliases = ()

@dataclass(frozen=True)
class Wide(Architecture):
    units: int = 16
    def build(self, event_shape, conditions=0):
        return NSF(transforms=1, hidden=(self.units,)).build(event_shape, conditions)

@dataclass(frozen=True)
class Mine(Target):
    side: int = 2
    @property
    def event_shape(self):
        return (self.side,)
    def log_prob(self, x, condition):
        return -x.square().sum(-1) / 2

def log_prob(x, condition):
    return -x.square().sum(-1) / 2

class Law(Normal):
    pass

def law(theta):
    return Normal(theta.mu, theta.sigma)

model = Mine(side=3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the user's own modules, none of which has been imported."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    Path("payload.py").write_text("open('PWNED', 'w')\nclass X:\n    pass\n")
    monkeypatch.setattr(sys, "path", [it for it in sys.path if it not in ("", str(tmp_path))])
    yield tmp_path
    for name in ("mine", "payload", "helper"):
        sys.modules.pop(name, None)


DRAWS = {"mu": torch.randn(4, 50), "sigma": torch.rand(4, 50) + 1}
POPEN = "subprocess:Popen(args=('touch', 'PWNED'))"
# Whatever reads "module:name" out of a text, each with something that it makes.
READERS = {
    "divergence": (rkl.parse, "mine:Loss()"),
    "a divergence in a sum": (lambda text: rkl.parse(f"0.5*kl + 0.5*{text}"), "mine:Loss()"),
    "architecture": (parse_architecture, "mine:Wide(units=8)"),
    "flow of data": (lambda text: FitSettings(Path("x.npy"), flow=text), "mine:Wide(units=8)"),
    "flow of a target": (lambda text: TargetSettings("mog4", flow=text), "mine:Wide(units=8)"),
    "target": (parse_target, "mine:Mine(side=2)"),
    "target, an instance": (parse_target, "mine:model"),
    "target, a function": (parse_target, "mine:log_prob(event_shape=(2,))"),
    "settings of a target": (TargetSettings, "mine:Mine(side=2)"),
    "objective": (parse_objective, "target:mine:Loss()"),
    "family, a class": (lambda t: bayes_act(DRAWS, t, rkl.KL()), "mine:Law(loc=mu, scale=sigma)"),
    "family, a function": (lambda text: bayes_act(DRAWS, text, rkl.KL()), "mine:law"),
    "loss": (parse_loss, "mine:Loss()"),
    "distilled": (lambda t: DistillSettings("T", "D", student="S", divergence=t), "mine:Loss()"),
}
every_reader = pytest.mark.parametrize(("read", "text"), READERS.values(), ids=READERS)


@every_reader
@pytest.mark.parametrize(
    "hostile",
    [
        POPEN,
        "subprocess:Popen",
        "os:system('touch PWNED')",
        "os:system",
        "os:mkdir(path='PWNED')",
        "os:mkdir",
        "payload:X",
        "pathlib:Path",
        "builtins:exec",
    ],
)
def test_nothing_is_called_that_is_of_another_class(read, text, hostile, folder):
    Path("payload.py").write_text(
        "class X:\n    def __init__(self):\n        open('PWNED', 'w')\n"
    )
    sys.path.append(str(folder))
    hostile = hostile if not text.startswith("target:") else f"target:{hostile}"
    with pytest.raises(ValueError, match="(?i)cannot read|must|no target|none is called"):
        read(hostile)
    assert not Path("PWNED").exists()


@every_reader
def test_python_imports_what_it_asks_for_and_a_file_only_what_is_allowed(
    read, text, folder, request
):
    sys.path.append(str(folder))
    # a class once made is known to every catalogue: each test has a module of its own
    module = f"mine_{list(READERS).index(request.node.callspec.id)}"
    Path("mine.py").rename(f"{module}.py")
    text = text.replace("mine:", f"{module}:")
    name = names_in(text.removeprefix("target:"))[0]
    with only(source="R/run.json"):
        with pytest.raises(ValueError, match=f"{name}, which R/run.json names, is not imported"):
            read(text)
        assert module not in sys.modules
    with only([name]):
        assert read(text) is not None


def test_what_is_allowed_is_one_name_and_no_other_of_its_module(folder):
    sys.path.append(str(folder))
    with only(["mine:Mine"]), pytest.raises(ValueError, match="say --allow mine:model"):
        import_object("mine:model")


def test_a_block_within_a_block_allows_what_either_does():
    with only(["fractions:Fraction"]), only(["decimal:Decimal"]):
        assert import_object("fractions:Fraction")
        assert import_object("decimal:Decimal")
        with pytest.raises(ValueError, match="is not imported"):
            import_object("fractions:gcd")
    assert copy_context().run(import_object, "decimal:Context")  # and nothing is left behind


@pytest.mark.parametrize("name", ["mine", "mine:", "a.b", "mine:a.b", "mine:A()", ".mine:A", 3])
def test_what_is_no_name_is_not_allowed(name):
    with pytest.raises(ValueError, match="allow must be module:name"), only([name]):
        pass


def test_names_that_are_no_list_are_refused():
    with pytest.raises(TypeError, match="allow must be a list"), only("mine:Mine"):
        pass


# Where it lies


def test_the_working_folder_is_on_the_path_while_a_name_is_imported_and_not_after(folder, capsys):
    Path("helper.py").write_text("import sys, os\nassert os.getcwd() in sys.path\n")
    Path("mine.py").write_text("import helper\n" + MINE)
    before = list(sys.path)
    assert main(["divergences", "mine:Loss()"]) == 0
    assert sys.path == before
    assert "Loss" in capsys.readouterr().out
    assert main(["divergences", "mine:Nothing()"]) == 2
    assert sys.path == before


@pytest.mark.parametrize(
    "words",
    [["--version"], pytest.param(["divergences", "kl"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_no_command_imports_from_the_working_folder_unasked(folder, words):
    names = (
        *("triton", "cuda", "pynvml", "torchcomms", "monkeytype", "gmpy2", "flint", "org"),
        *("opt_einsum", "colorama", "numexpr", "bottleneck", "cftime", "zstandard", "brotli"),
        *("torch_xla", "torch_npu", "jsonschema", "markdown", "secrets", "inspect", "argparse"),
    )
    for name in names:
        Path(f"{name}.py").write_text("open('PWNED', 'w')\nraise RuntimeError('imported')\n")
    for module in ("rkl.cli", "rkl.cli.__main__"):
        done = rkl_in_a_process(*words, module=module)
        assert (done.returncode, Path("PWNED").exists()) == (0, False), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folders", "modules"])
def test_common_folder_names_beside_the_data_break_no_verb(folder, kind):
    names = (
        *("datasets", "peft", "scipy", "triton", "typeguard", "pydot", "pytz", "torchvision"),
        *("envwrap", "kernels", "accelerate", "gguf", "pyarrow", "sklearn", "tests", "data"),
    )
    np.save("x.npy", np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32))
    for name in names:
        if kind == "folders":
            Path(name).mkdir()
        else:
            Path(f"{name}.py").write_text("open('PWNED', 'w')\n")
    Path("text.txt").write_text("One line of text.\n\n" * 40)
    for words in (
        ["fit", "--data", "x.npy", "--steps", "2", "--out", "F"],
        ["sample", "F", "-n", "5"],
        ["report", "F"],
        ["distill", "--help"],
        ["estimate", "--help"],
        ["metrics", "--real", "x.npy", "--fake", "x.npy"],
    ):
        done = rkl_in_a_process(*words)
        assert (done.returncode, Path("PWNED").exists()) == (0, False), (words, done.stderr)


def rkl_in_a_process(*words, module="rkl.cli"):
    source = Path(rkl.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )


# What goes wrong in somebody's own module


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ndef broken(:\n", r"mine.py, line 2: invalid syntax"),
        ("import sys\nsys.exit(0)\n", r"ends the program, with exit code 0 \(.*mine.py, line 2"),
        ("\n\n1 / 0\n", r"ZeroDivisionError: division by zero \(.*mine.py, line 3"),
        ("import no_such_thing\n", r"No module named 'no_such_thing' \(.*mine.py, line 1"),
        ("from os import no_such\n", r"cannot import name 'no_such'.*mine.py, line 1"),
        ("x = 1\n", r"module 'mine' has no attribute 'Bad'"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["divergences", "mine:Bad"],
        ["fit", "--target", "mine:Bad(side=2)", "--out", "R"],
        ["fit", "--data", "x.npy", "--flow", "mine:Bad", "--out", "R"],
    ],
    ids=["divergence", "target", "flow"],
)
def test_the_file_and_line_at_fault_in_ones_own_module_are_named(
    folder, source, message, words, capsys
):
    Path("mine.py").write_text(source)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said


def test_a_module_that_ends_the_program_while_it_is_used_is_an_error(folder, capsys):
    source = "def log_prob(x, condition):\n    import sys\n    sys.exit(0)\n"
    Path("mine.py").write_text(source)
    words = ["--target", "mine:log_prob(event_shape=(2,))", "--steps", "1", "--out", "R"]
    assert main(["fit", *words]) == 1
    assert "ended the program, with code 0" in capsys.readouterr().err


def test_the_cause_is_shown_with_debug(folder):
    Path("mine.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="cannot be imported") as error:
        main(["divergences", "mine:Bad", "--debug"])
    causes, cause = [], error.value
    while cause is not None:
        causes, cause = [*causes, type(cause)], cause.__cause__
    assert ZeroDivisionError in causes


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("mine:Mine(side=2)", "mine:Mine(side=2)"),
        ("mine:model", "mine:model"),
        ("mine:log_prob(event_shape=(2,))", "mine:log_prob(event_shape=(2,))"),
    ],
)
def test_a_run_of_ones_own_classes_names_their_module_and_is_read_again(
    target, kept, folder, capsys
):
    words = ["fit", "--target", target, "--flow", "mine:Wide(units=4)", "--steps", "1"]
    assert main([*words, "--batch", "64", "--no-anneal", "--out", "R"]) == 0
    settings = json.loads(Path("R/run.json").read_text())["settings"]
    assert settings["target"].replace("\n", "").startswith(kept.removesuffix(")"))
    assert settings["flow"] == "mine:Wide(units=4)"
    names = names_in(settings["target"], settings["flow"])
    drawn = ["sample", "R", "-n", "8", "--chains", "1", "--out", "s.npy"]
    sys.modules.pop("mine", None)  # not there if a class of this name is left from another test
    assert main([*drawn, *(word for name in names for word in ("--allow", name))]) in (0, 1)
    assert "not imported" not in capsys.readouterr().err
    sys.path.append(str(folder))
    assert rkl.load("R", allow=names)().sample((3,)).shape[0] == 3


def test_a_module_that_may_be_imported_reads_what_it_names_itself(folder):
    Path("outer.py").write_text(
        "import rkl\nfrom rkl.divergences import KL\n\nREAD = rkl.parse('inner:Inner')\n"
    )
    Path("inner.py").write_text("from rkl.divergences import KL\n\nclass Inner(KL):\n    pass\n")
    with only(["outer:READ"], source="R/run.json", folder=str(folder)):
        assert type(import_object("outer:READ")).__name__ == "Inner"
        with pytest.raises(ValueError, match="is not imported"):
            import_object("inner:KL")
