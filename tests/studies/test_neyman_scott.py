"""The problem of Neyman and Scott, against closed forms, brute force and its limits."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import mpmath
import pytest
import torch
from torch.distributions import MultivariateNormal

from rkl import demos, plots, studies
from rkl.runs import Run
from rkl.studies.neyman_scott import acts, draws, variance
from rkl.studies.neyman_scott import report as study
from rkl.studies.study import run_part

REFERENCE, JEFFREYS, SKEWED, HIERARCHICAL, WRONG = variance.PRIORS
PAIRED, UNEQUAL = variance.DESIGNS.values()

# From a computation of its own: estimate over maximum likelihood where the means are flat and the
# prior of σ² is a power, so that every estimate is a multiple of the sum of squares.
MULTIPLES = {
    (REFERENCE, 10): {
        "MAP in σ": 0.46279 / 0.48593,
        "MAP in σ²": 0.44176 / 0.48593,
        "MAP in log σ": 1.0,
        "MAP in 1/σ²": 0.53992 / 0.48593,
        "posterior mean of σ²": 1.21483 / 0.48593,
        "posterior mean of σ, squared": 1.14141 / 0.48593,
        "posterior median": 1.04034 / 0.48593,
        "Wallace-Freeman": 0.97186 / 0.48593,
        "forward KL": 1.82224 / 0.48593,
        "reverse KL": 0.97186 / 0.48593,
        "symmetric KL": 1.33078 / 0.48593,
        "intrinsic": 1.51075 / 0.48593,
    },
    (JEFFREYS, 100): {
        "MAP in σ": 0.33194 / 0.49957,
        "posterior median": 0.50124 / 0.49957,
        "Wallace-Freeman": 1.0,
        "forward KL": 0.75693 / 0.49957,
        "reverse KL": 1.0,
        "symmetric KL": 0.61493 / 0.49957,
        "intrinsic": 0.75690 / 0.49957,
    },
}
# The same, with its Monte Carlo error from 200 data sets: (prior, estimator, N): mean and sd.
PUBLISHED = {
    (SKEWED, "forward KL", 1000): (1.51390, 0.07191),
    (SKEWED, "reverse KL", 1000): (1.00726, 0.04785),
    (HIERARCHICAL, "forward KL", 1000): (1.47861, 0.06981),
    (HIERARCHICAL, "reverse KL", 1000): (1.00135, 0.04810),
    (HIERARCHICAL, "symmetric KL", 1000): (1.21680, 0.05795),
    (HIERARCHICAL, "posterior median", 1000): (1.00195, 0.04809),
    (WRONG, "posterior mean of σ²", 1000): (7.08218, 0.46251),
    (WRONG, "forward KL", 1000): (7.86164, 0.47373),
    (WRONG, "reverse KL", 1000): (7.07066, 0.46207),
    (WRONG, "symmetric KL", 1000): (7.45565, 0.46825),
    (WRONG, "reverse KL", 10): (7.44521, 4.72034),
    (HIERARCHICAL, "reverse KL", 10): (0.98350, 0.51793),
    (HIERARCHICAL, "forward KL", 10): (1.81970, 0.93766),
}


@pytest.fixture(scope="module")
def thousand():
    """200 data sets of 1,000 pairs, and all estimates of each prior."""
    data = variance.simulate(PAIRED, 1000, 200, seed=0)
    found = {name: variance.bayesian(data, it) for name, it in variance.PRIORS.items()}
    return found | {"no prior": variance.classical(data)}


def limits(estimates):
    """Mean of the estimates, and four standard errors."""
    return estimates.mean().item(), 4 * estimates.std().item() / math.sqrt(len(estimates))


# Closed forms and published numbers


@pytest.mark.parametrize(("prior", "groups"), MULTIPLES)
def test_flat_means_make_every_estimate_the_published_multiple_of_maximum_likelihood(
    prior, groups
):
    """To the five decimals of the table; its intrinsic act is 3e-4 off the incomplete gammas."""
    data = variance.simulate(PAIRED, groups, 3, seed=1)
    found = variance.bayesian(data, variance.PRIORS[prior])
    likelihood = variance.classical(data)["maximum likelihood"]
    for name, multiple in MULTIPLES[prior, groups].items():
        ratio = (found[name] / likelihood).tolist()
        assert ratio == pytest.approx([multiple] * 3, rel=4e-4 if name == "intrinsic" else 5e-5)


@pytest.mark.parametrize("sizes", [PAIRED, UNEQUAL])
@pytest.mark.parametrize("prior", [REFERENCE, JEFFREYS, SKEWED])
def test_flat_means_leave_an_inverse_gamma_law_whose_acts_are_closed_forms(sizes, prior):
    data, chosen = variance.simulate(sizes, 12, 4, seed=2), variance.PRIORS[prior]
    found = variance.bayesian(data, chosen)
    k, n = data.observations, data.groups
    a = (k - n) / 2 + chosen.power - 1 + chosen.half * n
    b = data.within / 2 + chosen.scale
    mean, reverse = b / (a - 1), b / a
    root = math.exp(math.lgamma(a - 0.5) - math.lgamma(a))
    forward = mean * (1 + n / k)
    expected = {
        "posterior mean of σ²": mean,
        "posterior mean of σ, squared": b * root**2,
        "forward KL": forward,
        "reverse KL": reverse,  # the sizes of the groups drop out
        "symmetric KL": (forward * reverse).sqrt(),
        "MAP in σ²": b / (a + n / 2 + 1),
        "Wallace-Freeman": reverse,
    }
    for name, value in expected.items():
        assert found[name].tolist() == pytest.approx(value.tolist(), rel=1e-10), name


def inverse_gamma_parts(a, b, t):
    """P(v < t), E[v; v < t] and E[1/v; v > t] of an inverse gamma law."""
    upper = lambda s: mpmath.gammainc(s, b / t, mpmath.inf, regularized=True)  # noqa: E731
    return upper(a), b / (a - 1) * upper(a - 1), a / b * (1 - upper(a + 1))


def test_median_and_intrinsic_act_are_those_of_incomplete_gamma_functions():
    data = variance.simulate(PAIRED, 10, 1, seed=3)
    found = variance.bayesian(data, variance.PRIORS[REFERENCE])
    a, b, q = 5, data.within.item() / 2, 0.5

    def slope(t):
        below, first, inverse = inverse_gamma_parts(a, b, t)
        return below - (1 + q) * first / t + t * inverse - (1 - below)

    median = mpmath.findroot(lambda t: inverse_gamma_parts(a, b, t)[0] - 0.5, b / a)
    intrinsic = mpmath.findroot(slope, 1.5 * b / a)
    assert found["posterior median"].item() == pytest.approx(float(median), rel=2e-5)
    assert found["intrinsic"].item() == pytest.approx(float(intrinsic), rel=2e-5)


def test_which_kl_is_the_smaller_depends_on_the_variances_alone():
    """What the intrinsic act rests on."""
    generator = torch.Generator().manual_seed(4)
    v, t, q = torch.rand(3, 1000, generator=generator, dtype=torch.float64) * 3 + 1e-3
    forward, reverse = (v + q) / t - 1 + (t / v).log(), (t + q) / v - 1 - (t / v).log()
    assert torch.equal(forward < reverse, v < t)


@pytest.mark.parametrize(("prior", "name", "groups"), PUBLISHED)
def test_means_over_data_sets_are_the_published_ones(prior, name, groups, thousand):
    if groups == 1000:
        estimates = thousand[prior][name]
    else:
        data = variance.simulate(PAIRED, groups, 200, seed=0)
        estimates = variance.bayesian(data, variance.PRIORS[prior])[name]
    mean, sd = PUBLISHED[prior, name, groups]
    error = math.hypot(sd, estimates.std().item()) / math.sqrt(200)
    assert abs(estimates.mean().item() - mean) < 4 * error


# What the study says


def test_reverse_kl_goes_where_the_marginal_posterior_goes(thousand):
    for prior, limit in {REFERENCE: 1.0, SKEWED: 1.0, HIERARCHICAL: 1.0, JEFFREYS: 0.5}.items():
        mean, margin = limits(thousand[prior]["reverse KL"])
        assert abs(mean - limit) < margin + 5 / 1000  # a bias of order 1/N is left
        median = thousand[prior]["posterior median"].mean().item()
        assert mean == pytest.approx(median, rel=2e-3)


def test_a_proper_prior_is_not_enough(thousand):
    """Its pseudo-true variance: the root of the expected score of the marginal likelihood."""
    assert thousand[WRONG]["reverse KL"].mean().item() > 6

    def score(v):
        u = 1 + v / 2  # the variance that the prior gives a group's mean
        return 0.5 * (-1 / v + 1 / v**2) + 0.25 * (-1 / u + 9.5 / u**2)

    limit = float(mpmath.findroot(score, 7))
    assert limit == pytest.approx(7.04, abs=0.001)
    mean, margin = limits(thousand[WRONG]["reverse KL"])
    assert abs(mean - limit) < margin


def test_forward_kl_and_intrinsic_keep_a_bias_that_the_sizes_set(thousand):
    for name in ("forward KL", "intrinsic"):
        mean, margin = limits(thousand[REFERENCE][name])
        assert abs(mean - 1.5) < margin + 5 / 1000
    mean, margin = limits(thousand[REFERENCE]["symmetric KL"])
    assert abs(mean - math.sqrt(1.5)) < margin + 5 / 1000


def test_maximum_likelihood_is_inconsistent_and_its_classical_remedies_are_not(thousand):
    for name, limit in {
        "maximum likelihood": 0.5,
        "conditional likelihood": 1.0,
        "marginal likelihood": 1.0,
    }.items():
        mean, margin = limits(thousand["no prior"][name])
        assert abs(mean - limit) < margin


def test_a_hierarchical_map_collapses_onto_one_mean():
    """All means together cost likelihood once for each group; τ → 0 gains log N each."""
    data = variance.simulate(PAIRED, 10_000, 2, seed=5)
    found = variance.bayesian(data, variance.PRIORS[HIERARCHICAL])
    assert found["MAP in σ"].mean().item() == pytest.approx(1 + 9, rel=0.05)
    assert found["reverse KL"].mean().item() == pytest.approx(1, rel=0.1)


# Brute force


def full_posterior(x, sizes, tau2, kappa, v):
    """Log marginal likelihood, and mean and variance of the means, by whole matrices."""
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    z = torch.nn.functional.one_hot(groups).double()
    one = torch.ones(len(sizes), len(sizes)).double()
    prior = tau2[:, None, None] * (torch.eye(len(sizes)).double() + one / kappa)
    whole = z @ prior @ z.T + v[:, None, None] * torch.eye(len(x)).double()
    gain = prior @ z.T @ torch.linalg.inv(whole)
    log_p = MultivariateNormal(torch.zeros(len(x)).double(), whole).log_prob(x)
    return log_p, gain @ x, (prior - gain @ z @ prior).diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("prior", [HIERARCHICAL, WRONG])
def test_acts_are_those_of_the_whole_matrices_on_a_plain_grid(prior):
    """Three groups of unequal size: risks written out and minimised over all four numbers."""
    sizes, chosen = (2, 3, 5), variance.PRIORS[prior]
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(10, generator=generator, dtype=torch.float64)
    x = x + torch.tensor([-2.0, 0.5, 2.5]).double().repeat_interleave(torch.tensor(sizes))
    classes = [it[None, None] for it in x.split(list(sizes))]
    hierarchical = prior == HIERARCHICAL
    log_v = torch.linspace(-3.5, 7, 121).double()
    log_tau2 = torch.linspace(-1.5, 12, 46).double() if hierarchical else torch.zeros(1).double()
    a, b = (it.flatten() for it in torch.meshgrid(log_v, log_tau2, indexing="ij"))
    v, tau2 = a.exp(), b.exp()
    kappa = chosen.kappa if hierarchical else math.inf
    log_p, mean, spread = full_posterior(x, sizes, tau2, kappa, v)
    log_p = log_p - (chosen.power - 1) * a - chosen.scale / v
    if hierarchical:
        log_p = log_p - chosen.shape * b - chosen.rate / tau2
    w, size = log_p.softmax(0), torch.tensor(sizes).double()

    def minimum(risk):
        at = torch.cat([(w[:, None] * mean).sum(0), (w @ v).log()[None]]).requires_grad_()
        fit = torch.optim.LBFGS([at], max_iter=200, tolerance_grad=1e-11, tolerance_change=0)

        def closure():
            fit.zero_grad()
            t = at[3].exp()
            q = ((mean - at[:3]).square() + spread) @ size / 10
            forward, reverse = (v + q) / t + (t / v).log() - 1, (t + q) / v - (t / v).log() - 1
            loss = w @ risk(forward, reverse)
            loss.backward()
            return loss

        fit.step(closure)
        return at[3].exp().item()

    found = variance.bayesian(variance.statistics(classes), chosen)
    assert found["reverse KL"].item() == pytest.approx(minimum(lambda f, r: r), rel=1e-5)
    assert found["forward KL"].item() == pytest.approx(minimum(lambda f, r: f), rel=1e-5)
    assert found["symmetric KL"].item() == pytest.approx(minimum(lambda f, r: f + r), rel=1e-5)
    # A grid of 121 jumps where a node passes t: the study's nodes do not, the grid here does.
    assert found["intrinsic"].item() == pytest.approx(minimum(torch.minimum), rel=0.02)


def test_the_acts_from_draws_are_those_of_quadrature_within_their_stated_errors():
    found = draws.compare(seed=10)
    assert found.keys() == {"forward KL", "symmetric KL", "intrinsic", "reverse KL"}
    for (value, error), exact in found.values():
        assert abs(value - exact) < 4 * error
        assert error < 0.02 * exact


# The run


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(draws, "DRAWS", 40)
    return study.Plan(sizes=(6,), replications=4)


@pytest.mark.parametrize("part", study.PARTS)
def test_a_part_writes_every_estimate_and_shows_it(part, small, tmp_path):
    threads = torch.get_num_threads()
    problem = replace(study.PARTS[part], plan=small, workers=1)
    page = run_part("neyman_scott", part, problem, tmp_path / "run", seed=3).read_text()
    assert torch.get_num_threads() == threads
    with open(tmp_path / "run" / f"{part}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["prior"] for row in rows} == {"no prior", *problem.priors}
    assert {row["N"] for row in rows} == {"6"}
    assert {row["quantity"] for row in rows} == set(problem.truths)
    assert all(int(row["replications"]) == 4 for row in rows if row["prior"] != "no prior")
    assert page.count("<svg") == len(problem.designs) * len(problem.truths)
    for name in problem.drawn:
        assert name in page
    assert Run.open(tmp_path / "run").record["status"] == "finished"


def test_a_row_holds_mean_error_spread_and_distance_from_the_truth():
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    labels = {"prior": "prior", "design": "design", "quantity": "σ²", "estimator": "estimator"}
    row = study.Row.of(values, 1.0, size=10, **labels)
    *words, mean, se, sd, rmse = row.cells()
    assert words == ["prior", "design", "σ²", "estimator", "10", "1", "3"]
    expected = 2, 1 / math.sqrt(3), 1, math.sqrt(5 / 3)
    assert [float(it) for it in (mean, se, sd, rmse)] == pytest.approx(expected, rel=1e-5)


def test_other_parts_and_devices_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="part must be one of variance, panel"):
        studies.run("neyman-scott", "toy", tmp_path / "run")
    with pytest.raises(ValueError, match="device must be 'cpu'.*got 'cuda'"):
        studies.run("neyman-scott", "panel", tmp_path / "run", device="cuda")
    assert list(tmp_path.iterdir()) == []


FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def written_rows(part):
    with open(FIGURES / f"neyman-scott-{part}.csv", newline="") as file:
        return list(csv.DictReader(file))


def rows_of(problem, sizes, seed):
    for design in problem.designs:
        for size in sizes:
            yield from problem.rows(design, size, seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", study.PARTS)
def test_the_figures_of_the_page_are_those_of_the_study(part):
    rows = rows_of(study.PARTS[part], study.Plan().sizes, 0)
    for row, written in zip(rows, written_rows(part), strict=True):
        found = dict(zip(study.COLUMNS, row.cells(), strict=True))
        for name in ("mean", "se", "sd", "rmse"):
            assert float(found.pop(name)) == pytest.approx(float(written.pop(name)), rel=1e-4)
        assert found == written


@pytest.mark.statistical
@pytest.mark.parametrize("part", study.PARTS)
def test_other_data_give_the_figures_of_the_page_within_their_errors(part):
    """Some 900 means, of which those of one prior go together: 5 standard errors."""
    rows = rows_of(study.PARTS[part], study.Plan().sizes[1:], 1)
    kept = [it for it in written_rows(part) if it["N"] != "10"]
    for row, written in zip(rows, kept, strict=True):
        mean, error = row.mean
        assert abs(mean - float(written["mean"])) < 5 * math.hypot(error, float(written["se"]))


@pytest.fixture
def asked(monkeypatch):
    """What the study was asked for, which it then does not do."""
    found = []

    def noted(paper, parts, part, out, **how):
        assert paper == "neyman_scott"
        found.append((part, Path(out), how))
        return Path(out) / "report.html"

    monkeypatch.setattr("rkl.studies.study.run_study", noted)
    return found


def test_the_command_line_takes_the_first_part_and_lists_no_parts_as_studies(asked, capsys):
    from rkl import cli

    assert studies.papers() == ["advnf", "akl", "neyman-scott", "precision-recall"]
    assert cli.main(["study", "neyman-scott", "--seed", "1"]) in (0, None)
    place = Path("runs", "neyman-scott-variance")
    assert asked == [
        (
            "variance",
            place,
            {"overwrite": False, "resume": False, "data": None, "seed": 1, "device": "cpu"},
        )
    ]
    assert capsys.readouterr().out == f"{place / 'report.html'}\n"


def test_the_demonstration_is_the_first_part(asked):
    assert demos.run("neyman-scott", "out", seed=1) == f"The report: {Path('out', 'report.html')}"
    assert asked[0][:2] == ("variance", Path("out"))
    with pytest.raises(ValueError, match="steps are of distillations"):
        demos.run("neyman-scott", "out", steps=3)


# The figure


def test_an_estimator_keeps_its_line_from_panel_to_panel():
    series = [10, 100], [1.0, 2.0], [0.5, 0.2]
    panels = {"one": {"a": series, "b": series}, "two": {"b": series}}
    figure = plots.estimates(panels, truth=1.0, label="σ²")
    figure.draw_without_rendering()
    first, second = (axes.lines for axes in figure.axes[:2])
    assert first[1].get_color() == second[0].get_color() != first[0].get_color()
    assert first[0].get_linewidth() > first[1].get_linewidth()
    fresh = [plots.estimates(panels, truth=1.0, label="σ²") for _ in range(2)]
    assert plots.to_svg(fresh[0], "title") == plots.to_svg(fresh[1], "title")


@pytest.mark.parametrize(
    ("panels", "said"),
    [
        ({}, "panels is empty"),
        ({"one": {}}, "panels is empty, or one of them is"),
        ({"one": {"a": ([1], [1])}}, r"panels\['one'\]\['a'\] must be sizes, means and bands"),
        ({"one": {"a": ([1], [1], [])}}, "three vectors of one length"),
    ],
)
def test_a_figure_of_nothing_is_refused(panels, said):
    with pytest.raises(ValueError, match=said):
        plots.estimates(panels, truth=1.0, label="σ²")


def test_the_peak_of_two_is_the_higher_one():
    def height(x):
        return torch.logaddexp(-((x + 2) ** 2) * 50, 0.3 - ((x - 3) ** 2) * 50)

    assert acts.peak(height, torch.zeros(1, 1).double(), 9.0).item() == pytest.approx(3, abs=1e-6)
