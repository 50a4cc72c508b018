import math

import pytest
import torch

from rkl.stats import pareto_k, tail


def even(draws):
    """Draws of the uniform law, spread evenly: no chance in what follows."""
    return (torch.arange(draws, dtype=torch.float64) + 0.5) / draws


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.0, 1.5])
def test_an_exact_pareto_tail_has_its_shape(k):
    # 300 draws in the tail, drawn to 0.5 as if by ten more; the grid of θ costs 0.02
    expected = (300 * k + 10 * 0.5) / 310
    assert pareto_k(even(10_000) ** -k).item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("shape", [0.9, 1.5, 3.0])
def test_an_inverse_gamma_of_shape_a_has_k_of_one_over_a(shape):
    generator = torch.Generator().manual_seed(0)
    gammas = torch._standard_gamma(torch.full((100_000, 20), shape).double(), generator)
    k = pareto_k(1 / gammas)
    assert k.mean().item() == pytest.approx(1 / shape, abs=0.05)  # 0.06 / √20, and a bias of 0.01
    assert pareto_k(gammas).max() < 0.25  # the natural parameter has all moments


def test_light_and_bounded_tails_have_no_positive_k():
    u = even(100_000)
    assert -0.2 < pareto_k(torch.special.ndtri(u)) < 0
    assert pareto_k(u).item() == pytest.approx(-1, abs=0.1)
    assert pareto_k(-u.log()).item() == pytest.approx(0, abs=0.03)


# ArviZ 0.23.4, arviz.stats.stats._gpdfit of the excesses ((1 - u)^-k - 1)/k over even draws u.
ARVIZ = {
    -0.4: -0.24455242217455522,
    0.3: 0.34088317691231573,
    0.7: 0.6723013388970224,
    1.2: 1.0867965164086753,
}


@pytest.mark.parametrize("k", ARVIZ)
def test_the_fit_is_that_of_arviz(k):
    # 500 draws have a tail of 68, and here all others are 0
    tail = ((1 - even(68)) ** -k - 1) / k
    assert pareto_k(torch.cat([torch.zeros(432), tail])).item() == pytest.approx(
        ARVIZ[k], rel=1e-9
    )


def test_the_heavier_of_the_two_tails_counts_and_units_do_not():
    x = even(5_000) ** -0.8
    k = pareto_k(x)
    for same in (-x, 1e200 * x, x * 1e-200, torch.cat([x, -(even(5_000) ** -0.1)])[::2]):
        assert pareto_k(same).item() == pytest.approx(k.item(), abs=0.03)
    torch.testing.assert_close(pareto_k(-x), k)
    torch.testing.assert_close(pareto_k(1e200 * x), k, rtol=1e-9, atol=0)


def test_columns_are_judged_one_by_one(monkeypatch):
    monkeypatch.setattr("rkl.stats.pareto.NUMBERS", 10_000)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, 2, generator=generator, dtype=torch.float64).exp()
    k = pareto_k(x)
    assert k.shape == (3, 2)
    for row in range(3):
        torch.testing.assert_close(k[row], torch.stack([pareto_k(c) for c in x[:, row].unbind(1)]))


def test_extreme_draws_that_are_all_the_same_have_no_tail():
    assert pareto_k(torch.ones(100)) == -math.inf
    assert pareto_k(torch.arange(1_000) % 5 * 1.0) == -math.inf


def test_an_infinite_draw_is_a_tail_without_any_moment():
    x = even(100)
    x[3] = -math.inf
    assert pareto_k(torch.stack([x, even(100)], 1)).tolist()[0] == math.inf
    assert pareto_k(x[:, None])[0] == math.inf


def test_too_few_draws_have_no_tail_to_judge_and_what_is_no_number_is_refused():
    assert pareto_k(even(24)).isnan()
    assert pareto_k(even(25)).isfinite()
    with pytest.raises(ValueError, match="values must be numbers; got 1 nan"):
        pareto_k(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="got a single number"):
        pareto_k(torch.tensor(1.0))


@pytest.mark.statistical
def test_the_estimate_is_as_uncertain_as_it_says():
    """(1 + k) / √(3 √n), by which a test against k = 1 or 0.5 errs; 10 % less by the prior."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(4_000, 2_000, generator=generator, dtype=torch.float64)
    for k in (0.5, 1.0):
        spread = pareto_k(u**-k).std().item()
        assert spread == pytest.approx((1 + k) / math.sqrt(3 * math.sqrt(4_000)), rel=0.15)


def clusters(draws, share, generator):
    """A normal body, and a tight cluster far off that holds a share of the draws."""
    body = torch.randn(draws, generator=generator, dtype=torch.float64) / 10
    return torch.where(torch.rand(draws, generator=generator) < share, 4.0, 0.0) + body


def spikes(draws, share, generator):
    """An atom at 0 that holds all but a share of the draws."""
    slab = 1 + torch.randn(draws, generator=generator, dtype=torch.float64) / 5
    return torch.where(torch.rand(draws, generator=generator) < share, slab, 0.0)


def counts(draws, share, generator):
    """Squares of rounded normal variables: levels whose distances grow."""
    z = torch.randn(draws, generator=generator, dtype=torch.float64)
    return (0.6 * z).round().square() / (1 + share * z.roll(1)).square()


@pytest.mark.parametrize("kind", [clusters, spikes, counts])
@pytest.mark.parametrize("share", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("draws", [800, 4000])
def test_atoms_and_clusters_do_not_speak_for_an_infinite_mean(kind, share, draws):
    # in 100 replicates pareto_k exceeds 1 in up to all of them; here none may conclude so
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([kind(draws, share, generator) for _ in range(30)], -1)
    assert not tail(values).infinite_mean.any()


@pytest.mark.parametrize(("shape", "least", "most"), [(0.6, 0.9, 1), (0.8, 0.6, 1), (1.5, 0, 0.1)])
def test_a_tail_without_a_mean_is_still_recognised(shape, least, most):
    # 1 / Gamma(a) has k = 1/a; of 300 replicates of 1,000 draws 0.99, 0.77 and 0.01 are concluded
    generator = torch.Generator().manual_seed(0)
    gammas = torch._standard_gamma(torch.full((1000, 100), shape).double(), generator)
    assert least <= tail(1 / gammas).infinite_mean.double().mean() <= most


def test_a_continuous_tail_keeps_its_shape_and_a_tied_one_has_none():
    x = even(10_000) ** -0.7
    torch.testing.assert_close(tail(x).k, pareto_k(x))
    assert tail(torch.cat([x, torch.full((150,), 1e4)])).k.isnan()
    assert tail(torch.zeros(100)).k == -math.inf
    assert tail(torch.zeros(10)).k.isnan()
    assert tail(torch.tensor([math.inf] + 99 * [0.0])).infinite_mean
