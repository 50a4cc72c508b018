"""Draw docs/images/one-bump.png: one bump fitted to two, under four divergences.

A target p of two bumps on a grid, and a model q that can only be one bump: it must miss something
or invent something. All fits begin at the left bump; where they end is the divergence's doing. A
model invents the mass it has where q > 10 p, and misses that of p where p > 10 q.

    python docs/images/one_bump.py docs/images/one-bump.png
"""

import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal

import rkl
from rkl.plots.style import GRID, INK, STYLE, blank, colour

STEPS = 800
DIVERGENCES = {
    "forward KL": rkl.KL(),
    "AKL, μ = 0.5": rkl.AKL(mu=0.5),
    "Jensen–Shannon": rkl.JensenShannon(),
    "reverse KL": rkl.ReverseKL(),
}
DARK = {INK: "#24292f", GRID: "#b8bec6"}  # on a white card, whatever the page around it


def two_bumps(x: Tensor) -> Tensor:
    """log p on the grid: 60 % of the mass in a narrow bump, 40 % in a wide one."""
    bumps = 0.6 * Normal(-2.2, 0.5).log_prob(x).exp() + 0.4 * Normal(2.2, 0.8).log_prob(x).exp()
    return (bumps / bumps.sum()).log()


def fit(divergence: rkl.Divergence, logp: Tensor, x: Tensor) -> Tensor:
    """log q of the bump that Adam reaches from mean −2 and width 1."""
    mean, log_width = torch.tensor(-2.0, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_width], lr=0.03)
    for _ in range(STEPS):
        logits = -(((x - mean) / log_width.exp()) ** 2) / 2
        loss = rkl.exact(divergence, p=logp[None], q=logits[None], compiled=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().log_softmax(-1)


def draw(x: Tensor, p: Tensor, fits: dict[str, Tensor]) -> Figure:
    style = {key: DARK.get(value, value) for key, value in STYLE.items()}
    with rc_context(style | {"axes.grid": False, "figure.facecolor": "white"}):
        figure = blank(640, 340)
        panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
        highest = max(float(q.max()) for q in (p, *fits.values()))
        for i, (axes, (name, q)) in enumerate(zip(panels, fits.items(), strict=True)):
            invented, missed = q[q > 10 * p].sum(), p[p > 10 * q].sum()
            axes.fill_between(x, p, color="#d0d7de", linewidth=0)
            axes.plot(x, q, color=colour(i), linewidth=2.2)
            axes.set_title(f"{name}: invents {invented:.0%}, misses {missed:.0%}")
            axes.set(xlim=(-6, 6), ylim=(0, 1.05 * highest), yticks=[])
            axes.spines["left"].set_visible(False)
    return figure


def main(path: Path) -> None:
    x = torch.linspace(-6, 6, 121)
    logp = two_bumps(x)
    fits = {name: fit(divergence, logp, x).exp() for name, divergence in DIVERGENCES.items()}
    for name, q in fits.items():
        mean = (q * x).sum()
        print(f"{name:15} mean {mean:5.2f}  width {(q * (x - mean) ** 2).sum().sqrt():.2f}")
    draw(x, logp.exp(), fits).savefig(path, dpi=144)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/images/one_bump.py FILE")
    main(Path(sys.argv[1]))
