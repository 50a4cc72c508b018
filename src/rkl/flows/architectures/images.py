"""A small multi-scale flow for images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from rkl.flows.architectures.base import Architecture, Flow
from rkl.flows.architectures.coupling import STEEPEST
from rkl.flows.architectures.splines import check_sizes

# Which two of the four pixels of a 2 x 2 block say how the other two move: the checkerboard
# first, then rows, then columns, and each the other way round.
PAIRS = ((0, 3, 1, 2), (1, 2, 0, 3), (0, 1, 2, 3), (2, 3, 0, 1), (0, 2, 1, 3), (1, 3, 0, 2))


@dataclass(frozen=True)
class MultiScale(Architecture):
    """Affine couplings of the pixels of 2 x 2 blocks at one scale after another.

    Every scale makes a channel of each pixel of a block, couples two of the four with the other
    two (checkerboards, rows and columns in turn), and passes half of the channels on. The masks
    are slices: no convolution computes unused channels. It starts as the identity.

    Source: Dinh et al. (2017), arXiv 1605.08803, section 3.6.

    Args:
        scales: Number of scales; both sides must be divisible by 2 to this power.
        couplings: Number of couplings at each.
        hidden: Channels of the convolutions.

    >>> MultiScale(couplings=2, hidden=8).build((1, 8, 8))().event_shape
    torch.Size([1, 8, 8])
    """

    scales: int = 2
    couplings: int = 6
    hidden: int = 32

    domain = "line"

    def __post_init__(self):
        check_sizes((self.hidden,), scales=self.scales, couplings=self.couplings)

    def build(self, event_shape: tuple[int, ...], conditions: int = 0) -> nn.Module:
        return MultiScaleFlow(self, event_shape, conditions)


class MultiScaleFlow(Flow):
    """The flow that :class:`MultiScale` builds."""

    def __init__(self, chosen: MultiScale, event_shape: tuple[int, ...], conditions: int):
        image = (1, *event_shape) if len(event_shape) == 2 else tuple(event_shape)
        block = 2**chosen.scales
        if len(image) != 3 or image[1] % block or image[2] % block:
            raise ValueError(
                f"event_shape must be [height, width] or [channels, height, width] with sides "
                f"divisible by {block} for scales={chosen.scales}; got {list(event_shape)}."
            )
        super().__init__(event_shape, conditions)
        self.image = image
        self.couplings = chosen.couplings
        self.nets = nn.ModuleList(
            _Convolutions(2 * channels, chosen.hidden, 4 * channels, conditions)
            for channels in (image[0] * 2**scale for scale in range(chosen.scales))
            for _ in range(chosen.couplings)
        )

    def encode(self, value, condition):
        """The latents of events, and log |d latent / d event|."""
        batch = value.shape[: value.ndim - len(self.event_shape)]
        images, condition = self._images(value, condition)
        total, done = images.new_zeros(len(images)), []
        for nets in self._scales():
            images = pixel_unshuffle(images, 2)
            for i, net in enumerate(nets):
                images, log_jacobian = _couple(net, images, condition, PAIRS[i % 6], 1)
                total = total + log_jacobian
            images, finished = images.chunk(2, 1)
            done.append(finished.flatten(1))
        latent = torch.cat([*done, images.flatten(1)], 1)
        return latent.reshape(*batch, *self.event_shape), total.reshape(batch)

    def decode(self, latent, condition):
        """The events of latents, and log |d event / d latent|."""
        batch = latent.shape[: latent.ndim - len(self.event_shape)]
        flat, condition = self._images(latent, condition)
        shapes, sizes = self._shapes()
        *done, images = flat.flatten(1).split(sizes, 1)
        images = images.reshape(-1, *shapes[-1])
        total = flat.new_zeros(len(flat))
        for nets, finished, shape in reversed([*zip(self._scales(), done, shapes, strict=True)]):
            images = torch.cat([images, finished.reshape(-1, *shape)], 1)
            for i in reversed(range(len(nets))):
                images, log_jacobian = _couple(nets[i], images, condition, PAIRS[i % 6], -1)
                total = total + log_jacobian
            images = pixel_shuffle(images, 2)
        return images.reshape(*batch, *self.event_shape), total.reshape(batch)

    def _scales(self) -> list[list[nn.Module]]:
        nets, step = list(self.nets), self.couplings
        return [nets[i : i + step] for i in range(0, len(nets), step)]

    def _images(self, value: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        condition = condition if condition is None else condition.reshape(-1, self.conditions)
        return value.reshape(-1, *self.image), condition

    def _shapes(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """The shape of what each scale sets aside, and how many latents it and the rest are."""
        channels, height, width = self.image
        shapes = []
        for _ in self._scales():
            channels, height, width = 2 * channels, height // 2, width // 2
            shapes.append((channels, height, width))
        sizes = [c * h * w for c, h, w in shapes]
        return shapes, [*sizes, sizes[-1]]


class _Convolutions(nn.Module):
    """Shift and log scale of some channels, given others and the conditions; zero at first."""

    def __init__(self, inputs: int, hidden: int, outputs: int, conditions: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.given = nn.Linear(conditions, hidden, bias=False) if conditions else None
        self.rest = nn.Sequential(nn.SiLU(), nn.Conv2d(hidden, hidden, 1), nn.SiLU())
        self.last = nn.Conv2d(hidden, outputs, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, channels: Tensor, condition: Tensor | None) -> Tensor:
        inside = self.first(channels)
        if self.given is not None and condition is not None:
            inside = inside + self.given(condition)[:, :, None, None]
        return self.last(self.rest(inside))


def _couple(
    net: nn.Module, images: Tensor, condition: Tensor | None, pairs: tuple[int, ...], way: int
) -> tuple[Tensor, Tensor]:
    """One coupling, forth or back (``way`` 1 or −1), with its log-Jacobian."""
    blocks = images.unflatten(1, (-1, 4))  # pixel_unshuffle puts the pixels of a block last
    unchanged = blocks[:, :, pairs[:2]].flatten(1, 2)
    moved = blocks[:, :, pairs[2:]].flatten(1, 2)
    shift, log_scale = net(unchanged, condition).chunk(2, 1)
    log_scale = STEEPEST * torch.tanh(log_scale / STEEPEST)
    moved = moved * log_scale.exp() + shift if way > 0 else (moved - shift) * (-log_scale).exp()
    both = torch.cat([unchanged.unflatten(1, (-1, 2)), moved.unflatten(1, (-1, 2))], 2)
    back = sorted(range(4), key=pairs.__getitem__)
    return both[:, :, back].flatten(1, 2), way * log_scale.flatten(1).sum(1)
