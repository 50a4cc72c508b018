import math
import warnings

import numpy as np
import pytest
import torch

from rkl.metrics import neighbours
from rkl.metrics.neighbours import PRDC, copies, prdc, prdc_ceiling


def cloud(count, features, scale=1.0, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return scale * x + shift


def values(scores):
    return [it.value.item() for it in scores]


def by_definition(real, fake, k, inclusive):
    """Every distance written down, in the words of the papers."""

    def within(distance, radius):
        return distance <= radius if inclusive else distance < radius

    def radius(x):
        return (torch.cdist(x, x) + torch.eye(len(x)) * 1e9).sort(1).values[:, k - 1]

    across = torch.cdist(real, fake)
    in_real = within(across, radius(real)[:, None])
    in_fake = within(across, radius(fake)[None])
    covered = within(across.amin(1), radius(real))
    shares = in_real.any(0), in_fake.any(1), in_real.sum(0).double() / k, covered
    return [it.double().mean().item() for it in shares]


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("reals", [40, 1_500])  # without and with groups of columns
def test_the_scores_are_those_of_all_distances_written_down(reals, k, inclusive, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 20_000)  # several blocks, the last of them smaller
    real, fake = cloud(reals, 6), cloud(reals * 2 // 3, 6, scale=0.8, shift=0.5, seed=1)
    found = prdc(real=real, fake=fake, k=k, inclusive=inclusive, subsamples=0)
    assert values(found) == pytest.approx(by_definition(real, fake, k, inclusive), abs=1e-12)


def with_copies():
    draw = np.random.default_rng(0)
    real, fake = draw.normal(size=(700, 6)), 0.8 * draw.normal(size=(500, 6)) + 0.3
    fake[:100] = real[:100]
    return torch.from_numpy(real), torch.from_numpy(fake)


def on_a_grid():
    draw = np.random.default_rng(0)
    draw.normal(size=(1_200, 6))  # what the other pair took
    real = draw.integers(0, 4, size=(300, 3)).astype(float)
    fake = draw.integers(0, 5, size=(200, 3)).astype(float)
    return torch.from_numpy(real), torch.from_numpy(fake)


# prdc 0.2, compute_prdc; torch-fidelity 0.4.0, prc_features_to_metric. On the grid and at the
# copies distances equal radii, so that open and closed balls differ.
PRDC_02 = {
    (with_copies, 3): [0.98, 0.8114285714285714, 1.1453333333333333, 0.79],
    (with_copies, 5): [0.99, 0.8928571428571429, 1.1816, 0.9185714285714286],
    (on_a_grid, 3): [0.15, 0.7066666666666667, 0.11833333333333332, 0.11333333333333333],
    (on_a_grid, 5): [0.345, 0.91, 0.239, 0.39],
}
TORCH_FIDELITY = {with_copies: [0.98, 0.8114285469055176], on_a_grid: [0.6549999713897705, 1.0]}


@pytest.mark.parametrize(("pair", "k"), PRDC_02, ids=lambda it: getattr(it, "__name__", it))
def test_open_balls_give_the_scores_of_prdc(pair, k):
    real, fake = pair()
    found = prdc(real=real, fake=fake, k=k, subsamples=0)
    assert values(found) == pytest.approx(PRDC_02[pair, k], abs=1e-12)


@pytest.mark.parametrize("pair", TORCH_FIDELITY, ids=lambda it: it.__name__)
def test_closed_balls_give_the_scores_of_torch_fidelity(pair):
    real, fake = pair()
    found = prdc(real=real, fake=fake, k=3, inclusive=True, subsamples=0)
    assert values(found)[:2] == pytest.approx(TORCH_FIDELITY[pair], abs=1e-7)  # single precision


@pytest.mark.slow
def test_standard_normals_in_a_thousand_dimensions_have_the_scores_of_the_readme_of_prdc():
    real, fake = (cloud(10_000, 1_000, seed=seed).float() for seed in (0, 1))
    with pytest.warns(UserWarning, match="in high dimension"):
        found = prdc(real=real, fake=fake, k=5, subsamples=0)
    # github.com/clovaai/generative-evaluation-prdc, one draw without a seed
    expected = torch.tensor([0.4772, 0.4705, 1.0555, 0.9735])
    away = (torch.tensor(values(found)) - expected).abs()
    assert (away < torch.tensor([0.06, 0.06, 0.12, 0.01])).all(), values(found)


def test_exchanging_the_sides_exchanges_precision_and_recall():
    real, fake = cloud(300, 3), cloud(200, 3, scale=0.6, seed=1)
    there = prdc(real=real, fake=fake, subsamples=0)
    back = prdc(real=fake, fake=real, subsamples=0)
    assert there.precision.value == back.recall.value
    assert there.recall.value == back.precision.value
    assert there.precision.value > 0.99 > 0.8 > there.recall.value


def test_single_precision_agrees_far_from_the_origin():
    real, fake = cloud(400, 8), cloud(400, 8, scale=1.2, seed=1)
    near = prdc(real=real, fake=fake, subsamples=0)
    away = prdc(real=(real + 1_000).float(), fake=(fake + 1_000).float(), subsamples=0)
    # Their own rounding moves features by 3e-5, which may turn a few of 400 decisions.
    assert values(away) == pytest.approx(values(near), abs=0.01)


def clusters(count, generator):
    """Eight clusters, whose balls are small beside their distances."""
    angle = torch.randint(8, (count,), generator=generator) * math.pi / 4
    places = 4 * torch.stack([angle.cos(), angle.sin()], 1)
    return places + 0.03 * torch.randn(count, 2, generator=generator)


@pytest.mark.parametrize("law", ["clusters", "line", "plane"])
def test_single_precision_agrees_where_balls_are_small_beside_the_spread(law):
    """A product in single precision cannot tell such balls; both sides have one law."""
    generator = torch.Generator().manual_seed(0)
    laws = {
        "clusters": lambda: clusters(1_500, generator),
        "line": lambda: torch.randn(1_500, 1, generator=generator),
        "plane": lambda: 100 + torch.randn(1_500, 2, generator=generator),
    }
    x, y = laws[law](), laws[law]()
    single, double = (prdc(real=x.to(it), fake=y.to(it)) for it in (torch.float, torch.double))
    for one, other in zip(single, double, strict=True):
        assert one.value.item() == pytest.approx(other.value.item(), abs=2 / len(x))
        assert one.error.item() == pytest.approx(other.error.item(), rel=0.02)
        assert one.value > 0.93


@pytest.mark.parametrize("off", [1e-6, 1e-4])
def test_copies_in_single_precision_are_found_on_a_line(off):
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randn(1_500, 1, generator=generator) for _ in range(2))
    fake = train + off * torch.sign(train)
    found = copies(train=train, held_out=held_out, fake=fake)
    train, held_out, fake = (it.double() for it in (train, held_out, fake))
    nearest = (fake - train.T).abs().amin(1)
    usual = (held_out - train.T).abs().amin(1).median()
    assert found.near == int((nearest <= 0.1 * usual).sum())


def test_neither_order_nor_units_matter():
    real, fake = cloud(300, 3), cloud(200, 3, scale=1.4, seed=1)
    expected = values(prdc(real=real, fake=fake, subsamples=0))
    moved = values(prdc(real=(8 * real + 3).flip(0), fake=8 * fake + 3, subsamples=0))
    assert moved == pytest.approx(expected, abs=1e-12)


# Errors


def test_errors_shrink_with_the_root_of_the_number_of_samples():
    few, many = (
        prdc(real=cloud(count, 4), fake=cloud(count, 4, 1.3, seed=1), subsamples=60)
        for count in (400, 3_600)
    )
    for small, large in zip(few, many, strict=True):
        assert 1.5 < small.error / large.error < 6  # 3, each with a relative error of 0.1


@pytest.mark.statistical
@pytest.mark.parametrize(("features", "scale"), [(2, 1.3), (8, 1.1), (32, 1.02)])
def test_the_errors_are_those_of_repeated_samples(features, scale):
    found = []
    for seed in range(120):
        real = cloud(1_000, features, seed=2 * seed)
        fake = cloud(1_000, features, scale, 0.3 / math.sqrt(features), seed=2 * seed + 1)
        found.append(prdc(real=real, fake=fake, subsamples=20 * (seed < 20)))
    value = torch.tensor([values(it) for it in found])
    error = torch.tensor([[score.error.item() for score in it] for it in found[:20]])
    ratio = error.square().mean(0).sqrt() / value.std(0)
    # The scores of quarters spread a little otherwise than those of the whole; 5 s.e. are 0.4.
    # A recall of 0.999 has hardly any spread, and three times that in quarters.
    assert ((ratio > 0.6) & (ratio < 1.6) | (value.std(0) < 0.002)).all(), ratio


def test_drawing_with_replacement_would_miss_the_score_by_many_errors():
    """Copies are each other's neighbours, and radii collapse: why errors come from subsets."""
    real, fake = cloud(600, 16), cloud(600, 16, seed=1)
    score = prdc(real=real, fake=fake, k=3)
    generator = torch.Generator().manual_seed(2)
    redrawn = []
    for _ in range(10):
        rows = torch.randint(600, (2, 600), generator=generator)
        redrawn.append(values(prdc(real=real[rows[0]], fake=fake[rows[1]], k=3, subsamples=0)))
    bootstrap = torch.tensor(redrawn).mean(0)
    for i in (0, 1):  # precision and recall
        assert values(score)[i] - bootstrap[i] > 5 * score[i].error


def test_quarters_too_small_for_a_neighbour_leave_errors_unknown():
    scores = prdc(real=cloud(20, 2), fake=cloud(20, 2, seed=1))
    assert all(math.isnan(it.error) for it in scores)


def test_the_same_seed_gives_the_same_errors():
    pair = {"real": cloud(100, 2), "fake": cloud(100, 2, seed=1)}
    first, second, third = (prdc(**pair, seed=seed) for seed in (0, 0, 1))
    assert values(first) == values(third)
    assert first.precision.error == second.precision.error != third.precision.error


# The ceiling, and what is warned of


def test_the_ceiling_is_that_of_one_half_against_the_other():
    ceiling = prdc_ceiling(real=cloud(2_000, 2), subsamples=0)
    assert isinstance(ceiling, PRDC)
    perfect = prdc(real=cloud(1_000, 2, seed=1), fake=cloud(1_000, 2, seed=2), subsamples=0)
    assert values(ceiling) == pytest.approx(values(perfect), abs=0.05)


def test_the_same_samples_twice_are_warned_of():
    x = cloud(50, 2)
    with pytest.warns(UserWarning, match="the same samples"):
        prdc(real=x, fake=x.clone(), subsamples=0)


def test_in_high_dimension_the_two_sides_are_unlike_and_that_is_warned_of():
    def sphere(radius, seed):
        x = cloud(800, 512, seed=seed)
        return radius * x / x.norm(dim=1, keepdim=True)

    with pytest.warns(UserWarning, match=r"in high dimension \(about 1\d\d, of 512 features\)"):
        inside = prdc(real=sphere(1.0, 0), fake=sphere(0.95, 1), subsamples=0)
    with pytest.warns(UserWarning, match="in high dimension"):
        outside = prdc(real=sphere(1.0, 0), fake=sphere(1.05, 1), subsamples=0)
    assert inside.precision.value > 0.99
    assert inside.recall.value < 0.3
    assert outside.precision.value < 0.3
    assert outside.recall.value > 0.99


def test_many_features_of_few_dimensions_are_not_warned_of():
    embed = cloud(5, 512, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prdc(real=cloud(300, 5) @ embed, fake=cloud(300, 5, seed=1) @ embed, subsamples=0)


@pytest.mark.parametrize("power", [-76, 63, 100])
def test_units_so_small_or_large_that_squares_exceed_single_precision_change_nothing(power):
    real, fake = cloud(120, 3).float(), cloud(100, 3, scale=1.4, seed=1).float()
    unit = 2.0**power
    found = prdc(real=unit * real, fake=unit * fake, subsamples=4)
    expected = prdc(real=real, fake=fake, subsamples=4)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(torch.stack(one), torch.stack(other))


def test_a_sample_far_out_is_in_no_ball_and_spoils_no_other():
    real, fake = cloud(60, 3).float(), cloud(60, 3, seed=1).float()
    fake[0] = 1e30
    scores = prdc(real=real, fake=fake, k=3, subsamples=0)
    expected = by_definition(real.double(), fake.double(), 3, False)
    assert values(scores) == pytest.approx(expected, abs=1e-6)
