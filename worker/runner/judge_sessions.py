"""What runs inside `worker.runner.judge_process` once its walls stand: the sessions of a job's classifiers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from evidence.errors import ClassifierError, ClassifierOutputError
from evidence.onnx_model import OnnxModel, OnnxSpec
from worker.runner.judge_process import MEMORY_BYTES, read_frame

__all__ = ["Sessions"]


class Sessions:
    """The classifiers that were opened, numbered from 0."""

    def __init__(self) -> None:
        self._opened: list[tuple[OnnxModel, tuple[int, int, int]]] = []

    def answers(self, message: Mapping[str, Any], incoming: IO[bytes]) -> list[bytes]:
        """The frames that answer one message; a refusal is one of them.

        Args:
            message: a file to open, or who is to judge the images that follow.
            incoming: where they follow.
        """
        if "open" in message:
            return self._open(message["open"])
        data = read_frame(incoming, message["bytes"])
        return [] if data is None else self._judge(message["judge"], data, bool(message.get("probabilities")))

    def _open(self, told: Mapping[str, Any]) -> list[bytes]:
        shape: tuple[int, int, int] = tuple(told["image_shape"])
        try:
            self._opened.append((OnnxModel(Path(told["path"]), _spec_of(told["spec"]), shape), shape))
        except (ClassifierError, MemoryError) as error:
            return [_refusal(error, told["spec"]["name"])]
        return [b"{}"]

    def _judge(self, number: int, data: bytes, probabilities: bool) -> list[bytes]:
        model, shape = self._opened[number]
        images = np.frombuffer(data, dtype=np.uint8).reshape(-1, *shape)
        try:
            if probabilities:
                return [b"{}", model.probabilities(images).astype("<f8").tobytes()]
            return [b"{}", model.labels(images).astype("<i8").tobytes()]
        except (ClassifierError, MemoryError) as error:
            return [_refusal(error, model.name)]


def _spec_of(told: Mapping[str, Any]) -> OnnxSpec:
    scale = told["scale"]
    return OnnxSpec(
        **{
            **told,
            "classes": tuple(told["classes"]),
            "scale": scale if isinstance(scale, str) else tuple(tuple(values) for values in scale),
        }
    )


def _refusal(error: ClassifierError | MemoryError, name: str) -> bytes:
    cause = error.__cause__ if isinstance(error, ClassifierError) else error
    if isinstance(cause, MemoryError) or "alloc" in str(cause):  # the runtime says so by its wording alone
        error = ClassifierOutputError(
            f"the classifier {name} needs more memory than the {MEMORY_BYTES / 2**30:g} GiB that all classifiers of a "
            "job have; use a smaller one"
        )
    return json.dumps({"refused": type(error).__name__, "message": str(error)[:1000]}).encode()
