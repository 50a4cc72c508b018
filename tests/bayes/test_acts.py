"""The Bayes act: its value, its risk and its errors, when it exists and when it does not."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
import xarray as xr
from bayes.found import FIXED, every_family, laws
from scipy.optimize import minimize
from torch.distributions import (
    AffineTransform,
    Distribution,
    Exponential,
    ExpTransform,
    Independent,
    InverseGamma,
    Normal,
    Poisson,
    StudentT,
    TransformedDistribution,
    constraints,
)

from rkl.bayes import Intrinsic, bayes_act, family_of
from rkl.bayes.compare import excess_over
from rkl.divergences import KL, Jeffreys, JensenShannon, ReverseKL

ORDINARY = "normal(loc=mu, scale=sigma)"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture
def draws():
    """An ordinary posterior: 4 chains of 500 draws of a mean and a standard deviation."""
    return {"mu": 1 + normals(4, 500) / 3, "sigma": (0.4 * normals(4, 500, seed=1)).exp()}


def weighted(grid, log_density):
    """A grid and its weights as draws [1, n], for posteriors known in closed form."""
    weights = torch.exp(log_density - log_density.max())
    return grid[None], weights[None]


def test_a_normal_act_averages_precisions_or_variances(draws):
    mu, variance = draws["mu"], draws["sigma"].square()
    reverse = bayes_act(draws, ORDINARY).act
    precision = (1 / variance).mean()
    torch.testing.assert_close(reverse["sigma"].square(), 1 / precision, rtol=1e-12, atol=0)
    torch.testing.assert_close(reverse["mu"], (mu / variance).mean() / precision)
    forward = bayes_act(draws, ORDINARY, KL()).act
    total = variance.mean() + mu.var(correction=0)
    torch.testing.assert_close(forward["sigma"].square(), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(forward["mu"], mu.mean())


def test_the_act_goes_by_the_names_of_the_law_and_of_the_posterior(draws):
    act = bayes_act(draws, ORDINARY).act
    assert {*act} == {"loc", "scale", "mu", "sigma"}
    assert act["loc"] == act["mu"]
    assert act.distribution.scale == act["sigma"]
    loc, scale = act["loc"], act["scale"]
    for natural, value in zip(act.natural, (loc / scale**2, -1 / (2 * scale**2)), strict=True):
        torch.testing.assert_close(natural.value, value)
    for mean, value in zip(act.mean, (loc, loc**2 + scale**2), strict=True):
        torch.testing.assert_close(mean.value, value)
    with pytest.raises(KeyError, match="the act has no 'tau'; it has loc, scale, mu, sigma"):
        act["tau"]


SPELT = {
    "text": ORDINARY,
    "callable": lambda theta: Normal(theta.mu, theta.sigma),
    "other coordinates": lambda theta: Normal(-theta.down, (theta.log / 2).exp()),
    "independent": lambda theta: Independent(Normal(theta.mu[:, None], theta.sigma[:, None]), 1),
    "data renamed": lambda theta: TransformedDistribution(
        Normal(theta.mu, theta.sigma), [ExpTransform()]
    ),
}


@pytest.mark.parametrize("spelling", SPELT)
@pytest.mark.parametrize("divergence", [ReverseKL(), KL(), Jeffreys()], ids=repr)
def test_the_act_does_not_depend_on_how_the_family_is_spelt(draws, spelling, divergence):
    wanted = bayes_act(draws, ORDINARY, divergence)
    names = draws | {"down": -draws["mu"], "log": 2 * draws["sigma"].log()}
    found = bayes_act(names, SPELT[spelling], divergence)
    for name in ("loc", "scale"):
        value, error = found.act.parameters[name]
        torch.testing.assert_close(value.squeeze(), wanted.act[name], rtol=1e-10, atol=0)
        torch.testing.assert_close(error.squeeze(), wanted.act.error[name], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.risk.value, wanted.risk.value, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.risk.error, wanted.risk.error, rtol=1e-5, atol=0)


@every_family
@pytest.mark.parametrize("divergence", [ReverseKL(), KL()], ids=repr)
def test_the_risk_and_its_excess_are_those_of_brute_force(name, divergence):
    law = laws(name, 60)
    own = {key: getattr(law, key) for key in family_of(law).parameters}
    settings = FIXED.get(name, {})
    made = bayes_act(
        {key: x.reshape(2, 30, *x.shape[1:]) for key, x in own.items()},
        lambda theta: type(law)(**{key: theta[key] for key in own}, **settings),
        divergence,
    )
    family = family_of(law)
    drawn, other = family.natural(law), tuple(x[:1] for x in family.natural(law))
    act = tuple(mean.value[None] for mean in made.act.natural)

    def risk(t):
        pair = (t, drawn) if divergence == ReverseKL() else (drawn, t)
        return family.kl(*pair).mean()

    excess = family.kl(other, act) if divergence == ReverseKL() else family.kl(act, other)
    torch.testing.assert_close(made.risk.value, risk(act), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(risk(other) - risk(act), excess[0], rtol=1e-8, atol=1e-10)


@every_family
def test_under_both_kls_the_sum_of_risks_is_flat_at_the_act(name):
    law = laws(name, 60)
    own = {key: getattr(law, key) for key in family_of(law).parameters}
    settings = FIXED.get(name, {})
    made = bayes_act(
        {key: x.reshape(2, 30, *x.shape[1:]) for key, x in own.items()},
        lambda theta: type(law)(**{key: theta[key] for key in own}, **settings),
        Jeffreys(),
    )
    family = family_of(law)
    drawn = family.natural(law)
    act = tuple(mean.value.requires_grad_() for mean in made.act.natural)

    def risk(t):
        t = tuple(x.expand_as(y) for x, y in zip(t, drawn, strict=True))
        return (family.kl(t, drawn) + family.kl(drawn, t)).mean()

    value = risk(act)
    slope = torch.autograd.grad(value, act)
    torch.testing.assert_close(made.risk.value, value.detach(), rtol=1e-9, atol=1e-12)
    for pull, component in zip(slope, act, strict=True):
        assert (pull * (1 + component.abs())).abs().max() < 1e-8 * (1 + value)


@pytest.mark.parametrize(
    ("r", "reverse", "intrinsic"),
    [(0, 0.01384, 0.0314), (1, 0.10328, 0.1238), (3, 0.30078, 0.3137)],
)
def test_the_binomial_acts_are_the_published_ones(r, reverse, intrinsic):
    # Posterior Beta(r + 1/2, n − r + 1/2) on a grid of logits, fine enough for ten digits.
    n, u = 10, torch.linspace(-60, 25, 6001, dtype=torch.float64)
    logs = torch.nn.functional.logsigmoid
    grid, weights = weighted(u.sigmoid(), (r + 0.5) * logs(u) + (n - r + 0.5) * logs(-u))
    family = "binomial(total_count=10, probs=p)"
    act = bayes_act({"p": grid}, family, weights=weights).act["p"].item()
    exact = 1 / (1 + mpmath.exp(mpmath.psi(0, n - r + 0.5) - mpmath.psi(0, r + 0.5)))
    assert act == pytest.approx(float(exact), abs=1e-10)
    assert act == pytest.approx(reverse, abs=5e-6)
    coarse = weights[:, ::10]
    least = bayes_act({"p": grid[:, ::10]}, family, Intrinsic(), weights=coarse)
    assert least.act["p"].item() == pytest.approx(intrinsic, abs=1e-3)


def test_the_reverse_act_of_neyman_and_scott_is_that_of_wallace_and_freeman():
    # σ² given SS is inverse-gamma(N(J − 1)/2, SS/2) under the reference prior 1/σ.
    scatter, freedom = 37.0, 20
    u = torch.linspace(-3, 3, 601, dtype=torch.float64)  # log σ

    def log_posterior(theta):
        return -(freedom + 1) * theta.sigma.log() - scatter / (2 * theta.sigma.square())

    grid, weights = weighted(u.exp(), -freedom * u - scatter / 2 * (-2 * u).exp())
    estimate = bayes_act({"sigma": grid}, "normal(loc=0, scale=sigma)", weights=weights)
    assert estimate.act["sigma"].item() ** 2 == pytest.approx(scatter / freedom, rel=1e-12)
    wallace = estimate.compare(log_posterior).acts["Wallace–Freeman"]["sigma"].item()
    assert wallace**2 == pytest.approx(scatter / freedom, rel=1e-12)


def test_a_joint_law_shares_its_scale_and_a_batch_does_not():
    mu, sigma = normals(4, 250, 5) * torch.arange(1, 6), 1 + normals(4, 250, seed=1).abs()
    draws = {"mu": mu, "sigma": sigma}
    apart = bayes_act(draws, ORDINARY, KL())
    assert apart.risk.value.shape == apart.act["sigma"].shape == (5,)
    spread = sigma.square().mean() + mu.flatten(0, 1).var(0, correction=0)
    torch.testing.assert_close(apart.act["sigma"].square(), spread)
    joint = bayes_act(
        draws, lambda theta: Independent(Normal(theta.mu, theta.sigma[:, None]), 1), KL()
    )
    assert joint.risk.value.shape == joint.act["sigma"].shape == ()
    torch.testing.assert_close(joint.act["sigma"].square(), spread.mean())
    assert joint.risk.value > apart.risk.value.sum()


@pytest.mark.parametrize("divergence", [ReverseKL(), KL(), Jeffreys(), Intrinsic()], ids=repr)
def test_a_batch_has_the_acts_that_its_members_have_alone(divergence):
    mu = normals(4, 100, 3) + torch.arange(3)
    sigma = 1 + normals(4, 100, 3, seed=1).abs()
    together = bayes_act({"mu": mu, "sigma": sigma}, ORDINARY, divergence)
    for i in range(3):
        alone = bayes_act({"mu": mu[..., i], "sigma": sigma[..., i]}, ORDINARY, divergence)
        for name in ("mu", "sigma"):
            value, error = (x[i] for x in together.act.parameters[name])
            torch.testing.assert_close(value, alone.act[name], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(error, alone.act.error[name], rtol=1e-2, atol=0)
        torch.testing.assert_close(together.risk.value[i], alone.risk.value, rtol=1e-8, atol=0)


@pytest.mark.parametrize("family", ["bernoulli(probs=p)", "poisson(rate=p)"])
def test_members_that_sum_to_one_have_the_acts_that_they_have_alone(family):
    p = normals(4, 10, 3).softmax(-1)
    together = bayes_act({"p": p}, family, Intrinsic())
    alone = [bayes_act({"p": x}, family, Intrinsic()) for x in p.unbind(-1)]
    for name in ("act", "risk"):
        values = [e.act["p"] if name == "act" else e.risk.value for e in (together, *alone)]
        torch.testing.assert_close(values[0], torch.stack(values[1:]), rtol=1e-5, atol=0)


def test_the_act_of_a_correlation_matrix_is_any_covariance_under_every_loss():
    r = torch.tanh(0.5 + 0.3 * normals(4, 10))
    one = torch.ones_like(r)
    omega = torch.stack([one, r, r, one], -1).unflatten(-1, (2, 2))
    family = "multivariate-normal(loc=[0, 0], covariance_matrix=omega)"
    estimate = bayes_act({"omega": omega}, family, Intrinsic())

    def risk(t):  # of variances exp(2 t) and a correlation tanh t
        root = np.diag(np.exp(t[:2]))
        act = root @ np.array([[1, np.tanh(t[2])], [np.tanh(t[2]), 1]]) @ root
        ratio = np.linalg.solve(act, omega.flatten(0, 1).numpy())
        log_det = np.linalg.slogdet(ratio)[1]
        forward = (np.trace(ratio, axis1=1, axis2=2) - 2 - log_det) / 2
        inverse = np.trace(np.linalg.inv(ratio), axis1=1, axis2=2)
        return np.minimum(forward, (inverse - 2 + log_det) / 2).mean()

    least = min(
        minimize(risk, start, method="Nelder-Mead", options={"xatol": 1e-8}).fun
        for start in ([0, 0, 0.5], [-0.1, -0.1, 0.5])
    )
    assert estimate.risk.value.item() == pytest.approx(least, rel=1e-4)


def test_what_is_fixed_stays_fixed(draws):
    for divergence in (ReverseKL(), KL(), Jeffreys()):
        estimate = bayes_act(draws, "normal(loc=mu, scale=2)", divergence)
        assert estimate.act["scale"] == 2
        torch.testing.assert_close(estimate.act["mu"], draws["mu"].mean())
        kinds = 2 if divergence == Jeffreys() else 1
        gap = kinds * draws["mu"].var(correction=0) / 8
        torch.testing.assert_close(estimate.risk.value, gap)


def test_weights_stand_for_repeated_draws(draws):
    few = {name: x[:1, :100] for name, x in draws.items()}
    weights = torch.randint(0, 4, (1, 100), generator=generator(3)).double()
    again = {name: x[0].repeat_interleave(weights[0].long())[None] for name, x in few.items()}
    for divergence in (ReverseKL(), KL(), Intrinsic()):
        by_weight = bayes_act(few, ORDINARY, divergence, weights=weights)
        by_draw = bayes_act(again, ORDINARY, divergence)
        for name in ("mu", "sigma"):
            torch.testing.assert_close(by_weight.act[name], by_draw.act[name], rtol=1e-6, atol=0)
        torch.testing.assert_close(by_weight.risk.value, by_draw.risk.value)


def by_function(theta):
    return Normal(theta.mu, theta.sigma)


@pytest.mark.parametrize("family", [ORDINARY, by_function])
def test_an_estimate_can_be_pickled_and_copied(draws, family):
    estimate = bayes_act(draws, family)
    inside = estimate.region().inside  # which fills what is computed once
    for again in (pickle.loads(pickle.dumps(estimate)), copy.deepcopy(estimate)):
        assert str(again) == str(estimate)
        assert torch.equal(again.region().inside, inside)


def test_the_unit_of_a_covariate_does_not_move_the_act_of_a_smaller_family():
    """Independent Poisson counts of three rows are a larger family than two coefficients."""
    beta = (
        torch.tensor([2.0, 1.0]).double() + normals(2, 60, 2) * torch.tensor([0.5, 0.3]).double()
    )
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 3.0]]).double()
    acts = []
    for unit in (torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0, 1e8]).double()):
        design = rows * unit

        def law(theta, design=design):
            return Independent(Poisson((theta.beta @ design.T).exp()), 1)

        acts.append(bayes_act({"beta": beta / unit}, law, KL()).act["beta"] * unit)
    # coordinates have one centre, about 1, whose rounding is 2e-16 / 1e-8 of the small coefficient
    torch.testing.assert_close(acts[1], acts[0], rtol=1e-6, atol=0)


def test_a_large_location_costs_no_digits(draws):
    far = {"mu": draws["mu"] + 1e8, "sigma": draws["sigma"]}
    for divergence in (ReverseKL(), KL(), Jeffreys()):
        near, moved = (bayes_act(x, ORDINARY, divergence) for x in (draws, far))
        torch.testing.assert_close(moved.act["sigma"], near.act["sigma"], rtol=1e-7, atol=0)
        torch.testing.assert_close(moved.risk.value, near.risk.value, rtol=1e-7, atol=0)
        torch.testing.assert_close(moved.risk.error, near.risk.error, rtol=1e-3, atol=0)


def test_the_act_under_both_kls_has_the_least_sum_of_risks(draws):
    act = bayes_act(draws, ORDINARY, Jeffreys()).act
    leaf = torch.stack([act["mu"], act["sigma"]]).requires_grad_()
    law = Normal(draws["mu"], draws["sigma"])
    risk = Jeffreys().between(law, Normal(leaf[0], leaf[1])).mean()
    slope = torch.autograd.grad(risk, leaf)[0]
    assert slope.abs().max() < 1e-12
    uneven = bayes_act(draws, ORDINARY, 0.2 * KL() + 0.8 * ReverseKL()).act["sigma"]
    ends = [bayes_act(draws, ORDINARY, d).act["sigma"] for d in (ReverseKL(), KL())]
    assert ends[0] < uneven < act["sigma"] < ends[1]


# Errors


def chain(seed, chains=4, length=1000, correlation=0.8):
    """A stationary autoregressive chain of standard normal draws."""
    noise = normals(chains, length, seed=seed) * math.sqrt(1 - correlation**2)
    x = torch.empty_like(noise)
    x[:, 0] = noise[:, 0] / math.sqrt(1 - correlation**2)
    for i in range(1, length):
        x[:, i] = correlation * x[:, i - 1] + noise[:, i]
    return x


def test_errors_know_that_draws_depend_on_each_other():
    z = chain(0, length=4000, correlation=0.9)
    tangled = bayes_act({"sigma": (0.3 * z).exp()}, "normal(loc=0, scale=sigma)")
    shuffled = z.flatten()[torch.randperm(z.numel(), generator=generator())].reshape(z.shape)
    free = bayes_act({"sigma": (0.3 * shuffled).exp()}, "normal(loc=0, scale=sigma)")
    torch.testing.assert_close(tangled.act["sigma"], free.act["sigma"])
    ratio = (tangled.act.error["sigma"] / free.act.error["sigma"]).item()
    # √τ is √19 = 4.4 for the chain itself; errors of errors are about 10 % each
    assert 3 < ratio < 5.5
    assert tangled.diagnostics.ess < free.diagnostics.ess / 8


@pytest.mark.statistical
@pytest.mark.parametrize("divergence", [ReverseKL(), KL(), Jeffreys(), Intrinsic()], ids=repr)
def test_errors_are_as_large_as_repetitions_scatter(divergence):
    found = []
    for seed in range(80):
        draws = {"mu": 0.5 * chain(2 * seed), "sigma": (0.2 * chain(2 * seed + 1)).exp()}
        estimate = bayes_act(draws, ORDINARY, divergence)
        numbers = [*estimate.act.parameters.values(), estimate.risk]
        found.append(torch.stack([torch.stack(mean) for mean in numbers]))
    values, errors = torch.stack(found).unbind(-1)
    assert errors.isfinite().double().mean() > 0.8  # a few tails seem too heavy for an error
    ratio = values.std(0) / errors.nanmean(0)
    # 80 repetitions tell a standard deviation to 8 %, and batch means are 10 % off at most
    assert ((ratio > 0.75) & (ratio < 1.3)).all(), ratio


# Existence


@pytest.mark.parametrize("shape", [0.9, 1.5, 3.0])
def test_only_what_has_a_mean_has_an_act(shape):
    torch.manual_seed(0)
    law = InverseGamma(torch.tensor(shape).double(), torch.tensor(1.0).double())
    variance = law.sample(torch.Size([4, 25_000]))
    draws, family = {"sigma": variance.sqrt()}, "normal(loc=0, scale=sigma)"
    reverse = bayes_act(draws, family)
    assert reverse.act.error["sigma"].isfinite()
    assert reverse.risk.error.isfinite()
    if shape < 1:
        with pytest.raises(ValueError, match=r"does not exist: it averages E x².*Pareto-k 1\."):
            bayes_act(draws, family, KL())
        return
    forward = bayes_act(draws, family, KL())
    told = [text for text in forward.diagnostics.warnings if "no error of normal theory" in text]
    assert forward.act.error["sigma"].isnan() == (shape < 2)
    assert bool(told) == (shape < 2)
    assert forward.act["sigma"].isfinite()


def test_among_many_acts_none_is_denied_by_chance_and_one_is_by_its_tail():
    # The second moment of exp(z) has a mean, though some 600 draws now and then deny it.
    sigma = normals(4, 150, 2000).exp()
    family = "normal(loc=0, scale=sigma)"
    estimate = bayes_act({"sigma": sigma}, family, KL())
    assert estimate.diagnostics.pareto_k["E x²"].max() > 1
    wanted = sigma.square().mean((0, 1)).sqrt()
    torch.testing.assert_close(estimate.act["sigma"], wanted)
    assert 0 < estimate.act.error["sigma"].isnan().double().mean() < 1
    sigma[..., 7] = (1 / torch.linspace(1e-4, 1, 600, dtype=torch.float64)[None]).reshape(4, 150)
    with pytest.raises(ValueError, match="does not exist: it averages E x²"):
        bayes_act({"sigma": sigma**2}, family, KL())


MOVING = {
    "uniform(low=0, high=theta)": "Uniform",
    "pareto(scale=theta, alpha=3)": "Pareto",
    "binomial(total_count=count, probs=0.5)": "Binomial",
}


@pytest.mark.parametrize("family", MOVING)
@pytest.mark.parametrize("divergence", [ReverseKL(), KL(), Jeffreys()], ids=repr)
def test_a_support_that_moves_is_refused_with_the_reason_and_the_way_out(family, divergence):
    theta = 1 + torch.rand(4, 100, generator=generator(), dtype=torch.float64)
    draws = {"theta": theta, "count": (10 * theta).round()}
    with pytest.raises(ValueError, match="moves.*edge of the posterior's support.*Intrinsic"):
        bayes_act(draws, family, divergence)


def test_the_intrinsic_act_of_a_uniform_law_is_the_published_one():
    # Posterior of θ given the largest of n under the prior 1/θ: Pareto(max x, n).
    n, largest, size = 5, 2.0, 20_000
    rank = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    theta = largest * (1 - rank) ** (-1 / n)
    theta = theta[torch.randperm(size, generator=generator())].reshape(4, -1)
    estimate = bayes_act({"theta": theta}, "uniform(low=0, high=theta)", Intrinsic())
    assert estimate.act["theta"].item() == pytest.approx(2 ** (1 / n) * largest, rel=1e-3)


# What is asked of one experiment is not asked of another


def schools():
    """Draws as of eight schools: effects of old groups about a mean, with a spread."""
    mu, tau = 5 + normals(4, 500), (1 + 0.5 * normals(4, 500, seed=1)).exp()
    theta = mu[..., None] + tau[..., None] * normals(4, 500, 8, seed=2) / 2
    return {"mu": mu, "tau": tau, "theta": theta}


def test_new_groups_and_old_groups_have_different_acts():
    noise = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
    old = bayes_act(
        schools(), lambda theta, noise: Independent(Normal(theta.theta, noise), 1), design=noise
    )
    new = bayes_act(
        schools(),
        lambda theta, noise: Normal(theta.mu, (theta.tau.square() + noise**2).sqrt()),
        design=12.0,
    )
    torch.testing.assert_close(old.act["theta"], schools()["theta"].mean((0, 1)))
    assert {*new.act} >= {"mu", "tau"}
    variance = schools()["tau"].square() + 144
    torch.testing.assert_close(new.act["scale"].square(), 1 / (1 / variance).mean())
    torch.testing.assert_close(new.act["tau"].square(), 1 / (1 / variance).mean() - 144)
    assert "design: 12.0" in str(new)
    assert old.to_dict()["design"] == noise.tolist()


def test_switching_labels_are_noticed_and_close_components_are_not():
    first, second = -2 + normals(4, 500) / 5, 2 + normals(4, 500, seed=1) / 5
    swap = torch.rand(4, 500, generator=generator(2)) < 0.3
    mu = torch.stack([torch.where(swap, second, first), torch.where(swap, first, second)], -1)
    switched = bayes_act({"mu": mu, "sigma": 0 * mu + 1}, ORDINARY).diagnostics.warnings
    assert any("components 0 and 1 of mu change places" in text for text in switched)
    for calm in (torch.stack([first, second], -1), normals(4, 500, 8)):
        told = bayes_act({"mu": calm, "sigma": 0 * calm + 1}, ORDINARY).diagnostics.warnings
        assert not any("change places" in text for text in told)


# How it prints


def test_an_estimate_prints_errors_in_units_of_the_last_digit(draws):
    estimate = bayes_act(draws, ORDINARY)
    text = str(estimate)
    value, error = estimate.act["sigma"].item(), estimate.act.error["sigma"].item()
    assert 0.001 < error < 0.1
    lines = {line.split()[0]: line.split()[-1] for line in text.splitlines()[3:5]}
    shown, _, last = lines["sigma"].rstrip(")").partition("(")
    digits = len(shown.partition(".")[2])
    assert float(shown) == pytest.approx(value, abs=0.5 * 10**-digits)
    assert float(last) * 10**-digits == pytest.approx(error, rel=0.3)
    assert "effective draws of 2,000" in text
    assert "<table>" in estimate._repr_html_()


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon()], ids=repr)
def test_an_estimate_is_json_and_a_data_frame(draws, divergence):
    few = {name: x[:, :100] for name, x in draws.items()}
    estimate = bayes_act(few, ORDINARY, divergence)
    again = json.loads(json.dumps(estimate.to_dict()))
    assert again["act"]["sigma"]["value"] == estimate.act["sigma"].item()
    assert again["family"] == ORDINARY
    assert again["divergence"] == repr(divergence)
    frame = estimate.to_dataframe()
    assert set(frame["parameter"]) >= {"mu", "sigma", "risk (nats)"}


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d | {"sigma": -d["sigma"]}, "sigma must satisfy GreaterThan.*got -"),
        (lambda d: d | {"sigma": 0 * d["sigma"]}, r"sigma must satisfy GreaterThan.*got 0"),
        (
            lambda d: d | {"sigma": d["sigma"].clone().index_fill_(1, torch.tensor(7), -1.0)},
            "scale",
        ),
        (lambda d: d | {"mu": d["mu"] / 0}, "mu must be finite"),
        (lambda d: d | {"mu": d["mu"][:, :9]}, "has 4 chains of 500 draws but mu has 4 of 9"),
        (lambda d: {k: x[:1, :3] for k, x in d.items()}, "at least 4 effective draws"),
        (lambda d: {k: x[:1].sort(1).values for k, x in d.items()}, "at least 4 effective draws"),
        (lambda d: {"mu": d["mu"]}, "sigma"),
    ],
)
def test_draws_that_cannot_be_used_are_refused_in_a_line(draws, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        bayes_act(change(draws), ORDINARY)
    assert "\n" not in str(caught.value)


def test_draws_on_the_boundary_are_refused():
    p = torch.rand(2, 100, generator=generator(), dtype=torch.float64)
    p[1, 3] = 1.0
    with pytest.raises(ValueError, match="logit is inf in 1 of 100"):
        bayes_act({"p": p}, "bernoulli(probs=p)")


def test_what_is_no_divergence_is_refused(draws):
    with pytest.raises(TypeError, match="divergence must be one, such as"):
        bayes_act(draws, ORDINARY, "reverse-kl")


def test_a_law_without_a_closed_form_is_served_all_the_same(draws):
    few = {name: x[:, :100] for name, x in draws.items()}
    estimate = bayes_act(few, "student-t(df=4, loc=mu, scale=sigma)")
    assert estimate.diagnostics.method.startswith("minimised over")
    assert estimate.act["scale"] == estimate.act["sigma"]
    assert isinstance(estimate.act.distribution, StudentT)
    leaf = torch.stack([estimate.act["mu"], estimate.act["sigma"]]).requires_grad_()
    x = torch.linspace(-60, 60, 40_001, dtype=torch.float64)[:, None]
    q = StudentT(4.0, leaf[0], leaf[1]).log_prob(x)
    p = StudentT(4.0, few["mu"].flatten(), few["sigma"].flatten()).log_prob(x).mean(1)
    slope = torch.autograd.grad(torch.trapezoid(q.exp()[:, 0] * (q[:, 0] - p), x[:, 0]), leaf)[0]
    assert slope.abs().max() < 1e-5  # what lies beyond ±60 is missed


def test_an_act_of_exponential_laws_is_the_same_before_and_after_a_bijection():
    rate = 1 + normals(4, 200).abs()
    plain = bayes_act({"alpha": rate}, lambda theta: Exponential(theta.alpha))
    pareto = bayes_act({"alpha": rate}, "pareto(scale=1, alpha=alpha)")
    assert plain.act["alpha"] == pareto.act["alpha"]
    x = torch.tensor(2.5, dtype=torch.float64)
    wanted = torch.distributions.Pareto(torch.ones(()).double(), pareto.act["alpha"]).log_prob(x)
    torch.testing.assert_close(pareto.act.distribution.log_prob(x), wanted)


def atoms(generator):
    """Posteriors whose draws lie on atoms or in clusters; all their moments are finite."""
    z = torch.randn(3, 4, 500, generator=generator, dtype=torch.float64)
    u = torch.rand(4, 500, generator=generator)
    narrow = (2 + 0.1 * z[0]).abs()
    return {
        "rounded": {"mu": (10 + 0.6 * z[1]).round(), "sigma": narrow},
        "two modes": {"mu": torch.where(u < 0.05, 14.0, 10.0) + 0.1 * z[1], "sigma": narrow},
        "spike and slab": {
            "mu": torch.where(u < 0.02, 1 + 0.2 * z[1], 0.0),
            "sigma": (0.2 * z[0]).exp(),
        },
        "an indicator": {"mu": (u < 0.3).double(), "sigma": (0.2 * z[0]).exp()},
    }


@pytest.mark.parametrize("kind", atoms(generator()))
@pytest.mark.parametrize("seed", range(3))
def test_draws_on_atoms_and_in_clusters_have_an_act_and_a_risk(kind, seed):
    draws = atoms(generator(seed))[kind]
    estimate = bayes_act(draws, ORDINARY)
    mu, precision = draws["mu"], draws["sigma"].pow(-2)
    scale = precision.mean().rsqrt()
    act = Normal((mu * precision).mean() / precision.mean(), scale)
    losses = torch.distributions.kl_divergence(act, Normal(mu, draws["sigma"]))
    torch.testing.assert_close(estimate.risk.value, losses.mean())
    torch.testing.assert_close(estimate.act["sigma"], scale)


def rare(value, other, *places, size=(2, 200)):
    """A number that differs in a few draws, none of them among those that are looked at first."""
    draws = torch.full(size, value, dtype=torch.float64)
    for place in places:
        draws[place] = other
    return draws


def from_file(draws, path):
    axes = {2: ("chain", "draw"), 3: ("chain", "draw", "k")}
    dataset = xr.Dataset({k: (axes[x.ndim], x.numpy()) for k, x in draws.items()})
    dataset.to_netcdf(path, engine="h5netcdf")
    return path


RARE = {
    "the centre of a Laplace": (
        {"m": rare(0.0, 3.0, (0, 33), (1, 190)), "s": (0.1 * normals(2, 200)).exp()},
        lambda t: torch.distributions.Laplace(t.m, t.s),
        torch.arange(-25, 25, 0.005).double()[:, None],
    ),
    "the shape of a negative binomial": (
        {"m": rare(10.0, 40.0, (1, 111)), "s": (0.1 * normals(2, 200)).exp() / 3},
        lambda t: torch.distributions.NegativeBinomial(t.m, t.s),
        torch.arange(100).double()[:, None],
    ),
    "a factor of a log-normal": (
        {"m": rare(1.0, 3.0, (0, 20)), "s": 1 + 0.2 * normals(2, 200)},
        lambda t: TransformedDistribution(
            torch.distributions.LogNormal(t.s, 0.5), [AffineTransform(0.0, t.m)]
        ),
        torch.arange(0.01, 100, 0.01).double()[:, None],
    ),
}


@pytest.mark.parametrize("case", RARE)
def test_what_moves_in_few_draws_has_the_act_of_least_risk_from_memory_and_from_a_file(
    tmp_path, case
):
    draws, family, x = RARE[case]
    found = bayes_act(draws, family)
    again = bayes_act(from_file(draws, tmp_path / "draws.nc"), family)
    for name in draws:
        assert torch.equal(found.act[name], again.act[name])
    assert torch.equal(found.risk.value, again.risk.value)

    def family_of_draws(m, s):
        return family(SimpleNamespace(m=m, s=s))

    log_p = family_of_draws(draws["m"].flatten(), draws["s"].flatten()).log_prob(x).mean(-1)

    def risk(m, s):
        """E KL(act ‖ draw) by a sum over a grid, which misses 1e-3 of it at a kink."""
        log_q = family_of_draws(m[None], s[None]).log_prob(x)[:, 0]
        return (log_q.exp() * (log_q - log_p)).sum() * (x[1] - x[0]).item()

    here = found.act["m"], found.act["s"]
    torch.testing.assert_close(found.risk.value, risk(*here), rtol=1e-3, atol=0)
    for m, s in ((1.05, 1.0), (0.95, 1.0), (1.0, 1.05), (1.0, 0.95)):
        assert risk(m * here[0], s * here[1]) > found.risk.value * (1 - 1e-3)


def test_a_support_that_moves_in_few_draws_is_refused_of_a_file_too(tmp_path):
    draws = {"n": rare(20.0, 40.0, (1, 77)), "p": torch.full((2, 200), 0.3).double()}
    for source in (draws, from_file(draws, tmp_path / "draws.nc")):
        with pytest.raises(ValueError, match="support of Binomial moves"):
            bayes_act(source, "binomial(total_count=n, probs=p)")


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon()])
def test_what_moves_in_an_element_that_was_not_looked_at_counts(monkeypatch, divergence):
    m = torch.stack([rare(0.0, 3.0, size=(2, 40)), rare(0.0, 3.0, (1, 19), size=(2, 40))], -1)
    draws = {"m": m, "s": (0.1 * normals(2, 40, 2)).exp()}
    wanted = bayes_act(draws, "laplace(loc=m, scale=s)", divergence)
    assert wanted.act["m"][1] > 0
    monkeypatch.setattr("rkl.bayes.draws.ELEMENTS", (1, 1))
    found = bayes_act(draws, "laplace(loc=m, scale=s)", divergence)
    torch.testing.assert_close(found.act["m"], wanted.act["m"])
    torch.testing.assert_close(found.risk.value, wanted.risk.value)
    found.compare(losses=[KL()])


@pytest.mark.parametrize("size", [0.08, 0.25])
def test_beta_distributions_with_mass_next_to_both_ends_have_their_jensen_shannon_act(size):
    a, b = size * (0.2 * normals(2, 50)).exp(), 1.2 * size * (0.2 * normals(2, 50, seed=1)).exp()
    found = bayes_act({"a": a, "b": b}, "beta(alpha=a, beta=b)", JensenShannon())
    u = torch.sinh(torch.linspace(-9.0, 9.0, 20_001).double())[:, None]  # of logits
    weight = u.square().add(1).sqrt() * 9e-4

    def log_p(a, b):
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        logsigmoid = torch.nn.functional.logsigmoid
        return a * logsigmoid(u) + b * logsigmoid(-u) - log_beta

    p = log_p(a.flatten(), b.flatten())

    def risk(a, b):
        q = log_p(a, b)
        middle = torch.logaddexp(p, q) - math.log(2)
        terms = p.exp() * (p - middle) + q.exp() * (q - middle)
        return (weight * terms).sum(0).mean() / 2

    here = found.act["a"], found.act["b"]
    torch.testing.assert_close(found.risk.value, risk(*here), rtol=1e-6, atol=0)
    for x, y in ((1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)):
        assert risk(x * here[0], y * here[1]) > risk(*here)


@pytest.mark.parametrize("divergence", [JensenShannon(), ReverseKL()])
def test_distributions_that_are_narrow_for_their_spread_have_an_act(divergence):
    m, s = 60 * normals(2, 50), (0.1 * normals(2, 50, seed=1)).exp()
    found = bayes_act({"m": m, "s": s}, "student-t(df=4, loc=m, scale=s)", divergence)
    u = torch.linspace(-12.0, 12.0, 40_001).double()[:, None]
    x = 30 * torch.sinh(u)
    p = StudentT(4.0, m.flatten(), s.flatten()).log_prob(x)

    def risk(m, s):
        q = StudentT(4.0, m, s).log_prob(x)
        middle = torch.logaddexp(p, q) - math.log(2)
        terms = q.exp() * (q - p)
        if divergence == JensenShannon():
            terms = (p.exp() * (p - middle) + q.exp() * (q - middle)) / 2
        return (30 * torch.cosh(u) * 6e-4 * terms).sum(0).mean()

    here = found.act["m"], found.act["s"]
    # the sum is exact but for 1e-8; nodes are placed to 1e-3 of the mass
    torch.testing.assert_close(found.risk.value, risk(*here), rtol=1e-4, atol=0)
    for shift, factor in ((2.0, 1.0), (-2.0, 1.0), (0.0, 1.05), (0.0, 0.95)):
        assert risk(here[0] + shift, here[1] * factor) > risk(*here)


def test_distributions_too_far_apart_for_a_sample_of_nodes_are_refused():
    draws = {"m": 300 * normals(2, 50, 2), "s": (0.1 * normals(2, 50, 2, seed=1)).exp()}
    with pytest.raises(ValueError, match=r"too far apart for a sample of 4,096 nodes"):
        bayes_act(draws, lambda t: Unnamed(Independent(Normal(t.m, t.s), 1)))


class Unnamed(Distribution):
    """A distribution of vectors that rkl has no closed form for."""

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, law):
        self.law = law
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    def log_prob(self, value):
        return self.law.log_prob(value)

    def sample(self, sample_shape=()):
        return self.law.sample(sample_shape)


def test_the_error_of_a_risk_contains_the_sampling_of_its_nodes():
    draws = {"m": 0.3 * normals(2, 100, 3), "s": (0.2 * normals(2, 100, 3, seed=1)).exp()}

    def family(t):
        return Independent(Normal(t.m, t.s), 1)

    exact = bayes_act(draws, family)
    ratios = []
    for seed in range(6):
        found = bayes_act(draws, lambda t: Unnamed(family(t)), seed=seed)
        sampled = found.risk.error.square() - exact.risk.error.square()
        assert sampled > 0
        ratios.append((found.risk.value - exact.risk.value) / sampled.sqrt())
        other = {name: 1.05 * x for name, x in found.act.point.items()}
        value, error = excess_over(found)(other)
        loss, law = found.problem.loss, found.problem.loss.laws.of
        laws = [law({k: x[None] for k, x in at.items()}) for at in (other, found.act.point)]
        assert 0 < found.problem.sampling_error(loss, *laws) < error
        assert (value - excess_over(exact)(other)[0]).abs() < 5 * error
    # chi-square of 6: between 0.2 and 2.2 of its square root but once in 10,000
    assert 0.2 < torch.stack(ratios).square().mean().sqrt() < 2.2


@pytest.mark.parametrize("digits", [3, 6])
@pytest.mark.parametrize("classes", [3, 10])
def test_a_simplex_written_with_few_digits_is_renormalised_and_said(classes, digits):
    exact = torch.distributions.Dirichlet(torch.arange(2.0, 2.0 + classes).double())
    torch.manual_seed(0)
    exact = exact.sample(torch.Size([4, 200]))
    rounded = exact.round(decimals=digits).clamp_min(10.0**-digits)
    wanted = bayes_act({"p": rounded / rounded.sum(-1, keepdim=True)}, "categorical(probs=p)")
    for family in ("categorical(probs=p)", lambda t: torch.distributions.Categorical(t.p)):
        found = bayes_act({"p": rounded}, family)
        torch.testing.assert_close(found.act["p"], wanted.act["p"])
        assert any("p was divided by its sums" in text for text in found.diagnostics.warnings)
    single = bayes_act({"p": exact.float()}, "categorical(probs=p)")
    assert not any("divided" in text for text in single.diagnostics.warnings)


@pytest.mark.parametrize("vector", ["many small rates", "rates that sum to nearly 1"])
def test_rates_are_not_divided_by_their_sums(vector):
    near = torch.distributions.Dirichlet(torch.tensor([5.0, 6.0, 7.0]).double())
    torch.manual_seed(0)
    rates = {
        "many small rates": (0.2 * normals(4, 50, 500)).exp() / 400,
        "rates that sum to nearly 1": near.sample(torch.Size([4, 50])).round(decimals=3),
    }[vector]
    for family in ("poisson(rate=lam)", lambda t: torch.distributions.Poisson(t.lam)):
        found = bayes_act({"lam": rates}, family)
        torch.testing.assert_close(found.act["lam"], rates.log().mean((0, 1)).exp())
        assert not any("divided" in text for text in found.diagnostics.warnings)


@pytest.mark.parametrize("dask", [False, True])
def test_a_rounded_simplex_of_a_file_is_divided_as_it_is_read(tmp_path, dask):
    p = np.random.default_rng(0).dirichlet([3.0, 4.0, 5.0], size=(2, 100)).round(3)
    axes = "chain", "draw"
    written = xr.Dataset({"p": ((*axes, "k"), p.astype(np.float32)), "mu": (axes, p[..., 0])})
    written.to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    lazy = xr.open_dataset(tmp_path / "draws.nc", engine="h5netcdf")
    if dask:
        pytest.importorskip("dask")
        lazy = lazy.chunk(draw=30)
    bayes_act(lazy, "normal(loc=mu, scale=1)")
    found = bayes_act(lazy, "categorical(probs=p)")
    assert not lazy["p"].variable._in_memory
    log_p = np.log(p / p.sum(-1, keepdims=True)).mean((0, 1))
    wanted = torch.from_numpy(np.exp(log_p) / np.exp(log_p).sum())
    # 3 digits in single precision: 6e-8 of each number
    torch.testing.assert_close(found.act["p"], wanted, rtol=1e-6, atol=0)


def test_what_is_no_simplex_is_not_divided():
    draws = {"p": torch.tensor([0.5, 0.52]).repeat(4, 100, 1)}
    with pytest.raises(ValueError, match="p must satisfy Simplex"):
        bayes_act(draws, "categorical(probs=p)")


@pytest.mark.parametrize("components", [2, 3, 5, 8])
@pytest.mark.parametrize("column", [0, 1])
def test_label_switching_is_noticed_among_any_number_of_components(components, column):
    m = 4.0 * torch.arange(components) ** 1.3 + normals(4, 250, components) / 4
    order = torch.rand(m.shape, generator=generator()).argsort(-1)
    other = normals(4, 250, components, seed=1)
    family = lambda t: Independent(Normal(t.m, 1.0), 1)  # noqa: E731
    for switched, x in ((False, m), (True, m.gather(-1, order)), (False, other)):
        pair = [other, other]
        pair[column] = x
        estimate = bayes_act({"m": torch.stack(pair, -1)}, family)
        assert switched == any("change places" in text for text in estimate.diagnostics.warnings)
