"""The runner's side of `worker.runner.judge_process`: its classifiers, asked in frames, each answer with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from evidence.errors import ClassifierFileError, ClassifierOutputError, ClassifierShapeError
from evidence.onnx_model import BATCH, OnnxSpec
from worker.runner.judge_process import LONGEST_REPLY, read_frame, write_frame

__all__ = ["Deadlines", "JudgeProcess", "WalledModel"]

ROOT = Path(__file__).resolve().parents[2]
IMAGES_AT_ONCE = BATCH
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
REFUSALS = {one.__name__: one for one in (ClassifierFileError, ClassifierShapeError, ClassifierOutputError)}


@dataclass(frozen=True)
class Deadlines:
    """After which a classifier counts as one that does not end; seconds by the clock.

    No machine was measured for them: they are so long that a large classifier on a busy core stays within them, and so
    short that one that never ends is told long before the supervisor takes the runner for one that hangs.

    Attributes:
        start: of the process, to its first word.
        open: of a file.
        batch: of up to IMAGES_AT_ONCE images, however few.
        image: of each of them, on top.
    """

    start: float = 120.0
    open: float = 120.0
    batch: float = 60.0
    image: float = 1.0


class JudgeProcess:
    """One process for all ONNX classifiers of a job, which share its memory; it ends with this object and the runner.

    Args:
        folder: that of the files; all that the process can open.
        deadlines: of its answers.

    Raises:
        RuntimeError: it does not start, for which no classifier is to blame.
    """

    def __init__(self, folder: Path, deadlines: Deadlines | None = None) -> None:
        self._deadlines, self._opened = deadlines or Deadlines(), 0
        options = json.dumps({"folder": str(folder.resolve()), "parent": os.getpid()})
        process = subprocess.Popen(  # noqa: S603 our own module, no shell
            [sys.executable, "-P", "-m", "worker.runner.judge_process", options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the runtime's messages may quote the file
            env={**os.environ, **ENVIRONMENT},
        )
        self._process = process
        self._ended = weakref.finalize(self, _end, process)
        self.walls = self._started()
        """Which of them this host allows."""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def open(self, path: Path, spec: OnnxSpec, image_shape: tuple[int, int, int]) -> WalledModel:
        """A classifier of the folder; arguments and refusals are those of `evidence.onnx_model.OnnxModel`."""
        told = {"path": str(path.resolve()), "spec": asdict(spec), "image_shape": image_shape}
        self._asked(spec.name, {"open": told}, None, self._deadlines.open, "to its file")
        self._opened += 1
        return WalledModel(self, self._opened - 1, spec)

    def labels(self, judge: int, name: str, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Labels (n,) that an open classifier gives for images (n, c, h, w), unchecked; n is at most IMAGES_AT_ONCE."""
        n, data = len(images), images.tobytes()
        seconds = self._deadlines.batch + n * self._deadlines.image
        labels = self._asked(name, {"judge": judge, "bytes": len(data)}, data, seconds, f"to {n} images")
        return np.frombuffer(labels[: len(labels) // 8 * 8], dtype="<i8").astype(np.int64)

    def close(self) -> None:
        """End the process."""
        self._ended()

    def _started(self) -> list[str]:
        with self._watched(self._deadlines.start):
            reply = _object(read_frame(_pipe(self._process.stdout), LONGEST_REPLY))
        if reply is None or "walls" not in reply:
            self.close()
            why = (reply or {}).get("failed", "it said nothing")
            raise RuntimeError(f"the process of the classifiers did not start: {why}")
        walls: list[str] = reply["walls"]
        return walls

    def _asked(self, name: str, message: Mapping[str, Any], data: bytes | None, seconds: float, what: str) -> bytes:
        """The frame that answers data; empty for a message without. Ends the process unless all came in time."""
        with self._watched(seconds) as watch:
            reply, answer = self._exchanged(message, data), b"" if data is None else None
            if data is not None and reply is not None and "refused" not in reply:
                answer = read_frame(_pipe(self._process.stdout), 8 * IMAGES_AT_ONCE)
        if watch.bit:
            self.close()
            raise ClassifierOutputError(
                f"the classifier {name} did not answer {what} within {watch.seconds:.3g} s; use a faster one"
            )
        if reply is not None and "refused" in reply:
            raise REFUSALS.get(str(reply["refused"]), ClassifierOutputError)(str(reply.get("message")))
        if reply is None or answer is None:
            self.close()
            raise ClassifierOutputError(
                f"the classifier {name} could not be run within the memory that there is; use a smaller one"
            )
        return answer

    def _exchanged(self, message: Mapping[str, Any], data: bytes | None) -> dict[str, Any] | None:
        """The reply; None where the process is gone, or says what is none."""
        try:
            write_frame(_pipe(self._process.stdin), json.dumps(message).encode())
            if data is not None:
                write_frame(_pipe(self._process.stdin), data)
            return _object(read_frame(_pipe(self._process.stdout), LONGEST_REPLY))
        except (OSError, ValueError):  # the latter of a pipe that we closed
            return None

    @contextmanager
    def _watched(self, seconds: float) -> Iterator[_Watch]:
        """A block that the process has so long to answer in; then it is killed, and reads end."""
        watch = _Watch(self._process, seconds)
        watch.start()
        try:
            yield watch
        finally:
            watch.end()


class WalledModel:
    """As `evidence.onnx_model.OnnxModel`, in the process of the job's classifiers, which it keeps alive.

    Args:
        process: where it was opened.
        number: what the process calls it.
        spec: what its file does not tell.
    """

    def __init__(self, process: JudgeProcess, number: int, spec: OnnxSpec) -> None:
        self.name, self.classes = spec.name, spec.classes
        self._process, self._number = process, number

    def labels(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Labels (n,) of images (n, c, h, w); raises ClassifierError as `OnnxModel` does, and after its deadline."""
        parts = [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(images), IMAGES_AT_ONCE):
            parts.append(self._labels(np.ascontiguousarray(images[start : start + IMAGES_AT_ONCE])))
        return np.concatenate(parts)

    def _labels(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        labels = self._process.labels(self._number, self.name, images)
        if len(labels) != len(images) or labels.min() < 0 or labels.max() >= len(self.classes):
            raise ClassifierOutputError(f"the classifier {self.name} gives labels that are none of its classes")
        return labels


class _Watch:
    """Kills a process after a time; the process is ours to reap, so its number is not another's."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self.bit, self._began, self._process = False, time.monotonic(), process
        self._timer = threading.Timer(seconds, self._bite)
        self._timer.daemon = True

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def start(self) -> None:
        """Begin."""
        self._timer.start()

    def end(self) -> None:
        """Kill nothing any more; from here on `bit` stays what it is."""
        self._timer.cancel()
        self._timer.join()

    def _bite(self) -> None:
        self.bit = True
        self._process.kill()


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


def _object(frame: bytes | None) -> dict[str, Any] | None:
    try:
        told = json.loads(frame or b"null")
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None
