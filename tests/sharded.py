"""One problem whose vocabulary several processes share; run as one of them by test_sharded.py."""

import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import catalogued
import torch
import torch.distributed as dist

import rkl

TOKENS, WIDTH, VOCAB = 9, 5, 38
SIZES = {2: (21, 17), 4: (4, 15, 9, 10)}  # atoms of each process
TEMPERED = {"scale": 0.8, "softcap": 9.0, "temperature": 1.7}
PADDING = [0, 5]  # tokens without a weight, whose hidden states are no numbers


def heads(*, masked=(), ties=False, padded=False, dtype=torch.float64):
    """The hidden states, weights and biases of teacher and student."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = []
    for scale in (1.5, 1.0):
        bias = random(VOCAB)
        bias[list(masked)] = -math.inf
        made.append([random(TOKENS, WIDTH), scale * random(VOCAB, WIDTH), bias])
    if ties:  # rows of a teacher with few different logits
        made[0][1], made[0][2] = made[0][1] * 0, (made[0][2] * 1.5).round()
    for hidden, *_ in made if padded else ():
        hidden[PADDING] = math.nan
    return [[x.to(dtype) for x in one] for one in made]


def token_weights(padded=False):
    weight = torch.linspace(0.5, 1.5, TOKENS, dtype=torch.float64)
    if padded:
        weight[PADDING] = 0.0
    return weight / weight.sum()


def compare(divergence, *, group=None, cut=slice(None), teacher="head", how=(), **settings):
    """The loss of one process, or of the whole, and its gradients."""
    named = {name: settings.pop(name, False) for name in ("ties", "padded")}
    of_p, of_q = heads(masked=settings.pop("masked", ()), **named)
    parameters = [of_q[0].clone(), of_q[1][cut].clone(), of_q[2][cut].clone()]
    for x in parameters:
        x.requires_grad_()
    q = rkl.LinearHead(*parameters, **dict(how), group=group)
    p = known(teacher, of_p, how, group, cut)
    weight = token_weights(named["padded"])
    loss = rkl.exact(divergence, p=p, q=q, weight=weight, **settings)
    (3.0 * loss).backward()
    values = loss.detach()[None]
    if settings.get("chunk"):
        values = rkl.per_token({"it": divergence}, p=p, q=q)["it"]
    return loss.detach(), values, *(x.grad for x in parameters)


def known(teacher, of_p, how, group, cut):
    hidden, weight, bias = of_p
    whole = rkl.LinearHead(hidden, weight, bias, **dict(how))
    logits = hidden @ weight.T + bias
    match teacher:
        case "head":
            return whole._replace(weight=weight[cut], bias=bias[cut], group=group)
        case "whole head":
            return whole
        case "logits":
            return logits
        case "top k":
            return rkl.TopK(*logits.log_softmax(-1).topk(6))
        case "draws":
            return rkl.draw(logits, 8, generator=torch.Generator().manual_seed(1))
    raise ValueError(teacher)


@dataclass(frozen=True)
class _Careless(rkl.Divergence):
    """A divergence that says that it reduces its rows, and leaves one reduction out."""

    reduces_rows = True

    def held(self, logp, logq, *inputs):
        return (torch.minimum(logp, logq).exp().sum(-1, keepdim=True),)

    def integrand(self, logp, logq, accepted):
        return (1 + accepted) * rkl.KL().integrand(logp, logq)

    def excess(self, logp, logq, accepted):
        return (1 + accepted) * rkl.KL().excess(logp, logq)


@dataclass(frozen=True)
class _Split(rkl.Divergence):
    """A divergence of a user's whose weight needs the sorted row."""

    def held(self, logp, logq, *inputs):
        return (logp.sort(-1).values[..., :1].exp(),)

    def integrand(self, logp, logq, w):
        return (1 + w) * rkl.KL().integrand(logp, logq)

    def excess(self, logp, logq, w):
        return (1 + w) * rkl.KL().excess(logp, logq)


def problems():
    """Every divergence by its repr, and what else may differ, by name."""
    tempered = {"how": tuple(TEMPERED.items()), "padded": True, "masked": (1, 2, 3, 30, 37)}
    every = {repr(it): (it, tempered) for it in catalogued.ALL}
    every |= {f"{it} in chunks": (it, {"chunk": 4}) for it in (rkl.KL(), rkl.AKL(), rkl.AMiD())}
    hard = {"labels": torch.arange(TOKENS) * 4, "hard_label_weight": 0.5}
    for it in (rkl.KL(), rkl.AKL(), rkl.AMiD(), 0.5 * rkl.AKL() + rkl.NegLogAcceptance()):
        every |= {f"{it} and labels": (it, hard | tempered)}
        every |= {f"{it} masked to a part": (it, {"masked": range(21)})}
        every |= {f"{it}, {known}": (it, {"teacher": known}) for known in TEACHERS[1:4]}
    every |= {f"{it}, draws": (it, {"teacher": "draws"}) for it in (rkl.KL(), rkl.ReverseKL())}
    for mu in (0.0, 0.25, 0.5, 0.75, 0.97):
        for straddle in ("head", "tail"):
            it = rkl.AKL(mu, straddle=straddle)
            every[f"{it} of ties"] = (it, {"ties": True})
    return every


TEACHERS = "head", "whole head", "logits", "top k", "draws"


def count_bytes(traffic):
    """Let the collectives note the bytes that each process gives them."""
    whole = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        traffic.append(tensor.numel() * tensor.element_size())
        return whole(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for name in ("all_gather", "all_gather_into_tensor", "all_to_all", "broadcast", "gather"):
        setattr(dist, name, None)  # an all_reduce is all that is used


def bytes_per_token(group, rank, count, vocab, divergence):
    """Bytes of one process for 8 tokens more."""
    traffic, sums = [], []
    count_bytes(traffic)
    for tokens in (8, 16):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, tokens, WIDTH, generator=generator)
        weight = torch.randn(vocab, WIDTH, generator=generator).chunk(count)[rank].requires_grad_()
        q = rkl.LinearHead(hidden[1].requires_grad_(), weight, group=group)
        p = rkl.LinearHead(hidden[0].detach(), weight.detach(), group=group)
        traffic.clear()
        rkl.exact(divergence, p=p, q=q).backward()
        sums.append(sum(traffic))
    return (sums[1] - sums[0]) / 8


def refusal(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refusals(group, rank, cut):
    """What is said where processes differ, or a divergence needs whole rows."""
    other = rkl.KL() if rank == 0 else rkl.ReverseKL()

    def of(p=None, q=None, divergence: rkl.Divergence = rkl.KL(), **settings):
        (h, w, b), (hidden, weight, bias) = heads()
        whole = rkl.LinearHead(hidden, weight[cut], bias[cut], group=group)
        teacher = rkl.LinearHead(h, w[cut], b[cut], group=group)
        return refusal(
            lambda: rkl.exact(
                divergence,
                p=teacher._replace(**(p or {})),
                q=whole._replace(**(q or {})),
                **settings,
            )
        )

    hidden = heads()[1][0]
    return {
        "whole rows": of(divergence=_Split()),
        "whole rows in a sum": of(divergence=rkl.KL() + 0.5 * _Split()),
        "other divergences": of(divergence=other),
        "other batches": of(q={"hidden": hidden + rank}),
        "other numbers of tokens": of(weight=token_weights() * (rank == 0) + token_weights(True)),
        "a bad argument in one": of(q={"scale": -1.0} if rank else {}),
        "compiled": of(compiled=True),
        "no group": of(q={"group": "tensor"}),
        "whole q": of(q={"group": None}),
        "a part too many": of(p={"weight": heads()[0][1], "bias": None}),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank, count = dist.get_rank(), dist.get_world_size()
    first = sum(SIZES[count][:rank])
    cut, group = slice(first, first + SIZES[count][rank]), dist.group.WORLD
    results = {
        name: compare(it, group=group, cut=cut, **settings)
        for name, (it, settings) in problems().items()
    }
    results["careless"] = compare(_Careless(), group=group, cut=cut)
    told = refusals(group, rank, cut)
    traffic = {
        repr(it): [bytes_per_token(group, rank, count, vocab, it) for vocab in (60, 3000)]
        for it in (cls() for cls in rkl.catalogue().values())
    }
    torch.save([results, told, traffic], folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.append(os.path.dirname(__file__))
    main(Path(sys.argv[1]))
