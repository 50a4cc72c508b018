"""Two problems like that of Neyman and Scott, against quadrature and minimisation written out."""

import math

import mpmath
import pytest
import torch
from torch.distributions import MultivariateNormal

from rkl.studies.neyman_scott import lines, panel


def limits(estimates):
    """Mean of the estimates, and four standard errors."""
    return estimates.mean().item(), 4 * estimates.std().item() / math.sqrt(len(estimates))


# Errors in variables


@pytest.fixture(scope="module")
def points():
    return lines.simulate(8, 3, seed=7)


@pytest.mark.parametrize("name", list(lines.PRIORS)[:3])
def test_a_line_through_flat_places_is_one_integral_over_the_angle(name, points):
    """σ² given φ is inverse gamma: closed forms inside, mpmath outside."""
    chosen, n = lines.PRIORS[name], points.points
    found = lines.bayesian(points, chosen)
    a = n / 2 + chosen.power + chosen.half * n - 1
    for i in range(3):
        xx, xy, yy = (it[i].item() for it in (points.xx, points.xy, points.yy))

        def across(p, xx=xx, xy=xy, yy=yy):
            c, s = mpmath.cos(p), mpmath.sin(p)
            return s * s * xx - 2 * s * c * xy + c * c * yy

        def density(p, across=across):
            return across(p) ** -a * abs(mpmath.cos(p)) ** (n * chosen.tilt)

        def integral(f, density=density):
            middle = math.atan2(2 * xy, xx - yy) / 2  # noqa: B023
            around = [middle + d for d in (-math.pi / 2, -0.5, 0, 0.5, math.pi / 2)]
            return mpmath.quad(lambda p: f(p) * density(p), around)

        whole = integral(lambda p: 1)
        precision = integral(lambda p, across=across: 2 * a / across(p)) / whole
        assert found["reverse KL"][1][i].item() == pytest.approx(float(1 / precision), rel=1e-6)
        weights = [
            integral(lambda p, f=f, across=across: f(p) / across(p))
            for f in (
                lambda p: mpmath.cos(p) ** 2,
                lambda p: mpmath.cos(p) * mpmath.sin(p),
                lambda p: mpmath.sin(p) ** 2,
            )
        ]
        m = torch.tensor([[weights[0], weights[1]], [weights[1], weights[2]]], dtype=torch.float64)
        scatter = torch.tensor([[xx, xy], [xy, yy]], dtype=torch.float64)
        top = torch.linalg.eigh(m @ scatter @ m).eigenvectors[:, 1]
        assert found["reverse KL"][0][i].item() == pytest.approx(
            (top[1] / top[0]).item(), rel=1e-6
        )


def test_a_line_through_normal_places_is_that_of_a_plain_grid(points):
    """In slope and σ, with whole covariances, and the risks minimised over all numbers."""
    one = lines.Points(*(it[:1] for it in (points.xx, points.xy, points.yy)), points.points)
    z = torch.linalg.cholesky(lines._matrix(one)[0]).T  # points of the same scatter, and zeros
    z = torch.cat([z, torch.zeros(points.points - 2, 2).double()])
    phi = (torch.arange(240).double() + 0.5) / 240 * math.pi - math.pi / 2
    log_v = torch.linspace(-4, 6, 101).double()
    p, a = (it.flatten() for it in torch.meshgrid(phi, log_v, indexing="ij"))
    b, v = torch.stack([torch.ones_like(p), p.tan()], 1), a.exp()
    cov = v[:, None, None] * torch.eye(2).double() + 4 * b[:, :, None] * b[:, None, :]
    log_p = MultivariateNormal(torch.zeros(2).double(), cov).log_prob(z[:, None]).sum(0)
    w = log_p.softmax(0)  # flat in φ and log σ²
    gain = 4 * torch.linalg.solve(cov, b[:, :, None])[..., 0]  # E[ξ] = gain·z
    xi, left = z @ gain.T, 4 - 4 * (gain * b).sum(1)
    mu = xi[..., None] * b  # [points nodes 2]
    second = mu.square().sum((0, 2)) + points.points * left * b.square().sum(1)

    def risk(slope, places, t, act):
        m = places[:, None] * torch.stack([torch.ones_like(slope), slope])
        q = second - 2 * (mu * m[:, None]).sum((0, 2)) + m.square().sum()
        q = q / (2 * points.points)
        forward, reverse = (v + q) / t + (t / v).log() - 1, (t + q) / v - (t / v).log() - 1
        return w @ {"forward KL": forward, "reverse KL": reverse}.get(act, forward + reverse)

    found = lines.bayesian(one, lines.PRIORS["proper, x ~ N(0, 4)"])
    for act in ("forward KL", "reverse KL", "symmetric KL"):
        at = torch.cat([torch.ones(1).double(), z.sum(1) / 2, torch.zeros(1).double()])
        at.requires_grad_()
        fit = torch.optim.LBFGS(
            [at],
            max_iter=300,
            tolerance_grad=1e-11,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure(act=act, at=at, fit=fit):
            fit.zero_grad()
            loss = risk(at[0], at[1:-1], at[-1].exp(), act)
            loss.backward()
            return loss

        fit.step(closure)
        slope, t = found[act]
        assert slope.item() == pytest.approx(at[0].item(), rel=1e-4)
        assert t.item() == pytest.approx(at[-1].exp().item(), rel=1e-4)


def test_flat_in_x_leaves_least_squares_and_flat_along_the_line_the_nearest_line():
    data = lines.simulate(10_000, 12, seed=8)
    tilted = lines.bayesian(data, lines.PRIORS["flat in x, 1/σ"])
    along = lines.bayesian(data, lines.PRIORS["flat along the line, 1/σ"])
    squares, nearest = (
        lines.classical(data)[it][0] for it in ("least squares", "marginal likelihood")
    )
    assert tilted["reverse KL"][0].tolist() == pytest.approx(squares.tolist(), rel=1e-3)
    assert along["reverse KL"][0].tolist() == pytest.approx(nearest.tolist(), rel=1e-3)
    assert squares.mean().item() == pytest.approx(4 / 5, abs=0.005)  # Var x / (Var x + σ²)
    for name, limit in {"reverse KL": 1.0, "forward KL": 1.5, "intrinsic": 1.5}.items():
        mean, margin = limits(along[name][1])
        assert abs(mean - limit) < margin


# The panel


@pytest.fixture(scope="module")
def counts():
    return torch.tensor([[3.0, 1.0, 4.0, 6.0], [2.0, 2.0, 1.0, 0.0]], dtype=torch.float64)


def panel_grid(prior, counts):
    """Nodes of β with their weights, and of α for each pair of answers, on a plain fine grid."""
    beta = torch.linspace(-12, 14, 521).double()
    alpha = torch.linspace(-40, 40, 641).double()[:, None]
    first, second = alpha.sigmoid(), (alpha + beta).sigmoid()
    if prior.spread is None:
        density = (first * (1 - first) + second * (1 - second)).sqrt()
    else:
        density = (-0.5 * ((alpha - prior.centre) / prior.spread).square()).exp()
    said = [(a, b) for b in (0, 1) for a in (0, 1)]
    joint = torch.stack(
        [(first if a else 1 - first) * (second if b else 1 - second) * density for a, b in said]
    )
    log_beta = (counts @ joint.sum(1).log()) - beta.square() / 18
    return beta, alpha, log_beta.softmax(0), joint / joint.sum(1, keepdim=True)


@pytest.mark.parametrize("name", panel.PRIORS)
def test_panel_acts_solve_their_equations_on_a_plain_grid(name, counts):
    found = panel.bayesian(counts, panel.PRIORS[name])
    for i, row in enumerate(counts):
        beta, alpha, weight, given = panel_grid(panel.PRIORS[name], row)
        assert found["reverse KL"][i].item() == pytest.approx((weight @ beta).item(), rel=1e-5)
        p1 = (given * alpha.sigmoid()).sum(1) @ weight
        p2 = (given * (alpha + beta).sigmoid()).sum(1) @ weight

        def excess(b, p1=p1, p2=p2, row=row):
            """Of the fitted over the expected second answers, each person's total fitted."""
            low, high = torch.full((4,), -60.0).double(), torch.full((4,), 60.0).double()
            for _ in range(60):
                middle = (low + high) / 2
                over = middle.sigmoid() + (middle + b).sigmoid() > p1 + p2
                low, high = low.where(over, middle), middle.where(over, high)
            return (row * ((middle + b).sigmoid() - p2)).sum().item()

        forward = found["forward KL"][i].item()
        assert excess(forward - 1e-4) < 0 < excess(forward + 1e-4)


def test_the_panel_goes_where_its_posterior_goes():
    counts = panel.simulate(10_000, 12, seed=9)
    classical = panel.classical(counts)
    for name, limit in {"maximum likelihood": 2.0, "conditional likelihood": 1.0}.items():
        mean, margin = limits(classical[name])
        assert abs(mean - limit) < margin
    truth, wrong, jeffreys = (panel.bayesian(counts, it) for it in panel.PRIORS.values())
    mean, margin = limits(truth["reverse KL"])
    assert abs(mean - 1) < margin
    assert truth["forward KL"].mean().item() < 0.85
    assert wrong["reverse KL"].mean().item() > 1.3
    mean, margin = limits(jeffreys["reverse KL"])
    assert abs(mean - 2.002) < margin  # where the expected log likelihood is highest


def test_maximum_likelihood_is_infinite_where_nobody_changed_one_way():
    found = panel.classical(torch.tensor([[3.0, 0.0, 2.0, 5.0]]).double())
    assert found["maximum likelihood"].tolist() == [math.inf]
