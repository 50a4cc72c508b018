import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from catalogued import F, every_f, pair

import rkl
from rkl.divergences import (
    AKL,
    KL,
    FDivergence,
    JensenShannon,
    PrecisionHalf,
    PrecisionRecall,
    RecallHalf,
    ReverseKL,
    TotalVariation,
)
from rkl.metrics.precision_recall import pr_curve, pr_spectrum, pr_weight
from rkl.plots import to_svg
from rkl.plots.trade_offs import spectrum

BUT_KL = [0.5 * KL() + 0.5 * TotalVariation(), PrecisionRecall(0.3) + 2.0 * PrecisionRecall(4.0)]
SLOPES = torch.tensor([0.01, 0.3, 1.0, 2.0, 50.0], dtype=torch.float64)


@dataclass(frozen=True)
class Hinges(FDivergence):
    """A user's own, with kinks at ratios of 1/2 and 3: f(r) = max(1/2 - r, 0) + max(r - 3, 0)."""

    def integrand(self, logp, logq):
        p, q = logp.exp(), logq.exp()
        return torch.relu(q / 2 - p) + torch.relu(p - 3 * q)


def lacks(p, q, slopes):
    """D_λ at each slope."""
    return slopes.clamp_max(1) - pr_curve(p=p, q=q, slopes=slopes).precision


def mixed(divergence, p, q):
    """Density and atoms over what precision lacks: Gauss-Legendre where D_λ is linear in λ."""
    bends = {it for _, term in terms(divergence) if (it := getattr(term, "lam", None))}
    both = p.exp() * q.exp() > 0
    ends = torch.tensor(sorted({*(q - p)[both].tolist(), 0.0, *map(math.log, bends)}))
    cells = (torch.linspace(a, b, 3) for a, b in itertools.pairwise(ends.tolist()))
    pieces = torch.unique(torch.cat([it.double() for it in cells]))
    nodes, weights = (torch.from_numpy(it) for it in np.polynomial.legendre.leggauss(16))
    half = pieces.diff()[:, None] / 2
    u = (pieces[:-1, None] + half + half * nodes).flatten()
    spectrum = pr_spectrum(divergence, u.exp())
    dense = ((half * weights).flatten() * spectrum.density * u.exp() * lacks(p, q, u.exp())).sum()
    missed, invented = p.exp()[q == -math.inf].sum(), q.exp()[p == -math.inf].sum()
    far = torch.tensor([1e-80, ends[0].exp(), ends[-1].exp(), 1e80], dtype=torch.float64)
    below, _, above = pr_weight(divergence, far)
    inside = (spectrum.atom_slopes > far[1]) & (spectrum.atom_slopes < far[2])
    total = dense + missed * below + invented * above
    if inside.any():
        at_atoms = lacks(p, q, spectrum.atom_slopes[inside])
        total = total + spectrum.atom_weights[inside] @ at_atoms
    return total


def terms(divergence):
    return rkl.divergences.base.weighted_terms(divergence)


@pytest.mark.parametrize("divergence", [*F, *BUT_KL, Hinges()], ids=repr)
def test_density_and_atoms_reproduce_the_divergence(divergence):
    p, q = pair(7, scale=1.5)
    torch.testing.assert_close(mixed(divergence, p, q), divergence(p, q), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("divergence", [*F, *BUT_KL, Hinges()], ids=repr)
@pytest.mark.parametrize("missing", ["p", "q"])
def test_the_tails_carry_what_only_one_of_the_laws_has(divergence, missing):
    p, q = pair(7, scale=1.5, seed=2)
    hole = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0, -math.inf, 0.0])
    if missing == "p":
        p = (p + hole).log_softmax(-1)
    else:
        q = (q + hole).log_softmax(-1)
    expected = divergence(p, q)
    if expected.isfinite():
        torch.testing.assert_close(mixed(divergence, p, q), expected, rtol=1e-6, atol=1e-9)
    else:
        assert mixed(divergence, p, q) > 2  # and without end, were ratios above 1e80


DENSITIES = {  # arXiv 2302.00628, table 1: f''(1/λ) / λ³
    "kl": (KL(), lambda x: x**-2),
    "reverse-kl": (ReverseKL(), lambda x: 1 / x),
    "js": (JensenShannon(), lambda x: 1 / (2 * x * (1 + x))),
    "precision half": (PrecisionHalf(0.5), lambda x: x**-2 * (x > 0.5)),
    "recall half": (RecallHalf(0.5), lambda x: x**-2 * (x < 0.5)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_the_density_is_the_one_derived_by_hand(name):
    divergence, by_hand = DENSITIES[name]
    torch.testing.assert_close(pr_spectrum(divergence, SLOPES).density, by_hand(SLOPES))


@pytest.mark.parametrize("lam", [1e-5, 0.1, 1.0, 3.7, 1e6])
def test_a_precision_recall_divergence_is_one_atom_of_weight_one(lam):
    spectrum = pr_spectrum(PrecisionRecall(lam))
    assert not spectrum.density.any()
    assert spectrum.atom_slopes.tolist() == pytest.approx([lam], rel=1e-9)
    assert spectrum.atom_weights.tolist() == pytest.approx([1], rel=1e-9)


def test_total_variation_has_an_atom_at_one_and_sums_have_all_of_theirs():
    whole = TotalVariation() + 0.1 * PrecisionRecall(1.01) + 1e-3 * PrecisionRecall(20.0) + KL()
    spectrum = pr_spectrum(whole)
    assert spectrum.atom_slopes.tolist() == pytest.approx([1, 1.01, 20], rel=1e-9)
    assert spectrum.atom_weights.tolist() == pytest.approx([1, 0.1, 1e-3], rel=1e-6)
    assert pr_spectrum(TotalVariation()).atom_slopes.tolist() == [1.0]


def test_the_kinks_of_a_divergence_of_ones_own_are_found():
    spectrum = pr_spectrum(Hinges())
    assert spectrum.atom_slopes.tolist() == pytest.approx([1 / 3, 2], rel=1e-9)
    assert spectrum.atom_weights.tolist() == pytest.approx([3, 0.5], rel=1e-9)


@every_f
def test_smooth_divergences_have_no_atoms_and_no_weight_is_negative(divergence):
    spectrum = pr_spectrum(divergence, torch.logspace(-6, 6, 97, dtype=torch.float64))
    kinked = isinstance(divergence, TotalVariation | PrecisionRecall)
    assert len(spectrum.atom_slopes) == kinked
    assert (spectrum.density >= -1e-15 * spectrum.density.max()).all()


@every_f
def test_the_weights_of_bands_are_the_integral_of_the_density_and_the_atoms(divergence):
    edges = torch.tensor([0.02, 0.4, 1.5, 30.0], dtype=torch.float64)
    for a, b in itertools.pairwise(edges.tolist()):
        (weight,) = pr_weight(divergence, torch.tensor([a, b], dtype=torch.float64))
        # PrecisionHalf's density jumps: midpoints of 4,000 cells are within 2e-3 of it.
        u = torch.linspace(math.log(a), math.log(b), 4_001, dtype=torch.float64)
        lam = ((u[1:] + u[:-1]) / 2).exp()
        spectrum = pr_spectrum(divergence, lam)
        integral = (u.diff() * lam * spectrum.density * lam.clamp_max(1)).sum()
        inside = (spectrum.atom_slopes > a) & (spectrum.atom_slopes < b)
        caps = spectrum.atom_slopes.clamp_max(1)
        integral += (spectrum.atom_weights * caps)[inside].sum()
        torch.testing.assert_close(weight, integral, rtol=2e-3, atol=1e-9)


@every_f
def test_all_weights_add_up_to_the_divergence_of_laws_that_share_nothing(divergence):
    logp = torch.tensor([0.0, -math.inf], dtype=torch.float64)
    most = divergence(logp, logp.flip(0))
    (total,) = pr_weight(divergence, torch.tensor([1e-100, 1e100], dtype=torch.float64))
    if most.isfinite():
        torch.testing.assert_close(total, most, rtol=1e-6, atol=0)
    else:
        assert total > 200


def test_exchanging_the_laws_mirrors_the_spectrum():
    there, back = (pr_spectrum(it, SLOPES) for it in (KL(), ReverseKL()))
    mirrored = pr_spectrum(ReverseKL(), 1 / SLOPES).density * SLOPES**-3
    torch.testing.assert_close(there.density, mirrored)
    assert not torch.allclose(there.density, back.density)


def test_what_is_no_f_divergence_has_no_spectrum():
    for function in (pr_spectrum, pr_weight):
        with pytest.raises(TypeError, match="divergence must be an f-divergence .* AKL"):
            function(AKL(), SLOPES)


@pytest.mark.parametrize("edges", [[1.0], [2.0, 1.0], [0.0, 1.0], [1.0, math.inf]])
def test_edges_are_rising_slopes(edges):
    with pytest.raises(ValueError, match="edges must be two slopes at least, rising; got"):
        pr_weight(KL(), torch.tensor(edges))


def test_the_picture_has_a_line_for_each_divergence_and_a_needle_for_each_atom():
    slopes, names = [0.25, 1.0, 4.0], ["kl", "tv"]
    weights = {"kl": [1.0, 0.5, 0.1], "tv": [0.0, 1.0, 0.0]}
    figure = spectrum(slopes, weights, atoms={"tv": [(1.0, 0.5)]})
    (axes,) = figure.axes
    drawn = [line.get_ydata() for line in axes.lines]
    assert [list(it) for it in drawn[:2]] == [weights["kl"], weights["tv"]]
    assert list(drawn[2]) == [0, 1]  # the needle, as high as the largest
    svg = to_svg(figure, "spectrum")
    assert all(name in svg for name in names)
    assert "precision" in svg
