"""What an estimate, and what cannot be one, says to somebody who meets it for the first time."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import (
    Categorical,
    Distribution,
    ExpTransform,
    Independent,
    MixtureSameFamily,
    Normal,
    StudentT,
)

from rkl.bayes import Draws, bayes_act, check_invariance, read_draws
from rkl.divergences import KL, JensenShannon, ReverseKL

ORDINARY = "normal(loc=mu, scale=sigma)"


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def draws():
    return {"mu": 1 + noise(4, 60), "sigma": (0.2 * noise(4, 60, seed=1)).exp()}


def refused(draws, family, kind: type[Exception] = ValueError, **asked):
    with pytest.raises(kind) as caught:
        bayes_act(draws, family, **asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Families


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize(
    "family",
    [
        lambda theta: Normal(theta.mu, np.sqrt(theta.sigma)),
        lambda theta: Normal(np.asarray(theta.mu), theta.sigma),
        lambda theta: Normal(theta.mu, math.sqrt(theta.sigma)),
    ],
    ids=["a function of NumPy", "an array", "a function of math"],
)
def test_a_family_that_leaves_torch_is_told_to_stay(draws, family):
    assert "write it in torch" in refused(draws, family)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("normal(mu, sigma)", "Write it like normal(loc=mu, scale=sigma)"),
        ("normal(loc=mu, scale=1/sigma)", "write a function, lambda theta"),
        ("normal(loc=mu)", "must say scale of Normal"),
        ("poisson-regression(coefficients=mu)", "design=X (--design FILE)"),
        ("multivariate-normal(loc=0, covariance_matrix=sigma)", "list of numbers, such as [0, 0]"),
        ("normal(loc=mu, scale=wide)", "their axes must agree, the first of one with the first"),
    ],
)
def test_a_family_in_words_is_refused_with_what_to_write(draws, family, words):
    draws = {"mu": noise(4, 60, 3), "sigma": draws["sigma"], "wide": noise(4, 60, 2).exp()}
    message = refused(draws, family)
    assert words in message
    assert "akl" not in message


def test_the_name_of_a_divergence_is_answered_with_the_divergence(draws):
    assert "write KL()" in refused(draws, ORDINARY, TypeError, divergence="kl")
    assert "write Intrinsic()" in refused(draws, ORDINARY, TypeError, divergence="intrinsic")
    assert "write ReverseKL()" in refused(draws, ORDINARY, TypeError, divergence=ReverseKL)


# Draws


@pytest.mark.parametrize("place", [(0, 0), (2, 47)], ids=["the first", "one of many"])
@pytest.mark.parametrize(
    "family", [ORDINARY, lambda t: Normal(t.mu, t.sigma), lambda t: StudentT(5.0, t.mu, t.sigma)]
)
def test_a_draw_on_the_boundary_is_found(draws, family, place):
    draws["sigma"][place] = 0.0
    message = refused(draws, family)
    assert f"See chain {place[0]}, draw {place[1]}: " in message
    assert "sigma = 0.0" in message


def test_a_draw_on_the_boundary_is_found_where_an_import_has_ended_validation(draws, monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", False)  # as zuko's import does
    draws["sigma"][1, 5] = 0.0
    assert "See chain 1, draw 5: " in refused(draws, lambda t: StudentT(5.0, t.mu, t.sigma))
    assert not Distribution._validate_args


def test_where_every_draw_is_outside_none_is_blamed(draws):
    assert "See chain" not in refused({**draws, "sigma": -draws["sigma"]}, ORDINARY)


def test_transposed_draws_are_noticed(draws):
    turned = bayes_act({name: x.T for name, x in draws.items()}, ORDINARY)
    assert any("60 chains of 4 draws" in text for text in turned.diagnostics.warnings)
    plain = bayes_act(draws, ORDINARY)
    assert not any("chains of" in text for text in plain.diagnostics.warnings)


def test_text_beside_the_numbers_is_passed_over(draws):
    data = xr.Dataset({name: (("chain", "draw"), x.numpy()) for name, x in draws.items()})
    data["country"] = ("chain", "draw"), np.full((4, 60), "at")
    assert read_draws(data).names == ("mu", "sigma")
    with pytest.raises(ValueError, match="scale must be one of mu, sigma; got country"):
        bayes_act(data, "normal(loc=mu, scale=country)")


def test_a_chain_alone_is_told_of_numpyro():
    with pytest.raises(ValueError, match=r"group_by_chain=True"):
        Draws({"mu": noise(60)})


class CmdStanMCMC:
    """What cmdstanpy documents of its fit: `draws_xr()`, and `method_variables()` [draws, chains].

    Source: cmdstanpy 1.3.2, cmdstanpy.stanfit.mcmc.
    """

    __module__ = "cmdstanpy.stanfit.mcmc"

    def __init__(self, arrays, lp):
        self.arrays, self.lp = arrays, lp

    def draws_xr(self):
        named = {name: (("chain", "draw"), x.numpy()) for name, x in self.arrays.items()}
        return xr.Dataset(named, coords={"chain": np.arange(4) + 1, "draw": np.arange(60)})

    def method_variables(self):
        return {"lp__": self.lp.T.numpy(), "divergent__": np.zeros((60, 4))}


class CmdStanVB:
    __module__ = "cmdstanpy.stanfit.vb"


def test_a_fit_of_cmdstanpy_is_read_with_its_log_density(draws):
    lp = noise(4, 60, seed=2)
    found = read_draws(CmdStanMCMC(draws, lp))
    assert found.names == ("mu", "sigma", "lp")
    assert torch.equal(found["mu"], draws["mu"])
    assert torch.equal(found["lp"], lp)
    with pytest.raises(TypeError, match="CmdStanMCMC .* got a CmdStanVB"):
        read_draws(CmdStanVB())


STAN = """# stan_version_major = 2
# stan_version_minor = 36
# stan_version_patch = 0
# model = normal_model
# method = sample (Default)
#   sample
#     num_samples = 60
#     num_warmup = 10
#     save_warmup = false (Default)
#     thin = 1 (Default)
#     adapt
#       engaged = true (Default)
#     algorithm = hmc (Default)
#       hmc
#         engine = nuts (Default)
#           nuts
#             max_depth = 10 (Default)
#         metric = diag_e (Default)
# id = {chain}
lp__,accept_stat__,stepsize__,treedepth__,n_leapfrog__,divergent__,energy__,mu,sigma
# Adaptation terminated
# Step size = 0.8
# Diagonal elements of inverse mass matrix:
# 1, 1
{rows}
# 
#  Elapsed Time: 0.01 seconds (Warm-up)
#                0.02 seconds (Sampling)
# 
"""  # noqa: W291


@pytest.mark.tools
def test_a_fit_that_cmdstanpy_made_of_its_files_is_read(draws, tmp_path):
    cmdstanpy = pytest.importorskip("cmdstanpy")
    files = [tmp_path / f"normal-{chain}.csv" for chain in range(4)]
    for chain, file in enumerate(files):
        pairs = zip(*(draws[name][chain].tolist() for name in ("mu", "sigma")), strict=True)
        rows = "\n".join(f"{-mu!r},0.9,0.8,3,7,0,1,{mu!r},{sigma!r}" for mu, sigma in pairs)
        file.write_text(STAN.format(chain=chain + 1, rows=rows))
    found = read_draws(cmdstanpy.from_csv([str(file) for file in files]))
    for name, x in {**draws, "lp": -draws["mu"]}.items():
        torch.testing.assert_close(found[name], x)


# Answers


def test_a_refusal_names_a_way_out(draws):
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    heavy = {"mu": uniform[order].reshape(4, 1000) ** -1.5}
    for divergence, other in ((ReverseKL(), "KL()"), (KL(), "ReverseKL()")):
        message = refused(heavy, "normal(loc=mu, scale=1)", divergence=divergence)
        assert f"1 is too much). {other} averages" in message
        assert "Intrinsic()" in message


def test_a_region_says_that_its_ranges_are_shadows(draws):
    table = bayes_act(draws, ORDINARY).region(0.8).table()
    assert table.title == "The 80% of the draws closest to the act under ReverseKL()"
    assert "shadow" in table.notes[0]
    alone = bayes_act({"mu": draws["mu"]}, "normal(loc=mu, scale=1)").region().table()
    assert not alone.notes


def test_an_estimate_and_its_act_have_short_names(draws):
    estimate = bayes_act(draws, ORDINARY)
    assert repr(estimate).startswith("Estimate(mu=")
    assert repr(estimate).endswith(f"; {ORDINARY} under ReverseKL())")
    wide = bayes_act({"mu": noise(4, 60, 3)}, "normal(loc=mu, scale=1)")
    assert "mu=[3]" in repr(wide.act)
    assert max(len(repr(estimate)), len(repr(wide.act))) < 150
    assert [row[0] for row in wide.table().rows][-1] == "risk[2] (nats)"


def test_what_the_family_does_not_look_at_has_no_error():
    drawn = {"mu": noise(4, 60, 2), "tau": noise(4, 60)}
    estimate = bayes_act(drawn, lambda theta: Normal(theta.mu + 0 * theta.tau[:, None], 1.0))
    assert estimate.act.error["tau"].isnan()
    assert estimate.act.error["mu"].isfinite().all()
    assert any("tau is not used by the family" in text for text in estimate.diagnostics.warnings)


def test_transforms_are_spelt_in_words(draws):
    table = check_invariance(bayes_act(draws, ORDINARY), {"sigma": ExpTransform().inv})
    assert table.title.endswith("sigma by the inverse of ExpTransform()")


@pytest.mark.parametrize(
    "family",
    [
        lambda t: StudentT(5.0, t.mu, t.sigma),
        lambda t: Independent(StudentT(5.0, t.mu[:, None], t.sigma[:, None].expand(-1, 2)), 1),
        lambda t: StudentT(5.0, torch.stack([t.mu, -t.mu], 1), t.sigma[:, None]),
        lambda t: MixtureSameFamily(
            Categorical(torch.ones(len(t.mu), 2)),
            Normal(t.mu[:, None] * torch.tensor([1, -1]), 1.0),
        ),
    ],
    ids=["plain", "joint", "batch", "mixture"],
)
def test_the_law_of_an_act_has_no_axis_of_draws(draws, family):
    estimate = bayes_act({k: x[:, :20] for k, x in draws.items()}, family, ReverseKL())
    act = {name: estimate.act[name][None] for name in estimate.problem.model.names}
    law, meant = estimate.act.distribution, estimate.problem.model.law(act)
    assert law.batch_shape == estimate.problem.batch == meant.batch_shape[1:]
    x = law.sample(torch.Size([3]))
    assert x.shape == (3, *law.batch_shape, *law.event_shape)
    torch.testing.assert_close(law.log_prob(x), meant.log_prob(x.unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(law.mean, meant.mean[0])


def test_the_divergence_asked_for_is_compared_whatever_it_takes(draws):
    few = {k: x[:, :10] for k, x in draws.items()}
    joint = bayes_act(
        few, lambda t: Independent(Normal(t.mu[:, None].expand(-1, 2), 1.0), 1), JensenShannon()
    )
    assert "Jensen–Shannon" in joint.compare().acts
