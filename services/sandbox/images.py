"""The door for images: foreign files in, plain PNGs out, decoded in a process of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from services.errors import ImageRefused

__all__ = ["DECODERS", "ImageDecoder", "Pixels"]

PROGRAM = Path(__file__).with_name("image_process.py")
MEMORY_BYTES = 2**30  # address space: an image at the pixel cap needs about 700 MB on its way
DECODERS = 2  # images decoded at a time in this process: its memory holds that many times MEMORY_BYTES, and itself
WALL_SECONDS = 60.0  # per image; the processor time has its own, shorter limit
LONGEST_FACTS = 4096

WALLS = frozenset({"limits", "network", "files", "privileges"})
logger = logging.getLogger("forgetd.sandbox")
_places = threading.BoundedSemaphore(DECODERS)

REFUSALS = {
    "empty": "is empty; send the file's bytes",
    "unknown_format": "is not a JPEG, PNG or WebP image, or its head is damaged; convert it to one of them",
    "too_many_pixels": "has too many pixels; scale it down",
    "too_small": "is less than 2 pixels wide or high; send a photo",
    "animated": "has more than one frame; send one still picture",
    "damaged": "is damaged or cut short; send it again from the original file",
    "too_much_memory": "needs too much memory to decode; scale it down or save it as a plain JPEG",
    "crashed": "could not be decoded within the limits; save it anew as a plain JPEG or PNG",
}


@dataclass(frozen=True)
class Pixels:
    """One decoded image: 8-bit grey (L) or RGB, as a PNG without any metadata."""

    png: bytes
    width: int
    height: int
    mode: str

    @property
    def sha256(self) -> str:
        """Of the PNG; the same for the same pixels."""
        return hashlib.sha256(self.png).hexdigest()


class ImageDecoder:
    """Decodes the images of one upload in one sandboxed process; a context manager.

    Attributes:
        isolation: What the kernel and our user allowed: ``limits``, ``network``, ``files``, ``user``, ``privileges``.
    """

    def __init__(
        self, *, max_pixels: int, memory_bytes: int = MEMORY_BYTES, wall_seconds: float = WALL_SECONDS
    ) -> None:
        self._wall_seconds = wall_seconds
        self._empty = tempfile.TemporaryDirectory(prefix="forgetd-empty-")
        options = {"max_pixels": max_pixels, "memory_bytes": memory_bytes, "empty_folder": self._empty.name}
        self._process = subprocess.Popen(  # noqa: S603 our own program, no shell
            [sys.executable, "-I", str(PROGRAM), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a decoder's messages may quote the file
            env={"LC_ALL": "C.UTF-8"},
            cwd=self._empty.name,
            start_new_session=True,
        )
        try:
            self.isolation: list[str] = self._facts()["isolation"]
            _warn_once(tuple(sorted(WALLS - set(self.isolation))))
        except EOFError as error:
            self.close()
            raise RuntimeError("the image process did not start") from error

    def decode(self, data: bytes, *, index: int) -> Pixels:
        """The pixels of one file. ``index`` is its place in the upload, the only name it has here.

        Waits while ``DECODERS`` other images are being decoded.

        Raises:
            ImageRefused: It is not a single still picture within the limits. After ``crashed`` the decoder is spent.
        """
        with _places:
            facts, png = self._exchange(data)
        if "refused" in facts:
            raise ImageRefused(f"Image {index} {REFUSALS[facts['refused']]}.", index=index, reason=facts["refused"])
        return Pixels(png, int(facts["width"]), int(facts["height"]), str(facts["mode"]))

    def _exchange(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        watchdog = threading.Timer(self._wall_seconds, self._process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            self._stdin.write(struct.pack(">Q", len(data)))
            self._stdin.write(data)
            self._stdin.flush()
            return self._facts(), self._frame()
        except (OSError, EOFError):
            return {"refused": "crashed"}, b""
        finally:
            watchdog.cancel()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
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

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self._frame(at_most=LONGEST_FACTS))
        return facts

    def _frame(self, *, at_most: int = MEMORY_BYTES) -> bytes:
        return _exactly(self._process.stdout, struct.unpack(">Q", _exactly(self._process.stdout, 8))[0], at_most)


@lru_cache
def _warn_once(missing: tuple[str, ...]) -> None:
    if missing:
        logger.warning("images are decoded without these walls, which this host does not allow: %s", ", ".join(missing))


def _exactly(stream: IO[bytes] | None, count: int, at_most: int = MEMORY_BYTES) -> bytes:
    """That many bytes, or ``EOFError``: the other side may be anything by now, and gets no memory of ours for a lie."""
    if stream is None or count > at_most:
        raise EOFError
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
