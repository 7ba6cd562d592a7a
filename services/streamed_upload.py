"""A write of unknown length to the object store, part by part: no more than one part is in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["PART_BYTES", "StoredObject", "Upload"]

PART_BYTES = 8 * 2**20  # 10,000 parts at most: 80 GiB


@dataclass(frozen=True)
class StoredObject:
    """What was written: size in bytes and SHA-256 of the whole (an S3 ETag is not a hash)."""

    key: str
    bytes: int
    sha256: str


class Upload:
    """A streamed write: memory holds one part of 8 MiB, whatever the length. Not finished means not visible.

    ``once`` is the SHA-256 of what will be written, kept with the object; an object that is there is left as it is.
    """

    def __init__(self, client: S3Client, bucket: str, key: str, *, once: str | None = None) -> None:
        self._client = client
        self._bucket, self._key = bucket, key
        self._facts: dict[str, Any] = {} if once is None else {"Metadata": {"sha256": once}}
        self._unless: dict[str, Any] = {} if once is None else {"IfNoneMatch": "*"}
        self._id: str | None = None
        self._parts: list[Any] = []
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self.bytes = 0

    def wants_flush(self) -> bool:
        """Whether a part is full; ``flush`` blocks, so that an event loop calls it in a thread."""
        return len(self._buffer) >= PART_BYTES

    def feed(self, chunk: bytes) -> None:
        """Take bytes; no input or output happens here."""
        self._buffer += chunk
        self._digest.update(chunk)
        self.bytes += len(chunk)

    def sha256(self) -> str:
        """SHA-256 of the bytes fed so far, in hexadecimal."""
        return self._digest.hexdigest()

    def flush(self) -> None:
        """Send what is buffered as one part."""
        if self._id is None:
            answer = self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key, **self._facts)
            self._id = answer["UploadId"]
        number = len(self._parts) + 1
        part = self._client.upload_part(
            Bucket=self._bucket, Key=self._key, UploadId=self._id, PartNumber=number, Body=bytes(self._buffer)
        )
        self._parts.append({"ETag": part["ETag"], "PartNumber": number})
        self._buffer.clear()

    def finish(self) -> StoredObject:
        """Make the object visible."""
        if self._id is None:
            body = bytes(self._buffer)
            self._client.put_object(Bucket=self._bucket, Key=self._key, Body=body, **self._facts, **self._unless)
        else:
            if self._buffer:
                self.flush()
            self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._id,
                MultipartUpload={"Parts": self._parts},
                **self._unless,
            )
        return StoredObject(self._key, self.bytes, self._digest.hexdigest())

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._id is not None:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._id)
