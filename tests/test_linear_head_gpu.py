"""The benchmark of a GPU, whose every line but the measurement itself runs on a CPU."""

import argparse
import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import rkl

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRL_EXPERIMENTAL_SILENCE"):
            patch.setenv(variable, "1")  # as the benchmark sets them
        patch.syspath_prepend(str(FOLDER))
        path = FOLDER / "linear_head_gpu.py"
        spec = importlib.util.spec_from_file_location("linear_head_gpu", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "linear_head_gpu", module)  # where dataclasses look for it
        spec.loader.exec_module(module)
        # uncompiled: what is compiled is tested elsewhere
        patch.setitem(module.contenders.OURS, module.OURS, module.contenders.OURS["ours eager"])
        yield module


def settings(**how) -> argparse.Namespace:
    small = {"device": "cpu", "tokens": 40, "vocab": 64, "widths": [8, 16], "chunk": 16}
    fixed = {"peers": False, "repeats": 2, "minutes": 60.0, "out": None}
    return argparse.Namespace(**small | fixed | {"divergence": [rkl.KL()]} | how)


@pytest.fixture
def bench(gpu, tmp_path):
    with gpu.Bench(settings(out=tmp_path / "rows.csv"), gpu.machine_of("cpu")) as bench:
        yield bench


def rows_of(bench) -> list[dict[str, str]]:
    with bench.settings.out.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_exact_gradients_are_within_the_bound_and_wrong_ones_beyond(gpu, bench):
    reference, problem = bench.reference, gpu.select(bench.problem, bench.reference.places)
    found = gpu.contenders.OURS[gpu.OURS](problem, rkl.KL(), 16)
    exact = gpu.errors_of(reference, rkl.KL(), *found)
    assert 0 < max(exact) < 1
    d_hidden, d_weight = (x.clone() for x in found)
    d_hidden[3] *= 1.1
    d_weight[7] *= 1.5
    # one token may be on the edge of a switch, two are an error
    one_token = gpu.errors_of(reference, rkl.KL(), d_hidden, d_weight)
    assert one_token.hidden < 1 < one_token.weight
    d_hidden[5] *= 1.1
    assert gpu.errors_of(reference, rkl.KL(), d_hidden, d_weight).hidden > 1


def test_a_contender_that_is_wrong_misses(gpu, bench, monkeypatch, capsys):
    ours = gpu.contenders.OURS[gpu.OURS]

    def wrong(*of):
        return [1.1 * x for x in ours(*of)]

    monkeypatch.setitem(gpu.contenders.OURS, gpu.OURS, wrong)
    bench.compare(rkl.KL())
    assert "errors of KL()" in bench.missed
    assert "MISSED (at most 1)" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out_and_named(gpu, bench, capsys):
    bench.settings.minutes = 0.0
    bench.compare(rkl.KL())
    bench.compare(rkl.AKL())
    bench.summarise()
    said = capsys.readouterr().out
    assert "left out after 0 minutes: ours compiled KL(); ours compiled AKL(" in said
    assert rows_of(bench) == []


def test_a_row_is_on_the_disk_as_soon_as_it_is_measured(gpu, bench, monkeypatch):
    def interrupted(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "machine", bench.machine._replace(peak_megabytes=interrupted))
    with pytest.raises(KeyboardInterrupt):
        bench.compare(rkl.KL())
    rows = rows_of(bench)
    kinds = [row["kind"] for row in rows]
    assert kinds == ["error within all", "error alone", "error head", "cpu_s", "cpu_s"]
    assert {row["device"] for row in rows} == {bench.machine.name}
    assert all(float(row["value"]) > 0 for row in rows)
    assert all(float(row["floor_after"]) > 0 for row in rows[3:])


def test_a_contender_that_fails_is_named_and_the_others_go_on(gpu, bench, monkeypatch, capsys):
    def fail(*of):
        raise RuntimeError("no kernel")

    monkeypatch.setitem(gpu.contenders.OURS, gpu.OURS, fail)
    bench.compare(rkl.KL())
    monkeypatch.undo()
    bench.compare(rkl.ReverseKL())
    said = capsys.readouterr().out
    assert "FAILED: RuntimeError: no kernel" in said
    assert "ours compiled KL() failed" in bench.missed
    assert "ReverseKL()" in said.splitlines()[-1]


def test_goals_are_those_of_the_issue(gpu):
    goals = {rkl.KL(): 1.25, rkl.JensenShannon(): 1.25, rkl.AKL(): 1.4, rkl.ToDi(): None}
    assert {it: gpu.target_ratio(it) for it in goals} == goals


def test_seconds_and_bytes_of_a_gpu_are_read_from_its_events_and_its_allocator(gpu, monkeypatch):
    allocated = {"now": 3 * 2**20, "peak": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.recorded = True

        def elapsed_time(self, end):
            assert self.recorded
            assert end.recorded
            return 250.0  # milliseconds

    def step():
        allocated["peak"] = 10 * 2**20

    stub = SimpleNamespace(
        Event=Event,
        synchronize=lambda: None,
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda: allocated.update(peak=allocated["now"]),
        memory_allocated=lambda: allocated["now"],
        max_memory_allocated=lambda: allocated["peak"],
        set_device=lambda device: None,
        get_device_name=lambda: "a GPU",
    )
    monkeypatch.setattr(torch, "cuda", stub)
    machine = gpu.machine_of("cuda")
    assert (machine.name, machine.unit) == ("a GPU", "gpu_s")
    assert machine.seconds(step) == 0.25
    assert machine.peak_megabytes(step) == 7.0
