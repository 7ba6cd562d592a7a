"""What a base's samples can teach: whether bounds can hold without more of what it hardly ever shows.

Steps regress on samples of the base. What is in next to none of them can be made rarer, and not more frequent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, prod
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["FEWEST", "Group", "untaught"]

FEWEST = 5
"""Samples of a class that the base must show before it can be asked for more of it."""
CELLS = 4096
"""Combinations of classes up to which those that the base never shows are named as well."""
SUBSETS = 256
"""Sets of judges that are looked at together: of up to eight judges all, of more the smallest."""
NEGLIGIBLE = 1e-6
"""Growth of a fraction that counts as none."""

Box = tuple[Tensor, Tensor]
"""Lowest and highest fraction of the classes of one constraint, 2 x (k,) float64."""
Integers = np.ndarray[Any, np.dtype[np.int64]]
Reals = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Group:
    """Samples that are all to become more, or less, frequent alike: of every constraint, one of these classes."""

    classes: tuple[tuple[int, ...], ...]
    """For each constraint, the classes: one that is bounded, or all of those that are not."""
    hits: int
    """Samples of the base that show one of these classes of every constraint."""


def untaught(labels: Sequence[Tensor], boxes: Sequence[Box]) -> list[Group]:
    """Groups that would have to become more frequent to keep all bounds, and that the base shows too rarely for it.

    Weights are one a class, and a judge's classes have no part in another's. So a class of FEWEST samples or more can
    become more frequent whatever else its samples show, and so can those that several judges tell together; the rest of
    what these samples show comes along in its proportions. Found by a linear program over the fractions of all groups:
    a mixture of what can so be taught and of rare groups as far as the base shows them, subject to the bounds, with the
    least sum of what has to be added to the rare ones. Classes without a bound of their own have the same weight in the
    nearest distribution (`unlearning.constraints`), so that each constraint's count as one.

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
        if more > NEGLIGIBLE
    ]


def _members(low: Tensor, high: Tensor) -> list[tuple[int, ...]]:
    """The classes of one constraint that belong together: each bounded one alone, the others as one."""
    free = ((low <= 0) & (high >= 1)).tolist()
    rest = tuple(k for k, unbounded in enumerate(free) if unbounded)
    return [(k,) for k, unbounded in enumerate(free) if not unbounded] + ([rest] if rest else [])


def _places(members: list[tuple[int, ...]]) -> Integers:
    """For each class, the position of the members that it is among."""
    places = np.zeros(sum(map(len, members)), dtype=np.int64)
    for place, classes in enumerate(members):
        places[list(classes)] = place
    return places


def _least_growth(
    cells: Integers, hits: Integers, members: Sequence[list[tuple[int, ...]]], boxes: Sequence[Box]
) -> Reals:
    """By how much each fraction, of cells (m, j), has to grow untaught; zeros where nothing keeps the bounds.

    Variables are the shares of all that can be taught, what is kept of each rare cell and by how much it grows.
    """
    from scipy.optimize import linprog  # takes half a second, which who bounds no class need not wait for
    from scipy.sparse import coo_matrix, hstack, vstack

    m = len(cells)
    rare = np.flatnonzero(hits < FEWEST)
    sums, least, most = [], [], []
    for j, (some, (low, high)) in enumerate(zip(members, boxes, strict=True)):
        sums.append(coo_matrix((np.ones(m), (cells[:, j], np.arange(m))), shape=(len(some), m)))
        least += [float(low[classes[0]]) for classes in some]
        most += [float(high[classes[0]]) for classes in some]
    marginals = vstack(sums).tocsr()
    taught = _taught(cells, hits)
    mixture = hstack([marginals @ taught, marginals[:, rare], marginals[:, rare]])
    shares, none, whole = taught.shape[1], np.zeros(len(rare)), np.ones(len(rare))
    highest = np.concatenate([np.ones(shares), hits[rare] / hits.sum(), whole])
    found = linprog(
        np.concatenate([np.zeros(shares), none, whole]),
        A_ub=vstack([mixture, -mixture]).tocsr(),
        b_ub=np.concatenate([most, np.negative(least)]),
        A_eq=np.ones((1, len(highest))),
        b_eq=[1.0],
        bounds=np.column_stack([np.zeros(len(highest)), highest]),
        method="highs",
    )
    growth: Reals = np.zeros(m)
    if found.x is not None:
        growth[rare] = found.x[shares + len(rare) :]
    return growth


def _taught(cells: Integers, hits: Integers) -> csr_matrix:
    """What can become more frequent as a whole, as fractions of the cells, (m, wholes).

    A whole is all samples that show given classes of some judges, whatever the others say, where they are enough.
    """
    from scipy.sparse import coo_matrix, hstack

    found = []
    for judges in _subsets(cells.shape[1]):
        _, whole = np.unique(cells[:, judges], axis=0, return_inverse=True)
        whole = whole.reshape(-1)
        sizes = np.bincount(whole, weights=hits)
        (enough,) = np.nonzero(sizes >= FEWEST)
        share = hits / np.maximum(sizes, 1)[whole]
        found.append(coo_matrix((share, (np.arange(len(cells)), whole))).tocsc()[:, enough])
    return hstack(found).tocsr()


def _subsets(judges: int) -> list[tuple[int, ...]]:
    """All judges together, each alone, in pairs and so on."""
    found = [tuple(range(judges))]
    for size in range(1, judges):
        if len(found) + comb(judges, size) > SUBSETS:
            break
        found += combinations(range(judges), size)
    return found
