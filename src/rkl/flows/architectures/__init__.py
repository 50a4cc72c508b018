"""Architectures of normalizing flows: values that build a flow for a given shape of event."""

from rkl.flows.architectures.base import Architecture, catalogue, draw, parse_architecture
from rkl.flows.architectures.circular import CircularSplines
from rkl.flows.architectures.coupling import Coupling
from rkl.flows.architectures.images import MultiScale
from rkl.flows.architectures.mixed import MixedSplines
from rkl.flows.architectures.scaled import Conditioned, Scaled, latent
from rkl.flows.architectures.splines import MAF, NSF

__all__ = [
    "MAF",
    "NSF",
    "Architecture",
    "CircularSplines",
    "Conditioned",
    "Coupling",
    "MixedSplines",
    "MultiScale",
    "Scaled",
    "catalogue",
    "draw",
    "latent",
    "parse_architecture",
]
