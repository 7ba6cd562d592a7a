"""Objects that others write part by part, with URLs that each allow one part of one length and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

__all__ = ["Multipart", "StoredPart", "length_of"]

GONE = ("NoSuchKey", "NoSuchUpload", "404")


@dataclass(frozen=True)
class StoredPart:
    """A part that has arrived."""

    bytes: int
    etag: str


class Multipart:
    """Multipart writes of one bucket. What is not there, or not any more, is ``KeyError``.

    Args:
        client: of the store, as this process reaches it.
        presigner: of the store, as callers reach it.
        bucket: whose.
        seconds: how long a URL is good for.
    """

    def __init__(self, client: S3Client, presigner: S3Client, bucket: str, *, seconds: int) -> None:
        self._client, self._presigner, self._bucket, self._seconds = client, presigner, bucket, seconds

    def begin(self, key: str) -> str:
        """Begin a write; its upload id."""
        return self._client.create_multipart_upload(Bucket=self._bucket, Key=key)["UploadId"]

    def begun(self, prefix: str) -> list[str]:
        """The keys under a prefix of writes that were begun and neither finished nor dropped."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
        return [write["Key"] for page in pages for write in page.get("Uploads", [])]

    def url(self, key: str, upload_id: str, number: int, size: int) -> str:
        """Where this part is PUT, by whoever holds it; the length is signed, so that a body of another is refused."""
        part = {"PartNumber": number, "ContentLength": size}
        return self._presigner.generate_presigned_url(
            "upload_part",
            Params={"Bucket": self._bucket, "Key": key, "UploadId": upload_id, **part},
            ExpiresIn=self._seconds,
        )

    def abort(self, key: str, upload_id: str) -> None:
        """Drop one write and its parts; one that is gone stays gone."""
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id)
        except ClientError as error:
            if error.response["Error"]["Code"] not in GONE:
                raise

    def abort_begun_before(self, limit: datetime, prefix: str) -> int:
        """Drop every write under a prefix that was begun before this, and its parts. Returns how many.

        Raises:
            RuntimeError: the store refused some; all others are dropped.
        """
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
        gone = 0
        refused: list[ClientError] = []
        for write in [write for page in pages for write in page.get("Uploads", []) if write["Initiated"] < limit]:
            try:
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=write["Key"], UploadId=write["UploadId"])
                gone += 1
            except ClientError as error:
                if error.response["Error"]["Code"] not in GONE:  # else finished or dropped meanwhile
                    refused.append(error)
        if refused:
            raise RuntimeError(f"the store refused to abort {len(refused)} uploads") from refused[0]
        return gone

    def stored(self, key: str, upload_id: str) -> dict[int, StoredPart]:
        """The parts that have arrived, by number."""
        try:
            pages = list(
                self._client.get_paginator("list_parts").paginate(Bucket=self._bucket, Key=key, UploadId=upload_id)
            )
        except ClientError as error:
            raise _missing(error, key) from error
        listed = [it for page in pages for it in page.get("Parts", [])]
        return {it["PartNumber"]: StoredPart(it["Size"], it["ETag"]) for it in listed}

    def finish(self, key: str, upload_id: str, parts: dict[int, StoredPart]) -> None:
        """Make the object visible, of these parts in the order of their numbers."""
        named: list[CompletedPartTypeDef] = [
            {"PartNumber": number, "ETag": part.etag} for number, part in sorted(parts.items())
        ]
        try:
            self._client.complete_multipart_upload(
                Bucket=self._bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": named}
            )
        except ClientError as error:
            raise _missing(error, key) from error

    def size(self, key: str) -> int:
        """Bytes of a finished object."""
        try:
            answer = self._client.head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            raise _missing(error, key) from error
        return length_of(answer)

    def head(self, key: str, count: int) -> bytes:
        """The first bytes of a finished object, so many at most."""
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes=0-{count - 1}")
        except ClientError as error:
            raise _missing(error, key) from error
        body = answer["Body"]  # as a context manager it would give the stream below it, which counts no bytes
        with body:
            first: bytes = body.read()
        return first


def length_of(answer: Mapping[str, Any]) -> int:
    """Bytes of the object that an answer is about.

    Raises:
        ConnectionError: it does not say; a ``KeyError`` would be taken for an object that is not there.
    """
    if "ContentLength" not in answer:
        raise ConnectionError("the store's answer does not say how long it is")
    return int(answer["ContentLength"])


def _missing(error: ClientError, key: str) -> Exception:
    return KeyError(key) if error.response["Error"]["Code"] in GONE else error
