"""What every flow checks before it is built: sizes within their ranges, so that a bad manifest allocates nothing."""

from collections.abc import Mapping, Sequence

from models.errors import ArchitectureError

MAX_CHANNELS = 64
MAX_IMAGE_SIZE = 1024
"""Pixels a side."""


def check_ranges(ranges: Mapping[str, tuple[object, int, int]]) -> None:
    """Refuse the first value that is no whole number within its range.

    Args:
        ranges: name to (value, lowest, highest), in the order in which they are checked.

    Raises:
        ArchitectureError: with the name, the range and the value.
    """
    for name, (value, low, high) in ranges.items():
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ArchitectureError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def check_image(image_shape: Sequence[int], n_bits: int) -> tuple[int, int, int]:
    """Refuse what is no image shape or colour depth; returns (channels, height, width).

    Raises:
        ArchitectureError: with the value.
    """
    if len(image_shape) != 3:
        raise ArchitectureError(f"image_shape is (channels, height, width), not {tuple(image_shape)}")
    channels, height, width = image_shape
    check_ranges(
        {
            "n_bits": (n_bits, 1, 8),
            "channels": (channels, 1, MAX_CHANNELS),
            "height": (height, 2, MAX_IMAGE_SIZE),
            "width": (width, 2, MAX_IMAGE_SIZE),
        }
    )
    return channels, height, width


def check_halvings(image_shape: Sequence[int], count: int) -> None:
    """Refuse an image whose sides cannot be halved `count` times, as the squeezes of a multiscale flow do.

    Raises:
        ArchitectureError: with the side.
    """
    for side in image_shape[1:]:
        if side % 2**count:
            raise ArchitectureError(f"a side of {side} pixels cannot be halved {count} times; use a power of two")
