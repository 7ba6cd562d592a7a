"""What a base's samples can teach: whether bounds can hold without more of what it hardly ever shows.

Steps regress on samples of the base. What is in next to none of them can be made rarer, and not more frequent.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix, hstack, identity, vstack
from torch import Tensor

__all__ = ["FEWEST", "Group", "untaught"]

FEWEST = 5
"""Samples of a class that the base must show before it can be asked for more of it."""
CELLS = 4096
"""Combinations of classes up to which those that the base never shows are named as well."""
NEGLIGIBLE = 1e-6
"""Growth of a fraction that counts as none."""

Box = tuple[Tensor, Tensor]
"""Lowest and highest fraction of the classes of one constraint, 2 x (k,) float64."""


@dataclass(frozen=True)
class Group:
    """Samples that are all to become more, or less, frequent alike: of every constraint, one of these classes."""

    classes: tuple[tuple[int, ...], ...]
    """For each constraint, the classes: one that is bounded, or all of those that are not."""
    hits: int
    """Samples of the base that show one of these classes of every constraint."""


def untaught(labels: Sequence[Tensor], boxes: Sequence[Box]) -> list[Group]:
    """Groups that would have to become more frequent to keep all bounds, and that the base shows too rarely for it.

    Found by a linear program over the fractions of all groups: the least sum by which those of fewer than FEWEST
    samples exceed what the base shows of them, subject to the bounds. Classes without a bound of their own have the
    same weight in the nearest distribution (`unlearning.constraints`), so that each constraint's count as one.

    Args:
        labels: what each constraint's judge says of the same samples of the base, one (n,) a constraint.
        boxes: the bounds, likewise.

    Returns:
        The groups, empty where the base can teach what is asked for, or where no fractions keep all bounds.
    """
    members = [_members(*box) for box in boxes]
    rows = [_places(some)[label.cpu().numpy()] for some, label in zip(members, labels, strict=True)]
    shown = Counter(zip(*(row.tolist() for row in rows), strict=True))
    every = prod(map(len, members)) <= CELLS
    cells = list(product(*(range(len(some)) for some in members))) if every else sorted(shown)
    hits = np.array([shown[cell] for cell in cells])
    growth = _least_growth(np.array(cells), hits, members, boxes)
    return [
        Group(tuple(some[place] for some, place in zip(members, cell, strict=True)), int(count))
        for cell, count, more in zip(cells, hits, growth, strict=True)
        if count < FEWEST and more > NEGLIGIBLE
    ]


def _members(low: Tensor, high: Tensor) -> list[tuple[int, ...]]:
    """The classes of one constraint that belong together: each bounded one alone, the others as one."""
    free = ((low <= 0) & (high >= 1)).tolist()
    rest = tuple(k for k, unbounded in enumerate(free) if unbounded)
    return [(k,) for k, unbounded in enumerate(free) if not unbounded] + ([rest] if rest else [])


def _places(members: list[tuple[int, ...]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """For each class, the position of the members that it is among."""
    places = np.zeros(sum(map(len, members)), dtype=np.int64)
    for place, classes in enumerate(members):
        places[list(classes)] = place
    return places


def _least_growth(
    cells: np.ndarray[tuple[int, int], np.dtype[np.int64]],
    hits: np.ndarray[tuple[int], np.dtype[np.int64]],
    members: Sequence[list[tuple[int, ...]]],
    boxes: Sequence[Box],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """By how much the fraction of each rare cell, of cells (m, j), has to grow; zeros where nothing keeps the bounds.

    Variables are m fractions and their m growths; a cell of enough samples may grow for nothing.
    """
    m = len(cells)
    rare, fractions = hits < FEWEST, hits / hits.sum()
    sums, least, most = [], [], []
    for j, (some, (low, high)) in enumerate(zip(members, boxes, strict=True)):
        sums.append(coo_matrix((np.ones(m), (cells[:, j], np.arange(m))), shape=(len(some), m)))
        least += [float(low[classes[0]]) for classes in some]
        most += [float(high[classes[0]]) for classes in some]
    marginals, nothing = vstack(sums), csr_matrix((len(least), m))
    found = linprog(
        np.concatenate([np.zeros(m), rare.astype(float)]),
        A_ub=vstack([
            hstack([marginals, nothing]), hstack([-marginals, nothing]), hstack([identity(m), -identity(m)]),
        ]).tocsr(),
        b_ub=np.concatenate([most, np.negative(least), fractions]),
        A_eq=np.concatenate([np.ones(m), np.zeros(m)])[None],
        b_eq=[1.0],
        bounds=(0, 1),
        method="highs",
    )  # fmt: skip
    growth: np.ndarray[tuple[int], np.dtype[np.float64]] = np.zeros(m) if found.x is None else found.x[m:]
    return growth
