"""The demonstration of the XY model, in miniature."""

import functools
import json

import pytest
import torch

from rkl import demos
from rkl.demos import xy
from rkl.runs import Run
from rkl.sample import thermodynamic_integration


@pytest.fixture(autouse=True)
def short_integration(monkeypatch):
    """A tenth of the draws by which log Z is had without a flow."""
    short = functools.partial(thermodynamic_integration, draws=50)
    monkeypatch.setattr("rkl.sample.evaluate.thermodynamic_integration", short)


TINY = xy.Plan(side=2, minutes=None, steps=30, width=8, values=3, draws=100, chains=4)


def test_the_demonstration_leaves_a_run_a_table_and_a_report(tmp_path):
    threads = torch.get_num_threads()
    said = xy.run(tmp_path / "run", plan=TINY, seed=1)
    assert torch.get_num_threads() == threads
    lines = said.splitlines()
    assert "trained for 30 steps" in lines[0]
    first = next(k for k, line in enumerate(lines) if line.startswith("0.05"))
    rows = [line.split() for line in lines[first : first + 3]]
    assert [row[0] for row in rows] == ["0.05", "1.05", "2.05"]
    z = [float(row[3].replace("−", "-")) for row in rows]
    assert max(map(abs, z)) < 4.5  # energies of the flow and of the heat bath
    assert (tmp_path / "run" / "report.html").exists()
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["passed"] is True
    assert Run.open(tmp_path / "run").record["status"] == "finished"


def test_the_demonstration_goes_on_with_the_flow_that_it_had_trained(tmp_path, monkeypatch):
    def stop(*_args, **_how):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(xy, "measure_run", stop)
        with pytest.raises(KeyboardInterrupt):
            xy.run(tmp_path / "run", plan=TINY, seed=1)
    flow, before = tmp_path / "run" / "flow.safetensors", Run.open(tmp_path / "run").metrics
    weights = flow.read_bytes()
    assert "trained for 30 steps" in xy.run(tmp_path / "run", plan=TINY, seed=1, resume=True)
    assert flow.read_bytes() == weights
    assert Run.open(tmp_path / "run").metrics == before  # nothing was trained again
    assert (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("how", "message"), [({"device": "cuda"}, "device"), ({"steps": 3}, "steps")]
)
def test_what_it_is_not_made_for_is_refused_before_anything_is_written(tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        demos.run("xy", tmp_path / "run", **how)
    assert list(tmp_path.iterdir()) == []
