"""Training steps and sampling of affine couplings, against normflows, nflows and their products.

    python benchmarks/flows.py --out benchmarks/figures/flows.csv

One architecture everywhere: as many couplings of two halves, each with a perceptron of two hidden
layers that yields shift and log scale. A step is a log-density, its gradient and Adam. The floor
is the products of matrices that no such flow can spare: three for every layer of every perceptron
in a step (forward, and the gradients of weights and inputs), one in sampling. Time is CPU time of
one thread; contenders and floor take turns, and a ratio is the median, over repetitions, of a
contender's time over the mean of the floors right before and right after. Splines are measured
beside them: of zuko, which rkl builds, and of the two peers, with their own networks.
"""

import argparse
import csv
import os
import statistics
import time

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch reads them
    os.environ[variable] = "1"

import quick  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from rkl.flows import NSF, Coupling  # noqa: E402

GOAL = 1.5
COUPLINGS, BINS = 8, 8
SIZES = {"small": (16, 64, 512), "large": (64, 256, 1024)}  # coordinates, hidden, batch
FIELDS = ("size", "what", "flow", "repetition", "cpu_s", "floor", "ratio", "load")


class Products:
    """The floor."""

    def __init__(self, features, hidden, batch):
        half = features // 2
        layers = [(half, hidden), (hidden, hidden), (hidden, features)]
        self.pairs = [
            (torch.randn(batch, i), torch.randn(o, i), torch.randn(batch, o))
            for _ in range(COUPLINGS)
            for i, o in layers
        ]

    def train(self):
        for x, weight, gradient in self.pairs:
            x @ weight.T
            gradient @ weight
            gradient.T @ x

    def sample(self):
        for x, weight, _ in self.pairs:
            x @ weight.T


class Contender:
    """A flow with its optimiser."""

    def __init__(self, module, log_prob, sample, x):
        self.log_prob, self.draw, self.x = log_prob, sample, x
        self.optimizer = torch.optim.Adam(module.parameters(), lr=1e-5, fused=True)

    def train(self):
        self.optimizer.zero_grad()
        (-self.log_prob(self.x).mean()).backward()
        self.optimizer.step()

    @torch.no_grad()
    def sample(self):
        self.draw(len(self.x))


def ours(architecture):
    def build(features, hidden, x):
        flow = architecture(hidden).build((features,))
        return Contender(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), x)

    return build


def normflows(spline):
    def build(features, hidden, x):
        import normflows as nf

        flows = []
        for _ in range(COUPLINGS):
            if spline:
                flows.append(
                    nf.flows.CoupledRationalQuadraticSpline(features, 1, hidden, num_bins=BINS)
                )
                continue
            net = nf.nets.MLP([features // 2, hidden, hidden, features], init_zeros=True)
            flows += [
                nf.flows.AffineCouplingBlock(net),
                nf.flows.Permute(features, mode="swap"),
            ]
        model = nf.NormalizingFlow(nf.distributions.DiagGaussian(features), flows)
        return Contender(model, model.log_prob, model.sample, x)

    return build


def nflows(spline):
    def build(features, hidden, x):
        from nflows import distributions, flows, transforms
        from nflows.nn import nets

        class Perceptron(nets.MLP):
            def forward(self, inputs, context=None):
                return super().forward(inputs)

        def perceptron(inputs, outputs):
            widths = [inputs], [outputs], [hidden, hidden]
            return Perceptron(*widths, activation=nn.functional.silu)

        def residual(inputs, outputs):
            return nets.ResidualNet(inputs, outputs, hidden, num_blocks=1)

        steps = []
        for i in range(COUPLINGS):
            mask = (torch.arange(features) + i) % 2
            if spline:
                how = {"num_bins": BINS, "tails": "linear", "tail_bound": 5.0}
                step = transforms.PiecewiseRationalQuadraticCouplingTransform
                steps.append(step(mask, residual, **how))
            else:
                steps.append(transforms.AffineCouplingTransform(mask, perceptron))
        base = distributions.StandardNormal([features])
        model = flows.Flow(transforms.CompositeTransform(steps), base)
        return Contender(model, model.log_prob, model.sample, x)

    return build


def contenders(asked):
    found = {
        "rkl, compiled": ours(lambda hidden: Coupling(COUPLINGS, (hidden, hidden), compiled=True)),
        "rkl": ours(lambda hidden: Coupling(COUPLINGS, (hidden, hidden))),
        "normflows": normflows(False),
        "nflows": nflows(False),
    }
    if asked.splines:
        found |= {
            "zuko spline": ours(lambda hidden: NSF(COUPLINGS, (hidden, hidden), BINS, passes=2)),
            "normflows spline": normflows(True),
            "nflows spline": nflows(True),
        }
    if not asked.peers:
        found = {name: it for name, it in found.items() if "flows" not in name}
    return found


def timed(work, least=0.05):
    """CPU time of one call, over as many as take a while."""
    start, calls = time.process_time(), 0
    while (spent := time.process_time() - start) < least:
        work()
        calls += 1
    return spent / calls


def measure(size, asked):
    features, hidden, batch = SIZES[size]
    torch.manual_seed(0)
    x = torch.randn(batch, features)
    floor = Products(features, hidden, batch)
    built = {name: it(features, hidden, x) for name, it in contenders(asked).items()}
    for what in ("train", "sample"):
        for it in (floor, *built.values()):  # compiles, and allocates
            for _ in range(3):
                getattr(it, what)()
        before = timed(getattr(floor, what))
        for repetition in range(asked.repeats):
            for name, it in built.items():
                spent = timed(getattr(it, what))
                after = timed(getattr(floor, what))
                least, before = (before + after) / 2, after
                row = (size, what, name, repetition, spent, least, spent / least)
                yield dict(zip(FIELDS, (*row, os.getloadavg()[0]), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--splines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", help="a csv of all repetitions")
    asked = quick.parse(parser, sizes=["small"], repeats=1, peers=False)
    torch.set_num_threads(1)
    rows = [row for size in asked.sizes for row in measure(size, asked)]
    for size, what, name in dict.fromkeys((it["size"], it["what"], it["flow"]) for it in rows):
        same = [it for it in rows if (it["size"], it["what"], it["flow"]) == (size, what, name)]
        ratio, spent = (statistics.median(it[key] for it in same) for key in ("ratio", "cpu_s"))
        print(f"{size:6} {what:7} {name:17} {1e3 * spent:9.2f} ms {ratio:7.2f} x the products")
    if asked.out:
        with open(asked.out, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
