"""The process that runs a caller's ONNX classifier for the runner, behind the walls of the reader of checkpoints.

The runtime parses and runs what a stranger wrote. The file was tried at the door, on images of zeros; here it meets
others, beside a checkpoint, with the network and other jobs' files in reach. So the session lives in a child without
them: ``python -m worker.runner.judge_process OPTIONS``. Frames both ways: a big-endian length, then that many bytes.
In: images, uint8 (n, c, h, w). Out: a JSON object, and where it says so, n labels, int64.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from evidence.errors import (
    ClassifierError,
    ClassifierFileError,
    ClassifierOutputError,
    ClassifierShapeError,
)
from evidence.onnx_model import BATCH, OnnxModel, OnnxSpec
from worker.runner import sandbox

__all__ = ["WalledModel"]

ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 8 * 2**30
"""Address space beyond what the libraries take: a batch on its way through a large classifier."""
CPU_SECONDS = 24 * 3600
"""Of one job; a classifier that hangs is ended with its runner, which then reports nothing any more."""
IMAGES_AT_ONCE = 4 * BATCH
LONGEST_REPLY = 2**16
REFUSALS = {one.__name__: one for one in (ClassifierFileError, ClassifierShapeError, ClassifierOutputError)}


class WalledModel:
    """As `evidence.onnx_model.OnnxModel`, in a process of its own, which ends with this object.

    Args:
        path: the file; its folder is all that the process can open.
        spec: what the file does not tell.
        image_shape: (c, h, w) that the flow draws.

    Raises:
        ClassifierError: as `OnnxModel` does, or the process ended.
    """

    def __init__(self, path: Path, spec: OnnxSpec, image_shape: tuple[int, int, int]) -> None:
        self.name, self.classes, self._shape = spec.name, spec.classes, image_shape
        options = json.dumps({"path": str(path.resolve()), "spec": asdict(spec), "image_shape": image_shape})
        process = subprocess.Popen(  # noqa: S603 our own module, no shell
            [sys.executable, "-P", "-m", "worker.runner.judge_process", options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the runtime's messages may quote the file
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._process = process
        self._ended = weakref.finalize(self, _end, process)
        self.walls: list[str] = self._reply()["walls"]
        """Which of them this host allows."""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def labels(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Labels (n,) of images (n, c, h, w); raises ClassifierError as `OnnxModel` does."""
        parts = [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(images), IMAGES_AT_ONCE):
            parts.append(self._asked(np.ascontiguousarray(images[start : start + IMAGES_AT_ONCE])))
        return np.concatenate(parts)

    def close(self) -> None:
        """End the process."""
        self._ended()

    def _asked(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        try:
            _write(_pipe(self._process.stdin), images.tobytes())
        except (OSError, ValueError) as error:  # the latter of a pipe that we closed
            raise self._gone() from error
        self._reply()
        labels = np.frombuffer(self._frame(8 * len(images)), dtype="<i8").astype(np.int64)
        if len(labels) != len(images) or labels.min() < 0 or labels.max() >= len(self.classes):
            raise ClassifierOutputError(f"the classifier {self.name} gives labels that are none of its classes")
        return labels

    def _reply(self) -> dict[str, Any]:
        try:
            reply = json.loads(self._frame(LONGEST_REPLY))
        except ValueError as error:
            raise self._gone() from error
        if "refused" in reply:
            raise REFUSALS.get(reply["refused"], ClassifierOutputError)(str(reply["message"]))
        answer: dict[str, Any] = reply
        return answer

    def _frame(self, at_most: int) -> bytes:
        data = _read(_pipe(self._process.stdout), at_most)
        if data is None:
            raise self._gone()
        return data

    def _gone(self) -> ClassifierError:
        self._ended()
        return ClassifierOutputError(
            f"the classifier {self.name} could not be run within its limits of memory; use a smaller one"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # bytes that the dead process did not take
                continue


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ClassifierOutputError("the classifier's process has no pipes")
    return stream


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(struct.pack(">Q", len(data)))
    stream.write(data)
    stream.flush()


def _read(stream: IO[bytes], at_most: int) -> bytes | None:
    """The next frame; None at the end, and for one that is cut short or longer: no memory is given for a lie."""
    header = stream.read(8)
    if len(header) < 8 or (size := struct.unpack(">Q", header)[0]) > at_most:
        return None
    data = stream.read(size)
    return data if len(data) == size else None


def _spec_of(told: Mapping[str, Any]) -> OnnxSpec:
    scale = told["scale"]
    return OnnxSpec(
        **{
            **told,
            "classes": tuple(told["classes"]),
            "scale": scale if isinstance(scale, str) else tuple(tuple(values) for values in scale),
        }
    )


def _refusal(error: Exception) -> bytes:
    known = error if isinstance(error, ClassifierError) else ClassifierOutputError("the classifier failed on images")
    return json.dumps({"refused": type(known).__name__, "message": str(known)[:1000]}).encode()


def main() -> None:
    """Serve until standard input ends."""
    options = json.loads(sys.argv[1])
    path, shape = Path(options["path"]), tuple(options["image_shape"])
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    walls = sandbox.close_doors(path.parent)  # before the runtime has a thread
    sandbox.limit_resources(memory_bytes=MEMORY_BYTES, cpu_seconds=CPU_SECONDS, source_bytes=0)
    try:
        model = OnnxModel(path, _spec_of(options["spec"]), shape)
    except ClassifierError as error:
        return _write(outgoing, _refusal(error))
    _write(outgoing, json.dumps({"walls": walls}).encode())
    while (data := _read(incoming, IMAGES_AT_ONCE * math.prod(shape))) is not None:
        try:
            labels = model.labels(np.frombuffer(data, dtype=np.uint8).reshape(-1, *shape))
        except (ClassifierError, MemoryError) as error:
            _write(outgoing, _refusal(error))
            continue
        _write(outgoing, b"{}")
        _write(outgoing, labels.astype("<i8").tobytes())
    return None


if __name__ == "__main__":
    main()
