"""The image sets of a job: what is to be forgotten, what must stay, and what only the judge sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import unlearning
from evidence.likelihood import derive_seed
from evidence.records import RememberSource
from worker.runner.base import Base, Origin
from worker.runner.images import Images, Reader
from worker.runner.problems import UserError

__all__ = ["SMALLEST_REMEMBER", "Remember", "images_to_remember", "reader_of", "remember_of"]

SMALLEST_REMEMBER = 16
"""Images left to remember, below which mu_R and sigma_R mean nothing."""


@dataclass(frozen=True)
class Remember:
    """What must stay, as the model takes it: uint8 (n, c, h, w), and where it comes from."""

    images: Tensor
    source: RememberSource

    def digest(self) -> str:
        """SHA-256 over the pixels."""
        return Images(self.images).digest()

    def without(self, rows: list[int]) -> Tensor:
        """The images but those at these positions."""
        dropped = set(rows)
        return self.images[[row for row in range(len(self.images)) if row not in dropped]]


def reader_of(job: Mapping[str, Any], folder: Path, base: Origin) -> Reader:
    """Reads this job's images at the size of its model."""
    channels, size, _ = base.image_shape
    return Reader(folder, image_size=size, channels=channels, fit=job["parameters"].get("fit") or "crop")


def remember_of(
    job: Mapping[str, Any], reader: Reader, base: Base, *, forget: Tensor, near_duplicate_rms: float
) -> Remember:
    """The images to remember, or samples of the base where the caller has none.

    Args:
        job: the job.
        reader: of its images.
        base: drawn from where there are no images.
        forget: uint8 (n, c, h, w), what is to be forgotten; the method takes its near-duplicates out of the set.
        near_duplicate_rms: how near that is, in grey levels.

    Raises:
        UserError: too few images are left, or the base draws none.
    """
    images = images_to_remember(job, reader, forget=forget, near_duplicate_rms=near_duplicate_rms)
    if images is not None:
        return Remember(images, "images")
    count, seed = int(job["remember"]["generated"]), derive_seed(job["seed"], "remember")
    try:
        return Remember(unlearning.generate_remember(base.flow, count, base.n_bits, seed), "generated")
    except unlearning.InputError as error:
        title = "The checkpoint cannot be used"
        raise UserError("checkpoint-refused", title, str(error), pointer="/checkpoint") from error


def images_to_remember(
    job: Mapping[str, Any], reader: Reader, *, forget: Tensor | None = None, near_duplicate_rms: float = 0.0
) -> Tensor | None:
    """The caller's images to remember, uint8 (n, c, h, w); None where there are none.

    Raises:
        UserError: too few are left without those that show what is to be forgotten.
    """
    if job["inputs"]["remember"] is None:
        return None
    remember = reader.read(job["inputs"]["remember"], "remember").pixels
    near = 0 if forget is None else len(unlearning.near_duplicates(forget, remember, near_duplicate_rms))
    if len(remember) - near < SMALLEST_REMEMBER:
        raise _too_small(len(remember), near)
    return remember


def _too_small(count: int, near: int) -> UserError:
    left = count - near
    said = f"There {'is 1 image' if count == 1 else f'are {count} images'} to remember"
    if near:
        said = (
            f"{near} of the {count} images to remember show what is to be forgotten and left the set; {left} are left"
        )
    return UserError(
        "remember-set-too-small",
        "Too few images are left to remember",
        f"{said}, and at least {SMALLEST_REMEMBER} are needed: from fewer no mean and spread can be told. "
        f"Send {SMALLEST_REMEMBER - left} more, or leave the set out: then samples of the model stand in for it.",
        pointer="/remember/images",
        left=left,
        needed=SMALLEST_REMEMBER,
    )
