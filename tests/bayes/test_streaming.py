import functools
import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import (
    Bernoulli,
    Binomial,
    Dirichlet,
    Gamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    kl_divergence,
)

from rkl.bayes.draws import Draws, read_draws
from rkl.bayes.loss.between import Weights
from rkl.bayes.solve import streaming
from rkl.bayes.solve.closed import minimum_risk
from rkl.bayes.solve.errors import averages_of
from rkl.bayes.solve.streaming import one_pass
from rkl.stats import BatchMeans


def chains(*shape, seed=0, rho=0.5):
    """Stationary AR(1) chains [chains, draws, ...] of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for t in range(1, shape[1]):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * x[:, t]
    return x


def normal(theta):
    return Normal(theta["mu"], theta["sigma"], validate_args=False)


def unchecked_gamma(theta):
    return Gamma(theta["mu"], theta["sigma"], validate_args=False)


def log_normal(theta):
    return LogNormal(theta["mu"], theta["sigma"], validate_args=False)


def posterior(*batch, draws=400, seed=0):
    mu, log_sigma = chains(3, draws, 2, *batch, seed=seed).unbind(2)
    return Draws({"mu": 3 + mu, "sigma": (0.3 * log_sigma).exp()})


def natural_of(moments, direction):
    """Natural parameter of the act: the mean of η, or that of the mean parameter."""
    here = averages_of(moments, (direction,)).here
    return here.natural if direction == "reverse" else moments.family.from_mean(here.mean)


def act_of(moments, direction):
    return moments.family.from_natural(natural_of(moments, direction))


def with_error(moments, direction, function):
    """A function of averages and a point in them, with the error that the act's numbers have."""
    known = averages_of(moments, (direction,))
    return known.with_errors(lambda at: {"": function(known, at)}, separate=True)[""]


def risk_of(moments, direction):
    weights = Weights(float(direction == "reverse"), float(direction == "forward"))
    return with_error(moments, direction, lambda known, at: minimum_risk(known, at, weights))


def scale_of(known, at):
    natural = at.natural or known.family.from_mean(at.mean)
    return known.family.from_natural(natural).scale


def positive_definite(n):
    """Covariances [3, 200, n, n] that differ from draw to draw."""
    half = 0.3 * chains(3, 200, n, n, seed=3) + torch.eye(n, dtype=torch.float64)
    return half @ half.mT


LAWS = {
    "Normal": (posterior(), normal),
    "Normal, batched": (posterior(2, 3), normal),
    "Normal, sharing its scale": (
        Draws({"mu": chains(3, 200, 4), "sigma": chains(3, 200, seed=1).exp()}),
        lambda theta: Normal(theta["mu"], theta["sigma"][:, None]),
    ),
    "LogNormal": (posterior(2), log_normal),
    "Gamma": (
        Draws({"a": chains(3, 200, 2).exp(), "b": chains(3, 200, 2, seed=1).exp()}),
        lambda theta: Gamma(theta["a"], theta["b"]),
    ),
    "Bernoulli": (
        Draws({"p": chains(3, 200, 4).sigmoid()}),
        lambda theta: Bernoulli(theta["p"]),
    ),
    "Poisson": (Draws({"rate": chains(3, 200).exp()}), lambda theta: Poisson(theta["rate"])),
    "Dirichlet": (
        Draws({"c": chains(3, 200, 2, 4).exp()}),
        lambda theta: Dirichlet(theta["c"]),
    ),
    "MultivariateNormal": (
        Draws({"mu": chains(3, 200, 2), "cov": positive_definite(2)}),
        lambda theta: MultivariateNormal(theta["mu"], theta["cov"]),
    ),
}


def everything(draws, law):
    """The laws of all draws, [chains * draws, *batch]."""
    return law({name: draws[name].flatten(0, 1) for name in draws.names})


def mean_divergence(act, laws, reverse):
    act = act.expand(laws.batch_shape)  # torch's own formulas do not all broadcast
    pair = (act, laws) if reverse else (laws, act)
    return kl_divergence(*pair).mean(0)


@pytest.mark.parametrize("case", LAWS)
def test_the_risk_is_the_mean_divergence_of_the_act_and_the_least_there_is(case):
    draws, law = LAWS[case]
    laws, moments = everything(draws, law), one_pass(draws, law, draws.names)
    generator = torch.Generator().manual_seed(1)
    for direction in ("reverse", "forward"):
        natural = natural_of(moments, direction)
        act = moments.family.from_natural(natural)
        risk = mean_divergence(act, laws, direction == "reverse")
        torch.testing.assert_close(risk_of(moments, direction).value, risk, rtol=1e-9, atol=1e-12)
        for _ in range(5):
            noise = (1e-3 * torch.randn(x.shape, generator=generator) for x in natural)
            moved = tuple(x * (1 + e) for x, e in zip(natural, noise, strict=True))
            if natural[-1].ndim > 1 and case == "MultivariateNormal":
                moved = (moved[0], (moved[1] + moved[1].mT) / 2)
            other = moments.family.from_natural(moved)
            assert (mean_divergence(other, laws, direction == "reverse") >= risk - 1e-12).all()


def test_the_acts_of_a_normal_law_are_its_closed_forms():
    draws = posterior(5)
    mu, sigma = (draws[name].flatten(0, 1) for name in ("mu", "sigma"))
    moments = one_pass(draws, normal, ["mu", "sigma"])
    reverse, forward = (act_of(moments, each) for each in ("reverse", "forward"))
    precision = sigma.pow(-2)
    torch.testing.assert_close(reverse.scale, precision.mean(0).rsqrt())
    torch.testing.assert_close(reverse.loc, (mu * precision).mean(0) / precision.mean(0))
    torch.testing.assert_close(forward.loc, mu.mean(0))
    torch.testing.assert_close(
        forward.scale.square(), sigma.square().mean(0) + mu.var(0, correction=0)
    )


def same(a, b):
    for direction in ("reverse", "forward"):
        laws = [act_of(moments, direction) for moments in (a, b)]
        for name in a.family.parameters:
            x, y = (getattr(law, name) for law in laws)
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(
            risk_of(a, direction), risk_of(b, direction), rtol=1e-8, atol=1e-13
        )
    return True


@pytest.mark.parametrize("batch", [(), (3,), (80,)])
@pytest.mark.parametrize("draws", [5, 64, 97, 1_000])
def test_how_draws_are_cut_into_blocks_changes_nothing(batch, draws, monkeypatch):
    held = posterior(*batch, draws=draws)
    whole = one_pass(held, normal, held.names)
    laws = everything(held, normal)
    act = act_of(whole, "reverse")
    torch.testing.assert_close(risk_of(whole, "reverse").value, mean_divergence(act, laws, True))
    monkeypatch.setattr("rkl.bayes.draws.NUMBERS", 700)
    monkeypatch.setattr(streaming, "CACHED", 900)
    cut = one_pass(held, normal, held.names)
    for direction in ("reverse", "forward"):
        torch.testing.assert_close(risk_of(cut, direction).value, risk_of(whole, direction).value)
    # and other batches have other errors, of the same quantity
    few = risk_of(whole, "reverse").error / risk_of(cut, "reverse").error
    assert draws < 1_000 or ((few > 0.6) & (few < 1.7)).all()


def test_one_logarithm_for_eight_draws_is_as_good_as_eight():
    for law in (normal, log_normal):
        draws = posterior(70, draws=320)
        plan = streaming.Plan(law, *plan_of(draws, law), unit=16, rest=0, rows=64, compiled=False)
        for chunk in ({"mu": draws["mu"][0], "sigma": draws["sigma"][0]},):
            fast = streaming.sums_of(plan, 0, chunk)
            plain = streaming.sums_of(plan._replace(kernels=False), 0, chunk)
            for a, b in zip(fast, plain, strict=True):
                for direction in ("reverse", "forward"):
                    torch.testing.assert_close(
                        a.values[direction], b.values[direction], rtol=1e-12, atol=1e-13
                    )


def plan_of(draws, law):
    moments = one_pass(draws, law, draws.names)
    return moments.family, moments.reference, torch.Size([70]), ("reverse", "forward")


def test_products_that_overflow_are_averaged_again_without():
    draws = posterior(draws=320)
    sigma = draws["sigma"].clone()
    sigma[2, 100:200] = 1e60  # eight ratios of variances in a row are 1e960
    held = Draws({"mu": draws["mu"], "sigma": sigma})
    moments = one_pass(held, normal, held.names, directions=("reverse",))
    act = act_of(moments, "reverse")
    risk = mean_divergence(act, everything(held, normal), True)
    torch.testing.assert_close(risk_of(moments, "reverse").value, risk)


def test_large_locations_cost_no_digits():
    mu, log_sigma = chains(3, 400, 2).unbind(2)
    mu, sigma = mu * 1e-3 + 1e8, (0.1 * log_sigma).exp()
    mu, near = mu, mu - 1e8
    far = one_pass(Draws({"mu": mu, "sigma": sigma}), normal, ["mu", "sigma"])
    here = one_pass(Draws({"mu": near, "sigma": sigma}), normal, ["mu", "sigma"])
    for direction in ("reverse", "forward"):
        a, b = (act_of(m, direction) for m in (far, here))
        torch.testing.assert_close(a.scale, b.scale, rtol=1e-10, atol=0)
        torch.testing.assert_close(
            risk_of(far, direction), risk_of(here, direction), rtol=1e-7, atol=0
        )


def test_one_direction_is_averaged_as_well_alone_and_no_other_is_there():
    draws = posterior(3)
    both = one_pass(draws, normal, draws.names)
    alone = one_pass(draws, normal, draws.names, directions=("forward",))
    torch.testing.assert_close(risk_of(alone, "forward"), risk_of(both, "forward"))
    with pytest.raises(ValueError, match="direction 'reverse' was not averaged"):
        natural_of(alone, "reverse")


# Errors


def test_errors_are_those_of_the_draws_linearised_one_by_one():
    draws = posterior(2, draws=640)
    moments = one_pass(draws, normal, draws.names)
    mu, sigma = draws["mu"] - moments.family.origin, draws["sigma"]
    eta = torch.stack([mu / sigma**2, -0.5 / sigma**2], 2)
    act = act_of(moments, "reverse")
    # d scale = scale³ dη₂, and the risk moves with KL(act ‖ draw) alone, for the act minimises it
    influences = {
        "scale": act.scale**3 * eta[:, :, 1],
        "risk": kl_divergence(act, normal({"mu": draws["mu"], "sigma": sigma})),
    }
    scale, risk = with_error(moments, "reverse", scale_of), risk_of(moments, "reverse")
    for name, found in (("scale", scale), ("risk", risk)):
        means = BatchMeans(3, (2,), length=moments.reverse.length)
        for chain in range(3):
            means.push(chain, influences[name][chain])
        # what is left of the differences is of third order: a batch moves the mean by 2 %, and
        # a tenth of that squared, times a few, is 1e-5
        torch.testing.assert_close(found.error, means.error, rtol=1e-4, atol=0)


def test_a_function_of_several_outputs_has_an_error_for_each():
    moments = one_pass(*LAWS["MultivariateNormal"], ["mu", "cov"])
    covariance = with_error(
        moments, "reverse", lambda known, at: torch.linalg.inv(-2 * at.natural[1])
    )
    assert covariance.error.shape == (2, 2)
    torch.testing.assert_close(covariance.error, covariance.error.mT)
    first = with_error(
        moments, "reverse", lambda known, at: torch.linalg.inv(-2 * at.natural[1])[..., 0, 0]
    )
    torch.testing.assert_close(covariance.error[0, 0], first.error)


@pytest.mark.statistical
def test_errors_are_what_independent_repetitions_scatter_by():
    replications = 600
    mu, log_sigma = chains(4, 500, 2, replications, seed=5).unbind(2)
    draws = Draws({"mu": mu, "sigma": (0.3 * log_sigma).exp()})
    moments = one_pass(draws, normal, draws.names)
    for direction in ("reverse", "forward"):
        scale, risk = with_error(moments, direction, scale_of), risk_of(moments, direction)
        for found in (scale, risk):
            # 600 repetitions know a standard deviation to 3 %
            assert found.error.square().mean().sqrt().item() == pytest.approx(
                found.value.std().item(), rel=0.1
            )


# Weights


def test_weighted_draws_are_averaged_as_if_repeated():
    draws = posterior(3, draws=120)
    times = torch.randint(0, 4, (3, 120), generator=torch.Generator().manual_seed(0))
    weighted = Draws(draws.variables, times.double())
    moments = one_pass(weighted, normal, draws.names)
    laws = everything(draws, normal)
    rows = torch.arange(360).repeat_interleave(times.flatten())
    repeated = Normal(laws.loc[rows], laws.scale[rows])
    for direction in ("reverse", "forward"):
        act = act_of(moments, direction)
        risk = mean_divergence(act, repeated, direction == "reverse")
        torch.testing.assert_close(risk_of(moments, direction).value, risk)
    precision = repeated.scale.pow(-2).mean(0)
    torch.testing.assert_close(act_of(moments, "reverse").scale, precision.rsqrt())


def test_equal_weights_change_nothing():
    draws = posterior(70)
    weighted = Draws(draws.variables, torch.ones(3, 400))
    names = draws.names
    assert same(one_pass(weighted, normal, names), one_pass(draws, normal, names))


# What is compiled


@pytest.mark.slow
@pytest.mark.parametrize("case", ["Normal", "Normal, batched", "LogNormal", "Poisson"])
def test_what_is_compiled_is_the_same(case):
    draws, law = LAWS[case]
    plain = one_pass(draws, law, draws.names, compiled=False)
    assert same(one_pass(draws, law, draws.names, compiled=True), plain)


@pytest.mark.slow
def test_what_a_family_holds_fixed_is_compiled_with_it():
    draws, _ = LAWS["Bernoulli"]
    for count in (5, 9):
        law = functools.partial(Binomial, count)
        plain = one_pass(draws, lambda theta, law=law: law(theta["p"]), ["p"], compiled=False)
        assert same(
            one_pass(draws, lambda theta, law=law: law(theta["p"]), ["p"], compiled=True), plain
        )


@pytest.mark.slow
def test_many_laws_and_weights_are_compiled_to_the_same():
    draws = posterior(100, draws=331)  # which units do not fill
    for held in (draws, Draws(draws.variables, chains(3, 331).exp())):
        plain = one_pass(held, normal, draws.names, compiled=False)
        assert same(one_pass(held, normal, draws.names, compiled=True), plain)


# Where draws live


def test_no_more_is_in_memory_than_a_chunk(tmp_path, monkeypatch):
    held = posterior(draws=2_000)
    arrays = {name: (("chain", "draw"), held[name].numpy()) for name in held.names}
    path = tmp_path / "posterior.nc"
    xr.Dataset(arrays).to_netcdf(
        path, engine="h5netcdf", encoding={"mu": {"chunksizes": (1, 300)}}
    )
    monkeypatch.setattr("rkl.bayes.draws.NUMBERS", 500)
    monkeypatch.setattr(streaming, "CACHED", 64)
    sizes, read = [], streaming.read
    monkeypatch.setattr(
        streaming, "read", lambda *where: (sizes.append(where[2]), read(*where))[1]
    )
    assert same(one_pass(read_draws(path), normal, held.names), one_pass(held, normal, held.names))
    # of both variables, what the file keeps in one piece
    assert max(part.stop - part.start for part in sizes[: 2 * 3 * 7]) == 300


@pytest.mark.tools
def test_dask_computes_each_block_once_and_where_it_is():
    dask = pytest.importorskip("dask.array")
    held = posterior(2, draws=400)
    seen = []

    def block(mu):
        if mu.size:
            seen.append(mu.shape)
        return mu

    mu = dask.from_array(held["mu"].numpy(), chunks=(3, 50, 2)).map_blocks(
        block, dtype=float, meta=np.empty((0, 0, 0))
    )
    sigma = dask.from_array(held["sigma"].numpy(), chunks=(1, 100, 1))
    lazy = Draws({"mu": mu, "sigma": sigma})
    moments = one_pass(lazy, normal, ["mu", "sigma"])
    # and those of the first few draws, which choose the reference law, twice
    assert seen == [(3, 50, 2)] * (2 + 8)
    assert same(moments, one_pass(held, normal, ["mu", "sigma"]))
    weights = chains(3, 400).exp()
    weighted = [one_pass(Draws(d.variables, weights), normal, d.names) for d in (lazy, held)]
    assert same(*weighted)


# What is refused


@pytest.mark.parametrize("law", [normal, unchecked_gamma])
@pytest.mark.parametrize("batch", [(), (3,), (70,)])
def test_a_draw_outside_the_domain_is_refused_wherever_it_is(law, batch):
    for place in (0, 399):
        draws = posterior(*batch, draws=400)
        sigma = draws["sigma"].clone()
        sigma[2, place] = -0.5
        held = Draws({"mu": draws["mu"].exp(), "sigma": sigma})
        with pytest.raises(ValueError, match=r"must satisfy GreaterThan.*got -0.5 among"):
            one_pass(held, law, ["mu", "sigma"])


@pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (math.inf, "inf")])
@pytest.mark.parametrize("name", ["mu", "sigma"])
def test_draws_that_are_not_finite_are_refused_where_they_stand(name, value, said):
    draws = posterior(draws=400)
    held = {k: draws[k].clone() for k in draws.names}
    held[name][1, 333] = value
    with pytest.raises(
        ValueError, match=f"{name} must be finite; got {said} at chain 1, draw 333"
    ):
        one_pass(Draws(held), normal, ["mu", "sigma"])


def test_draws_on_the_boundary_of_the_domain_have_no_natural_parameter():
    p = chains(2, 100).sigmoid()
    p[1, 50] = 0.0
    with pytest.raises(ValueError, match="natural parameter of a Bernoulli"):
        one_pass(Draws({"p": p}), lambda theta: Bernoulli(theta["p"]), ["p"])


def test_means_beyond_double_precision_are_refused():
    held = Draws(
        {"mu": torch.zeros(1, 100), "sigma": torch.full((1, 100), 1e-200, dtype=torch.float64)}
    )
    with pytest.raises(ValueError, match="natural"):
        one_pass(held, normal, ["mu", "sigma"])


def test_laws_of_no_exponential_family_are_refused():
    with pytest.raises(ValueError, match="exponential family; got a StudentT"):
        one_pass(
            posterior(), lambda theta: StudentT(3.0, theta["mu"], theta["sigma"]), ["mu", "sigma"]
        )
