"""The door for classifiers: a foreign ONNX file is loaded and tried once, in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from services.errors import ClassifierRefused
from services.sandbox.process import WalledProcess

__all__ = ["TRIALS", "try_classifier"]

PROGRAM = Path(__file__).with_name("classifier_process.py")
MEMORY_BYTES = (
    4 * 2**30
)  # address space: libraries and arenas take about 1.5 GiB of it, a large file three times itself
TRIALS = 2  # files tried at a time in this process
WALL_SECONDS = 120.0  # the processor time has its own, shorter limit

_places = threading.BoundedSemaphore(TRIALS)

REFUSALS = {
    "not_onnx": "The file is no ONNX model that can be loaded, or is cut short; export it again as one .onnx file.",
    "external_data": "The model keeps weights outside of its file; save it whole: "
    "onnx.save(model, path, save_as_external_data=False).",
    "unknown_operator": "The model uses an operator or opset that onnxruntime {version} does not know; "
    "export it with standard operators and a lower opset.",
    "foreign_operator": "The model has operators that are not ONNX's own; export it without custom ones, and not fused "
    "by an optimiser.",
    "several": "The model has {inputs} inputs and {outputs} outputs; export it with one of each: images in, one row of "
    "figures an image out.",
    "input_type": "The input is {type}; a classifier takes float32 images: tensor(float).",
    "input_shape": "The input has shape {shape}; a classifier takes square images (N, c, h, h), with c 1 or 3.",
    "large_batch": "The model insists on {batch} images at once; the most is {most}. Export it with a dynamic first "
    'axis, such as dynamic_axes={{"input": {{0: "n"}}}}.',
    "does_not_run": "The model loads and does not run on images of zeros; check it with onnxruntime and export it "
    "again, with the side of its images fixed if it takes one alone.",
    "output_type": "The output is no tensor of floats; export the model without steps after its last layer.",
    "output_classes": "The output has shape {shape}, and {classes} classes were named: it must be (N, {classes}), one "
    "figure a class (or a single one for two classes). Name as many as the model has, in its order.",
    "output_score": "The output has shape {shape}; output=score takes one figure an image: (N) or (N, 1).",
    "not_finite": "The model answers NaN or infinity to images of zeros; export it again.",
    "no_probabilities": "What the model answers to images of zeros lies outside of [0, 1] or does not sum to 1; "
    "say output=logits, or end the model in a softmax.",
    "too_much_memory": "The model needs more memory than a classifier may; send a smaller one.",
    "crashed": "The model could not be loaded and tried within the limits; send a smaller one.",
}
POINTS_AT = {"output_classes": "classes", "output_score": "output", "no_probabilities": "output"}


def try_classifier(chunks: Iterable[bytes], count: int, *, output: str, classes: int) -> dict[str, int | None]:
    """What a classifier takes: its ``channels`` and ``size`` (the side in pixels), null where it takes any.

    Waits while ``TRIALS`` others are being tried.

    Args:
        chunks: The file.
        count: How many bytes they are.
        output: What it is said to answer: logits, probabilities or score.
        classes: How many classes it is said to tell apart.

    Raises:
        ClassifierRefused: It cannot be loaded, or is not what it is said to be.
    """
    with _places, _Trial(output, classes) as trial:
        facts = trial.facts(chunks, count)
    code = facts.pop("refused", None)
    if code is None:
        return {"channels": facts["channels"], "size": facts["size"]}
    detail = REFUSALS[code].format(**facts)
    place = {"errors": [{"parameter": POINTS_AT[code], "detail": detail}]} if code in POINTS_AT else {}
    raise ClassifierRefused(detail, reason=code, **place)


class _Trial(WalledProcess):
    def __init__(self, output: str, classes: int) -> None:
        options = {"output": output, "classes": classes}
        super().__init__(PROGRAM, options, memory_bytes=MEMORY_BYTES, wall_seconds=WALL_SECONDS)

    def facts(self, chunks: Iterable[bytes], count: int) -> dict[str, Any]:
        try:
            with self._watched():
                self._announce(count)
                for chunk in chunks:
                    self._stdin.write(chunk)
                self._stdin.flush()
                return self._facts()
        except (BrokenPipeError, EOFError):
            return {"refused": "crashed"}
