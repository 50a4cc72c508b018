"""Few rows in heaps: a flow begins as the mixture of Gaussians that BIC chooses."""

import math
import warnings

import pytest
import torch
from torch.distributions import MultivariateNormal

import rkl
from rkl.fit import Method, fit_to_samples
from rkl.fit.mixtures import best_mixture
from rkl.flows import MAF, NSF, Coupling, latent
from rkl.flows.architectures import draw
from rkl.flows.architectures.mixture import MixtureLatent, MixtureStart
from rkl.flows.training import load_state, save_state
from rkl.runs import Run

CENTRES = torch.tensor([[-4.0, 0.0, 1.0], [4.0, 1.0, 0.0], [0.0, 6.0, -2.0]])
SMALL = Coupling(2, (8,))


def heaps(count: int = 180) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(count) % 3
    noise = torch.randn(count, 3, generator=generator)
    return 100 + CENTRES[which] + 0.3 * noise, which


@pytest.fixture(scope="module")
def fitted():
    return fit_to_samples(SMALL, heaps()[0], steps=2)


@pytest.mark.parametrize("architecture", [SMALL, NSF(1, (8,)), MAF(1, (8,))], ids=repr)
def test_heaps_are_found_before_the_first_step(architecture):
    fitted = fit_to_samples(architecture, heaps()[0], steps=1)
    truth = MultivariateNormal(100 + CENTRES, 0.09 * torch.eye(3))
    parts = truth.log_prob(fitted.held_out.values[:, None])
    entropy = (parts.logsumexp(1) - torch.tensor(3.0).log()).mean().item()
    assert fitted.history[0]["held_out"] == pytest.approx(entropy, abs=0.3)
    assert fitted.history[0]["held_out"] > fitted.gaussian.value.item() + 2


def test_density_and_draws_of_the_start_agree(fitted):
    law = fitted.flow()
    value, log_q = draw(law, (4000,))
    assert torch.allclose(log_q, law.log_prob(value), atol=1e-4)
    nearest = torch.cdist(value - 100, CENTRES).min(1)
    assert (nearest.values < 2).double().mean() > 0.98  # the rest is of the Gaussian of all rows
    assert nearest.indices.bincount() / 4000 == pytest.approx(torch.full((3,), 1 / 3), abs=0.04)
    # E_q[p/q] = 1 of a density p that is another one
    p = MultivariateNormal(100 + CENTRES[0], 0.05 * torch.eye(3))
    ratio = (p.log_prob(value) - log_q).exp()
    assert ratio.mean().item() == pytest.approx(1.0, abs=5 * (ratio.std() / 4000**0.5).item())


def test_classes_are_the_components_where_rows_have_classes():
    rows, which = heaps()
    fitted = fit_to_samples(SMALL, rows, labels=[["a", "b", "c"][i] for i in which], steps=1)
    with torch.no_grad():
        for i, centre in enumerate(CENTRES):
            samples = fitted.flow(torch.eye(3)[i]).sample((500,))
            assert torch.allclose(samples.mean(0), 100 + centre, atol=0.15)
            assert (torch.cdist(samples - 100, CENTRES).argmin(1) == i).all()


def test_cold_latents_keep_every_heap_and_cut_ones_stay_near(fitted):
    law = fitted.flow()
    cold = latent(law, 0.1).sample((600,)) - 100
    away = torch.cdist(cold, CENTRES).min(1)
    assert away.indices.unique().tolist() == [0, 1, 2]
    assert (away.values < 0.5).double().mean() > 0.98
    base = MixtureLatent(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None], 1.0, 1.5)
    assert base.sample((1000,)).abs().max() <= 1.5
    assert base.log_prob(torch.tensor([2.0, 0.0])) == -torch.inf


def test_a_flow_with_a_mixture_is_saved_and_loaded(fitted, tmp_path):
    assert isinstance(fitted.flow.flow, MixtureStart)
    fitted.save(tmp_path / "run")
    value = fitted.held_out.values
    assert torch.equal(rkl.load(tmp_path / "run")().log_prob(value), fitted.flow().log_prob(value))


def test_other_divergences_and_estimators_take_the_same_start():
    rows = heaps(120)[0]
    for method in (Method(estimator="path", batch=32), Method(estimator="draws", batch=32)):
        fitted = fit_to_samples(SMALL, rows, rkl.JensenShannon(), steps=4, method=method)
        assert fitted.log_density.value > fitted.gaussian.value + 2


def test_one_heap_begins_as_the_gaussian_that_it_is():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 3, generator=generator) @ torch.randn(3, 3, generator=generator)
    assert not isinstance(fit_to_samples(SMALL, rows, steps=1).flow.flow, MixtureStart)


@pytest.mark.parametrize("count", [20, 60])
def test_tied_and_discrete_columns_make_no_component_singular(count):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(count, 4, generator=generator)
    rows[:, 3] = (rows[:, 0] > 0.3).float()
    rows[:, 2] = rows[:, 2].round()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = fit_to_samples(SMALL, rows, steps=1)
    assert torch.isfinite(fitted.flow().log_prob(rows)).all()
    assert torch.isfinite(fitted.flow().sample((100,))).all()


def test_a_row_far_from_all_heaps_is_no_worse_than_under_their_gaussian(fitted):
    far = 100 + torch.tensor([[300.0, -200.0, 100.0]])
    assert fitted.flow().log_prob(far) > fitted.flow.units.gaussian(far) - math.log(1000)


def test_the_density_is_right_in_every_unit():
    rows = heaps()[0].double()
    scale = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)
    plain, scaled = (fit_to_samples(SMALL, x, steps=1) for x in (rows, rows * scale))
    gap = plain.log_density.value - scaled.log_density.value
    assert gap.item() == pytest.approx(scale.log().sum().item(), abs=1e-3)


def test_a_mixture_of_least_bic_has_as_many_components_as_heaps():
    rows = (heaps(240)[0] - 100).double()
    mixture, _ = best_mixture(rows, None, seed=0)
    weight = mixture.log_weight.exp()
    assert weight.sum().item() == pytest.approx(1.0)
    nearest = torch.cdist(mixture.mean, CENTRES.double()).min(1)
    assert nearest.values.max() < 0.3
    shares = torch.zeros(3).double().index_add_(0, nearest.indices, weight)
    assert torch.allclose(shares, torch.full((3,), 1 / 3).double(), atol=0.05)


def test_networks_of_couplings_do_not_extrapolate():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(1200, 4, generator=generator)
    kept = Method(guard=False)
    flow = fit_to_samples(SMALL, rows, steps=100, method=kept).flow.flow
    far, edge = torch.tensor([40.0, 0.0, 40.0, 0.0]), torch.tensor([5.0, 0.0, 5.0, 0.0])
    for one, other in zip(
        *(flow._affine(flow.nets[0], x[0::2], None) for x in (far, edge)), strict=True
    ):
        assert one.any()
        assert torch.equal(one, other)
    assert torch.allclose(flow.decode(flow.encode(far, None)[0], None)[0], far, atol=1e-3)


def test_a_loaded_flow_sees_as_far_as_the_saved_one(fitted, tmp_path):
    fitted.save(tmp_path / "run")
    far = 100 + torch.tensor([[300.0, -200.0, 100.0]])
    assert torch.equal(rkl.load(tmp_path / "run")().log_prob(far), fitted.flow().log_prob(far))


def test_a_mixture_of_no_numbers_is_refused(fitted, tmp_path):
    fitted.save(tmp_path / "run")
    weights = tmp_path / "run" / "flow.safetensors"
    state = load_state(weights)
    state["flow"]["mean"][0, 0] = torch.nan
    save_state(weights, state)
    Run.open(tmp_path / "run").update(files={})  # so that its digest does not speak first
    with pytest.raises(ValueError, match="mean"):
        rkl.load(tmp_path / "run")
