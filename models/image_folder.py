"""A folder of image files as training data: its sub-folders are classes, and part of it is held out."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.errors import ImageError
from models.images import load_images

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
MAX_BYTES = 8 * 2**30
"""Of all images as uint8, which lie in host memory; training takes a copy of its part."""


class FolderError(ImageError):
    """The folder holds too little, too much or nothing to train on: name another, or sort it otherwise."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, each in the one shape that a flow takes."""

    images: Tensor
    """uint8 (n, channels, size, size), in the order of their paths."""
    labels: Tensor | None
    """The class of each image, (n,) int64: the position of its sub-folder's name in `classes`; null without classes."""
    classes: list[str]
    """Names of the sub-folders right below the folder, sorted; empty without classes."""
    passed_over: int
    """Files that are no images by their names."""


def read_folder(folder: Path, *, image_size: int, channels: int, with_classes: bool) -> ImageFolder:
    """Read every JPEG, PNG and WEBP file below a folder; links to folders and hidden files are not followed.

    Args:
        folder: where.
        image_size: side of the square, in pixels; images are cropped to their central square and resized.
        channels: 1 (grey) or 3 (RGB).
        with_classes: whether the sub-folder right below `folder` is an image's class.

    Raises:
        FolderError: fewer than two images, fewer than two classes, an image without a class, or too much for memory.
        ImageError: a file cannot be read; it is named.
    """
    paths, passed_over = _image_files(folder)
    if not paths:
        other = f" ({passed_over} other files)" if passed_over else ""
        raise FolderError(f"{folder} holds no JPEG, PNG or WEBP file{other}")
    if len(paths) == 1:
        raise FolderError(f"{folder} holds one image; a flow needs two at the very least, and learns from hundreds")
    if (size := len(paths) * channels * image_size**2) > MAX_BYTES:
        raise FolderError(
            f"{len(paths):,} images of {image_size} x {image_size} take {size / 2**30:.0f} GiB of memory; "
            f"the most is {MAX_BYTES // 2**30} GiB: train on a part of them"
        )
    names, labels = _classes(folder, paths) if with_classes else ([], None)
    images = torch.empty(len(paths), channels, image_size, image_size, dtype=torch.uint8)
    for row, path in enumerate(paths):
        try:
            images[row] = load_images([path], image_size=image_size, channels=channels)[0][0]
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
    return ImageFolder(images, labels, names, passed_over)


def hold_out(folder: ImageFolder, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split the rows at random into (training, held out), each sorted; of every class at least one stays in training.

    Of each class the rounded share is held out, and one image at least in all; with a share of 0, none.
    """
    labels = folder.labels if folder.labels is not None else torch.zeros(len(folder.images), dtype=torch.int64)
    apart: list[Tensor] = []
    sizes = torch.bincount(labels)
    for label in range(len(sizes)):
        rows = torch.nonzero(labels == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = round(share * len(rows))
        if share > 0 and label == int(sizes.argmax()):
            count = max(1, count)
        apart.append(rows[: max(0, min(count, len(rows) - 1))])
    held_out = torch.cat(apart).sort().values
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held_out] = False
    return torch.nonzero(kept).flatten(), held_out


def _image_files(folder: Path) -> tuple[list[Path], int]:
    paths, others = [], 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            if name.lower().endswith(SUFFIXES):
                paths.append(Path(root) / name)
            else:
                others += 1
    return paths, others


def _classes(folder: Path, paths: list[Path]) -> tuple[list[str], Tensor]:
    loose = [path.name for path in paths if path.parent == folder]
    if loose:
        raise FolderError(f"{loose[0]} lies in no sub-folder of {folder}; each sub-folder is a class")
    tops = [path.relative_to(folder).parts[0] for path in paths]
    names = sorted(set(tops))
    if len(names) == 1:
        raise FolderError(f"all images lie in one class, {names[0]!r}; a flow of classes needs two sub-folders or more")
    return names, torch.tensor([names.index(top) for top in tops])
