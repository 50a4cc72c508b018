"""What make test-portable finds out about the processor, what it runs, and what it says."""

import types

import portable
import pytest


@pytest.fixture
def calls(monkeypatch):
    """The runs of pytest that are asked for: none takes place, and each ends with code 0."""
    made, code = [], 0

    def call(words, *, cwd, env):
        made.append((env["ATEN_CPU_CAPABILITY"], env["OMP_NUM_THREADS"], words))
        return code

    monkeypatch.setattr(portable.subprocess, "call", call)
    return made


def test_the_plainest_kernels_are_found_on_every_processor():
    assert portable.available("default")


@pytest.mark.parametrize(
    ("returncode", "printed"),
    [
        (-4, ""),  # SIGILL: PyTorch believed the variable, the processor did not
        (0, "AVX2\n"),  # another width was taken instead
        (1, "AVX512\n"),
    ],
)
def test_a_width_counts_only_where_its_kernels_ran(returncode, printed, monkeypatch):
    done = types.SimpleNamespace(returncode=returncode, stdout=printed)
    monkeypatch.setattr(portable.subprocess, "run", lambda *_words, **_settings: done)
    assert not portable.available("avx512")


def test_the_probe_is_a_process_under_the_width_it_asks_for(monkeypatch):
    def run(words, *, env, **_settings):
        assert words[-1] == portable.PROBE
        return types.SimpleNamespace(returncode=0, stdout=env["ATEN_CPU_CAPABILITY"].upper())

    monkeypatch.setattr(portable.subprocess, "run", run)
    assert portable.available("avx2")


def test_a_width_that_is_lacking_is_said_not_to_have_run(calls, monkeypatch, capsys):
    monkeypatch.setattr(portable, "available", lambda width: width != "avx512")
    assert portable.main([]) == 0
    assert [(width, threads) for width, threads, _words in calls] == [
        ("default", "1"),
        ("default", "2"),
        ("avx2", "1"),
        ("avx2", "2"),
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if "thread" in line]
    said = {line[:19].strip(): line[19:].strip() for line in lines if not line.startswith("==")}
    lacking = [text for name, text in said.items() if name.startswith("avx512")]
    assert lacking == ["not run: this processor lacks it"] * 2
    assert sum(text.startswith("passed") for text in said.values()) == 4


def test_one_failure_and_nothing_at_all_are_failures(calls, monkeypatch):
    monkeypatch.setattr(portable, "available", lambda _width: False)
    assert portable.main([]) == 1
    assert not calls
    monkeypatch.setattr(portable, "available", lambda width: width == "avx2")
    monkeypatch.setattr(portable.subprocess, "call", lambda *_words, **_settings: 1)
    assert portable.main([]) == 1


def test_numerical_tests_are_doctests_and_files_that_run_no_command_line():
    found = portable.numerical()
    assert {"src", "docs", "README.md", "tests/bayes/test_family_digits.py"} <= set(found)
    assert {"tests/distill/test_heads.py", "tests/test_divergences.py"} <= set(found)
    assert not {"tests/test_cli.py", "tests/sample/test_target_run.py"} & set(found)
    assert len(found) > 40
    assert all((portable.ROOT / name).exists() for name in found)


def test_all_leaves_the_choice_of_files_to_pytest(calls, monkeypatch):
    monkeypatch.setattr(portable, "available", lambda width: width == "default")
    portable.main(["--all", "-x"])
    assert calls[0][2][1:] == ["-m", "pytest", "-q", "-n", "2", "-x"]
