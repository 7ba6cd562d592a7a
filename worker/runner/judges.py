"""Who says what samples show: classifiers from the store, and judges trained from the caller's labelled images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evidence.classifier import Classifier, TrainedClassifier, check_size, train_classifier
from evidence.errors import (
    ClassifierError,
    EvidenceError,
    InsufficientEvidenceError,
    TargetError,
    UnknownClassError,
)
from evidence.fractions import Bound
from evidence.likelihood import derive_seed
from evidence.onnx_model import OnnxSpec
from evidence.readings import Probabilistic
from evidence.steering_records import FractionBounds
from worker.runner.base import Origin
from worker.runner.images import Reader
from worker.runner.problems import UserError, escaped
from worker.runner.walled_model import IMAGES_AT_ONCE, JudgeProcess, WalledModel

__all__ = ["Judge", "Wanted", "judge_of", "refused_by_judge", "wanted_of"]


class Judge:
    """A classifier of the job, whose refusals are problems at its place in the request.

    Args:
        classifier: what judges.
        pointer: the place that names it.
    """

    def __init__(self, classifier: Classifier, pointer: str) -> None:
        self.name, self.classes = classifier.name, classifier.classes
        # Of a trained judge: the report states it.
        self.accuracy = classifier.accuracy if isinstance(classifier, TrainedClassifier) else None
        self.threshold = classifier.threshold if isinstance(classifier, Probabilistic) else 0.5
        self._classifier, self._pointer = classifier, pointer

    def __call__(self, images: Tensor) -> Tensor:
        """Labels (n,) int64 of images (n, c, h, w) uint8."""
        with refused_by_judge(self._pointer):
            return self._classifier(images)

    def probabilities(self, images: Tensor) -> Tensor | None:
        """See `evidence.readings.Probabilistic`."""
        with refused_by_judge(self._pointer):
            return self._classifier.probabilities(images) if isinstance(self._classifier, Probabilistic) else None


@dataclass(frozen=True)
class Wanted:
    """One judge and where the fractions of its classes are to lie."""

    judge: Judge
    bounds: Mapping[str, Bound]
    """By class; the others are free."""
    digest: str | None
    """SHA-256 of the classifier's file; None for a trained judge."""
    pointers: Mapping[str, str]
    """Where in the request each bounded class is asked for."""

    def asked(self) -> FractionBounds:
        """As the evaluation takes it."""
        low = {name: bound.low for name, bound in self.bounds.items() if bound.low > 0}
        high = {name: bound.high for name, bound in self.bounds.items() if bound.high < 1}
        return FractionBounds(self.judge, low, high)

    def summary(self) -> dict[str, float]:
        """What a summary says of the judge: its accuracy, where it is known."""
        accuracy = self.judge.accuracy
        return {} if accuracy is None else {f"accuracy/{self.judge.name}": accuracy.value}


def wanted_of(
    job: Mapping[str, Any], folder: Path, reader: Reader, base: Origin, *, on_batch: Callable[[], None] = lambda: None
) -> list[Wanted]:
    """What a job asks of samples, judge by judge: bounds that name the same judge are put to it together.

    Args:
        job: what is asked.
        folder: the job's.
        reader: of labelled sets.
        base: the flow whose samples are judged.
        on_batch: called after each batch that a caller's classifier judged, which may take minutes.

    Raises:
        UserError: a judge cannot judge this flow, its sets are too small, or it has no such class.
    """
    bench = _Bench(job, folder, reader, base, on_batch)
    if job["kind"] == "debias":
        return [_debias(job, bench)]
    groups: dict[str, list[int]] = {}
    for number, attribute in enumerate(job["target"]["attributes"]):
        groups.setdefault(json.dumps(attribute["judge"], sort_keys=True), []).append(number)
    return [_attributes(job, bench, numbers) for numbers in groups.values()]


def judge_of(
    spec: Mapping[str, Any],
    pointer: str,
    job: Mapping[str, Any],
    folder: Path,
    reader: Reader,
    base: Origin,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Judge:
    """The one judge that a request names at `pointer`; the other arguments are those of `wanted_of`.

    Raises:
        UserError: it cannot judge this model, or its sets are too small.
    """
    return _Bench(job, folder, reader, base, on_batch).judge(spec, pointer)


@contextmanager
def refused_by_judge(pointer: str) -> Iterator[None]:
    """What a judge refuses in this block becomes a problem at that place of the request."""
    try:
        yield
    except InsufficientEvidenceError as error:
        numbers = {"given": error.given, "needed": error.needed}
        title = "There is too little to judge from"
        raise UserError("insufficient-evidence", title, str(error), pointer=pointer, **numbers) from error
    except ClassifierError as error:
        raise UserError("classifier-refused", "The classifier cannot be used", str(error), pointer=pointer) from error
    except (UnknownClassError, TargetError) as error:
        raise UserError(
            "invalid-request", "The request cannot be met as it stands", str(error), pointer=pointer
        ) from error
    except EvidenceError as error:
        raise UserError("unusable-input", "The images cannot be used", str(error), pointer=pointer) from error


class _Walled:
    """A caller's ONNX classifier, asked in a process without network, other files or much memory."""

    def __init__(self, model: WalledModel, image_shape: tuple[int, int, int]) -> None:
        self.name, self.classes, self._image_shape = model.name, model.classes, image_shape
        self.threshold = model.spec.threshold
        self._model = model

    def __call__(self, images: Tensor) -> Tensor:
        """Labels (n,) int64 of images (n, c, h, w) uint8."""
        check_size(self.name, self._image_shape, images)
        return torch.from_numpy(self._model.labels(images.cpu().numpy()))

    def probabilities(self, images: Tensor) -> Tensor | None:
        """See `evidence.readings.Probabilistic`; a score is none."""
        check_size(self.name, self._image_shape, images)
        if self._model.spec.output == "score":
            return None
        return torch.from_numpy(self._model.probabilities(images.cpu().numpy()))


class _Bench:
    """Makes the judges of one job, each with a name of its own."""

    def __init__(
        self, job: Mapping[str, Any], folder: Path, reader: Reader, base: Origin, on_batch: Callable[[], None]
    ) -> None:
        self._seed, self._folder, self._reader, self._base = job["seed"], folder, reader, base
        # What ran out of memory is tried again in smaller batches, which judges may need as much as the flow.
        self._at_once, self._on_batch = max(1, IMAGES_AT_ONCE // job.get("micro_batch_divisor", 1)), on_batch
        self._names: set[str] = set()
        self._process: JudgeProcess | None = None

    def judge(self, spec: Mapping[str, Any], pointer: str) -> Judge:
        """The judge that a request names at `pointer`."""
        if spec.get("onnx"):
            place = f"{pointer}/classifier"
            with refused_by_judge(place):
                return Judge(self._from_file(spec), place)
        place = f"{pointer}/sets"
        return Judge(self._from_sets(spec["sets"], place), place)

    def _from_file(self, spec: Mapping[str, Any]) -> Classifier:
        channels, size, _ = self._base.image_shape
        scale = spec.get("scale")
        described = OnnxSpec(
            classes=tuple(spec["classes"]),
            channels=channels,
            size=size,
            output=spec["output"],
            threshold=float(spec["threshold"]),
            scale=(tuple(scale["mean"]), tuple(scale["std"])) if isinstance(scale, dict) else "unit",
            name=self._unique(spec.get("name") or "classifier"),
        )
        path = self._folder / spec["onnx"]
        if self._process is None:  # one for all of them: together they have the memory and the core of one
            self._process = JudgeProcess(path.parent, at_once=self._at_once, on_batch=self._on_batch)
        return _Walled(self._process.open(path, described, self._base.image_shape), self._base.image_shape)

    def _from_sets(self, sets: Mapping[str, list[str]], place: str) -> Classifier:
        images = {
            name: self._reader.read(paths, "labelled", pointer=f"{place}/{escaped(name)}").pixels
            for name, paths in sets.items()
        }
        seed, name = derive_seed(self._seed, "judge", place), self._unique(" or ".join(sets))
        with refused_by_judge(place):
            return train_classifier(images, seed=seed, name=name)

    def _unique(self, name: str) -> str:
        """The name, numbered where another judge of the job has it already."""
        number, free = 1, name
        while free in self._names:
            number += 1
            free = f"{name} ({number})"
        self._names.add(free)
        return free


def _debias(job: Mapping[str, Any], bench: _Bench) -> Wanted:
    pointer, target = "/target_distribution", {str(name): float(f) for name, f in job["target_distribution"].items()}
    judge = bench.judge(job["attribute"], "/attribute")
    with refused_by_judge(pointer):
        bounds = FractionBounds.distribution(judge, target, float(job["tolerance"])).bounds
    return Wanted(judge, bounds, job["attribute"].get("sha256"), dict.fromkeys(bounds, pointer))


def _attributes(job: Mapping[str, Any], bench: _Bench, numbers: list[int]) -> Wanted:
    asked = {number: job["target"]["attributes"][number] for number in numbers}
    spec = asked[numbers[0]]["judge"]
    judge = bench.judge(spec, f"/target/attributes/{numbers[0]}")
    bounds: dict[str, Bound] = {}
    pointers = {one["class"]: f"/target/attributes/{number}" for number, one in asked.items()}
    for number, one in asked.items():
        low, high = one.get("at_least"), one.get("at_most")
        bound = Bound(0.0 if low is None else low, 1.0 if high is None else high)
        if bound.high == 0 or bound.low == 1:
            raise _unprovable(bound, f"/target/attributes/{number}")
        with refused_by_judge(f"/target/attributes/{number}/class"):
            FractionBounds(judge, {one["class"]: bound.low}, {one["class"]: bound.high})  # does it tell the class?
        bounds[one["class"]] = bound
    return Wanted(judge, bounds, spec.get("sha256"), pointers)


def _unprovable(bound: Bound, pointer: str) -> UserError:
    said = "at most 0; ask for at most 0.01, say" if bound.high == 0 else "at least 1; ask for at least 0.99, say"
    detail = f"No number of samples can show a fraction of {said}."
    return UserError("invalid-request", "The request cannot be met as it stands", detail, pointer=pointer)
