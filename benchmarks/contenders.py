"""What `linear_head.py` compares: one problem, and everybody's way to its two gradients.

A contender is a function of (problem, divergence, chunk) that returns (dX, dW), the
gradients of the mean divergence per token in the student's hidden states and in its head.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from rkl import AKL, KL, JensenShannon, LinearHead, ReverseKL, estimators, exact
from rkl.divergences import Divergence

STUDENT_WIDTH, TEACHER_WIDTH = 512, 1024
# Standard deviation of a token's logits, from the flattest token to the sharpest. The teacher's
# entropy then runs from 7 nats to a tenth of one with a mean near 3, as a language model's does;
# that spread is what the search for AKL's head has to live with.
SHARPNESS = 2.5, 5.5


class Problem(NamedTuple):
    """Hidden states and heads: logits are hidden @ weight.T."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


def make_problem(
    tokens: int,
    vocab: int,
    widths: Sequence[int] = (STUDENT_WIDTH, TEACHER_WIDTH),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """A student that sees a part of what its teacher does, and so roughly agrees with it."""
    student, teacher = widths
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    teacher_hidden = torch.randn(tokens, teacher, **random)
    teacher_weight = torch.randn(vocab, teacher, **random)
    teacher_hidden[:, student:] *= 0.3
    spread = torch.linspace(*SHARPNESS, tokens, device=device)[torch.randperm(tokens, **random)]
    teacher_hidden *= (spread / math.sqrt(student))[:, None]
    both = teacher_hidden.to(dtype), teacher_weight.to(dtype)
    hidden, weight = (x[:, :student].clone().requires_grad_() for x in both)
    return Problem(hidden, weight, *both)


def tokens_at_once(problem: Problem, chunk: int | None) -> int:
    """How many tokens' logits ours keeps at one time; the floor does as it does."""
    student = LinearHead(*problem.student)
    return min(len(problem.hidden), estimators._chunk(chunk, student, None, compiled=True))


Gradients = tuple[Tensor, ...]
Contender = Callable[[Problem, Divergence, "int | None"], Gradients]


@torch.no_grad()
def floor(problem: Problem, chunk: int) -> Gradients:
    """The four products nobody can do without, and only what they must allocate."""
    hidden, weight, teacher_hidden, teacher_weight = problem
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    student, teacher = hidden.new_empty(2, chunk, len(weight))
    for rows in torch.arange(len(hidden)).split(chunk):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        s, t = student[: len(rows)], teacher[: len(rows)]
        torch.mm(hidden[part], weight.T, out=s)
        torch.mm(teacher_hidden[part], teacher_weight.T, out=t)
        torch.mm(s, weight, out=d_hidden[part])
        d_weight.addmm_(s.T, hidden[part])
    return d_hidden, d_weight


def ours(problem: Problem, divergence: Divergence, chunk: int | None, compiled: bool) -> Gradients:
    p = LinearHead(problem.teacher_hidden, problem.teacher_weight)
    value = exact(divergence, p=p, q=LinearHead(*problem.student), chunk=chunk, compiled=compiled)
    return torch.autograd.grad(value, problem.student)


def trl_chunked(problem: Problem, divergence: Divergence, chunk: int | None) -> Gradients:
    """The kernel of TRL's DistillationTrainer; ``chunk`` is that of the vocabulary."""
    from trl.kernels import chunked_divergence

    chunked_divergence.VOCAB_CHUNK_SIZE = chunk or 32768
    per_token, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
        *problem.student, None, *problem[2:], None, _beta(divergence)
    )
    return torch.autograd.grad(per_token.mean(), problem.student)


def trl_gkd(problem: Problem, divergence: Divergence, chunk: None) -> Gradients:
    """What TRL's GKDTrainer does, over full logits."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = _full_logits(problem)
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=_beta(divergence))
    return torch.autograd.grad(loss, problem.student)


def liger(
    problem: Problem, divergence: Divergence, chunk: int | None, compiled: bool
) -> Gradients:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=_beta(divergence),
        compiled=compiled,
        chunk_size=chunk or 1024,
    )
    labels = problem.hidden.new_zeros(len(problem.hidden), dtype=torch.long)
    return torch.autograd.grad(loss(*problem.student, *problem[2:], labels), problem.student)


def liger_triton(problem: Problem, divergence: Divergence, chunk: None) -> Gradients:
    """Liger's kernels in Triton, which choose their chunk themselves."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=_beta(divergence))
    return torch.autograd.grad(loss(*problem.student, *problem[2:], None), problem.student)


def official_akl(problem: Problem, divergence: AKL, chunk: None) -> Gradients:
    """The formulas of AKL.py, arXiv 2404.02657: the whole vocabulary sorted, full logits."""
    student, teacher = _full_logits(problem)
    p, q = softmax(teacher, -1), softmax(student, -1).detach()
    ranked, order = p.sort(dim=-1, descending=True)
    errors = (ranked - q.gather(-1, order)).abs()
    tail = ranked.cumsum(-1) > divergence.mu
    tail[..., 0] = False
    head_gap = errors.masked_fill(tail, 0.0).sum(-1)
    head = head_gap / (head_gap + errors.masked_fill(~tail, 0.0).sum(-1))
    forward, reverse = _one_sided(teacher, student), _one_sided(student, teacher)
    loss = (head * forward + (1 - head) * reverse).mean()
    return torch.autograd.grad(loss, problem.student)


def _one_sided(target: Tensor, model: Tensor) -> Tensor:
    """KL(target ‖ model) as AKL.py sums it: entropy and cross-entropy apart."""
    probabilities = softmax(target, -1)
    entropy = (probabilities * log_softmax(target, -1)).sum(-1)
    return entropy - (probabilities * log_softmax(model, -1)).sum(-1)


def _full_logits(problem: Problem) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher = problem.teacher_hidden @ problem.teacher_weight.T
    return problem.hidden @ problem.weight.T, teacher


def _beta(divergence: Divergence) -> float:
    """TRL's and Liger's name for the divergence."""
    if isinstance(divergence, JensenShannon):
        return divergence.beta
    return {KL(): 0.0, ReverseKL(): 1.0}[divergence]


class Peer(NamedTuple):
    run: Contender
    package: str
    divergences: tuple[type[Divergence], ...]
    chunks: tuple[int | None, ...]  # what a small scan tries, its own default first
    devices: tuple[str, ...] = ("cpu", "cuda")


_GENERALISED_JSD = KL, ReverseKL, JensenShannon
PEERS = {
    "TRL chunked": Peer(trl_chunked, "trl", _GENERALISED_JSD, (32768, 8192, 2048)),
    "TRL GKD eager": Peer(trl_gkd, "trl", _GENERALISED_JSD, (None,)),
    "Liger compiled": Peer(
        lambda *of: liger(*of, compiled=True), "liger_kernel", _GENERALISED_JSD, (1024, 256, 128)
    ),
    "Liger eager": Peer(
        lambda *of: liger(*of, compiled=False), "liger_kernel", _GENERALISED_JSD, (1024, 256, 128)
    ),
    "Liger Triton": Peer(
        liger_triton, "liger_kernel", _GENERALISED_JSD, (None,), devices=("cuda",)
    ),
    "AKL.py eager": Peer(official_akl, "torch", (AKL,), (None,)),
}
OURS: dict[str, Contender] = {
    "ours compiled": lambda *of: ours(*of, compiled=True),
    "ours eager": lambda *of: ours(*of, compiled=False),
}


def peers_of(divergence: Divergence, device: str = "cpu") -> list[str]:
    return [
        name
        for name, peer in PEERS.items()
        if isinstance(divergence, peer.divergences) and device in peer.devices
    ]


def installed(name: str) -> bool:
    return name in OURS or find_spec(PEERS[name].package) is not None
