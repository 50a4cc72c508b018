"""A heat bath for scalar φ⁴."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.sample.lattice import quartic
from rkl.sample.lattice.models import QuarticField
from rkl.sample.mcmc.kernels import colours


@dataclass(frozen=True)
class Phi4HeatBath:
    """Sites of φ⁴, one colour after another, drawn anew given their neighbours, in any well.

    Given its neighbours a site has density exp(hφ − aφ² − λφ⁴), h twice their sum and a = 4 + m²,
    and is drawn exactly. Behind every sweep the sign of the whole field is drawn anew too.
    """

    def move(
        self, target: Any, condition: Float[Tensor, "*batch conditions"], x: Tensor, sweeps: int
    ) -> Tensor:
        """The fields after some sweeps."""
        if not isinstance(target, QuarticField):
            raise TypeError(
                f"target must be Phi4(...) for this move; got {target}. See RandomWalk()."
            )
        shape = x.shape
        lam = condition[..., 0].expand(shape[:-1]).flatten()
        phi = x.reshape(-1, shape[-1]).mT.contiguous()
        classes = colours(target.side, False, x.device)
        for _ in range(sweeps):
            for colour in classes:
                field = 2 * phi[colour.neighbours].sum(1)
                phi[colour.sites] = quartic.draw(field, 4 + target.mass_squared, lam)
            phi = phi * (2 * torch.randint(2, lam.shape, device=x.device) - 1)
        return phi.mT.reshape(shape)
