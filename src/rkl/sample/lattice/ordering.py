"""Order in which the sites of a periodic lattice are drawn, and the sites to integrate."""

import functools
import itertools
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

COLOURS = (0, 0), (1, 1), (0, 1), (1, 0)  # sites of one colour are two steps apart
KNOWN = tuple((i, j) for i in (-1, 0) for j in (-1, 0))  # then those further away
FURTHER = tuple((i, j) for i in (-2, -1, 0, 1) for j in (-2, -1, 0, 1) if (i, j) not in KNOWN)
DIAGONAL = (1, 1), (1, -1), (-1, 1), (-1, -1)
STRAIGHT = (1, 0), (-1, 0), (0, 1), (0, -1)
DRAWN = (), DIAGONAL, STRAIGHT, (*STRAIGHT, *DIAGONAL)  # sites of earlier colours, by colour


class Pass(NamedTuple):
    """Sites of one colour of one level, drawn together.

    Attributes:
        sites: Their number.
        near: Rows of the drawn neighbours of each, its four nearest first.
        colour: Its colour, 0 to 3.
        level: 0 for the finest level that is drawn, 1 for the next coarser one, ...
        size: log2 of the number of sites of the level, 4 at most.
    """

    sites: int
    near: Int[Tensor, "near sites"]
    colour: int
    level: int
    size: int


class Ordering(NamedTuple):
    """Rows of sites in the order they are drawn; the first site is the origin.

    Attributes:
        site: The site in each row; the integrated ones come last.
        passes: The passes that draw the rows after the first.
        integrated: Number of the remaining sites, drawn exactly, given all others.
        bonds: Rows of the four neighbours of each integrated site.
        plaquettes: Rows of the other corners of its four plaquettes, the opposite one last.
    """

    site: Int[Tensor, " sites"]
    passes: tuple[Pass, ...]
    integrated: int
    bonds: Int[Tensor, "4 integrated"]
    plaquettes: Int[Tensor, "3 4 integrated"]

    @property
    def levels(self) -> int:
        """Number of levels."""
        return 1 + max(it.level for it in self.passes)


def check_side(side: int) -> None:
    """Refuse a side that cannot be halved down to one site."""
    if side < 2 or side & (side - 1):
        below = max(2, 1 << (side.bit_length() - 1))
        raise ValueError(
            f"side must be a power of two to go from coarse to fine; got {side}. Sides "
            f"{below} and {2 * below} can be built."
        )


def neighbours(side: int, site: int) -> list[int]:
    """The four neighbours of a site."""
    i, j = divmod(site, side)
    around = (i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)
    return [(a % side) * side + b % side for a, b in around]


def corners(side: int, site: int) -> list[tuple[int, int, int]]:
    """The other corners of the four plaquettes of a site, the opposite one last."""
    i, j = divmod(site, side)
    at = lambda a, b: (a % side) * side + b % side  # noqa: E731
    return [(at(i + a, j), at(i, j + b), at(i + a, j + b)) for a in (1, -1) for b in (1, -1)]


def check_colouring(side: int, sites: set[int], ring: bool) -> None:
    """Refuse to integrate sites that interact: their joint density would be no product.

    Raises:
        ValueError: Two of the sites share a bond, or a plaquette where these interact.
    """
    for site in sites:
        touched = set(neighbours(side, site))
        touched.update(*corners(side, site)) if ring else None
        if touched & sites:
            what = "a plaquette" if ring else "a bond"
            other = min(touched & sites)
            raise ValueError(
                f"sites {site} and {other} share {what}: they cannot both be integrated."
            )


def sites_to_integrate(side: int, integrate: str) -> set[int]:
    """The sites to integrate: "half" of them, of odd parity, a "quarter" of them, or "none"."""
    odd = {"half": lambda i, j: (i + j) % 2, "quarter": lambda i, j: i % 2 and not j % 2}
    test = odd.get(integrate, lambda i, j: False)
    return {s for s in range(side**2) if test(*divmod(s, side))}


@functools.cache
def ordering(side: int, integrate: str) -> Ordering:
    """The order for a side, from coarse to fine.

    A level doubles the number of sites: to a square lattice it adds the centres of the
    squares, which makes a square lattice turned by 45 degrees. So all levels look alike. Its
    sites are drawn colour by colour, each given all that is drawn before and near.
    """
    check_side(side)
    left = sites_to_integrate(side, integrate)
    check_colouring(side, left, ring=integrate == "quarter")
    site, drawn = [0], []
    steps = [side >> k // 2 for k in range(2 * (side.bit_length() - 1))]
    for level, step in enumerate(steps):
        basis = _bases(step)[level % 2]
        for colour, members, near in _colours(side, basis, left, side // step % 2 == 0):
            drawn.append((level, colour, members, near))
            site += members
    row = {s: r for r, s in enumerate(site + sorted(left))}
    finest = max(level for level, *_ in drawn)
    passes = tuple(
        Pass(len(members), _rows(row, near), colour, finest - level, min(level, 4))
        for level, colour, members, near in drawn
    )
    last = sorted(left)
    bonds = _rows(row, [neighbours(side, s) for s in last], 4)
    around = [[it[k] for it in corners(side, s)] for k in range(3) for s in last]
    plaquettes = _rows(row, around, 4).reshape(4, 3, len(last)).transpose(0, 1)
    return Ordering(torch.tensor(site + last), passes, len(last), bonds, plaquettes)


def _bases(step: int) -> tuple[tuple, tuple]:
    """Origin and basis of the sites that two levels add: centres of squares, then of edges."""
    half = step // 2
    return ((half, half), (step, 0), (0, step)), ((0, half), (half, half), (half, -half))


def _colours(side: int, basis: tuple, left: set[int], regular: bool):
    """The colours of one level: the colour, its sites, and the neighbours of each of them."""
    (i, j), e, f = basis

    def at(site, a, b):  # a and b in halves of the basis
        across = site // side + (a * e[0] + b * f[0]) // 2
        return (
            across % side * side + (site + (a * e[1] + b * f[1]) // 2 - site // side * side) % side
        )

    place: dict[int, tuple[int, int]] = {}
    for a, b in itertools.product(range(side), repeat=2):
        place.setdefault(at(i * side + j, 2 * a, 2 * b), (a, b))
    colour = {
        s: COLOURS.index((a % 2, b % 2)) if regular else k
        for k, (s, (a, b)) in enumerate(place.items())
    }
    for c in range(4):
        new = [s for s in place if colour[s] == c and s not in left]
        near = []
        for s in new:
            coarser = [at(s, 2 * a + 1, 2 * b + 1) for a, b in (*KNOWN, *FURTHER)]
            same = [at(s, 2 * a, 2 * b) for a, b in DRAWN[c]]
            earlier = [it for it in place if colour[it] < c and it not in left]
            if not regular and earlier:
                same = [earlier[k % len(earlier)] for k in range(len(same))]
            same = [it if it in earlier else coarser[k % 4] for k, it in enumerate(same)]
            near.append(coarser + same)
        if new:
            yield c, new, near


def _rows(row: dict[int, int], near: list[list[int]], width: int | None = None) -> Tensor:
    """Rows of the neighbours of each site, one column for each site."""
    rows = torch.tensor([[row[s] for s in sites] for sites in near], dtype=torch.long)
    return rows.reshape(len(near), width or rows.shape[-1]).mT.contiguous()
