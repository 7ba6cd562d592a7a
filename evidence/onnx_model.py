"""What runs an ONNX classifier: a session on the CPU, its shapes and answers checked. NumPy and the runtime alone.

Whoever keeps a stranger's classifier in a process of its own imports this, and none of the libraries of flows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from evidence.errors import ClassifierFileError, ClassifierOutputError, ClassifierShapeError, TargetError
from evidence.onnx_file import check_onnx

# Some builds of the runtime report its use to their maker, from a thread that its import starts, unless this says no.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime  # reads it once, at import

__all__ = ["BATCH", "OnnxModel", "OnnxSpec"]

FloatArray = npt.NDArray[np.float32]

BATCH = 256
"""Images that pass through the classifier at once."""

SUM_TOLERANCE = 1e-2
"""By which the probabilities of an image may miss 1; half precision inside a model costs some thousandths."""


@dataclass(frozen=True)
class OnnxSpec:
    """What the file cannot tell of a classifier.

    Attributes:
        classes: names in the order of the outputs. With one output value an image there are two: the second is the
            one that the value speaks for, such as ("no smile", "smile").
        output: "logits" (any real, softmax or sigmoid still to come), "probabilities" (in [0, 1]), or "score": one
            value an image of any scale.
        threshold: from which value on an image is of the second of two classes: a probability for logits and
            probabilities, in the score's own units for a score. Of three or more classes the largest output wins.
        scale: "unit" for v / 255, or (means, deviations), one of each for a channel, for (v / 255 - mean) / deviation.
        channels: of the images that it reads.
        size: their side, pixels.
        name: what a report calls it.
    """

    classes: tuple[str, ...]
    channels: int
    size: int
    output: Literal["logits", "probabilities", "score"] = "logits"
    threshold: float = 0.5
    scale: Literal["unit"] | tuple[tuple[float, ...], tuple[float, ...]] = "unit"
    name: str = "classifier"

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise TargetError(f"a classifier has two classes or more, each once, not {', '.join(self.classes)}")
        if self.output == "score" and len(self.classes) != 2:
            raise TargetError(f"a score tells two classes, not {len(self.classes)}")
        if self.output not in ("logits", "probabilities", "score"):
            raise TargetError(f"an output is logits, probabilities or score, not {self.output!r}")
        if self.output != "score" and not 0 < self.threshold < 1:
            raise TargetError(f"a threshold on probabilities lies in (0, 1), not at {self.threshold:g}")
        if self.scale != "unit":
            self._check_scale(*self.scale)

    def _check_scale(self, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        if not len(mean) == len(deviation) == self.channels or not all(value > 0 for value in deviation):
            raise TargetError(
                f"a scale has a mean and a positive deviation for each of {self.channels} channels, "
                f"not {mean} and {deviation}"
            )


class OnnxModel:
    """An ONNX model that answers for images (n, c, h, w) float32 with (n, k), or (n,) and (n, 1) for two classes.

    The file is checked before the runtime sees it: weights inside, ONNX's own operators only. It runs on the CPU.

    Args:
        path: the file.
        spec: what the file does not tell.
        image_shape: (c, h, w) that the flow draws.
        threads: of the runtime.

    Raises:
        ClassifierFileError: the file is no such model.
        ClassifierShapeError: it reads other images than the flow draws, or answers with another number of values.
    """

    def __init__(
        self, path: Path | str, spec: OnnxSpec, image_shape: tuple[int, int, int], *, threads: int = 1
    ) -> None:
        self.name = spec.name
        self.classes = spec.classes
        self.spec = spec
        declared = (spec.channels, spec.size, spec.size)
        if declared != image_shape:
            raise ClassifierShapeError(
                f"the classifier {spec.name} is said to take images of {declared} (channels, height, width), the flow "
                f"draws {image_shape}: give one for that size"
            )
        self._session = _session(Path(path), threads)
        self._input = self._session.get_inputs()[0].name
        self._fixed = _check_input(self._session, spec.name, image_shape)
        _check_output(self._session, spec)

    def labels(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Labels (n,) of images (n, c, h, w).

        Raises:
            ClassifierOutputError: an answer is not finite, is no probability, or has another shape than stated.
        """
        parts = [self._decide(values) for values in self._batches(images)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def probabilities(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Probabilities (n, k) of images (n, c, h, w), rows that sum to 1; of logits, by softmax or sigmoid.

        Raises:
            ClassifierOutputError: as `labels`; also for a score, which is on a scale of its own.
        """
        if self.spec.output == "score":
            raise ClassifierOutputError(f"the classifier {self.name} gives scores, which are no probabilities")
        parts = [self._spread(values) for values in self._batches(images)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)))

    def _batches(self, images: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.float64]]:
        """What the model answers, (n, values) of each batch."""
        size = self._fixed or BATCH
        for start in range(0, len(images), size):
            yield self._values(self._scaled(images[start : start + size]))

    def _scaled(self, images: npt.NDArray[np.uint8]) -> FloatArray:
        unit = images.astype(np.float32) / np.float32(255)
        if self.spec.scale == "unit":
            return unit
        mean, deviation = (np.array(values, dtype=np.float32)[:, None, None] for values in self.spec.scale)
        scaled: FloatArray = (unit - mean) / deviation
        return scaled

    def _values(self, pixels: FloatArray) -> npt.NDArray[np.float64]:
        n = len(pixels)
        if self._fixed and n < self._fixed:  # a model of one batch size gets its batch, filled up
            pixels = np.concatenate([pixels, np.zeros((self._fixed - n, *pixels.shape[1:]), dtype=np.float32)])
        try:
            answer = np.asarray(self._session.run(None, {self._input: pixels})[0])
        except Exception as error:  # the runtime raises classes of its own, none of them a documented base
            raise ClassifierOutputError(
                f"the classifier {self.name} failed on images: {type(error).__name__}"
            ) from error
        k = len(self.classes)
        if answer.shape not in ((len(pixels), k), *(((len(pixels), 1), (len(pixels),)) if k == 2 else ())):
            raise ClassifierShapeError(_answers(self.name, answer.shape[1:], k))
        values = answer[:n].reshape(n, -1).astype(np.float64)
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).any(1).sum())
            raise ClassifierOutputError(f"the classifier {self.name} answers {bad} of {n} images with no finite number")
        return np.asarray(values)

    def _spread(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.spec.output == "probabilities":
            _check_probabilities(self.name, values)
            second = np.clip(values, 0, 1)
            both = np.concatenate([1 - second, second], axis=1) if values.shape[1] == 1 else second
            return np.asarray(both / both.sum(1, keepdims=True))
        logits = np.concatenate([np.zeros_like(values), values], axis=1) if values.shape[1] == 1 else values
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))

    def _decide(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        spec = self.spec
        if spec.output == "score":
            if values.shape[1] != 1:
                raise ClassifierShapeError(_answers(self.name, values.shape[1:], 1))
            return _over(values[:, 0], spec.threshold)
        if spec.output == "probabilities":
            _check_probabilities(self.name, values)
        if len(spec.classes) > 2:
            return np.asarray(values.argmax(1), dtype=np.int64)
        second = values[:, 0] if values.shape[1] == 1 else values[:, 1]
        if spec.output == "probabilities":
            return _over(second, spec.threshold)
        odds = second if values.shape[1] == 1 else values[:, 1] - values[:, 0]
        # sigmoid(odds) >= threshold, without the sigmoid's overflow
        return _over(odds, math.log(spec.threshold) - math.log1p(-spec.threshold))


def _over(values: npt.NDArray[np.float64], threshold: float) -> npt.NDArray[np.int64]:
    return np.asarray(values >= threshold, dtype=np.int64)


def _session(path: Path, threads: int) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ClassifierFileError(f"the classifier's file cannot be read: {error.strerror}") from error
    check_onnx(data)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its warnings are for whoever exported the model
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime raises classes of its own, none of them a documented base
        raise ClassifierFileError(f"the ONNX runtime refuses the model: {_first_line(error)}") from error


def _check_input(session: Any, name: str, image_shape: tuple[int, int, int]) -> int | None:
    """The batch size that the model insists on; None for any."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ClassifierShapeError(f"the classifier {name} has {len(inputs)} inputs; it takes one, the images")
    shape, kind = list(inputs[0].shape), inputs[0].type
    fits = len(shape) == 4 and all(
        not isinstance(got, int) or got == wanted for got, wanted in zip(shape[1:], image_shape, strict=True)
    )
    if not fits or kind != "tensor(float)":
        raise ClassifierShapeError(
            f"the classifier {name} reads {kind} of shape {shape}; it has to read tensor(float) of shape "
            f"['N', {', '.join(map(str, image_shape))}], the images that the flow draws"
        )
    return shape[0] if isinstance(shape[0], int) else None


def _check_output(session: Any, spec: OnnxSpec) -> None:
    outputs = session.get_outputs()
    if len(outputs) != 1:
        raise ClassifierShapeError(f"the classifier {spec.name} has {len(outputs)} outputs; it gives one")
    shape, k = list(outputs[0].shape or []), len(spec.classes)
    one_value = k == 2 and (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1))
    per_class = spec.output != "score" and len(shape) == 2 and shape[1] == k
    unsaid = not shape or (len(shape) == 2 and not isinstance(shape[1], int))  # then the first answer tells
    if not (one_value or per_class or unsaid):
        raise ClassifierShapeError(_answers(spec.name, tuple(shape[1:]), 1 if spec.output == "score" else k))


def _answers(name: str, values: tuple[Any, ...], wanted: int) -> str:
    got = " x ".join(map(str, values)) or "1"
    return f"the classifier {name} gives {got} values an image; {wanted} classes or scores were stated"


def _check_probabilities(name: str, values: npt.NDArray[np.float64]) -> None:
    off = (values < -SUM_TOLERANCE) | (values > 1 + SUM_TOLERANCE)
    if off.any() or (values.shape[1] > 1 and (np.abs(values.sum(1) - 1) > SUM_TOLERANCE).any()):
        raise ClassifierOutputError(
            f"the classifier {name} gives no probabilities: they lie in [0, 1] and sum to 1. Is its output logits?"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
