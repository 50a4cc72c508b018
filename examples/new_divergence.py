"""A divergence that rkl does not ship, in one class: triangular discrimination.

python examples/new_divergence.py
PYTHONPATH=examples rkl divergences new_divergence:TriangularDiscrimination
"""

from dataclasses import dataclass

import torch

import rkl
from rkl.testing import check_divergence


@dataclass(frozen=True)
class TriangularDiscrimination(rkl.FDivergence):
    """Triangular discrimination, Σ (p − q)² / (p + q).

    Between 0 and 2, symmetric.

    Source: Topsøe (2000), IEEE Trans. Inf. Theory 46, 1602.
    """

    def integrand(self, logp, logq):
        p, q = logp.exp(), logq.exp()
        # where p = q = 0 the term is 0, and so must its gradient be
        return (p - q).square() / (p + q).clamp_min(torch.finfo(p.dtype).tiny)


def main() -> None:
    mine = TriangularDiscrimination()
    check_divergence(mine)  # raises if it broke a law

    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    value = rkl.exact(mine, p=teacher, q=student.requires_grad_())
    value.backward()
    print(f"{mine} = {value.item():.4f}, its gradient in the logits {student.grad.tolist()[0]}")

    print("it is", ", ".join(name for name in ("symmetric", "bounded") if getattr(mine, name)))
    print("in a sum:", rkl.parse("0.5*kl + 0.5*triangular-discrimination"))


if __name__ == "__main__":
    main()
