"""What standardises rows: a flow begins as their Gaussian, bent where tails ask for it."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from rkl.fit import Method, fit_to_samples, read_data
from rkl.flows import MAF, NSF, Coupling, draw, latent
from rkl.flows.standardise import Standardised, Units

SMALL = Coupling(2, (8,))


def correlated(rows=120, columns=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix
    return x * torch.logspace(-3, 3, columns, dtype=torch.float64) + 50


def gaussian(rows):
    return MultivariateNormal(rows.mean(0), rows.T.cov())


@pytest.mark.parametrize("columns", [1, 2])
def test_values_of_another_shape_than_rows_are_refused(columns):
    rows = torch.randn(100, columns, generator=torch.Generator().manual_seed(0))
    density = fit_to_samples(NSF(1, (8,)), rows, steps=1).flow()
    assert density.log_prob(rows[None]).shape == (1, 100)
    for wrong in (rows[:, 0], rows[0, 0], torch.cat([rows, rows, rows], 1), rows[:, :1].mT):
        with pytest.raises(ValueError, match=f"must be .*batch, {columns}.*; got"):
            density.log_prob(wrong)
    if columns == 2:
        with pytest.raises(ValueError, match=r"got \[100, 1\]"):
            density.log_prob(rows[:, :1])


@pytest.mark.parametrize("architecture", [SMALL, NSF(1, (8,)), MAF(1, (8,))], ids=repr)
def test_before_its_first_step_a_flow_is_the_gaussian_of_its_rows(architecture):
    fitted = fit_to_samples(architecture, correlated(), steps=1)
    law = gaussian(fitted.trained_on.values)
    expected = law.log_prob(fitted.held_out.values).mean().item()
    assert fitted.history[0]["step"] == 0
    assert fitted.history[0]["held_out"] == pytest.approx(expected, abs=1e-4)
    assert fitted.gaussian.value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("architecture", [NSF(2, (8,)), MAF(2, (8,))], ids=repr)
def test_a_flow_of_one_column_begins_as_its_gaussian_too(architecture):
    rows = correlated(columns=1)
    plain = fit_to_samples(architecture, rows, steps=1)
    classes = fit_to_samples(architecture, rows, steps=1, labels=[0, 1] * 60)
    for fitted in (plain, classes):
        trained, held_out = fitted.trained_on.values, fitted.held_out.values
        expected = Normal(trained.mean(), trained.std()).log_prob(held_out).mean().item()
        assert fitted.history[0]["held_out"] == pytest.approx(expected, abs=1e-4)


def heaps():
    """Rows of a table that a flow of 40,000 parameters learns by heart within 100 steps."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(60, 6, generator=generator, dtype=torch.float64)


def test_a_small_table_never_ends_below_a_gaussian_of_the_same_rows():
    fitted = fit_to_samples(Coupling(2, (64,)), heaps(), steps=400)
    law = gaussian(fitted.trained_on.values)
    expected = law.log_prob(fitted.held_out.values).mean().item()
    assert fitted.log_density.value.item() >= expected - 1e-4
    assert fitted.history[-1]["held_out"] < expected - 0.1  # the last parameters are far below
    assert fitted.below_gaussian is None


def test_what_ends_below_a_gaussian_says_by_how_much():
    how = {"guard": False, "noise": 0, "lr": 2e-2}
    fitted = fit_to_samples(Coupling(2, (64,)), heaps(), steps=150, method=Method(**how))
    gap = (fitted.gaussian.value - fitted.log_density.value).item()
    assert f"{gap:.4f} below" in fitted.below_gaussian


def test_a_module_that_begins_elsewhere_is_held_to_the_gaussian_too():
    flow = Coupling(2, (8,)).build((6,))
    for parameter in flow.nets[-1][-1].parameters():
        torch.nn.init.constant_(parameter, 1.0)
    with pytest.warns(UserWarning, match=r"is \d+\.\d+ below that of a Gaussian"):
        fit_to_samples(flow, heaps(), steps=1)


def test_the_figure_of_a_fit_is_of_the_parameters_that_it_keeps():
    fitted = fit_to_samples(Coupling(2, (64,)), heaps(), steps=300)
    own = fitted.flow().log_prob(fitted.held_out.values).mean().item()
    assert fitted.log_density.value.item() == pytest.approx(own, abs=1e-5)
    assert fitted.training.best == pytest.approx(own, abs=1e-5)


def test_early_looks_grow_by_a_quarter():
    fitted = fit_to_samples(SMALL, correlated(), steps=60, every=25)
    steps = [row["step"] for row in fitted.history]
    assert steps[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15]
    assert steps[-1] == 60


def units_of(rows):
    return Units.of_rows(read_data(rows))


HEAVY = {
    "log-normal": lambda u: (2 * u).exp(),
    "Cauchy": lambda u: (math.pi * (Normal(0.0, 1.0).cdf(u) - 0.5)).tan(),
    "one value of 1e6": lambda u: torch.where(torch.arange(len(u)) == 7, 1e6, u),
}


@pytest.mark.parametrize("name", HEAVY)
def test_tails_that_no_box_holds_are_bent_into_it(name):
    torch.manual_seed(0)
    x = torch.stack([HEAVY[name](torch.randn(4000).double()), torch.randn(4000).double()], 1)
    units = units_of(x)
    assert units.bending.bent.tolist() == [True, False]
    inner, _ = units.encode(x)
    assert (inner[:, 0].abs() > 5).sum() <= 8 + (name == "Cauchy") * 10
    plain = Units.of_rows(read_data(x), bend=False)
    assert units.gaussian(x).mean() > plain.gaussian(x).mean() + 1.0


def test_a_bent_log_normal_is_its_gaussian_and_its_density_the_known_one():
    torch.manual_seed(0)
    z = torch.randn(20_000, 2).double()
    x = torch.stack([(2 * z[:, 0]).exp(), z[:, 1]], 1)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e)) + math.log(2)  # and E log x = 0
    assert -units_of(x).gaussian(x).mean().item() == pytest.approx(entropy, abs=0.05)


def test_symmetric_columns_without_tails_are_not_bent():
    torch.manual_seed(0)
    assert units_of(torch.randn(2000, 3)).bending is None
    assert units_of(torch.rand(2000, 3)).bending is None


def test_units_go_forth_and_back_with_their_jacobian():
    torch.manual_seed(0)
    x = torch.stack([torch.randn(300).double().exp(), torch.randn(300).double()], 1)
    x = torch.cat([x, x.sum(1, keepdim=True) + torch.randn(300, 1).double()], 1)
    units = units_of(x)
    inner, log_slope = units.encode(x)
    torch.testing.assert_close(units.decode(inner), x, rtol=1e-9, atol=1e-9)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda it: units.encode(it)[0]))(x[:20])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_slope[:20])
    torch.testing.assert_close(inner.T.cov(), torch.eye(3).double(), rtol=0, atol=1e-6)
    again = Units.of_state(units.state_dict())
    torch.testing.assert_close(again.encode(x)[0], inner)


def test_a_law_in_units_draws_what_it_gives_the_density_of():
    torch.manual_seed(0)
    x = torch.stack([torch.randn(300).exp(), torch.randn(300)], 1)
    flow = Standardised(SMALL.build((2,)), units_of(x))
    value, log_q = draw(flow(), (50,))
    torch.testing.assert_close(flow().log_prob(value), log_q, rtol=1e-4, atol=1e-4)
    cooled = latent(flow(), temperature=0.5).sample((2000,))
    assert flow.standardise(cooled).std(0).tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_a_total_beside_its_parts_is_refused_by_name(tmp_path):
    parts = np.random.default_rng(0).normal(size=(200, 2))
    rows = np.column_stack([parts, parts.sum(1), np.random.default_rng(1).normal(size=200)])
    with pytest.raises(ValueError, match="column 2 is a linear function of 0, 1, as a total"):
        fit_to_samples(SMALL, rows, steps=1)
    rows[:, 2] += 1e-2 * np.random.default_rng(2).normal(size=200)
    fit_to_samples(SMALL, rows, steps=1)  # nearly one has a density


# Levels


def ages_and_flags(rows=1600):
    g = np.random.default_rng(0)
    age = g.gamma(6, 7, rows).round().clip(17, 90)
    flag = (g.random(rows) < 0.3) * 1.0
    return np.stack([age, flag, np.exp(10 + 0.01 * age + 0.4 * g.normal(size=rows))], 1)


def test_columns_of_levels_beside_continuous_ones_are_named():
    with pytest.warns(UserWarning, match=r"columns of levels .*: 0 \(\d+ levels\), 1 \(2 levels"):
        fit_to_samples(SMALL, ages_and_flags(), steps=1)
    assert "1 (2 levels)" in read_data(ages_and_flags()).notes[0]
    assert read_data(np.random.default_rng(0).normal(size=(500, 3))).notes == ()


def test_each_column_is_spread_over_its_own_step():
    rows = ages_and_flags()
    rows = np.column_stack([rows, 100 * np.random.default_rng(1).integers(0, 30, len(rows))])
    data = read_data(rows, dequantise=True)
    assert data.step.tolist() == [1.0, 1.0, 0.0, 100.0]
    torch.manual_seed(0)
    away = data.spread().values - data.values
    assert away.abs().amax(0).tolist() == pytest.approx([0.5, 0.5, 0.0, 50.0], abs=0.2)
    assert away.mean(0).tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0], abs=3)


def test_where_no_column_holds_levels_dequantising_says_so():
    notes = read_data(np.random.default_rng(0).normal(size=(100, 2)), dequantise=True).notes
    assert notes == ("dequantise: no column holds levels, so that nothing was spread",)


def test_samples_of_counts_have_the_mean_of_the_counts_and_go_back_to_levels():
    x = np.random.default_rng(0).poisson(3.0, size=(4000, 2))
    fitted = fit_to_samples(Coupling(2, (16,)), x, dequantise=True, steps=60)
    torch.manual_seed(0)
    samples = fitted.flow().sample((20_000,))
    assert samples.mean(0).tolist() == pytest.approx(x.mean(0).tolist(), abs=0.1)
    levels = fitted.flow.to_levels(samples)
    assert set(levels.unique().tolist()) <= set(range(int(x.max()) + 1))
    assert levels.mean(0).tolist() == pytest.approx(x.mean(0).tolist(), abs=0.1)


def test_integers_of_more_digits_than_single_precision_keep_their_levels():
    t = 1_700_000_000 + np.random.default_rng(0).integers(0, 600, size=(800, 1))
    data = read_data(np.concatenate([t, t % 50], 1), dequantise=True)
    units = Units.of_rows(data)
    torch.manual_seed(0)
    assert torch.equal(units.to_levels(data.spread().values), data.values)


# The split


def test_equal_rows_are_on_one_side_and_counted():
    rows = torch.randn(250, 2, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    data = read_data(rows)
    assert "1,750 of 2,000 rows equal an earlier one" in data.notes[0]
    trained_on, held_out = data.split(0.1, seed=0)
    assert len(held_out) == 200
    seen = {tuple(row) for row in trained_on.values.tolist()}
    assert not seen & {tuple(row) for row in held_out.values.tolist()}


def test_a_column_that_is_constant_among_the_rows_to_learn_from_is_named():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    x[torch.randperm(200, generator=torch.Generator().manual_seed(0))[0], 2] = 1
    with pytest.raises(ValueError, match="1 constant columns among the 180 of 200 rows .*: 2"):
        fit_to_samples(SMALL, x, steps=50, dequantise=False)


def test_a_class_of_few_rows_is_named():
    rows = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    assert "b (1)" in read_data(rows, ["a"] * 99 + ["b"]).notes[0]


def test_rows_where_splines_do_not_bend_are_counted():
    rows = torch.randn(1200, 2, generator=torch.Generator().manual_seed(0))
    rows[:7, 0] = 1e4  # of which some are held out
    said = fit_to_samples(NSF(1, (8,)), rows, steps=1).beyond_splines
    assert said is not None
    assert 0 < int(said.split()[0]) <= 7
    near = torch.rand(1200, 2, generator=torch.Generator().manual_seed(1))
    assert fit_to_samples(NSF(1, (8,)), near, steps=1).beyond_splines is None
    assert fit_to_samples(SMALL, rows, steps=1).beyond_splines is None
