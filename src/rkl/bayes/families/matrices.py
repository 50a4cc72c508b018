"""Symmetric matrices, batch by batch: determinants, inverses, and how far two are apart."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def log_det(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Log determinant of a positive definite matrix."""
    return 2 * torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def inverse(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Inverse of a positive definite matrix, symmetric to the last digit."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def times(matrix: Float[Tensor, "*b m n"], vector: Float[Tensor, "*c n"]) -> Tensor:
    """The matrix times the vector, [*batch, m]."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def positive_definite(matrix: Float[Tensor, "*batch n n"]) -> Bool[Tensor, "*batch"]:
    """True of symmetric matrices that are finite and positive definite."""
    finite = matrix.isfinite().all(-1).all(-1)
    safe = torch.where(finite[..., None, None], matrix, 0.0)
    return finite & (torch.linalg.cholesky_ex(safe).info == 0)


def excess_matrix(p: Float[Tensor, "*b n n"], q: Float[Tensor, "*c n n"]) -> tuple[Tensor, Tensor]:
    """tr(E) and log det(1 + E) of E = p⁻¹ q − 1, for two negative definite matrices.

    From the difference q − p, so that E keeps its digits where they are near.
    """
    root = torch.linalg.cholesky(-p)
    half = torch.linalg.solve_triangular(root, p - q, upper=False)
    excess = torch.linalg.solve_triangular(root, half.mT, upper=False)
    trace = excess.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace, log_det(torch.eye(p.shape[-1], dtype=p.dtype, device=p.device) + excess)
