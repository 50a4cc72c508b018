"""The command line: what it lists, how it reads settings, how it says that something failed."""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Literal

import pytest

import rkl
from rkl import cli
from rkl.cli import commands, settings
from rkl.cli.documentation import without_markup
from rkl.runs import Run
from rkl.runs.processes import PeerError


def answer(*words):
    """The exit code of one command, whichever way it ends."""
    try:
        return cli.main(words)
    except SystemExit as end:  # how argparse ends after --help and --version
        return end.code


@pytest.fixture
def fail_with(monkeypatch):
    """A command, "fail", that raises what it is given."""

    def install(error):
        def fail(parser, words):
            """Fail.

            examples:
              rkl fail
            """
            parser.add_argument("--out", type=Path)
            parser.add_argument("--resume", action="store_true")

            def failed(parsed):
                raise error

            return failed

        monkeypatch.setitem(commands.COMMANDS, "fail", (fail, "runs"))

    return install


def complaint(capsys):
    """What was said on stderr, which must be one line."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err.removesuffix("\n")


# What it lists


def test_help_lists_the_commands_that_are_there(capsys):
    assert answer("--help") == 0
    listed = capsys.readouterr().out
    assert all(f"    {name} " in listed for name in cli.available())
    assert {"divergences", "evaluate", "compare", "report"} <= cli.available().keys()


def test_a_command_without_its_wing_is_not_there(monkeypatch, capsys):
    monkeypatch.setitem(commands.COMMANDS, "fit", (commands.compare, "flows_to_come"))
    monkeypatch.setitem(commands.COMMANDS, "nest", (commands.compare, "none.of_these"))
    assert not {"fit", "nest"} & cli.available().keys()
    assert answer("fit") == 2
    assert "invalid choice: 'fit'" in complaint(capsys)


def test_a_folder_without_code_is_no_wing(monkeypatch, tmp_path):
    (tmp_path / "cli").mkdir()
    (tmp_path / "flows" / "__pycache__").mkdir(parents=True)
    (tmp_path / "bayes.py").write_text("")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli" / "__init__.py"))
    assert [cli._exists(name) for name in ("flows", "bayes", "flows.fit")] == [False, True, False]


@pytest.mark.parametrize("name", cli.available())
def test_every_command_has_help_with_examples(name, capsys):
    assert answer(name, "--help") == 0
    shown = capsys.readouterr().out
    assert f"\n  rkl {name}" in shown.partition("xamples:")[2]
    assert {"--seed", "--device", "--debug"} <= set(shown.replace(",", " ").split())


def test_the_version_is_the_installed_one(capsys):
    assert answer("--version") == 0
    assert capsys.readouterr().out == f"rkl {rkl.__version__}\n"


def test_the_installed_program_answers():
    program = [sys.executable, "-m", "rkl.cli", "divergences", "kl"]
    shown = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("KL()\n")


def test_the_list_holds_every_divergence_once_with_its_properties(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert answer("divergences") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert rkl.catalogue().keys() <= rows.keys()
    assert "f-divergence, symmetric, bounded" in rows["jensen-shannon"]
    assert rows["kl"].rstrip().endswith("f-divergence, scale-free")
    assert rows["akl"].rstrip().endswith("exact only")


@pytest.mark.parametrize("name", rkl.catalogue())
def test_every_divergence_is_explained_with_formula_source_and_properties(name, capsys):
    assert answer("divergences", name) == 0
    shown = capsys.readouterr().out
    divergence = rkl.parse(name)
    assert shown.startswith(f"{divergence!r}\n")
    assert type(divergence).__doc__.split("\n")[0] in shown
    assert f"symmetric     {'yes' if divergence.symmetric else 'no'}\n" in shown


@pytest.mark.parametrize("name", rkl.catalogue())
def test_an_explanation_shows_no_markup(name, capsys):
    assert answer("divergences", name) == 0
    shown = capsys.readouterr().out
    assert not re.findall(r":\w+:`|``", shown)


def test_markup_is_taken_out_of_a_docstring():
    text = "``akl`` as :class:`~rkl.divergences.AKL`, :func:`rkl.exact` and ``a`b``"
    assert without_markup(text) == "akl as AKL, rkl.exact and a`b"


def test_fit_shows_both_ways_in_before_all_settings(capsys):
    assert answer("fit", "--help") == 0
    shown = capsys.readouterr().out
    head = shown.partition("options:")[0]
    assert "two ways in:" in head
    assert "  --data DATA " in head
    assert "  --target TARGET " in head
    assert shown.index("settings, with --data:") < shown.index("settings, with --target:")
    assert shown.index("settings, with --target:") < shown.index("Examples:")


def test_usage_names_what_must_be_given_alone(capsys):
    assert answer("distill", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: rkl distill --out RUN [flags]\n")
    assert answer("metrics", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: rkl metrics [flags]\n")


COMMAND_SETTINGS = {
    "divergences": "name: akl(mu=0.3)\n",
    "metrics": "real: real.csv\nfake: fake.csv\nk: 2\njson: true\n",
    "study": "name: akl\npart: nothing\n",
    "demo": "name: xy\nsteps: 3\n",
    "evidence": "target: mog4\nvalues: 0\n",
}


@pytest.mark.parametrize("command", COMMAND_SETTINGS)
def test_every_command_reads_its_settings_from_a_file(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("real.csv", "fake.csv"):
        Path(name).write_text("x,y\n" + "".join(f"{i},{i * i % 7}\n" for i in range(9)))
    Path("settings.yaml").write_text(COMMAND_SETTINGS[command])
    code, said = answer(command, "--config", "settings.yaml"), capsys.readouterr()
    assert {
        "divergences": lambda: code == 0 and said.out.startswith("AKL(mu=0.3"),
        "metrics": lambda: code == 0 and "to neighbour 2" in json.loads(said.out)["about"],
        "study": lambda: code == 2 and "part must be one of toy," in said.err,
        "demo": lambda: code == 2 and "xy has none; got 3" in said.err,
        "evidence": lambda: code == 2 and "values" in said.err,
    }[command](), (code, said)
    assert [it for it in tmp_path.iterdir() if it.is_dir()] == []


def test_settings_and_sums_are_understood(capsys):
    assert answer("divergences", "0.5*akl(mu=0.3) + 0.5*kl") == 0
    assert "AKL(mu=0.3" in capsys.readouterr().out


# How it fails


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["divergences", "kl", "js"], "js"),
        (["divergences", "--seed", "one"], "--seed"),
        (["divergences", "--sed", "1"], "--sed"),
        (["divergences", "akl(mu=2)"], "mu"),
        (["divergences", "akl(mu=0.5"], "akl(mu=0.5"),
        (["divergences", "unheard-of"], "unheard-of"),
        (["evaluate", "no-such-folder"], "no-such-folder"),
        (["compare", "no-such-folder"], "no-such-folder"),
        (["estimate", "", "--family", "normal(loc=a)"], "POSTERIOR: it must not be empty"),
        (["metrics", "--real", "a.npy", "--fake", " "], "--fake: it must not be empty"),
        (["study", "akl", "--out", ""], "--out: it must not be empty"),
        (["report", ""], "RUN: it must not be empty"),
        (["demo", "--out", "here", "--device"], "--device"),
    ],
)
def test_bad_usage_is_one_line_that_names_what_is_wrong_and_exits_with_2(words, named, capsys):
    assert answer(*words) == 2
    said = complaint(capsys)
    assert said.startswith("rkl: error: ")
    assert named in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("mu must be\n below 1."), 2, "rkl: error: mu must be below 1."),
        (FileExistsError("out: RUN exists."), 2, "rkl: error: out: RUN exists."),
        (ImportError("pip install 'rkl[data]'"), 1, "rkl: error: pip install 'rkl[data]'"),
        (KeyError("x"), 1, "rkl: error: KeyError: 'x' (--debug shows where)"),
        (RuntimeError(""), 1, "rkl: error: RuntimeError (--debug shows where)"),
    ],
)
def test_an_error_is_one_line_and_its_code_says_whose_it_is(fail_with, capsys, error, code, said):
    fail_with(error)
    assert answer("fail") == code
    assert complaint(capsys) == said


def test_the_failure_of_another_process_is_told_with_how_to_go_on(fail_with, capsys):
    fail_with(PeerError("process 1 failed."))
    assert answer("fail") == 1
    assert complaint(capsys) == "rkl: error: process 1 failed. Begin again with: rkl fail"


def test_the_package_that_cannot_be_imported_is_told_by_its_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "half_a_package.py").write_text("\nimport no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)

    def importing(parsed):
        importlib.import_module("half_a_package")

    monkeypatch.setattr(cli, "_run", importing)
    assert answer("divergences") == 1
    file = tmp_path / "half_a_package.py"
    said = f"rkl: error: No module named 'no_such_module_at_all' ({file}, line 2)"
    assert complaint(capsys) == said


def test_a_setting_that_a_json_has_twice_is_refused(config):
    file = config('{"teacher": "T", "max_steps": 3, "max_steps": 4}', "settings.json")
    with pytest.raises(ValueError, match="max_steps is set twice"):
        gathered("--config", file)


def test_a_file_of_settings_may_begin_with_a_byte_order_mark(config):
    assert gathered("--config", config('\ufeff{"teacher": "T"}', "settings.json")) == Toy("T")


@pytest.mark.parametrize(
    "words",
    [
        ["divergences", "kl"],
        ["metrics", "--real", "a.npy", "--fake", "b.npy"],
        ["compare", "run"],
        ["report", "run"],
    ],
)
def test_a_device_that_a_command_does_not_use_is_refused(words, capsys):
    assert answer(*words, "--device", "cuda:99") == 2
    assert "device must be cpu, the only one of this command" in complaint(capsys)


def test_the_list_ends_like_any_output_that_nobody_reads(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1, encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert answer("divergences") == 141
    assert capsys.readouterr().err == ""


def test_debug_shows_where(fail_with):
    fail_with(ValueError("mu"))
    with pytest.raises(ValueError, match="mu"):
        cli.main(["fail", "--debug"])
    with pytest.raises(ValueError, match="mu"):
        cli.main(["--debug", "fail"])


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(fail_with, capsys):
    fail_with(KeyboardInterrupt())
    assert answer("fail") == 130
    assert "Begin again with: rkl fail\n" in capsys.readouterr().err


INTERRUPTED = {
    "distill": "--teacher t --student s --data d --out {out}",
    "fit": "--data d.npy --out {out} --overwrite",
    "fit --target": "fit --target mog4 --out {out} --resume",
    "estimate": "d.nc --family normal(loc=a,scale=b) --out {out}",
    "demo": "demo --out {out}",
    "study": "study akl --out {out}",
    "metrics": "--real a.npy --fake b.npy",
    "sample": "sample {run} -n 3 --out x.npy",
    "evaluate": "evaluate {run}",
    "compare": "compare {run} {run} --out x.html --overwrite",
    "report": "report {run}",
    "divergences": "divergences kl",
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("verb", INTERRUPTED)
def test_what_is_proposed_after_an_interruption_is_a_command_that_works(
    tmp_path, monkeypatch, capsys, verb, begun
):
    out, run = tmp_path / "a run", tmp_path / "another run"
    Run.create(run, "sample", {"target": "mog4()"}, seed=0).release()
    words = [it.format(out=out, run=run) for it in INTERRUPTED[verb].split()]
    words = words if words[0] in cli.commands.COMMANDS else [verb, *words]

    def interrupted(parsed):
        if begun:
            Run.create(out, "fit", {}, seed=0).update(status="interrupted")
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(words) == 130
    program, *proposed = shlex.split(capsys.readouterr().err.partition(" with: ")[2])
    assert program == "rkl"
    reached = []
    monkeypatch.setattr(cli, "_run", reached.append)
    assert cli.main(proposed) == 0
    (parsed,) = reached
    how = vars(parsed)
    if begun and getattr(parsed, "out", None) == out:  # else the folder would be refused
        assert how["overwrite"] != how.get("resume", False)
    if verb in ("distill", "fit", "fit --target"):
        assert parsed.resume


def test_an_earlier_run_is_never_proposed_to_be_overwritten(tmp_path, monkeypatch, capsys):
    run = Run.create(tmp_path, "bayes", {}, seed=0)
    run.update(status="interrupted")
    os.utime(run.path / "run.json", (0, 0))

    def interrupted(parsed):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert answer("estimate", "d.nc", "--family", "normal(loc=a)", "--out", str(tmp_path)) == 130
    assert "--overwrite" not in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error():
    program = f"{sys.executable} -m rkl.cli divergences kl | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert ended.returncode in (0, 141)  # 0 where all was written before the reader left
    assert ended.stderr == ""


# How it dispatches


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    data: str
    seed: int = 0


@pytest.fixture
def toy_runs(monkeypatch, tmp_path):
    """Two runs of a wing that the command line has never heard of."""
    toy = types.ModuleType("rkl.toy")
    toy.EvaluateSettings = EvaluateSettings
    toy.evaluate_run = lambda path, chosen: f"evaluated {path.name}: {chosen}"
    toy.compare_runs = lambda paths, **options: f"compared {len(paths)} {options}"
    toy.report_runs = lambda paths, **options: f"reported {len(paths)} {options}"
    monkeypatch.setitem(sys.modules, "rkl.toy", toy)
    monkeypatch.setattr("rkl.runs.KINDS", ("toy",))
    return [str(Run.create(tmp_path / name, "toy", {}, seed=0).path) for name in "ab"]


def test_evaluate_compare_and_report_go_to_the_wing_that_made_the_run(toy_runs, capsys):
    assert answer("evaluate", "--data", "D", toy_runs[0], "--seed", "3") == 0
    assert answer("compare", *toy_runs) == 0
    assert answer("report", *toy_runs, "--out", "r.html") == 0
    assert capsys.readouterr().out.splitlines() == [
        "evaluated a: EvaluateSettings(data='D', seed=3)",
        "compared 2 {'out': None, 'overwrite': False}",
        f"reported 2 {{'out': {Path('r.html')!r}, 'overwrite': False}}",
    ]


def test_the_flags_of_evaluate_are_those_of_the_runs_wing(toy_runs, capsys):
    assert answer("evaluate", toy_runs[0], "--help") == 0
    assert "--data DATA" in capsys.readouterr().out
    assert answer("evaluate", toy_runs[0]) == 2
    assert "--data must be given" in complaint(capsys)
    assert answer("evaluate", "no-such-run", "--data", "D") == 2
    assert "no-such-run is not a run" in complaint(capsys)


# Settings


@dataclasses.dataclass(frozen=True)
class Toy:
    """Settings of nothing.

    Args:
        teacher: Whom to imitate, such as
            ``a friend``.
        layers: Which ones.
    """

    teacher: str
    learning_rate: float = 1e-4
    max_steps: int | None = None
    layers: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    where: Path | None = None
    percent: str = dataclasses.field(default="5%", metadata={"help": "100% sure", "metavar": "P"})
    seed: int = 0

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}.")


def gathered(*words, earlier=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    settings.add_flags(parser, Toy)
    return settings.gather(Toy, parser.parse_args(list(words)), earlier)


@pytest.fixture
def config(tmp_path):
    def write(text, name="settings.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_the_fields_of_the_settings_are_the_flags():
    words = "--teacher T --learning-rate 0.5 --layers 1 2 --layers 3 --dtype bfloat16 --compiled"
    expected = Toy("T", 0.5, None, (1, 2, 3), "bfloat16", True, Path("a/b"))
    assert gathered(*words.split(), "--where", "a/b") == expected
    assert gathered("--teacher", "T", "--no-compiled", "--seed", "7") == Toy("T", seed=7)


def test_flags_come_before_the_file_and_the_file_before_the_defaults(config):
    file = config("teacher: T\nlearning-rate: 1e-3\nmax_steps: 5\nlayers: [1, 2]\nseed: 3\n")
    found = gathered("--config", file, "--max-steps", "6")
    assert found == Toy("T", learning_rate=1e-3, max_steps=6, layers=(1, 2), seed=3)


def test_an_earlier_run_is_a_file_of_settings(tmp_path):
    chosen = Toy("T", max_steps=9, layers=(4,), seed=5)
    run = Run.create(tmp_path / "run", "toy", dataclasses.asdict(chosen), seed=5)
    assert gathered("--config", str(run.path)) == chosen
    assert gathered("--config", str(run.path / "run.json")) == chosen
    assert gathered(earlier=run.path) == chosen
    assert gathered("--max-steps", "3", earlier=run.path).max_steps == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("teacher: T\nlearnin_rate: 1", "'learnin_rate'; known are teacher, learning_rate"),
        ("teacher: 3", "teacher must be of type str; got 3"),
        ("teacher: T\nmax_steps: 1.5", "max_steps must be of type int; got 1.5"),
        ("teacher: T\nmax_steps: true", "max_steps must be of type int; got True"),
        ("teacher: T\ncompiled: 1", "compiled must be of type bool; got 1"),
        ("teacher: T\nlearning_rate: fast", "learning_rate must be of type float; got 'fast'"),
        ("teacher: T\nlearning_rate: true", "learning_rate must be of type float; got True"),
        ("teacher: T\nlearning_rate: -1", "learning_rate must be positive; got -1"),
        ("teacher: T\ndtype: float64", "dtype must be one of float32, bfloat16; got 'float64'"),
        ("teacher: T\nlayers: [a]", "layers must be of type int; got 'a'"),
        ("max_steps: 3", "--teacher must be given"),
        ("", "--teacher must be given"),
        ("settings: {teacher: T}\nmax_steps: 3", "sets max_steps beside settings"),
        ("- a list", "must hold names with their values"),
        ("teacher: T\nmax_steps: 3\nmax_steps: 4", "max_steps is set twice"),
        ("teacher: T\nmax_steps: 3\nmax-steps: 4", "max_steps is set twice"),
        ("teacher: T\nseed: 010", "seed: 010 is a number in base 8 or 60"),
        ("teacher: T\nmax_steps: 1:30", "max_steps: 1:30 is a number in base 8 or 60"),
        ("teacher: [", "cannot be read"),
        ("teacher: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_settings_says_why(config, text, named):
    with pytest.raises(ValueError, match="(?s).*") as caught:
        gathered("--config", config(text))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_is_read_as_json(config):
    assert gathered("--config", config('{"teacher": "T"}', "settings.json")) == Toy("T")
    with pytest.raises(ValueError, match="cannot be read"):
        gathered("--config", config("teacher: T", "settings.json"))


def test_help_says_defaults_and_takes_percent_signs():
    parser = argparse.ArgumentParser()
    settings.add_flags(parser, Toy)
    shown = " ".join(parser.format_help().split())
    assert "--teacher TEACHER Whom to imitate, such as a friend. (required)" in shown
    assert "--percent P 100% sure (default: 5%)" in shown
    assert "--learning-rate FLOAT (default: 0.0001)" in shown
    assert "--dtype {float32,bfloat16} (default: float32)" in shown
    assert "--compiled, --no-compiled (default: --no-compiled)" in shown
    assert "--layers INT [INT ...] Which ones." in shown


def test_a_run_that_is_called_as_the_command_is_not_taken_for_the_run(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Run.create("sample", "sample", {"target": "mog4()"}, seed=0).release()
    Run.create("flow", "fit", {"data": "x.npy"}, seed=0).release()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["sample", "flow", "--help"])
    assert "--latent-temperature" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "variables", "spins"),
    [
        ("", {}, "10000"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import torch;", {}, "None"),
    ],
    ids=["by itself", "a policy of the user's", "a count of the user's", "torch is there"],
)
def test_waiting_threads_sleep_soon_unless_the_user_has_chosen(before, variables, spins):
    """It counts only where torch is not loaded yet."""
    code = f"import contextlib, os; {before} from rkl import cli\n"
    code += "with contextlib.suppress(SystemExit): cli.main(['--version'])\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'))"
    chosen = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    clean = {name: value for name, value in os.environ.items() if name not in chosen}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == spins
