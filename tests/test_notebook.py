"""Results show themselves in a notebook: as tables, with every number that they hold."""

import dataclasses
import importlib
import inspect
import re

import pytest
import torch
from torch.distributions import Normal

from rkl.bayes import Draws, bayes_act
from rkl.fit import Reached, fit_to_samples, reject
from rkl.flows import Coupling, Data, FlowComparison, Training
from rkl.metrics import (
    OperatingPoint,
    copies,
    operating_point,
    pr_curve,
    pr_curve_sampled,
    prdc,
)
from rkl.sample import (
    MoG4,
    evidence,
    independent_metropolis,
    judge_coverage,
    reweight,
    thermodynamics,
)
from rkl.stats import Mean, mean
from rkl.tables import Table, table_of

WINGS = "bayes", "distill", "fit", "flows", "metrics", "sample", "stats"
HOLDS_RESULT = re.compile(r"\b(Mean|Table|Measured|Training|Importance)\b")


def public_classes():
    for wing in WINGS:
        module = importlib.import_module(f"rkl.{wing}")
        yield from filter(inspect.isclass, (getattr(module, name) for name in module.__all__))


def fields_of(cls):
    """The annotations of the fields of a dataclass or a named tuple, as text."""
    if not (dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")):
        return []
    return [it if isinstance(it, str) else str(it) for it in inspect.get_annotations(cls).values()]


RESULTS = [cls for cls in public_classes() if any(map(HOLDS_RESULT.search, fields_of(cls)))]


def numbers(shown):
    """The text of the cells of HTML tables."""
    return re.findall(r"<td[^>]*>(.*?)</td>", shown)


@pytest.mark.parametrize("cls", RESULTS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_whatever_holds_a_number_with_its_error_is_a_table_in_a_notebook(cls):
    assert callable(getattr(cls, "_repr_html_", None))


def test_the_results_of_every_wing_are_looked_at():
    names = {cls.__name__ for cls in RESULTS}
    assert {"Fit", "Accepted", "PRDC", "Evidence", "Coverage", "Evaluation"} <= names


def test_a_mean_is_shown_with_its_error_and_several_are_counted():
    assert numbers(mean(torch.tensor([1.0, 2.0, 6.0]))._repr_html_()) == ["3.0 ± 1.5"]
    two = Mean(torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.5]))
    assert numbers(two._repr_html_()) == ["1.0 ± 0.2", "2.0 ± 0.5"]
    assert ">1</th>" in two._repr_html_()


def test_arrays_of_several_shapes_are_no_table():
    with pytest.raises(ValueError, match="zip"):
        table_of("", {"a": torch.zeros(2), "b": torch.zeros(3)})


def test_no_arrays_are_an_empty_table():
    assert table_of("", {"a": torch.zeros(0)}).rows == []


@pytest.fixture(scope="module")
def fitted():
    rows = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    return fit_to_samples(Coupling(1, (4,)), rows, steps=5)


def test_a_fit_shows_log_densities_and_steps(fitted):
    cells = numbers(fitted._repr_html_())
    assert Table("", ("", "v"), [("a", fitted.log_density.pair())]).to_html().count(cells[0]) == 1
    assert "5" in cells
    assert str(fitted) == str(fitted.table())
    assert "Coupling" not in fitted._repr_html_()


def test_training_shows_its_history(fitted):
    shown = fitted.training._repr_html_()
    assert shown.count("<tr>") == len(fitted.history) + 1
    assert "step" in shown
    unfinished = Training([], 0, 0.0, None, None, "no step had a finite gradient")
    assert "Stopped: no step had a finite gradient" in unfinished._repr_html_()


def test_an_operating_point_is_shown_with_the_reason_why_it_is_not_met():
    precision = Mean(torch.tensor(0.8), torch.tensor(0.02))
    reached = Reached(0.9, precision, OperatingPoint(0.5, 2.0, 0.85))
    shown = reached._repr_html_()
    assert {"0.80 ± 0.02", "0.9", "no"} <= set(numbers(shown))
    assert "out of its reach" in shown
    assert "<p>" not in dataclasses.replace(reached, asked=0.5)._repr_html_()


def test_accepted_samples_are_shown_by_their_cost():
    p, q = Normal(0.0, 1.0), Normal(0.0, 2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        accepted = reject(q, lambda x: p.log_prob(x) - q.log_prob(x), n=500, budget=1.5)
    cells = numbers(accepted._repr_html_())
    assert cells[:2] == ["500", f"{accepted.cost:.4g}"]
    assert "±" in cells[2]


def test_data_and_draws_are_shown_by_their_shapes():
    data = Data(torch.zeros(30, 2), columns=("a", "b"), notes=("two rows are equal",))
    assert numbers(data._repr_html_()) == ["30", "2", "a, b"]
    assert "<p>two rows are equal</p>" in data._repr_html_()
    draws = Draws({"mu": torch.zeros(4, 10), "theta": torch.zeros(4, 10, 8, 2)})
    assert numbers(draws._repr_html_()) == ["number", "8 x 2"]
    assert "4 chains of 10 draws" in draws._repr_html_()


def test_an_act_and_its_diagnostics_are_shown():
    scale = 1 + torch.rand(4, 200, generator=torch.Generator().manual_seed(0)).double()
    estimate = bayes_act({"sigma": scale}, "normal(loc=0, scale=sigma)")
    assert "sigma" in estimate.act._repr_html_()
    assert numbers(estimate.table()._repr_html_())[0] in numbers(estimate.act._repr_html_())
    assert "closed form" in numbers(estimate.diagnostics._repr_html_())


def test_scores_and_curves_of_samples_are_shown():
    x = torch.randn(120, 2, generator=torch.Generator().manual_seed(0))
    assert len(numbers(prdc(real=x[:60], fake=x[60:])._repr_html_())) == 4
    assert len(numbers(copies(train=x[:40], held_out=x[40:80], fake=x[80:])._repr_html_())) == 4
    ratio = torch.tensor([0.5, 1.0, 1.5]).log()
    slopes = torch.tensor([0.5, 1.0])
    sampled = pr_curve_sampled(log_ratio_q=ratio, slopes=slopes)
    assert numbers(sampled._repr_html_())[0] == "0.5"
    assert len(numbers(sampled._repr_html_())) == 6
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    exact = pr_curve(p=p, q=p.flip(-1), slopes=slopes)
    assert len(numbers(exact._repr_html_())) == 12
    assert len(numbers(operating_point(ratio.double(), budget=1.2)._repr_html_())) == 3


@pytest.fixture(scope="module")
def target():
    return MoG4()


def test_what_comes_from_a_target_is_shown_under_each_condition(target):
    particles = evidence(target, torch.ones(1, 1), particles=64, islands=4, seed=0)
    assert numbers(particles._repr_html_())[0].count("±") == 1
    proposal = torch.distributions.Independent(Normal(torch.zeros(2), 4.0), 1)
    chain = independent_metropolis(target, proposal, torch.ones(1), draws=50, chains=2)
    assert numbers(chain._repr_html_())[0] == f"{chain.acceptance.item():.4g}"
    assert "2 chains of 50 draws" in str(chain)
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(3, 500, generator=generator).double()
    weights = reweight(log_ratio)
    assert weights._repr_html_().count("<tr>") == 4
    assert "condition" in weights._repr_html_()
    thermal = thermodynamics(log_ratio, log_ratio.exp(), torch.tensor([0.5, 1.0, 2.0]).double())
    assert thermal._repr_html_().count("<tr>") == 4


def test_coverage_is_shown_as_its_text_says_it(target):
    proposal = torch.distributions.Independent(Normal(torch.zeros(2), 4.0), 1)
    coverage = judge_coverage(target, proposal, torch.ones(1), draws=2000)
    shown = coverage._repr_html_()
    assert coverage.verdict in shown
    assert coverage.verdict in str(coverage)
    assert shown.count("<table>") == len(coverage.tables()) == 2
    assert numbers(coverage.modes[0]._repr_html_())[-1] in ("yes", "no")


def test_comparisons_of_runs_are_all_of_their_tables():
    table = Table("T", ("run", "loss"), [("a", 1.0)])
    shown = FlowComparison((table, table), {}, {})._repr_html_()
    assert shown.count("<table>") == 2
