"""The service's side of a walled process: started without environment, spoken to in frames, ended after a time.

It ends with us too, however we do, through a pipe whose other end we alone hold (``services.sandbox.walls.end_with``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

__all__ = ["WalledProcess"]

WALLS = frozenset({"limits", "network", "files", "privileges"})
LONGEST_FACTS = 4096
# One thread; and some builds of onnxruntime report its use to their maker unless told not to.
ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}
logger = logging.getLogger("forgetd.sandbox")


class WalledProcess:
    """One program of this folder in a process of its own, behind ``services.sandbox.walls``; a context manager.

    Attributes:
        isolation: What the kernel and our user allowed: ``limits``, ``network``, ``files``, ``user``, ``privileges``.
    """

    def __init__(self, program: Path, options: Mapping[str, Any], *, memory_bytes: int, wall_seconds: float) -> None:
        self._wall_seconds, self._memory_bytes = wall_seconds, memory_bytes
        self._empty = tempfile.TemporaryDirectory(prefix="forgetd-empty-")
        lifeline, held = os.pipe()
        self._held = os.fdopen(held, "wb")
        told = {**options, "memory_bytes": memory_bytes, "empty_folder": self._empty.name, "lifeline": lifeline}
        try:
            self._process = subprocess.Popen(  # noqa: S603 our own program, no shell
                [sys.executable, "-I", str(program), json.dumps(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a decoder's messages may quote the file
                env=ENVIRONMENT,
                cwd=self._empty.name,
                start_new_session=True,
                pass_fds=(lifeline,),
            )
        except OSError:
            self._held.close()
            raise
        finally:
            os.close(lifeline)
        try:
            self.isolation: list[str] = self._facts()["isolation"]
            _warn_once(tuple(sorted(WALLS - set(self.isolation))))
        except EOFError as error:
            self.close()
            raise RuntimeError(f"{program.stem} did not start") from error

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._held):
            if stream is not None:
                with contextlib.suppress(OSError):  # bytes that the dead process did not take
                    stream.close()
        self._empty.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def _stdin(self) -> IO[bytes]:
        if self._process.stdin is None:
            raise EOFError
        return self._process.stdin

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A block that the process has so long to answer in; then it is killed, and reads end with ``EOFError``."""
        watchdog = threading.Timer(self._wall_seconds, self._process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    def _announce(self, count: int) -> None:
        """Say how many bytes come next."""
        self._stdin.write(struct.pack(">Q", count))

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self._frame(at_most=LONGEST_FACTS))
        return facts

    def _frame(self, *, at_most: int | None = None) -> bytes:
        stream, limit = self._process.stdout, self._memory_bytes if at_most is None else at_most
        return _exactly(stream, struct.unpack(">Q", _exactly(stream, 8, limit))[0], limit)


@lru_cache
def _warn_once(missing: tuple[str, ...]) -> None:
    if missing:
        logger.warning("files are read without these walls, which this host does not allow: %s", ", ".join(missing))


def _exactly(stream: IO[bytes] | None, count: int, at_most: int) -> bytes:
    """That many bytes, or ``EOFError``: the other side may be anything by now, and gets no memory of ours for a lie."""
    if stream is None or count > at_most:
        raise EOFError
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
