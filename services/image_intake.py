"""An image set on its way in: each image decoded in the sandbox, stored, and forgotten here before the next comes."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from services import object_keys
from services.errors import ImageRefused, TooLarge
from services.sandbox import ImageDecoder
from services.settings import Settings
from services.storage import ObjectStorage

__all__ = ["ImageIntake"]


class ImageIntake:
    """Takes the files of one upload in order; a context manager that ends the sandbox.

    Attributes:
        images: What is in the store, as ``image_sets.complete`` takes it.
        duplicates: How many images had the pixels of an earlier one, and were dropped.
    """

    def __init__(self, settings: Settings, storage: ObjectStorage, *, tenant_id: str, image_set_id: str) -> None:
        self._settings, self._storage = settings, storage
        self._tenant_id, self._image_set_id = tenant_id, image_set_id
        self._decoder = ImageDecoder(max_pixels=settings.max_image_pixels)
        self._seen: set[str] = set()
        self._stored_bytes = 0
        self._received = 0
        self.images: list[dict[str, Any]] = []
        self.duplicates = 0

    def add(self, data: bytes) -> None:
        """Decode and store one file.

        Raises:
            ImageRefused: It is no picture that can be used.
            TooLarge: The set is.
        """
        index, self._received = self._received, self._received + 1
        if self._received > self._settings.max_image_set_count:
            raise TooLarge(f"A set holds at most {self._settings.max_image_set_count} images; send fewer.")
        pixels = self._decoder.decode(data, index=index)
        digest = pixels.sha256
        if digest in self._seen:
            self.duplicates += 1
            return
        self._seen.add(digest)
        self._stored_bytes += len(pixels.png)
        if self._stored_bytes > self._settings.max_image_set_bytes:
            raise TooLarge(
                f"Decoded, the set is over {self._settings.max_image_set_bytes} bytes; send fewer or smaller images."
            )
        place = len(self.images)
        self._storage.put(
            object_keys.image(self._tenant_id, self._image_set_id, place), pixels.png, media_type="image/png"
        )
        self.images.append(
            {
                "index": place,
                "width": pixels.width,
                "height": pixels.height,
                "mode": pixels.mode,
                "bytes": len(pixels.png),
                "sha256": digest,
            }
        )

    def finish(self) -> list[dict[str, Any]]:
        """The images; raises ``ImageRefused`` when there are none."""
        if not self.images:
            raise ImageRefused('The form holds no image; send each as a file in the field "images".', reason="none")
        return self.images

    def close(self) -> None:
        """End the sandbox."""
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
