"""Every figure of rkl.plots on a real result, each by the function that the page shows.

The results are computed when the page is made: a bump fitted to two under several divergences,
posterior draws, samples, and lattices.
"""

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal

import rkl
from rkl import plots
from rkl.bayes import bayes_act
from rkl.metrics import pr_curve, pr_spectrum, prdc
from rkl.plots import lattices, operating, trade_offs
from rkl.sample import XY, MoG8, Phi4, Rings, markov_chain

DIVERGENCES = {"forward KL": rkl.KL(), "AKL": rkl.AKL(mu=0.5), "reverse KL": rkl.ReverseKL()}
STEPS = 300


@cache
def bump_fits() -> tuple[Tensor, dict[str, Tensor]]:
    """log p of two bumps by rank, and log q [steps, atoms] of one bump while it is fitted."""
    x = torch.linspace(-6, 6, 121)
    bumps = 0.6 * Normal(-2.2, 0.5).log_prob(x).exp() + 0.4 * Normal(2.2, 0.8).log_prob(x).exp()
    logp, fits = (bumps / bumps.sum()).log(), {}
    for name, divergence in DIVERGENCES.items():
        theta = torch.tensor([-2.0, 0.0], requires_grad=True)  # mean, log width
        optimizer = torch.optim.Adam([theta], lr=0.03)
        steps = []
        for _ in range(STEPS):
            logits = -(((x - theta[0]) / theta[1].exp()) ** 2) / 2
            steps.append(logits.detach().log_softmax(-1))
            loss = rkl.exact(divergence, p=logp[None], q=logits[None], compiled=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fits[name] = torch.stack(steps)
    order = logp.argsort(descending=True)
    return logp[order], {name: logq[:, order] for name, logq in fits.items()}


def training_curves() -> Figure:
    """What each fit minimised, step by step."""
    logp, fits = bump_fits()
    runs = {
        name: (range(STEPS), DIVERGENCES[name](logp.expand_as(logq), logq).numpy())
        for name, logq in fits.items()
    }
    return plots.training_curves(runs, label="its own divergence (nats)")


def head_tail() -> Figure:
    """Target and model by rank under the target, early and late; the dotted line ends the head."""
    logp, fits = bump_fits()
    shown = {name: {k: q[k].exp().numpy() for k in (0, 40, 299)} for name, q in fits.items()}
    head = int((logp.exp().cumsum(0) <= 0.5).sum())
    return plots.head_tail(logp.exp().numpy(), shown, head=head, logarithmic=False)


def head_tail_by_step() -> Figure:
    """The same in one number each, the gap over head and tail."""
    logp, fits = bump_fits()
    head = int((logp.exp().cumsum(0) <= 0.5).sum())
    gaps = {name: (logp.exp() - logq.exp()).abs() for name, logq in fits.items()}
    runs = {
        k: (it[:, :head].sum(-1).numpy(), it[:, head:].sum(-1).numpy()) for k, it in gaps.items()
    }
    return plots.head_tail_by_step(range(STEPS), runs)


def divergence_by_rank() -> Figure:
    """Where along the ranking of the target the reverse KL of each fit arises."""
    logp, fits = bump_fits()
    edges = [0, 5, 10, 20, 40, 80, 121]
    by_rank = {}
    for name, logq in fits.items():
        terms = rkl.ReverseKL().excess(logp, logq[-1])
        by_rank[name] = [terms[a:b].sum().item() for a, b in zip(edges, edges[1:], strict=False)]
    return plots.divergence_by_rank(edges, by_rank, label="reverse KL (nats)")


def precision_recall() -> Figure:
    """Precision and recall of each fit, exactly."""
    logp, fits = bump_fits()
    curves = {name: pr_curve(p=logp, q=logq[-1]) for name, logq in fits.items()}
    pairs = {name: (it.precision.numpy(), it.recall.numpy()) for name, it in curves.items()}
    return plots.precision_recall(pairs, between=("target", "model"))


def bars() -> Figure:
    """The mass that differs between each fit and the target."""
    logp, fits = bump_fits()
    values = {name: rkl.TotalVariation()(logp, logq[-1]).item() for name, logq in fits.items()}
    return plots.bars(values, label="total variation distance")


def spectrum() -> Figure:
    """The slopes of the precision-recall curve that a divergence looks at."""
    slopes, weights = torch.logspace(-2, 2, 81, dtype=torch.float64), {}
    for divergence in (rkl.KL(), rkl.ReverseKL(), rkl.JensenShannon()):
        density = pr_spectrum(divergence, slopes).density
        weights[repr(divergence)] = (density * slopes * slopes.clamp_max(1.0)).numpy()
    return trade_offs.spectrum(slopes.numpy(), weights)


def posterior() -> Figure:
    """Six measurements of one quantity: posterior, estimates, and the region of the act."""
    y = np.array([4.1, 5.0, 3.2, 6.3, 4.4, 5.6])
    random = np.random.default_rng(0)
    sigma = (((y - y.mean()) ** 2).sum() / random.chisquare(5, (4, 500))) ** 0.5
    mu = y.mean() + sigma / 6**0.5 * random.normal(size=sigma.shape)
    draws = {"mu": torch.tensor(mu), "sigma": torch.tensor(sigma)}
    return bayes_act(draws, "normal(loc=mu, scale=sigma)", rkl.ReverseKL()).plot(prob=0.9)


def estimates() -> Figure:
    """Neyman and Scott's problem: pairs that share a variance, of which the truth is 1."""
    random, sizes = np.random.default_rng(0), np.array([10, 30, 100, 300, 1000])
    means: dict[str, list] = {"maximum likelihood": [], "reverse KL": []}
    for groups in sizes:
        y = random.normal(size=(200, groups, 2))
        squares = ((y - y.mean(-1, keepdims=True)) ** 2).sum((-1, -2))
        for name, degrees in (("maximum likelihood", 2 * groups), ("reverse KL", groups)):
            means[name].append((squares.mean() / degrees, squares.std() / degrees))
    panel = {name: (sizes, *np.transpose(pairs)) for name, pairs in means.items()}
    return plots.estimates({"200 data sets": panel}, truth=1.0, label="variance", columns=1)


@cache
def eight() -> dict[str, Tensor]:
    """Draws of eight Gaussians, and three models of them: wider, narrower and one-sided."""
    torch.manual_seed(0)
    target, scale = MoG8(), torch.tensor([[0.3]])
    real, again, half = (target.sample(scale, (600,))[:, 0] for _ in range(3))
    return {
        "target": real,
        "the same": again,
        "wider": again + 0.6 * torch.randn_like(again),
        "one half": half[half[:, 0] > 0],
    }


def operating_points() -> Figure:
    """Precision and recall of samples by their nearest neighbours, with errors."""
    laws = eight()
    points = {}
    for name in ("the same", "wider", "one half"):
        scores = prdc(real=laws["target"], fake=laws[name])
        pairs = [(float(it.value), float(it.error)) for it in (scores.recall, scores.precision)]
        points[name] = pairs[0], pairs[1]
    return operating.operating_points(points)


def clouds() -> Figure:
    """The samples themselves."""
    return operating.clouds({k: v.numpy() for k, v in eight().items()}, columns=2, reach=6.0)


def planes() -> Figure:
    """Exact draws of concentric rings at two widths."""
    torch.manual_seed(0)
    widths = {f"width {s}": Rings().sample(torch.tensor([[s]]), (800,))[:, 0] for s in (0.05, 0.2)}
    return lattices.planes({name: x.numpy() for name, x in widths.items()}, columns=2)


@cache
def angles() -> Tensor:
    """The XY model of 16 x 16 by its heat bath, [temperatures, chains, draws, sites]."""
    model, temperatures = XY(side=16), torch.tensor([[0.4], [0.9], [1.6]])
    walk = markov_chain(model, temperatures, draws=20, chains=16, warm_up=200, every=5, seed=0)
    assert walk.x is not None
    return walk.x


def wheels() -> Figure:
    """Angles as hues, vortices as discs: few and bound in the cold, many and free in the heat."""
    shown = {f"T = {t} J": x[0, -1] for t, x in zip((0.4, 0.9, 1.6), angles(), strict=True)}
    grids = {at: x.unflatten(-1, (16, 16)).numpy() for at, x in shown.items()}
    turns = {
        at: XY(side=16).vorticity(x).unflatten(-1, (16, 16)).numpy() for at, x in shown.items()
    }
    return lattices.wheels(grids, turns)


def histograms() -> Figure:
    """The magnetization of the draws at each temperature."""
    m = {}
    for t, x in zip((0.4, 0.9, 1.6), angles(), strict=True):
        m[f"T = {t} J"] = XY(side=16).observables(x, torch.tensor([t]))["magnetization"]
    panels = {at: {"heat bath": values.flatten().numpy()} for at, values in m.items()}
    return lattices.histograms(panels, label="magnetization per site", columns=3)


def against() -> Figure:
    """Energy per site against temperature; the errors are those of 16 independent chains."""
    model, temperatures = XY(side=16), torch.tensor([0.4, 0.9, 1.6])
    energy = model.observables(angles(), temperatures[:, None, None, None])["energy"].mean(-1)
    series = temperatures.numpy(), energy.mean(-1).numpy(), (energy.std(-1) / 4).numpy()
    return lattices.against(
        {"energy (J per site)": {"heat bath": series}}, label="T (J)", columns=1
    )


def montages() -> Figure:
    """Fields of φ⁴ as pictures, at two couplings."""
    model = Phi4(side=12)
    walk = markov_chain(
        model, torch.tensor([[4.5], [7.0]]), draws=1, chains=12, warm_up=100, seed=0
    )
    assert walk.x is not None
    fields = walk.x[:, :, 0].unflatten(-1, (12, 12)).numpy()
    return operating.montages({"λ = 4.5": fields[0], "λ = 7": fields[1]}, columns=2, across=4)


FIGURES: dict[str, tuple[str, ...]] = {
    "Distillation and divergences": (
        *("training_curves", "head_tail", "head_tail_by_step", "divergence_by_rank"),
        *("precision_recall", "bars", "spectrum"),
    ),
    "Estimates": ("posterior", "estimates"),
    "Samples": ("operating_points", "clouds", "planes", "montages"),
    "Lattices": ("wheels", "histograms", "against"),
}


INTRODUCTION = """# Gallery

Every figure function of `rkl.plots` on a real result, computed when this page was made. They
take arrays and return a figure of matplotlib; `rkl.plots.to_svg` puts one into a page, in its
colours. The fits of one bump to two come from

```python
{source}```
"""
ENTRY = """### {name}

{caption}

```{{raw}} html
<div class="drawing">{svg}</div>
```

````{{dropdown}} Code
```python
{source}```
````
"""


def write_gallery(folder: Path, write: Callable[[Path, str], None]) -> None:
    """Write the page: each figure as SVG in the page's colours, and the code below it."""
    parts = [INTRODUCTION.format(source=inspect.getsource(bump_fits))]
    for title, names in FIGURES.items():
        parts.append(f"## {title}\n")
        for name in names:
            make = globals()[name]
            caption, source = inspect.getdoc(make) or "", inspect.getsource(make)
            svg = plots.to_svg(make(), caption)
            parts.append(ENTRY.format(name=name, caption=caption, svg=svg, source=source))
    write(folder / "figures.md", "\n".join(parts))
