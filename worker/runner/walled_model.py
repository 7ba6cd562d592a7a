"""The runner's side of `worker.runner.judge_process`: its classifiers, asked in frames, each answer with a deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from evidence.errors import ClassifierFileError, ClassifierOutputError, ClassifierShapeError
from evidence.onnx_model import BATCH, OnnxSpec
from worker.runner.judge_process import LONGEST_REPLY, MEMORY_BYTES, read_frame, write_frame
from worker.runner.problems import OutOfMemory

__all__ = ["Deadlines", "JudgeProcess", "WalledModel"]

ROOT = Path(__file__).resolve().parents[2]
IMAGES_AT_ONCE = BATCH
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
REAPED_SECONDS = 10.0  # within which a process that closed its pipes has ended, for the kernel too
REFUSALS = {one.__name__: one for one in (ClassifierFileError, ClassifierShapeError, ClassifierOutputError)}


@dataclass(frozen=True)
class Deadlines:
    """After which a classifier counts as one that does not end; seconds by the clock.

    A batch has its own, and all batches of one call of `WalledModel.labels` have another together, which is what one
    batch of as many images would have: a classifier may be slow in some of its batches, and not in all of them.

    No machine was measured for them: they are so long that a large classifier on a busy core stays within them, and so
    short that one that never ends is told long before the supervisor takes the runner for one that hangs.

    Attributes:
        start: of the process, to its first word.
        open: of a file.
        batch: of a batch, and of a call, however few images it has.
        image: of each of them, on top.
    """

    start: float = 120.0
    open: float = 120.0
    batch: float = 60.0
    image: float = 1.0

    def of(self, n: int) -> float:
        """For the labels of n images, in one batch or one call."""
        return self.batch + n * self.image


class JudgeProcess:
    """One process for all ONNX classifiers of a job, which share its memory; it ends with this object and the runner.

    Made by the runner's first thread, which lasts as long as the runner: the process ends with the thread that made it.

    Args:
        folder: that of the files; all that the process can open.
        deadlines: of its answers.
        at_once: images in a batch; IMAGES_AT_ONCE at most.
        on_batch: called after each batch that was judged.

    Raises:
        RuntimeError: it does not start, for which no classifier is to blame.
        OutOfMemory: it was killed.
    """

    def __init__(
        self,
        folder: Path,
        deadlines: Deadlines | None = None,
        *,
        at_once: int = IMAGES_AT_ONCE,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._deadlines, self._at_once, self._on_batch = deadlines or Deadlines(), at_once, on_batch
        self._opened = 0
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
        seconds = self._deadlines.open
        self._asked(spec.name, {"open": told}, None, seconds, f"to its file within {seconds:g} s")
        self._opened += 1
        return WalledModel(self, self._opened - 1, spec)

    def labels(self, judge: int, name: str, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Labels (n,) that an open classifier gives for images (n, c, h, w), unchecked.

        Each batch has its deadline, and all of them together have `Deadlines.of(n)`.
        """
        told = self._judged(judge, name, images, {}, values=1)
        return np.concatenate([np.frombuffer(one, dtype="<i8").astype(np.int64) for one in told] or [np.zeros(0, int)])

    def probabilities(
        self, judge: int, name: str, images: npt.NDArray[np.uint8], classes: int
    ) -> npt.NDArray[np.float64]:
        """All probabilities (n * classes,) likewise, row by row."""
        told = self._judged(judge, name, images, {"probabilities": True}, values=classes)
        return np.concatenate([np.frombuffer(one, dtype="<f8").astype(np.float64) for one in told] or [np.zeros(0)])

    def _judged(
        self, judge: int, name: str, images: npt.NDArray[np.uint8], asked: Mapping[str, Any], *, values: int
    ) -> Iterator[bytes]:
        """The answer to each batch, numbers of eight bytes, `values` of them an image at most."""
        end = time.monotonic() + self._deadlines.of(len(images))
        for start in range(0, len(images), self._at_once):
            batch = images[start : start + self._at_once]
            seconds, left = self._deadlines.of(len(batch)), end - time.monotonic()
            n = len(batch) if seconds < left else len(images)
            late = f"to {n} images within {self._deadlines.of(n):g} s"
            data = batch.tobytes()
            message = {"judge": judge, "bytes": len(data), **asked}
            told = self._asked(name, message, data, min(seconds, left), late, values)
            yield told[: len(told) // 8 * 8]
            self._on_batch()

    def close(self) -> None:
        """End the process."""
        self._ended()

    def _started(self) -> list[str]:
        with self._watched(self._deadlines.start) as watch:
            reply = _object(read_frame(_pipe(self._process.stdout), LONGEST_REPLY))
        if reply is None or "walls" not in reply:
            self._fate(watch)
            why = (reply or {}).get("failed", "it said nothing")
            raise RuntimeError(f"the process of the classifiers did not start: {why}")
        walls: list[str] = reply["walls"]
        return walls

    def _asked(
        self, name: str, message: Mapping[str, Any], data: bytes | None, seconds: float, late: str, values: int = 1
    ) -> bytes:
        """The frame that answers data, so many numbers an image at most; empty for a message without data.

        Ends the process unless all came in time.
        """
        if not self._ended.alive:
            raise ClassifierOutputError(f"the classifier {name} could not be run: its process was ended before")
        with self._watched(seconds) as watch:
            reply, answer = self._exchanged(message, data), b"" if data is None else None
            if data is not None and reply is not None and "refused" not in reply:
                answer = read_frame(_pipe(self._process.stdout), 8 * values * IMAGES_AT_ONCE)
        if watch.bit:
            self.close()
            raise ClassifierOutputError(f"the classifier {name} did not answer {late}; use a faster one")
        if reply is not None and "refused" in reply:
            raise REFUSALS.get(str(reply["refused"]), ClassifierOutputError)(str(reply.get("message")))
        if reply is None or answer is None:
            raise ClassifierOutputError(
                f"the classifier {name} brought down the process that runs it ({self._fate(watch)}), as one may that "
                f"needs more than its {MEMORY_BYTES / 2**30:g} GiB of memory; use a smaller one"
            )
        return answer

    def _fate(self, watch: _Watch) -> str:
        """End the process, and say how it ended of its own.

        Raises:
            OutOfMemory: somebody else killed it, which no classifier makes happen within its limits: the machine is
                short of memory, if not for a person.
        """
        try:
            status = None if watch.bit else self._process.wait(REAPED_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        if status == -signal.SIGKILL:
            raise OutOfMemory("the process of the classifiers was killed")
        return "no answer" if status is None else f"signal {-status}" if status < 0 else f"exit {status}"

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
        self.name, self.classes, self.spec = spec.name, spec.classes, spec
        self._process, self._number = process, number

    def labels(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Labels (n,) of images (n, c, h, w).

        Raises:
            ClassifierError: as `OnnxModel` does; also where the process breaks down, or where a batch, or all of them,
                took longer than `Deadlines` grants: by default 60 s and 1 s an image.
            OutOfMemory: the process was killed.
        """
        labels = self._process.labels(self._number, self.name, images)
        if len(labels) != len(images) or not ((labels >= 0) & (labels < len(self.classes))).all():
            raise ClassifierOutputError(f"the classifier {self.name} gives labels that are none of its classes")
        return labels

    def probabilities(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Probabilities (n, k) of images (n, c, h, w); refusals are those of `labels`."""
        n, k = len(images), len(self.classes)
        found = self._process.probabilities(self._number, self.name, images, k)
        if found.size != n * k or not ((found >= 0) & (found <= 1)).all():
            raise ClassifierOutputError(f"the classifier {self.name} gives probabilities that are none")
        return found.reshape(n, k)


class _Watch:
    """Kills a process after a time; the process is ours to reap, so its number is not another's."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self.bit, self._process = False, process
        self._timer = threading.Timer(seconds, self._bite)
        self._timer.daemon = True

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
