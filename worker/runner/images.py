"""The images of a job as tensors: fitted, freed of copies, and checked against each other."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from torch import Tensor

from models.errors import ImageError
from models.images import Fit, load_images
from worker.runner.problems import UserError

__all__ = ["Images", "Reader"]

# Where each set is named in the request.
POINTERS = {
    "target": "/target/images",
    "remember": "/remember/images",
    "surrogate": "/replace_with/images",
    "same_identity": "/evaluation/same_identity/images",
    "held_out": "/evaluation/held_out/images",
}

FitMode = Literal["crop", "squash", "exact"]


@dataclass
class Images:
    """uint8 (n, c, h, w), and what happened on the way."""

    pixels: Tensor
    fits: list[Fit] = field(default_factory=list)
    copies_dropped: int = 0

    def without_copies(self) -> Images:
        """Each picture once, in the order of their first appearance."""
        seen: set[bytes] = set()
        rows = []
        for row, image in enumerate(self.pixels):
            digest = hashlib.sha256(image.contiguous().numpy().data).digest()
            if digest not in seen:
                seen.add(digest)
                rows.append(row)
        return Images(self.pixels[rows], [self.fits[row] for row in rows], len(self.pixels) - len(rows))

    def digest(self) -> str:
        """SHA-256 over the pixels as the model sees them."""
        return hashlib.sha256(self.pixels.contiguous().numpy().data).hexdigest()


class Reader:
    """Reads image sets for one model."""

    def __init__(self, folder: Path, *, image_size: int, channels: int, fit: str) -> None:
        self._folder, self._size, self._channels = folder, image_size, channels
        self._fit = cast(FitMode, fit)
        self._fits: list[Fit] = []

    def read(self, paths: Sequence[str], role: str, *, pointer: str | None = None) -> Images:
        """Read one set.

        Args:
            paths: relative to the job's folder.
            role: what the set is for, in words joined by underscores.
            pointer: the place in the request that named it; None: the role's own.

        Raises:
            UserError: an image cannot be used.
        """
        try:
            pixels, fits = load_images(
                [self._folder / path for path in paths], image_size=self._size, channels=self._channels, fit=self._fit
            )
        except ImageError as error:
            detail = f"In the {role.replace('_', ' ')} set: {error}"
            raise UserError(
                "image-refused", "An image was refused", detail, pointer=pointer or POINTERS[role]
            ) from error
        self._fits += fits
        return Images(pixels, fits)

    def read_or_none(self, paths: Sequence[str] | None, role: str) -> Tensor | None:
        """Read one set's pixels, or None where there is none."""
        return self.read(paths, role).pixels if paths else None

    def fitting(self) -> str:
        """What was done to all images read so far, in a sentence."""
        changes: Counter[str] = Counter()
        for fit in self._fits:
            if fit.cropped is not None:
                changes["cropped to their central square"] += 1
            if fit.resized is not None:
                changes[f"resized to {self._size} x {self._size} pixels"] += 1
            if fit.colour is not None:
                changes[f"converted from {fit.colour}"] += 1
        if not changes:
            return "images were used at the model's size as they came"
        said = ", ".join(f"{count} {what}" for what, count in changes.items())
        return f"of {len(self._fits)} images, {said}"
