"""Draws of equal weight from weighted ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def resample(
    log_w: Float[Tensor, "..."],
    axis: int = 0,
    count: int | None = None,
    offset: float | None = None,
) -> Int[Tensor, "..."]:
    """Places along an axis drawn in proportion to weights, as evenly as can be (systematically).

    One uniform number places a comb of equal teeth over the cumulated weights, so that a draw of
    weight w is taken w times its number up to one.

    Source: Kitagawa (1996), J. Comput. Graph. Statist. 5, 1, appendix.

    Args:
        log_w: Logarithms of the weights, up to a constant.
        axis: The axis along which they are drawn.
        count: How many; by default as many as there are weights.
        offset: Place of the first tooth, from 0 to 1; drawn at random by default.

    >>> resample(torch.tensor([0.5, 0.25, 0.25]).log(), count=4).tolist()
    [0, 0, 1, 2]
    >>> resample(torch.tensor([0.7, 0.2, 0.1]).log(), offset=0.5).tolist()
    [0, 0, 1]
    """
    share = log_w.double().softmax(axis).movedim(axis, -1)
    count = share.shape[-1] if count is None else count
    first = torch.rand_like(share[..., :1]) if offset is None else offset
    comb = torch.arange(count, dtype=share.dtype, device=share.device) + first
    edges = share.cumsum(-1).contiguous()
    places = torch.searchsorted(edges, (comb / count * edges[..., -1:]).contiguous())
    return places.clamp_max(share.shape[-1] - 1).movedim(-1, axis)
