"""What steering is asked for: bounds on the fractions of classes, the least change that keeps them, and the counts.

A judge sorts images into classes; a constraint bounds the fraction of samples in each. Among all distributions that
keep every bound, the nearest to the base in KL(q || base) is q(x) = p_base(x) prod_j w_j(c_j(x)): one weight a class,
so that everything within a class stays as it was (Csiszar, "I-divergence geometry", 1975).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor

from unlearning.errors import InputError, ParameterError, UnreachableError
from unlearning.reachability import FEWEST, Box, Group, untaught

Judge = Callable[[Tensor], Tensor]
"""uint8 images (n, c, h, w) to labels (n,), integers in [0, number of classes). No gradient goes through it."""

POWER = 1.645
"""Normal quantile of the probability, 0.95, with which a flow that reached its aim is to pass the decision."""
ROOM = 0.75
"""Share of the way from aim to bound that interval and chance may fill: the rest is for the flow's own error."""
ONE_SIDED = 0.02
"""How far inside a single bound the aim lies, at most; half of what the bound leaves, where that is less."""
MOST_SAMPLES = 2**19
"""Samples that bounds may ask for; twice what 1 point of tolerance among 100 classes takes at 99.99 % confidence."""
ROUNDS = 500
SETTLED = 1e-9
"""Largest change of a log weight in a round at which the projection has converged."""
CLOSE = 1e-6
"""How near to its bound a projected fraction, and to 1 their sum, must come for the bounds to count as compatible."""
NAMED = 5
"""Classes that a sentence names."""


@dataclass(frozen=True)
class Constraint:
    """Bounds on how often samples show the classes of one attribute."""

    classes: tuple[str, ...]
    """Names, in the order of the judge's labels; two or more."""
    classify: Judge = field(repr=False, compare=False)
    """The judge."""
    bounds: Mapping[str, tuple[float, float]]
    """(lowest, highest) fraction by class; classes without one are free."""
    name: str = "attribute"
    """What the history calls it."""

    def __post_init__(self) -> None:
        """Check names and bounds; raises ParameterError."""
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ParameterError("classes", f"are two or more, each once, not {', '.join(self.classes) or 'none'}")
        for name, (low, high) in self.bounds.items():
            if name not in self.classes:
                raise ParameterError(name, f"is no class of this judge; known: {', '.join(self.classes)}")
            if not (math.isfinite(low) and math.isfinite(high) and 0 <= low < high <= 1):
                raise ParameterError(name, f"takes bounds 0 <= low < high <= 1, not {low:g} to {high:g}")

    @classmethod
    def towards(
        cls,
        classes: Sequence[str],
        classify: Judge,
        target: Mapping[str, float],
        tolerance: float = 0.03,
        name: str = "attribute",
    ) -> "Constraint":
        """Fractions of `target` +- `tolerance`, for debiasing.

        Raises:
            ParameterError: the target names an unknown class, names all classes and does not sum to 1, or lies outside
                [0, 1].
        """
        for key, value in target.items():
            if not 0 <= value <= 1:
                raise ParameterError(key, f"is a fraction in [0, 1], not {value:g}")
        total = sum(target.values())
        if abs(total - 1) > 1e-6 and (total > 1 or set(target) >= set(classes)):
            raise ParameterError("target", f"sums to {total:g}, not to 1")
        if not 0 < tolerance < 1:
            raise ParameterError("tolerance", f"lies between 0 and 1, not at {tolerance:g}")
        bounds = {key: (max(0.0, value - tolerance), min(1.0, value + tolerance)) for key, value in target.items()}
        return cls(tuple(classes), classify, bounds, name)

    def box(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest fraction of every class, 2 x (k,) float64."""
        pairs = [self.bounds.get(name, (0.0, 1.0)) for name in self.classes]
        low, high = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        return low, high

    def labels(self, images: Tensor) -> Tensor:
        """What the judge says, checked: int64 (n,) on the CPU.

        Raises:
            InputError: an answer is no class.
        """
        found = self.classify(images)
        if found.shape != (len(images),) or found.is_floating_point() or found.is_complex():
            raise InputError(
                f"the judge of {self.name} answers {tuple(found.shape)} {found.dtype}, not one label an image"
            )
        found = found.detach().cpu().long()
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < len(self.classes):
            raise InputError(
                f"the judge of {self.name} answers {int(found.min())} to {int(found.max())}; "
                f"there are {len(self.classes)} classes"
            )
        return found


class Interval(NamedTuple):
    """A fraction of samples with Clopper and Pearson's interval (1934), which errs on the side of caution."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fractions:
    """How many of n independent samples a judge put in each class."""

    name: str
    """The constraint's."""
    hits: dict[str, int]
    """By class."""
    n: int
    confidence: float
    """With which all intervals hold together (Bonferroni; of two classes one mirrors the other)."""

    @property
    def values(self) -> dict[str, float]:
        """The fraction of each class."""
        return {name: hits / self.n for name, hits in self.hits.items()}

    @property
    def intervals(self) -> dict[str, Interval]:
        """The fraction of each class with its interval."""
        tail = (1 - self.confidence) / comparisons(len(self.hits)) / 2
        return {name: _clopper_pearson(hits, self.n, tail) for name, hits in self.hits.items()}

    def inside(self, constraint: Constraint) -> bool:
        """Whether every interval lies within its bounds."""
        found = self.intervals
        return all(
            low <= found[name].low and found[name].high <= high for name, (low, high) in constraint.bounds.items()
        )

    def tensor(self) -> Tensor:
        """The fractions in the order of the classes, (k,) float64."""
        return torch.tensor(list(self.values.values()), dtype=torch.float64)


def count(constraint: Constraint, labels: Tensor, confidence: float) -> Fractions:
    """The fractions among labels (n,)."""
    hits = labels.bincount(minlength=len(constraint.classes)).tolist()
    return Fractions(constraint.name, dict(zip(constraint.classes, hits, strict=True)), len(labels), confidence)


def comparisons(classes: int) -> int:
    """Intervals that say something of their own."""
    return 1 if classes == 2 else classes


def samples_needed(constraints: Sequence[Constraint], confidence: float) -> int:
    """Samples with which a flow that is at its aim, or off it by a quarter of the room, has its intervals inside.

    Raises:
        ParameterError: some bounds would take more than MOST_SAMPLES.
    """
    most = 100
    for constraint in constraints:
        z = _normal_quantile(1 - (1 - confidence) / comparisons(len(constraint.classes)) / 2)
        for name, (low, high) in constraint.bounds.items():
            if (low, high) == (0.0, 1.0):
                continue
            p, room = _aim_and_room(low, high)
            needed = math.ceil(((z + POWER) / (ROOM * room)) ** 2 * p * (1 - p))
            if needed > MOST_SAMPLES:
                raise ParameterError(
                    name,
                    f"insufficient evidence: to show that it is within {low:g} to {high:g} takes {needed:,} samples, "
                    f"and {MOST_SAMPLES:,} are the most that bounds may ask for; widen them, ask for less confidence, "
                    "or set the parameter samples",
                )
            most = max(most, needed)
    return most


def aims(constraints: Sequence[Constraint], labels: Sequence[Tensor], confidence: float = 0.95) -> list[Tensor]:
    """Log weights w_j of the nearest distribution that keeps the bounds with room to spare, one (k_j,) a constraint.

    A class bounded on both sides aims at the middle, where the bounds of the others allow it.

    Args:
        constraints: with their bounds.
        labels: what the judges say of the same samples of the base, one (n,) a constraint.
        confidence: of the interval of what a refusal says that the base shows.

    Raises:
        UnreachableError: no distribution over what the base shows keeps all bounds, or none that it can teach: samples
            that it shows fewer than five of would have to become more.
    """
    boxes = [constraint.box() for constraint in constraints]
    every = list(range(len(constraints)))
    for some in ([[j] for j in every] if len(every) > 1 else []) + [every]:  # what one alone lacks is said of it alone
        short = untaught([labels[j] for j in some], [boxes[j] for j in some])
        if short:
            raise _not_shown([constraints[j] for j in some], short, len(labels[0]), confidence)
    found, miss = project(labels, boxes)
    if miss > CLOSE:
        raise _apart(constraints, [count(*pair, confidence) for pair in zip(constraints, labels, strict=True)], miss)
    for share in (1.0, 0.5, 0.25):
        boxes = [_tightened(constraint, share) for constraint in constraints]
        weights, miss = project(labels, boxes)
        if miss <= CLOSE and not untaught(labels, boxes):
            found = weights
            break
    return [weight.log() for weight in found]


def project(labels: Sequence[Tensor], boxes: Sequence[Box]) -> tuple[list[Tensor], float]:
    """The I-projection of the samples' joint distribution onto bounded marginals, by Dykstra's alternating scheme.

    Each round scales one constraint's classes into their bounds, after the scaling it got last time was taken back.
    With bounds of no width this is iterative proportional fitting.

    Returns:
        One weight a class for each constraint, (k_j,) float64, and the largest miss: of any bound, or of the sum, which
        is not 1 where the classes that samples show leave no room for it.
    """
    cells, counts = torch.unique(torch.stack(list(labels), 1), dim=0, return_counts=True)  # (m, j), (m,)
    mass = counts.double() / counts.sum()
    weights = [torch.ones_like(low) for low, _ in boxes]
    miss = math.inf
    for _ in range(ROUNDS):
        before = torch.cat(weights)
        for j, (low, high) in enumerate(boxes):
            free = mass / weights[j][cells[:, j]]
            now = torch.zeros_like(low).index_add_(0, cells[:, j], free)
            weights[j] = torch.where(now > 0, _scaled(now, low, high) / now.clamp(min=1e-300), 1.0)
            mass = free * weights[j][cells[:, j]]
        misses = [
            float(torch.maximum(low - now, now - high).max())
            for (low, high), now in zip(boxes, _marginals(boxes, cells, mass), strict=True)
        ]
        miss = max(*misses, abs(float(mass.sum()) - 1))
        if len(boxes) == 1 or float((torch.cat(weights) / before).log().abs().max()) < SETTLED:
            break
    return weights, miss


def check_reachable(constraints: Sequence[Constraint], measured: Sequence[Fractions]) -> None:
    """Refuse what no steering can reach from what the base shows of one class; `aims` refuses the rest.

    Raises:
        UnreachableError: lowest fractions that sum to more than 1, highest ones to less, or more asked of a class than
            the base, which shows it in fewer than five of n samples, can teach.
    """
    for constraint, found in zip(constraints, measured, strict=True):
        low, high = constraint.box()
        if float(low.sum()) > 1 or float(high.sum()) < 1:
            raise _apart([constraint], [found])
        for name, (lowest, _) in constraint.bounds.items():
            interval = found.intervals[name]
            if lowest > interval.value and found.hits[name] < FEWEST:
                raise UnreachableError(
                    f"{constraint.name}: the base shows {name} in {found.hits[name]} of {found.n} samples (at most "
                    f"{interval.high:.2%} of them all); at least {lowest:.0%} cannot be learned from it",
                    constraint=constraint.name, class_name=name, measured=interval.value, n=found.n,
                    upper=interval.high,
                )  # fmt: skip


def _not_shown(
    constraints: Sequence[Constraint], short: Sequence[Group], n: int, confidence: float
) -> UnreachableError:
    """Something else would have to take the place of what is bounded, and the base hardly shows it."""
    hits = sum(group.hits for group in short)
    interval = _clopper_pearson(hits, n, (1 - confidence) / 2)

    def named(group: Group) -> str:
        each = zip(constraints, group.classes, strict=True)
        return " and ".join(_listed([constraint.classes[k] for k in some]) for constraint, some in each)

    what = _listed([named(group) for group in short])
    names = " and ".join(constraint.name for constraint in constraints)
    return UnreachableError(
        f"{names}: to keep the bounds, samples that show {what} would have to become more frequent, and the base shows "
        f"that in {hits} of {n} samples, {interval.value:.2%} (at most {interval.high:.2%} of them all): it cannot be "
        "learned from so few",
        constraint=constraints[0].name if len(constraints) == 1 else None,
        class_name=what, measured=interval.value, n=n, upper=interval.high,
    )  # fmt: skip


def _apart(
    constraints: Sequence[Constraint], measured: Sequence[Fractions], miss: float | None = None
) -> UnreachableError:
    """Bounds that no fractions keep, with the class that is furthest from its own."""
    misses = {
        (j, name): max(low - found.values[name], found.values[name] - high)
        for j, (constraint, found) in enumerate(zip(constraints, measured, strict=True))
        for name, (low, high) in constraint.bounds.items()
    }
    j, name = max(misses, key=misses.__getitem__)
    low, high = constraints[j].box()
    interval, n = measured[j].intervals[name], measured[j].n
    names = " and ".join(constraint.name for constraint in constraints)
    why = (
        f"the lowest fractions of {names} sum to {float(low.sum()):g}, the highest to {float(high.sum()):g}; 1 must "
        "lie between"
        if miss is None
        else f"the bounds of {names} cannot hold together over what the base shows: the nearest distribution still "
        f"misses one by {miss:.3f}"
    )
    return UnreachableError(
        f"{why}. The base shows {name} in {interval.value:.2%} of {n} samples",
        constraint=constraints[j].name, class_name=name, measured=interval.value, n=n, upper=interval.high,
    )  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED
    return " or ".join([*names[:NAMED], f"{more} more"] if more > 0 else names)


def _tightened(constraint: Constraint, share: float) -> tuple[Tensor, Tensor]:
    """The bounds, moved that share of the way to where an aim is safe."""
    low, high = constraint.box()
    for k, (lowest, highest) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if (lowest, highest) == (0.0, 1.0):
            continue
        p, _ = _aim_and_room(lowest, highest)
        low[k] += share * max(0.0, p - lowest) if lowest > 0 else 0.0
        high[k] -= share * max(0.0, highest - p) if highest < 1 else 0.0
    return low, high


def _aim_and_room(low: float, high: float) -> tuple[float, float]:
    """Where a bounded fraction is safe, and how far that is from the nearest bound."""
    if low > 0 and high < 1:
        return (low + high) / 2, (high - low) / 2
    room = min(ONE_SIDED, (high if low <= 0 else 1 - low) / 2)
    return (high - room if low <= 0 else low + room), room


def _marginals(boxes: Sequence[Box], cells: Tensor, mass: Tensor) -> list[Tensor]:
    """Fractions of every class, (k_j,) a constraint, from the mass (m,) of cells (m, j)."""
    return [torch.zeros_like(low).index_add_(0, cells[:, j], mass) for j, (low, _) in enumerate(boxes)]


def _scaled(now: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest distribution to `now` (k,) within the bounds: clip(t now, low, high), with t for a sum of 1."""
    parts = [row for row in zip(now.tolist(), low.tolist(), high.tolist(), strict=True) if row[0] > 0]
    start, end = -50.0, 50.0  # log t
    for _ in range(70):
        middle = (start + end) / 2
        t = math.exp(middle)
        total = sum(min(max(value * t, lowest), highest) for value, lowest, highest in parts)
        start, end = (middle, end) if total < 1 else (start, middle)
    return torch.minimum(torch.maximum(now * math.exp((start + end) / 2), low), high)


def _clopper_pearson(hits: int, n: int, tail: float) -> Interval:
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits == n else float(special.betaincinv(hits + 1, n - hits, 1 - tail))
    return Interval(hits / n, low, high)


def _normal_quantile(p: float) -> float:
    return float(special.ndtri(p))
