import math

import mpmath
import pytest
import torch
from torch.distributions import Normal

from rkl.metrics.clusters import prd_curve
from rkl.metrics.frechet import frechet_distance
from rkl.metrics.neighbours import prdc
from rkl.metrics.precision_recall import pr_curve
from rkl.metrics.samples import measure


def cloud(count, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64)


def mixed(count, features, seed):
    return cloud(count, features, seed) @ (
        torch.eye(features) + cloud(features, features, seed) / 3
    )


def test_the_distance_is_that_of_the_formula_in_thirty_digits():
    real, fake = mixed(40, 4, 0), mixed(30, 4, 1) + 0.5
    with mpmath.workdps(30):
        c, d = (mpmath.matrix(it.T.cov().tolist()) for it in (real, fake))
        shift = (real.mean(0) - fake.mean(0)).square().sum().item()
        root = mpmath.sqrtm(c)
        cross = mpmath.sqrtm(root * d * root)
        trace = sum((c[i, i] + d[i, i] - 2 * cross[i, i]).real for i in range(4))
        expected = float(shift + trace)
    assert frechet_distance(real=real, fake=fake).value.item() == pytest.approx(expected, rel=1e-9)


def test_it_is_symmetric_and_vanishes_between_the_same_moments():
    real, fake = mixed(60, 5, 0), mixed(40, 5, 1)
    there, back = frechet_distance(real=real, fake=fake), frechet_distance(real=fake, fake=real)
    torch.testing.assert_close(there, back, rtol=1e-8, atol=0)
    same = frechet_distance(real=real, fake=real.flip(0))
    assert same.value < 1e-12
    assert same.error < 1e-6


def test_more_features_than_samples_will_do():
    real, fake = cloud(20, 50), 2 * cloud(20, 50, seed=1)
    found = frechet_distance(real=real, fake=fake)
    assert found.value > 0
    assert found.error.isfinite()


def test_the_error_is_that_of_repeated_samples():
    values, errors = [], []
    for seed in range(300):
        found = frechet_distance(
            real=cloud(400, 3, 2 * seed), fake=1.5 * cloud(300, 3, 2 * seed + 1) + 0.5
        )
        values.append(found.value)
        errors.append(found.error)
    spread = torch.stack(values).std()
    typical = torch.stack(errors).square().mean().sqrt()
    assert typical.item() == pytest.approx(spread.item(), rel=0.2)  # 5 s.e. of a spread of 300


# One scalar hides the failure: N(0, 1) against N(0, 0.4²) and N(0, 1.6²), both at 0.6² = 0.36


def test_laws_at_equal_frechet_distance_may_have_opposite_precision_and_recall():
    real = cloud(2_000, 8)
    narrow, wide = 0.4 * cloud(2_000, 8, 1), 1.6 * cloud(2_000, 8, 2)
    near, far = (frechet_distance(real=real, fake=it) for it in (narrow, wide))
    for found in (near, far):
        assert abs(found.value - 8 * 0.36) < 5 * found.error
    tight, loose = (prdc(real=real, fake=it) for it in (narrow, wide))
    assert tight.precision.value > 0.98
    assert tight.recall.value < 0.3
    assert loose.precision.value < 0.6
    assert loose.recall.value > 0.98


def test_the_exact_curves_of_these_laws_are_opposite_too():
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    p, narrow, wide = (
        (Normal(0.0, scale).log_prob(x)).log_softmax(-1) for scale in (1.0, 0.4, 1.6)
    )
    slopes = torch.tensor([0.2, 5.0], dtype=torch.float64)
    tight, loose = (pr_curve(p=p, q=it, slopes=slopes) for it in (narrow, wide))
    assert tight.precision[1] > 0.99 > loose.precision[1]
    assert tight.recall[0] < 0.9 < 0.99 < loose.recall[0]


# The curve from clusters


def test_clusters_that_are_plain_give_the_exact_curve_of_their_shares():
    centres = 100 * cloud(4, 3)
    shares = {"p": torch.tensor([10, 20, 30, 40]), "q": torch.tensor([40, 30, 30, 0])}
    samples = {
        name: torch.cat([at + cloud(int(n), 3, int(n)) for at, n in zip(centres, ns, strict=True)])
        for name, ns in shares.items()
    }
    curve = prd_curve(real=samples["p"], fake=samples["q"], clusters=4)
    exact = pr_curve(**{name: (counts.double() / 100).log() for name, counts in shares.items()})
    torch.testing.assert_close(curve.precision.value, exact.precision, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curve.recall.value, exact.recall, rtol=1e-9, atol=1e-12)


def test_the_errors_of_the_curve_are_those_of_repeated_samples():
    slopes, found = torch.tensor([0.5, 1.0, 2.0]), []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        sides = (torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6]))
        rows = (it.multinomial(150, replacement=True, generator=generator) for it in sides)
        real, fake = (10.0 * it[:, None] for it in rows)
        how = {"clusters": 3, "runs": 1, "slopes": slopes}
        found.append(torch.stack(prd_curve(real=real, fake=fake, **how).precision))
    value, error = torch.stack(found).unbind(1)
    typical = error.square().mean(0).sqrt()
    # At slope 1 the middle atom has p = q, where the least of both spreads less than either.
    assert typical[[0, 2]].tolist() == pytest.approx(value.std(0)[[0, 2]].tolist(), rel=0.25)
    assert typical[1] >= 0.8 * value.std(0)[1]


def test_fewer_distinct_rows_than_clusters_will_do():
    x = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
    curve = prd_curve(real=x, fake=x, clusters=5)
    torch.testing.assert_close(curve.precision.value, curve.slopes.clamp_max(1))


def test_the_same_seed_gives_the_same_curve():
    pair = {"real": cloud(200, 2), "fake": 1.3 * cloud(200, 2, 1)}
    first, second = (prd_curve(**pair, clusters=8, runs=2) for _ in range(2))
    assert torch.equal(first.precision.value, second.precision.value)
    assert not math.isnan(first.precision.error.max())


@pytest.mark.parametrize("power", [-76, 63])
def test_units_that_exceed_single_precision_when_squared_change_no_score(power):
    x = torch.randn(2, 90, 3, generator=torch.Generator().manual_seed(0)) + 0.25
    unit = 2.0**power
    found, expected = (measure(real=s * x[0], fake=s * x[1] / 2) for s in (unit, 1.0))
    for name, score in expected.scores.items():
        units = unit**2 if name == "Fréchet distance" else 1.0
        assert found.scores[name].value.item() == pytest.approx(
            score.value.item() * units, rel=1e-12
        )


def test_clusters_far_from_the_origin_are_those_near_it():
    x = torch.randn(2, 200, 2, generator=torch.Generator().manual_seed(0)) * 1e-2
    x[1, :100] += 1.0
    x += 1e4
    single, double = (prd_curve(real=it[0], fake=it[1], clusters=2) for it in (x, x.double()))
    assert torch.equal(single.precision.value, double.precision.value)
    assert single.precision.value.max() == pytest.approx(0.5)
