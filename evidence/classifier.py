"""A judge of pictures trained from labelled image sets: it says which class a sample shows, and how often it errs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from evidence.errors import ClassifierShapeError, InsufficientEvidenceError, TargetError
from evidence.fractions import Fraction, clopper_pearson
from evidence.likelihood import check_images, derive_seed, device_of
from evidence.patch_features import Filters
from models.images import flow_input

__all__ = [
    "SMALLEST_SET",
    "Classifier",
    "FlowClassifier",
    "TrainedClassifier",
    "check_accuracy",
    "check_size",
    "train_classifier",
]

SMALLEST_SET = 10
"""Images of each class, below which five folds say nothing of a judge's errors."""

FOLDS = 5

PENALTIES = torch.logspace(-5, 3, 17, dtype=torch.float64)
"""Ridge penalties tried, in units of the features' mean square."""

SHARPNESS = torch.logspace(-1, 2.5, 71, dtype=torch.float64)
"""Factors of scores tried for probabilities; scores are near 0 for a wrong class and 1 for the right one."""

COMPONENTS = 512
"""Principal components of the features that the ridge regression reads, where there are as many."""

BATCH = 256
"""Images that a flow classifies at once."""


@runtime_checkable
class Classifier(Protocol):
    """What judges samples. No gradient goes through it, and it never sees the flow that drew them."""

    @property
    def name(self) -> str:
        """What a report calls it, such as the attribute that it tells."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; two or more."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Labels (n,) int64 on the CPU, of images (n, c, h, w) uint8."""
        ...


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A ridge classifier on patch features, trained from labelled images.

    Its labels are what it learned to tell those sets apart by: where the sets differ in light or framing too, it may
    tell that. Its errors move every fraction that it counts, by up to 1 - accuracy, and no interval covers that.

    Attributes:
        name: what a report calls it.
        classes: in the order of the labels.
        image_shape: (c, h, w) of the images that it was trained on and takes.
        accuracy: share of right labels on images that the fold had not seen, as the mean over classes, so that chance
            is 1 / k whatever the sizes; its interval is Clopper and Pearson's at the harmonic sample size.
        recall: the same for each class.
        sizes: images of each class.
        sharpness: what scores are multiplied by before the softmax that makes probabilities of them.
    """

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    accuracy: Fraction
    recall: Mapping[str, float]
    sizes: Mapping[str, int]
    sharpness: float
    _filters: Filters
    _mean: Tensor
    _projection: Tensor
    _weights: Tensor

    def features(self, images: Tensor) -> Tensor:
        """What it looks at: images (n, c, h, w) uint8 to (n, k) float32, principal components of patch features."""
        check_size(self.name, self.image_shape, images)
        if not len(images):
            return torch.zeros(0, self._projection.shape[1])
        return (self._filters(images) - self._mean) @ self._projection

    def __call__(self, images: Tensor) -> Tensor:
        """Labels (n,) int64 of images (n, c, h, w) uint8."""
        return self._scores(images).argmax(1)

    @property
    def threshold(self) -> float:
        """As `evidence.readings.Probabilistic`: the likelier of two classes wins."""
        return 0.5

    def probabilities(self, images: Tensor) -> Tensor:
        """(n, k) float64, rows that sum to 1, of images (n, c, h, w) uint8: calibrated on images it had not seen."""
        return torch.softmax(self.sharpness * self._scores(images), dim=1)

    def _scores(self, images: Tensor) -> Tensor:
        return _with_bias(self.features(images).double()).matmul(self._weights)


class FlowClassifier:
    """A flow of classes as the judge: its own classification, by one evaluation an image.

    It knows what the flow takes the classes to be; of a flow whose classes have been forgotten it is no judge, so
    give it the base.

    Args:
        flow: offers `classify(x)`, which answers with labels (b,) or a score for each class (b, k).
        classes: names, in the order of the labels.
        n_bits: colour depth of a flow over dequantised images.
        seed: of the noise on the images.
        name: what a report calls it.
    """

    def __init__(self, flow: object, classes: Sequence[str], *, n_bits: int, seed: int, name: str = "class") -> None:
        if not callable(getattr(flow, "classify", None)):
            raise ClassifierShapeError(f"a flow that judges offers classify(x); {type(flow).__name__} does not")
        self.name = name
        self.classes = tuple(classes)
        self._flow: Any = flow
        self._n_bits = n_bits
        self._seed = derive_seed(seed, "classify")

    def __call__(self, images: Tensor) -> Tensor:
        """Labels (n,) int64 of images (n, c, h, w) uint8."""
        check_images(images)
        generator = torch.Generator().manual_seed(self._seed)
        parts = [torch.zeros(0, dtype=torch.int64)]
        for start in range(0, len(images), BATCH):
            x = flow_input(self._flow, images[start : start + BATCH].cpu(), self._n_bits, generator)
            with torch.inference_mode():
                answer = self._flow.classify(x.to(device_of(self._flow))).cpu()
            parts.append((answer.argmax(1) if answer.ndim == 2 else answer).long())
        return torch.cat(parts)


def train_classifier(
    sets: Mapping[str, Tensor], *, seed: int, name: str = "attribute", confidence: float = 0.95
) -> TrainedClassifier:
    """Train a judge from labelled images and measure its errors on images that it had not seen.

    Least squares on one-hot classes with a ridge penalty, classes weighted alike, the penalty chosen by leave-one-out
    in closed form (Golub, Heath & Wahba 1979). The filters read no label and are learned once, from all images; all
    that reads labels is fitted anew in each of five folds.

    Args:
        sets: by class, (n, c, h, w) uint8, at least SMALLEST_SET images each, all of one shape.
        seed: of filters and folds; the same seed gives the same judge.
        name: what a report calls it.
        confidence: of the accuracy's interval.

    Raises:
        InsufficientEvidenceError: a set is too small, or the classes cannot be told apart from what there is.
        ClassifierShapeError: the images differ in shape.
    """
    classes = tuple(sets)
    sizes = {key: len(images) for key, images in sets.items()}
    shape = _check_sets(sets)
    images = torch.cat([one.cpu() for one in sets.values()])
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes.values())])
    generator = torch.Generator().manual_seed(derive_seed(seed, "classifier"))
    filters = Filters(images, generator)
    features = filters(images)
    mean, projection = _projection(features)
    x, targets = _with_bias(((features - mean) @ projection).double()), F.one_hot(labels, len(classes)).double()
    weight = 1 / torch.tensor(list(sizes.values()), dtype=torch.float64)[labels]
    scores = _held_out_scores(x, targets, weight, labels, generator)
    guesses = scores.argmax(1)
    hits = [float((guesses[labels == i] == i).double().mean()) for i in range(len(classes))]
    accuracy = _balanced(hits, list(sizes.values()), confidence)
    check_accuracy(accuracy, len(classes), name)
    return TrainedClassifier(
        name=name,
        classes=classes,
        image_shape=shape,
        accuracy=accuracy,
        recall=dict(zip(classes, hits, strict=True)),
        sizes=sizes,
        sharpness=_sharpness(scores, labels, weight),
        _filters=filters,
        _mean=mean,
        _projection=projection,
        _weights=_ridge(x, targets, weight),
    )


def check_size(name: str, takes: tuple[int, int, int], images: Tensor) -> None:
    """Raise unless images are (n, c, h, w) uint8 of the shape that a classifier takes."""
    check_images(images)
    if tuple(images.shape[1:]) != takes:
        raise ClassifierShapeError(
            f"the classifier {name} takes images of {takes} (channels, height, width), these are "
            f"{tuple(images.shape[1:])}: give one for the flow's own size"
        )


def _check_sets(sets: Mapping[str, Tensor]) -> tuple[int, int, int]:
    if len(sets) < 2:
        raise TargetError(f"a classifier tells two classes or more, not {len(sets)}")
    shapes = {key: tuple(images.shape[1:]) for key, images in sets.items()}
    for key, images in sets.items():
        check_images(images)
        if len(images) < SMALLEST_SET:
            raise InsufficientEvidenceError(
                f"insufficient evidence: {len(images)} images of {key!r} are too few to train a judge and to measure "
                f"its errors; {SMALLEST_SET} of each class are the least, 100 make a useful one",
                given=len(images),
                needed=SMALLEST_SET,
            )
    if len(set(shapes.values())) > 1:
        raise ClassifierShapeError(f"the labelled sets differ in shape: {shapes}")
    channels, height, width = next(iter(shapes.values()))
    return channels, height, width


def check_accuracy(accuracy: Fraction, classes: int, name: str) -> None:
    """A judge must do better than chance beyond doubt; else say how many images would show whether it does."""
    chance = 1 / classes
    if accuracy.low > chance:
        return
    needed = None
    remedy = "the sets do not differ in what it can see"
    if accuracy.value > chance:
        z = float(special.ndtri(1 - (1 - accuracy.confidence) / 2))
        spread = accuracy.value * (1 - accuracy.value)
        needed = math.ceil((z + 1.645) ** 2 * spread / (accuracy.value - chance) ** 2)  # 1.645: in 95 of 100 tries
        remedy = f"at this accuracy some {needed:,} images would do"
    raise InsufficientEvidenceError(
        f"insufficient evidence: the judge {name!r} is right on {accuracy.value:.0%} of unseen images "
        f"({accuracy.low:.0%} to {accuracy.high:.0%} at {accuracy.confidence:.0%} confidence), which cannot be told "
        f"from chance, {chance:.0%}; {remedy}",
        given=accuracy.n,
        needed=needed,
    )


def _balanced(hits: Sequence[float], sizes: Sequence[int], confidence: float) -> Fraction:
    """The mean of recalls, with the interval of a binomial of the same variance: exact where all sizes are equal."""
    k = len(sizes)
    n = int(k * k / sum(1 / size for size in sizes) + 1e-9)
    value = sum(hits) / k
    return Fraction(value, *clopper_pearson(value * n, n, 1 - confidence), n, confidence, confidence)


def _held_out_scores(x: Tensor, targets: Tensor, weight: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Scores (n, k) of each image by a judge that was fitted without it; every class is spread over all folds."""
    fold = torch.empty(len(x), dtype=torch.int64)
    for label in range(targets.shape[1]):
        rows = (labels == label).nonzero().flatten()
        fold[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % FOLDS
    scores = torch.empty_like(targets)
    for one in range(FOLDS):
        held, seen = fold == one, fold != one
        scores[held] = x[held] @ _ridge(x[seen], targets[seen], weight[seen])
    return scores


def _sharpness(scores: Tensor, labels: Tensor, weight: Tensor) -> float:
    """The factor of scores (n, k) at which their softmax is likeliest: temperature scaling (Guo et al. 2017)."""
    tried = [float(one) for one in SHARPNESS]
    return min(tried, key=lambda one: float(F.cross_entropy(one * scores, labels, reduction="none") @ weight))


def _ridge(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Weights (d, k) of the ridge regression whose penalty leaves the smallest leave-one-out error."""
    root = (weight / weight.mean()).sqrt()[:, None]
    a, b = x * root, targets * root  # (n, d), (n, k)
    n, d = a.shape
    if n >= d:
        squares, right = torch.linalg.eigh(a.T @ a)
        left = a @ right / squares.clamp_min(1e-9).sqrt()
    else:
        squares, left = torch.linalg.eigh(a @ a.T)
        right = a.T @ left / squares.clamp_min(1e-9).sqrt()
    kept = squares > 1e-9 * squares.max()
    squares, left, right = squares[kept], left[:, kept], right[:, kept]
    rotated = left.T @ b  # (r, k)
    best, least = torch.empty(0), math.inf
    for penalty in PENALTIES * squares.mean():
        shrink = squares / (squares + penalty)
        leverage = (left.square() @ shrink)[:, None]
        missed = (b - left @ (shrink[:, None] * rotated)) / (1 - leverage).clamp_min(1e-6)
        error = float(missed.square().mean())
        if error < least:
            least, best = error, shrink
    weights: Tensor = right @ ((best / squares.sqrt())[:, None] * rotated)
    return weights


def _projection(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) of features (n, d), and their standardisation and main directions as one matrix (d, k)."""
    mean, std = features.mean(0), features.std(0).clamp_min(1e-4)
    x = (features - mean) / std
    if len(x) <= COMPONENTS:
        _, values, rows = torch.linalg.svd(x, full_matrices=False)
        vectors = rows[values > 1e-4 * values.max()].T
    else:
        vectors = torch.linalg.eigh(x.T @ x).eigenvectors[:, -COMPONENTS:]
    return mean, vectors / std[:, None]


def _with_bias(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
