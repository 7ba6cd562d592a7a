"""The object store: one bucket behind boto3, streaming both ways."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.handlers import add_expect_header
from s3transfer.futures import TransferFuture  # boto3's own transfers, which its client starts but cannot stop
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from services.counted import Counted
from services.multipart import Multipart, length_of
from services.settings import Settings
from services.streamed_upload import PART_BYTES, StoredObject, Upload
from services.whole_answers import take_only_whole_answers

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["ObjectStorage", "Stopped", "StoredObject", "Upload", "file_sha256"]

READ_BYTES = 2**20
PARALLEL_FROM_BYTES = 64 * 2**20
DELETE_AT_ONCE = 1000  # the protocol's most
CONDITION_FAILED = ("PreconditionFailed", "ConditionalRequestConflict")
SLOW_DOWN = 429
CONNECT_SECONDS = 5
READ_SECONDS = 60
TRIES = 5
PROBE_SECONDS = 5
PROBES = "probes/"  # beside the tenants': an object of each host that had to ask
PROBE = b"Can this be read?\n"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Stopped(Exception):
    """Who asked for a transfer does not want it any more."""


def _always() -> bool:
    return True


def _to_nobody(_: int) -> None:
    pass


class ObjectStorage:
    """Reads, writes, lists and erases objects. Errors are botocore's; a missing key is ``KeyError``.

    Args:
        settings: where the store is.
        counted: told of every try that the store failed.
    """

    def __init__(self, settings: Settings, *, counted: Counted | None = None) -> None:
        self.bucket = settings.s3_bucket
        self.moved_at = time.monotonic()  # when bytes or an answer last went either way: who hangs, stands still
        self._settings, self._counted = settings, counted
        self._client = self._connect(settings.s3_endpoint_url)
        self._client.meta.events.register("response-received.s3", self._moved)
        public = settings.s3_public_endpoint_url
        self._presigner = self._connect(public) if public else self._client
        self.multipart = Multipart(self._client, self._presigner, self.bucket, seconds=settings.presign_seconds)

    def _connect(self, endpoint_url: str | None, *, read_seconds: float = READ_SECONDS, tries: int = TRIES) -> S3Client:
        settings = self._settings
        client: S3Client = boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key.get_secret_value() if settings.s3_access_key else None,
            aws_secret_access_key=settings.s3_secret_key.get_secret_value() if settings.s3_secret_key else None,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                connect_timeout=CONNECT_SECONDS,
                read_timeout=read_seconds,
                retries={"mode": "standard", "total_max_attempts": tries},
                max_pool_connections=20,
            ),
        )
        # Of a store that breaks off in the middle of its "100 Continue", botocore would wait for the rest for ever.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        if self._counted is not None:
            client.meta.events.register("response-received.s3", _Faults(self._counted))
        take_only_whole_answers(client)
        return client

    def another(self) -> ObjectStorage:
        """The same store for somebody else, with a ``moved_at`` of its own."""
        return ObjectStorage(self._settings, counted=self._counted)

    def _moved(self, *_: object, **__: object) -> None:
        self.moved_at = time.monotonic()

    def ping(self) -> None:
        """Raise unless the bucket answers."""
        self._client.head_bucket(Bucket=self.bucket)

    def probe(self) -> None:
        """Raise unless a small object can be written and read back, within seconds and in one try of each.

        A bucket may well answer while none of its objects does: it is another server's, or needs fewer disks. The key
        and the bytes are a host's own and always the same: nothing piles up, and two who ask at once agree. It leaves
        ``moved_at``: who asks is not at work.
        """
        key = f"{PROBES}{socket.gethostname()}"
        self._prober.put_object(Bucket=self.bucket, Key=key, Body=PROBE, ContentType="text/plain")
        body = self._prober.get_object(Bucket=self.bucket, Key=key)["Body"]
        with body:
            if body.read() != PROBE:
                raise ConnectionError("the store gives back other bytes than were written")

    @cached_property
    def _prober(self) -> S3Client:
        return self._connect(self._settings.s3_endpoint_url, read_seconds=PROBE_SECONDS, tries=1)

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

    def put_file(
        self,
        key: str,
        path: Path,
        *,
        media_type: str = "application/octet-stream",
        going_on: Callable[[], bool] = _always,
    ) -> StoredObject:
        """Write a file of any size together with its SHA-256 (see ``fetch``), in the place of what is there.

        ``going_on`` is asked at the start, and all along a file of more than one part, from other threads.

        Raises:
            Stopped: it said no; nothing was written.
        """
        size, sha256 = path.stat().st_size, file_sha256(path)
        if not going_on():
            raise Stopped(key)
        facts: dict[str, Any] = {"ContentType": media_type, "Metadata": {"sha256": sha256}}
        if size < PART_BYTES:  # in one go: what is on its way can no longer be held back
            self._client.put_object(Bucket=self.bucket, Key=key, Body=path.read_bytes(), **facts)
            return StoredObject(key, size, sha256)
        parts = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        with TransferManager(self._client, parts) as manager:
            _result(manager.upload(str(path), self.bucket, key, facts, [_Asking(going_on, self._moved)]), key)
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

    def fetch(
        self,
        key: str,
        path: Path,
        *,
        going_on: Callable[[], bool] = _always,
        arrived: Callable[[int], object] = _to_nobody,
    ) -> str | None:
        """Copy an object into a file. Its SHA-256 where it was written as a file (``put_file`` and its kin).

        ``arrived`` is told, all along, how many bytes are here: fewer than before where a part is asked for again.

        Raises:
            KeyError: there is none.
            Stopped: ``going_on``, which is asked all along, said no.
            ConnectionError: what the store sent is not the whole of it, or it does not say how long that is.
        """
        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            written: str | None = answer["Metadata"].get("sha256")
            body = answer["Body"]  # as a context manager it would give the stream below it, which counts no bytes
            with body:
                # One request up to here; a transfer asks twice and starts threads.
                length = length_of(answer)
                if length <= PARALLEL_FROM_BYTES:
                    with path.open("wb") as file:
                        for chunk in body.iter_chunks(READ_BYTES):
                            if not going_on():
                                raise Stopped(key)
                            self._moved()
                            file.write(chunk)
                            arrived(file.tell())
                    return written
            asking = _Asking(going_on, self._moved, arrived)
            with TransferManager(self._client, TransferConfig()) as manager:
                _result(manager.download(self.bucket, key, str(path), None, [asking]), key)
            if asking.passed != length:  # a part that is short leaves a hole, which nobody looks for
                raise ConnectionError("the store's answers were not the whole object")
            return written
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                raise KeyError(key) from error
            raise

    def size(self, key: str) -> int:
        """Bytes of an object; a missing one is ``KeyError``."""
        return self.multipart.size(key)

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
        """Abort the multipart uploads under a prefix that were begun longer ago than this. Returns how many.

        Raises:
            RuntimeError: the store refused some; all others are aborted.
        """
        return self.multipart.abort_begun_before(datetime.now(UTC) - older_than, prefix)


class _Faults:
    """Counts the tries of a client that failed: no answer, a fault of the store's own, or too much asked of it."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def __call__(
        self, *, event_name: str, response_dict: dict[str, Any] | None, exception: Exception | None, **_: Any
    ) -> None:
        status = (response_dict or {}).get("status_code", 0)
        if exception is None and status < 500 and status != SLOW_DOWN:
            return
        error = type(exception).__name__ if exception is not None else f"HTTP {status}"
        self._counted.count("store_errors", operation=event_name.rpartition(".")[2], error=error)


class _Asking(BaseSubscriber):
    """Stops a transfer once its owner does not want it any more; of an upload in parts the store then drops them."""

    def __init__(
        self, going_on: Callable[[], bool], moved: Callable[[], None], arrived: Callable[[int], object] = _to_nobody
    ) -> None:
        self._going_on, self._moved, self._arrived = going_on, moved, arrived
        self._lock = threading.Lock()
        self.passed = 0  # bytes; what is asked for again counts once

    def on_progress(self, future: TransferFuture, bytes_transferred: int, **_: Any) -> None:
        """Called as bytes pass, before the last part is through."""
        with self._lock:  # by several threads at once
            self.passed += bytes_transferred  # negative, where a part is asked for again
            self._arrived(self.passed)
        self._moved()
        if not self._going_on():
            future.cancel()


def _result(transfer: TransferFuture, key: str) -> None:
    try:
        transfer.result()
    except CancelledError as error:
        raise Stopped(key) from error
