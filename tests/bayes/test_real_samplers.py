"""Posteriors of emcee, NumPyro and PyMC, handed over as these libraries return them.

Each posterior has a reference that uses no draws: quadrature, or the conjugate formula.
"""

import contextlib
import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from rkl.bayes import GaussianRegression, bayes_act
from rkl.divergences import KL, ReverseKL

pytestmark = pytest.mark.tools

ERRORS = 5  # how many Monte Carlo errors a fixed seed may be off; 1 of 10^6 normal ones is


@contextlib.contextmanager
def foreign():
    """What others' code warns of is theirs to mend; what rkl warns of stays an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def imported(name):
    with foreign():
        return pytest.importorskip(name)


def assert_within_errors(estimate, name, reference, resolution):
    """A value agrees with its reference, and its error is small enough for that to say much."""
    value, error = estimate.act[name], estimate.act.error[name]
    reference = torch.as_tensor(reference, dtype=torch.float64)
    assert (error > 0).all()
    assert (error < resolution).all(), error
    assert ((value - reference).abs() < ERRORS * error).all(), (value, error, reference)


# --- eight schools, non-centred, in NumPyro -------------------------------------------------

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@pytest.fixture(scope="module")
def schools():
    """Rubin's eight schools: mu ~ Normal(0, 5), tau ~ HalfCauchy(5)."""
    numpyro, jax = imported("numpyro"), imported("jax")
    laws, infer = numpyro.distributions, numpyro.infer

    def model():
        mu = numpyro.sample("mu", laws.Normal(0, 5))
        tau = numpyro.sample("tau", laws.HalfCauchy(5))
        with numpyro.plate("school", 8):
            z = numpyro.sample("z", laws.Normal(0, 1))
            theta = numpyro.deterministic("theta", mu + tau * z)
            numpyro.sample("effect", laws.Normal(theta, ERROR), obs=EFFECT)

    mcmc = infer.MCMC(
        infer.NUTS(model, target_accept_prob=0.9),
        num_warmup=300,
        num_samples=500,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    with foreign():
        mcmc.run(jax.random.PRNGKey(0), extra_fields=("potential_energy",))
    return mcmc


@pytest.fixture(scope="module")
def schools_exactly():
    """The posterior of tau on a grid, and given tau the means of mu and of every theta."""
    tau = np.linspace(0.0, 200.0, 40_001)[1:]
    variance = ERROR**2 + tau[:, None] ** 2
    precision = 1 / 25 + (1 / variance).sum(1)
    mu = (EFFECT / variance).sum(1) / precision
    log_p = -np.log1p((tau / 5) ** 2) - 0.5 * (np.log(variance).sum(1) + np.log(precision))
    log_p += 0.5 * mu**2 * precision - 0.5 * (EFFECT**2 / variance).sum(1)
    weight = np.exp(log_p - log_p.max())
    share = tau[:, None] ** 2 / variance
    return tau, weight / weight.sum(), mu, share * EFFECT + (1 - share) * mu[:, None]


def test_the_act_of_these_schools_is_that_of_the_quadrature(schools, schools_exactly):
    """Normal with a known scale: its natural parameter is theta itself."""
    _, weight, _, theta = schools_exactly
    draws = schools.get_samples(group_by_chain=True)
    estimate = bayes_act(
        draws, lambda theta, error: Normal(theta.theta, error), design=torch.tensor(ERROR)
    )
    assert_within_errors(estimate, "theta", weight @ theta, 0.3)


@pytest.mark.parametrize("error", [5.0, 10.0])
def test_the_act_of_a_new_school_is_that_of_the_quadrature(schools, schools_exactly, error):
    """1/(tau² + error²) and mu/(tau² + error²) are averaged, and solved for mu and tau."""
    tau, weight, mu, _ = schools_exactly
    precision = 1 / (tau**2 + error**2)
    mean = (weight @ precision) ** -1
    estimate = bayes_act(schools.get_samples(group_by_chain=True), new_school, design=error)
    assert_within_errors(estimate, "mu", weight @ (mu * precision) * mean, 0.2)
    assert_within_errors(estimate, "tau", (mean - error**2) ** 0.5, 0.2)


def new_school(theta, error):
    return Normal(theta.mu, (theta.tau**2 + error**2).sqrt())


def test_the_spread_of_the_schools_by_itself_has_no_reverse_act(schools):
    """The density of tau at 0 is positive, so that E 1/tau² is infinite."""
    draws = schools.get_samples(group_by_chain=True)
    with pytest.raises(ValueError, match="posterior mean is infinite"):
        bayes_act(draws, "normal(loc=mu, scale=tau)")


def test_every_container_of_one_posterior_gives_one_act(schools, tmp_path):
    arviz, base = imported("arviz"), imported("arviz_base")
    with foreign():
        data, tree = arviz.from_numpyro(schools), base.from_numpyro(schools)
        data.to_netcdf(str(tmp_path / "data.nc"))
        tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    containers = [
        schools.get_samples(group_by_chain=True),
        data,
        data.posterior,
        tree,
        tree.posterior,
        tmp_path / "data.nc",
        tmp_path / "tree.nc",
    ]
    acts = [bayes_act(it, "normal(loc=theta, scale=10)").act for it in containers]
    for act in acts:
        torch.testing.assert_close(act["theta"], acts[0]["theta"], rtol=1e-14, atol=0)
        # chunks of a file may end elsewhere, which moves the last digits
        torch.testing.assert_close(act.error["theta"], acts[0].error["theta"], rtol=1e-9, atol=0)


# --- a straight line in emcee ---------------------------------------------------------------

X = np.column_stack([np.ones(20), np.linspace(-1, 1, 20)])
Y = X @ [0.1, 2.0] + 0.7 * np.random.default_rng(3).normal(size=20)


def log_posterior(parameters):
    """Of intercept, slope and log sigma [walkers, 3], flat in all three."""
    residual = Y - parameters[:, :2] @ X.T
    log_sigma = parameters[:, 2]
    return -len(Y) * log_sigma - 0.5 * (residual**2).sum(1) * np.exp(-2 * log_sigma)


@pytest.fixture(scope="module")
def line():
    emcee = imported("emcee")
    sampler = emcee.EnsembleSampler(32, 3, log_posterior, vectorize=True)
    sampler.random_state = np.random.RandomState(0).get_state()
    start = np.array([0.1, 2.0, -0.3]) + 0.1 * np.random.default_rng(0).normal(size=(32, 3))
    with foreign():
        state = sampler.run_mcmc(start, 300)
        sampler.reset()
        sampler.run_mcmc(state, 1_000)
    return sampler


def conjugate(rows):
    """Least squares of some rows: coefficients, their inverse information, residual squares."""
    design, response = X[rows], Y[rows]
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ response
    return coefficients, inverse, ((response - design @ coefficients) ** 2).sum()


def of_line(theta, design):
    coefficients = torch.stack([theta.intercept, theta.slope], -1)
    return GaussianRegression(design, coefficients, theta.log_sigma.exp())


def by_chain(sampler):
    values = np.swapaxes(sampler.get_chain(), 0, 1)
    return {"beta": values[..., :2], "sigma": np.exp(values[..., 2])}


LINE = "gaussian-regression(coefficients=beta, scale=sigma)"


def test_the_acts_of_a_line_are_those_of_the_conjugate_posterior(line):
    """sigma² is inverse gamma of (n - 2)/2 and RSS/2; beta given it normal about least squares."""
    coefficients, _, rss = conjugate(slice(None))
    n = len(Y)
    reverse = bayes_act(by_chain(line), LINE, design=X)
    assert_within_errors(reverse, "beta", coefficients, 0.03)
    assert_within_errors(reverse, "sigma", (rss / (n - 2)) ** 0.5, 0.03)
    forward = bayes_act(by_chain(line), LINE, KL(), design=X)
    assert_within_errors(forward, "beta", coefficients, 0.03)
    # E sigma² (1 + p/n): what the coefficients vary by is noise to one who reports one line
    assert_within_errors(forward, "sigma", (rss / (n - 4) * (1 + 2 / n)) ** 0.5, 0.03)


def test_the_sampler_itself_and_what_arviz_makes_of_it_give_the_act_of_the_arrays(line):
    arviz, base = imported("arviz"), imported("arviz_base")
    names = ["intercept", "slope", "log_sigma"]
    design = torch.tensor(X)
    plain = bayes_act(by_chain(line), LINE, design=X)
    acts = [
        bayes_act(from_emcee(line, var_names=names), of_line, design=design).act
        for from_emcee in (arviz.from_emcee, base.from_emcee)
    ]
    acts.append(bayes_act(line, unnamed, design=design).act)
    for act in acts:
        torch.testing.assert_close(act["coefficients"], plain.act["beta"], rtol=1e-9, atol=0)
        torch.testing.assert_close(act["scale"], plain.act["sigma"], rtol=1e-9, atol=0)


def at_zero(sampler):
    """Every fifth draw of the response at x = 0, Normal(intercept, sigma)."""
    beta, sigma = by_chain(sampler).values()
    return {"intercept": beta[:, ::5, 0], "sigma": sigma[:, ::5]}


def density_at_zero(theta):
    """Log density of intercept and sigma, the slope integrated out."""
    coefficients, inverse, rss = conjugate(slice(None))
    squares = rss + (theta.intercept - coefficients[0]).square() / inverse[0, 0]
    return -len(Y) * theta.sigma.log() - squares / (2 * theta.sigma.square())


def test_the_rows_of_a_comparison_are_what_they_are_called(line):
    """Mean, modes and excess of the conjugate posterior.

    sigma² is RSS over n at the mode in sigma, over n - 1 in log sigma, and over n - 2, as for
    the act, once the density is divided by the root of the Fisher information, 1/sigma².
    """
    coefficients, _, rss = conjugate(slice(None))
    n = len(Y)
    estimate = bayes_act(at_zero(line), "normal(loc=intercept, scale=sigma)")
    assert_within_errors(estimate, "sigma", (rss / (n - 2)) ** 0.5, 0.03)
    table = estimate.compare(density_at_zero)
    modes = [table.acts[name] for name in table.acts if name.startswith(("MAP", "Wallace"))]
    for mode, degrees in zip(modes, (n, n - 1, n - 2), strict=True):
        assert mode["intercept"].item() == pytest.approx(coefficients[0], abs=1e-5)
        assert mode["sigma"].item() == pytest.approx((rss / degrees) ** 0.5, rel=1e-5)
    half = math.exp(math.lgamma((n - 3) / 2) - math.lgamma((n - 2) / 2))
    mean = table.acts["posterior mean"]
    assert mean["sigma"].item() == pytest.approx(half * (rss / 2) ** 0.5, abs=0.03)
    ratio = (mean["sigma"] / estimate.act["sigma"]).item()
    moved = ((mean["intercept"] - estimate.act["intercept"]) / estimate.act["sigma"]).item()
    excess = (ratio**2 - 1 + moved**2) / 2 - math.log(ratio)  # KL(P_mean || P_act)
    row = next(row for row in table.rows if row[0] == "posterior mean")
    columns = [name for name in table.columns if name.startswith("excess reverse KL")]
    value, _ = row[table.columns.index(*columns)]
    assert value == pytest.approx(excess, rel=1e-9)


def test_the_draw_of_highest_lp_is_near_the_mode_of_the_sampler(line):
    """emcee's lp is the density in log sigma that it was given, of which the slope is a part."""
    arviz = imported("arviz")
    with foreign():
        draws = arviz.from_emcee(line, var_names=["intercept", "slope", "log_sigma"])
        draws = draws.sel(draw=slice(None, None, 5))
    estimate = bayes_act(draws, lambda theta: Normal(theta.intercept, theta.log_sigma.exp()))
    acts = estimate.compare("lp").acts
    highest = next(at for name, at in acts.items() if name.startswith("draw of highest lp"))
    coefficients, _, rss = conjugate(slice(None))
    assert highest["log_sigma"].item() == pytest.approx(math.log(rss / len(Y)) / 2, abs=0.1)
    assert highest["intercept"].item() == pytest.approx(coefficients[0], abs=0.1)


def test_the_region_of_a_line_holds_its_share_and_does_not_move_under_a_logarithm(line):
    plain = bayes_act(at_zero(line), "normal(loc=intercept, scale=sigma)")
    draws = at_zero(line)
    draws = {"intercept": draws["intercept"], "log_sigma": np.log(draws["sigma"])}
    log = bayes_act(draws, lambda theta: Normal(theta.intercept, theta.log_sigma.exp()))
    region, again = plain.region(0.8), log.region(0.8)
    assert region.inside.double().mean().item() == pytest.approx(0.8, abs=1e-3)
    assert torch.equal(region.inside, again.inside)
    act, (mu, sigma) = plain.act, map(torch.as_tensor, at_zero(line).values())
    square = (act["sigma"] ** 2 + (act["intercept"] - mu) ** 2) / sigma**2
    loss = (sigma / act["sigma"]).log() + (square - 1) / 2  # KL(P_act || P_theta)
    assert torch.equal(region.inside, loss <= region.threshold + 1e-12)
    assert region.contains({name: plain.act[name] for name in ("intercept", "sigma")})
    assert not region.contains({"intercept": 10.0, "sigma": 1.0})


def unnamed(theta, design):
    """The sampler knows no names; ArviZ numbers its variables."""
    coefficients = torch.stack([theta.var_0, theta.var_1], -1)
    return GaussianRegression(design, coefficients, theta.var_2.exp())


def test_weights_of_psis_leave_one_observation_out(line):
    """Against the conjugate posterior of the others."""
    arviz = imported("arviz")
    draws, out = by_chain(line), 18  # near an end of the line, which it pulls on
    residual = Y[out] - draws["beta"] @ X[out]
    ratio = 0.5 * (residual / draws["sigma"]) ** 2 + np.log(draws["sigma"])
    with foreign():
        smoothed, k = arviz.psislw(ratio.flatten())
    assert k < 0.5
    weights = np.exp(smoothed).reshape(ratio.shape)
    coefficients, _, rss = conjugate(np.arange(len(Y)) != out)
    estimate = bayes_act(draws, LINE, design=X, weights=weights)
    assert_within_errors(estimate, "beta", coefficients, 0.03)
    assert_within_errors(estimate, "sigma", (rss / (len(Y) - 3)) ** 0.5, 0.03)
    whole, _, _ = conjugate(slice(None))
    moved = abs(coefficients - whole) / estimate.act.error["beta"].numpy()
    assert moved.max() > ERRORS, "or the whole posterior would pass for that without it"


# --- counts in PyMC -------------------------------------------------------------------------

DOSE = np.linspace(-1, 1, 15)
DESIGN = np.column_stack([np.ones(15), DOSE])
COUNTS = np.random.default_rng(5).poisson(np.exp(DESIGN @ [0.7, 0.8]))


@pytest.fixture(scope="module")
def counts():
    """A Poisson regression with independent Normal(0, 2) priors; an InferenceData."""
    pymc = imported("pymc")
    with foreign(), pymc.Model():
        beta = pymc.Normal("beta", 0, 2, shape=2)
        pymc.Poisson("counts", pymc.math.exp(pymc.math.dot(DESIGN, beta)), observed=COUNTS)
        return pymc.sample(
            500, tune=500, chains=4, cores=1, random_seed=0, progressbar=False, quiet=True
        )


@pytest.fixture(scope="module")
def counts_exactly():
    """The posterior of beta on a grid of twelve standard deviations about its mode."""
    mode = np.zeros(2)
    for _ in range(50):
        mu = np.exp(DESIGN @ mode)
        hessian = DESIGN.T @ (mu[:, None] * DESIGN) + np.eye(2) / 4
        mode += np.linalg.solve(hessian, DESIGN.T @ (COUNTS - mu) - mode / 4)
    root = np.linalg.cholesky(np.linalg.inv(hessian))
    axis = np.linspace(-6, 6, 241)
    beta = mode + np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2) @ root.T
    eta = beta @ DESIGN.T
    log_p = eta @ COUNTS - np.exp(eta).sum(1) - (beta**2).sum(1) / 8
    weight = np.exp(log_p - log_p.max())
    return beta, weight / weight.sum()


def test_the_acts_of_counts_are_those_of_the_quadrature(counts, counts_exactly):
    """Reverse KL averages beta; KL finds the beta with the posterior mean of X' exp(X beta)."""
    beta, weight = counts_exactly
    family = "poisson-regression(coefficients=beta)"
    reverse = bayes_act(counts, family, ReverseKL(), design=DESIGN)
    assert_within_errors(reverse, "beta", weight @ beta, 0.02)
    wanted, found = DESIGN.T @ (weight @ np.exp(beta @ DESIGN.T)), weight @ beta
    for _ in range(50):
        mu = np.exp(DESIGN @ found)
        found = found + np.linalg.solve(DESIGN.T @ (mu[:, None] * DESIGN), wanted - DESIGN.T @ mu)
    forward = bayes_act(counts, family, KL(), design=DESIGN)
    assert_within_errors(forward, "beta", found, 0.02)
    gap = (forward.act["beta"] - reverse.act["beta"]).abs()
    assert (gap > ERRORS * reverse.act.error["beta"]).any(), "or one reference would do for both"
