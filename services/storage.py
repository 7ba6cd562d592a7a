"""The object store: one bucket behind boto3, streaming both ways."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from s3transfer.futures import TransferFuture  # boto3's own transfers, which its client starts but cannot stop
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from services.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["ObjectStorage", "StoredObject", "Upload", "file_sha256"]

PART_BYTES = 8 * 2**20  # 10,000 parts at most: 80 GiB
READ_BYTES = 2**20
PARALLEL_FROM_BYTES = 64 * 2**20
DELETE_AT_ONCE = 1000  # the protocol's most
CONDITION_FAILED = ("PreconditionFailed", "ConditionalRequestConflict")
CONNECT_SECONDS = 5
READ_SECONDS = 60


@dataclass(frozen=True)
class StoredObject:
    """What was written: size in bytes and SHA-256 of the whole (an S3 ETag is not a hash)."""

    key: str
    bytes: int
    sha256: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class ObjectStorage:
    """Reads, writes, lists and erases objects. Errors are botocore's; a missing key is ``KeyError``."""

    def __init__(self, settings: Settings) -> None:
        self.bucket = settings.s3_bucket
        self._settings = settings
        self._client = self._connect(settings.s3_endpoint_url)
        public = settings.s3_public_endpoint_url
        self._presigner = self._connect(public) if public else self._client

    def _connect(self, endpoint_url: str | None) -> S3Client:
        settings = self._settings
        return boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key.get_secret_value() if settings.s3_access_key else None,
            aws_secret_access_key=settings.s3_secret_key.get_secret_value() if settings.s3_secret_key else None,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"mode": "standard", "max_attempts": 4},
                max_pool_connections=20,
            ),
        )

    def ping(self) -> None:
        """Raise unless the bucket answers."""
        self._client.head_bucket(Bucket=self.bucket)

    # Writing.

    def put(self, key: str, body: bytes, *, media_type: str, only_if_absent: bool = False) -> StoredObject:
        """Write a small object. With ``only_if_absent`` an existing key raises ``FileExistsError``."""
        extra: dict[str, Any] = {"IfNoneMatch": "*"} if only_if_absent else {}
        try:
            self._client.put_object(Bucket=self.bucket, Key=key, Body=body, ContentType=media_type, **extra)
        except ClientError as error:
            if error.response["Error"]["Code"] in CONDITION_FAILED:
                raise FileExistsError(key) from error
            raise
        return StoredObject(key, len(body), hashlib.sha256(body).hexdigest())

    def put_file(self, key: str, path: Path, *, media_type: str = "application/octet-stream") -> StoredObject:
        """Write a file of any size together with its SHA-256 (see ``fetch``), in the place of what is there."""
        sha256 = file_sha256(path)
        facts = {"ContentType": media_type, "Metadata": {"sha256": sha256}}
        self._client.upload_file(str(path), self.bucket, key, ExtraArgs=facts)
        return StoredObject(key, path.stat().st_size, sha256)

    def put_file_while(self, key: str, path: Path, going_on: Callable[[], bool]) -> StoredObject | None:
        """As ``put_file``, but given up once ``going_on`` says no: then nothing is written, and None is given.

        It is asked at the start, and all along a file of more than one part, from other threads.
        """
        size, sha256 = path.stat().st_size, file_sha256(path)
        if not going_on():
            return None
        facts: dict[str, Any] = {"ContentType": "application/octet-stream", "Metadata": {"sha256": sha256}}
        if size < PART_BYTES:  # in one go: what is on its way can no longer be held back
            self._client.put_object(Bucket=self.bucket, Key=key, Body=path.read_bytes(), **facts)
            return StoredObject(key, size, sha256)
        parts = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        with TransferManager(self._client, parts) as manager:
            sent = manager.upload(str(path), self.bucket, key, facts, [_Asking(going_on)])
            try:
                sent.result()
            except CancelledError:
                return None
        return StoredObject(key, size, sha256)

    def put_file_once(self, key: str, path: Path, between: Callable[[], object] = lambda: None) -> StoredObject:
        """Write a file of any size together with its SHA-256 (see ``fetch``), or change nothing.

        Args:
            key: where.
            path: the file.
            between: called before each part but the last.

        Raises:
            FileExistsError: the key is there already.
        """
        upload = Upload(self._client, self.bucket, key, once=file_sha256(path))
        try:
            with path.open("rb") as stream:
                while chunk := stream.read(READ_BYTES):
                    upload.feed(chunk)
                    if upload.wants_flush():
                        between()
                        upload.flush()
            return upload.finish()
        except BaseException as error:
            upload.abort()
            if isinstance(error, ClientError) and error.response["Error"]["Code"] in CONDITION_FAILED:
                raise FileExistsError(key) from error
            raise

    def upload(self, key: str) -> Upload:
        """Begin a streamed write of unknown length."""
        return Upload(self._client, self.bucket, key)

    # Reading.

    def read(self, key: str) -> bytes:
        """A small object, whole."""
        return b"".join(self.stream(key))

    def stream(self, key: str) -> Iterator[bytes]:
        """An object in pieces of at most 1 MiB."""
        try:
            body = self._client.get_object(Bucket=self.bucket, Key=key)["Body"]
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                raise KeyError(key) from error
            raise
        with body:
            yield from body.iter_chunks(READ_BYTES)

    def fetch(self, key: str, path: Path) -> str | None:
        """Copy an object into a file. Its SHA-256 where it was written as a file (``put_file`` and its kin)."""
        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            written: str | None = answer["Metadata"].get("sha256")
            with answer["Body"] as body:
                if (
                    answer["ContentLength"] <= PARALLEL_FROM_BYTES
                ):  # one request; a transfer asks twice and starts threads
                    with path.open("wb") as file:
                        shutil.copyfileobj(body, file, READ_BYTES)
                    return written
            self._client.download_file(self.bucket, key, str(path))
            return written
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                raise KeyError(key) from error
            raise

    def presigned_get(self, key: str, *, filename: str, media_type: str) -> str:
        """A URL that gives this one object to whoever holds it, for the settings' ``presign_seconds``."""
        return self._presigner.generate_presigned_url(
            "get_object",
            Params={
                "Bucket": self.bucket,
                "Key": key,
                "ResponseContentDisposition": f'attachment; filename="{filename}"',
                "ResponseContentType": media_type,
            },
            ExpiresIn=self._settings.presign_seconds,
        )

    def newest(self, prefix: str) -> list[tuple[str, int]]:
        """Every current key under a prefix with its bytes, newest first."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        found = [item for page in pages for item in page.get("Contents", [])]
        found.sort(key=lambda item: (item["LastModified"], item["Key"]), reverse=True)
        return [(item["Key"], item["Size"]) for item in found]

    # Erasing.

    def keys(self, prefix: str) -> list[str]:
        """Every current key under a prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def unfinished(self, prefix: str) -> list[tuple[str, str]]:
        """Every multipart write under a prefix that was begun and neither finished nor aborted, as (key, upload id)."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
        return [(item["Key"], item["UploadId"]) for page in pages for item in page.get("Uploads", [])]

    def erase(self, prefix: str) -> int:
        """Delete everything under a prefix: every version, delete marker and unfinished upload. Returns how many.

        Raises:
            RuntimeError: the store refused a deletion, or something is still listed afterwards.
        """
        gone = 0
        for page in self._client.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=prefix):
            entries: list[Any] = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
            for start in range(0, len(entries), DELETE_AT_ONCE):
                gone += self._delete(entries[start : start + DELETE_AT_ONCE])
        for key, upload_id in self.unfinished(prefix):
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)
            gone += 1
        left = self.keys(prefix)
        if left:
            raise RuntimeError(f"{len(left)} objects are still listed under {prefix} after their deletion")
        return gone

    def _delete(self, entries: list[Any]) -> int:
        objects: list[Any] = [
            {"Key": item["Key"]} | ({} if item.get("VersionId") in (None, "null") else {"VersionId": item["VersionId"]})
            for item in entries
        ]
        answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
        errors = answer.get("Errors", [])
        if errors:
            raise RuntimeError(f"the store refused {len(errors)} of {len(objects)} deletions: {errors[0].get('Code')}")
        return len(objects)

    def abort_unfinished(self, prefix: str, *, older_than: timedelta) -> int:
        """Abort the multipart uploads under a prefix that were begun longer ago than this. Returns how many."""
        gone = 0
        limit = datetime.now(UTC) - older_than
        for listing in self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix):
            for part in listing.get("Uploads", []):
                if part["Initiated"] < limit:
                    self._client.abort_multipart_upload(Bucket=self.bucket, Key=part["Key"], UploadId=part["UploadId"])
                    gone += 1
        return gone


class _Asking(BaseSubscriber):
    """Stops a transfer in parts once its owner does not want it any more; the store then drops the parts."""

    def __init__(self, going_on: Callable[[], bool]) -> None:
        self._going_on = going_on

    def on_progress(self, future: TransferFuture, bytes_transferred: int, **_: Any) -> None:
        """Called as bytes leave, before the last part is through."""
        del bytes_transferred
        if not self._going_on():
            future.cancel()


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
