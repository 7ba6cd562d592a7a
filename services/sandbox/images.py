"""The door for images: foreign files in, plain PNGs out, decoded in a process of their own."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.errors import ImageRefused
from services.sandbox.process import WalledProcess

__all__ = ["DECODERS", "ImageDecoder", "Pixels"]

PROGRAM = Path(__file__).with_name("image_process.py")
MEMORY_BYTES = 2**30  # address space: an image at the pixel cap needs about 700 MB on its way
DECODERS = 2  # images decoded at a time in this process: its memory holds that many times MEMORY_BYTES, and itself
WALL_SECONDS = 60.0  # per image; the processor time has its own, shorter limit

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


class ImageDecoder(WalledProcess):
    """Decodes the images of one upload in one sandboxed process; a context manager."""

    def __init__(
        self, *, max_pixels: int, memory_bytes: int = MEMORY_BYTES, wall_seconds: float = WALL_SECONDS
    ) -> None:
        super().__init__(PROGRAM, {"max_pixels": max_pixels}, memory_bytes=memory_bytes, wall_seconds=wall_seconds)

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
        try:
            with self._watched():
                self._announce(len(data))
                self._stdin.write(data)
                self._stdin.flush()
                return self._facts(), self._frame()
        except (OSError, EOFError):
            return {"refused": "crashed"}, b""
