"""The reports of flows say what was found, in figures that hold what they should."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rkl import fit as fit_wing
from rkl import sample
from rkl.fit.run import fit
from rkl.fit.settings import FitSettings
from rkl.flows import Coupling
from rkl.plots.lattices import against, histograms, hue, planes, wheels
from rkl.sample import CoarseToFine, evaluate_on_target, thermodynamic_integration
from rkl.sample.report import target_page
from rkl.sample.run import fit_target
from rkl.sample.settings import TargetSettings
from rkl.sample.smc import evidence
from rkl.sample.targets import XY, Density, MoG8


@pytest.fixture(autouse=True)
def short_integration(monkeypatch):
    """A tenth of the draws by which log Z is had without a flow."""
    short = functools.partial(thermodynamic_integration, draws=50)
    monkeypatch.setattr("rkl.sample.evaluate.thermodynamic_integration", short)


LOGGED = [
    {"step": k, "seconds": k / 10, "v": 1 / k, "ess": 0.5, "acceptance": 0.6} for k in (1, 2)
]


def lattice_page(**settings):
    target = XY(side=2, **settings)
    flow = CoarseToFine.of(target, width=8).build((4,), len(target.conditions))
    found = evaluate_on_target(flow, target, draws=100, chains=4, reference=True)
    return found, target_page(found, LOGGED, {"seed": 0})


def test_the_report_of_a_lattice_shows_figures_trust_draws_training_and_cost():
    found, page = lattice_page()
    for title in ("Averages", "Thermodynamics", "How near the flow is", "Configurations"):
        assert f"<h3>{title}</h3>" in page
    for title in ("What it gives", "Whether to trust it", "Draws", "Training", "What it costs"):
        assert f"<h2>{title}</h2>" in page
    assert "effective draws per second by heat bath" in page
    assert "thermodynamic integration would take" in page
    assert "specific heat (k_B per site)" in page
    assert "<h3>The chains of the flow</h3>" in page
    assert "longest run without an accepted proposal (draws)" in page
    shown = f"<td>{found.thermodynamics.log_z.value[1].item():.1f}"
    assert shown in page


class Quartic(Density):
    """A field in two wells so far apart that no random walk goes from one to the other."""

    def __init__(self):
        super().__init__(lambda x, _: -4 * (x.square() - 9).square().sum(-1), event_shape=(4,))

    def observables(self, x, condition):
        return {"first": x[..., 0]}


def test_a_reference_in_doubt_judges_nothing_and_the_report_says_so(monkeypatch):
    def doubtful(*arguments, **_settings):
        found = evidence(*arguments, particles=32, islands=4)
        return replace(found, doubts=(("islands differ.",),))

    flow = Coupling(transforms=1, hidden=(8,)).build((4,), 0)
    with monkeypatch.context() as patch:
        patch.setattr("rkl.sample.evaluate.evidence", doubtful)
        found = evaluate_on_target(flow, Quartic(), draws=100, chains=4, reference=True)
    assert found.deviations() == {}
    assert found.passed is None
    assert "all: islands differ." in str(found)
    says = "raws by particles cannot be trusted here, and no average is judged by them."
    assert says in str(found)
    page = target_page(found, LOGGED, {"seed": 0})
    assert says in page
    assert "Agreement with the reference" not in page
    assert "particles (not to be trusted)" in page
    assert "no method is called cheaper here" in page
    assert "k_B" not in page
    _mixed, page = lattice_page()
    assert "cannot be trusted here" not in page
    assert "Agreement with the reference" in page


@pytest.mark.slow
def test_each_ring_exchange_has_a_line_of_its_own():
    _found, page = lattice_page(ring_exchange=None)
    assert "flow, K = 0" in page
    assert "heat bath, K = 1" in page


class Half(nn.Module):
    """Five of the eight modes."""

    def forward(self, condition):
        centres = MoG8().centres[:5].float()
        scale = 1.2 * condition[..., None, :].expand(*condition.shape[:-1], *centres.shape)
        parts = Independent(Normal(centres.expand_as(scale), scale), 1)
        return MixtureSameFamily(Categorical(torch.ones(parts.batch_shape)), parts)


def test_the_report_of_a_flow_that_lacks_modes_says_so_first_and_marks_them():
    found = evaluate_on_target(Half(), MoG8(), torch.tensor([[0.5]]), draws=250, reference=True)
    page = target_page(found, [], {"seed": 0})
    lead = page.split('<p class="lead">')[1].split("</p>")[0]
    assert "IT DOES NOT COVER THE TARGET" in lead
    assert "3 of 8 modes are missing" in page
    assert "<h3>The plane, scale = 0.5</h3>" in page


def test_a_run_of_a_target_and_one_of_data_are_reported(tmp_path):
    settings = TargetSettings("mog4", flow="nsf(transforms=1, hidden=(8,))", steps=2)
    fit_target(settings, tmp_path / "target")
    assert "<h2>What it costs</h2>" in sample.report_runs([tmp_path / "target"]).read_text()
    rows = np.random.default_rng(0).normal(size=(400, 2))
    np.save(tmp_path / "data.npy", rows)
    how = {"flow": "coupling(transforms=2, hidden=(8,))", "batch": 64, "steps": 30}
    fit(FitSettings(tmp_path / "data.npy", divergence="kl", **how), tmp_path / "data")
    page = fit_wing.report_runs([tmp_path / "data"]).read_text()
    for title in ("Samples", "Scores", "Its spectrum", "Likelihood of what was held out"):
        assert f"<h3>{title}</h3>" in page
    (tmp_path / "data.npy").unlink()
    assert "no longer where they were" in fit_wing.report_runs([tmp_path / "data"]).read_text()
    with pytest.raises(ValueError, match="one by one; got 2"):
        fit_wing.report_runs([tmp_path / "data", tmp_path / "target"])


def test_hue_goes_once_around_at_one_lightness():
    """Oklab's lightness of a colour, from its linear light."""
    colours = hue(np.linspace(-np.pi, np.pi, 100))
    assert np.allclose(colours[0], colours[-1])
    linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055) ** 2.4, colours / 12.92)
    cone = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        ).T
    )
    lightness = cone @ [0.2104542553, 0.7936177850, -0.0040720468]
    assert np.allclose(lightness, 0.74, atol=1e-3)
    assert np.linalg.norm(np.diff(colours, axis=0), axis=1).min() > 1e-3


def test_vortices_are_marked_where_the_angle_turns():
    """One vortex drawn by hand: its disc lies at the middle of the plaquette."""
    angles = np.array([[3, 1], [-3, -1]]) * np.pi / 4
    turns = np.zeros((2, 2))
    turns[0, 0] = 1.0
    figure = wheels({"one": angles}, {"one": turns})
    discs = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert [tuple(disc.get_xydata()[0]) for disc in discs] == [(0.5, 0.5)]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: against({}, label="T"), "panels is empty"),
        (
            lambda: against({"a": {"b": ([1.0], [1.0])}}, label="T"),
            "conditions, values and errors",
        ),
        (lambda: against({"a": {"b": ([1.0], [1.0], [])}}, label="T"), "non-empty vector"),
        (lambda: histograms({"a": {"b": ["x"]}}, label="E"), "must hold numbers"),
        (lambda: wheels({"a": [1.0, 2.0]}), "must be .rows, columns."),
        (lambda: planes({"a": [[1.0, 2.0, 3.0]]}), "must be .points, 2."),
        (lambda: planes({"a": [[1.0, 2.0]]}, columns=0), "columns must be"),
    ],
    ids=["empty", "two", "lengths", "words", "no plane", "space", "columns"],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_lines_beyond_the_palette_are_dashed():
    series = [0.0, 1.0], [1.0, 2.0], [0.1, 0.1]
    figure = against({"a": {f"line {k}": series for k in range(9)}}, label="x")
    lines = [it[0] for it in figure.axes[0].containers]
    pairs = [(it.get_color(), it.get_linestyle()) for it in lines]
    assert len(set(pairs)) == 9
    assert [it for _, it in pairs].count("-") == 7
