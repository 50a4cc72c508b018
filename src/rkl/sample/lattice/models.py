"""Protocols with the numbers of lattice models that moves and architectures need."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Rotors(Protocol):
    """Planar rotors on a periodic square lattice at a temperature, such as :class:`XY`."""

    @property
    def side(self) -> int:
        """Sites along one side."""
        ...

    @property
    def coupling(self) -> float:
        """J of the bonds."""
        ...

    @property
    def ring_exchange(self) -> float | None:
        """K of the plaquettes; None where it is the second condition."""
        ...

    def ring(self, condition: Tensor) -> Tensor | float:
        """K under a condition."""
        ...


@runtime_checkable
class QuarticField(Protocol):
    """A real field with a quartic potential on such a lattice, such as :class:`Phi4`."""

    @property
    def side(self) -> int:
        """Sites along one side."""
        ...

    @property
    def mass_squared(self) -> float:
        """m² in lattice units."""
        ...
