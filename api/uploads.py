"""Bodies that are streamed: counted, digested and passed on as they come, with nothing left behind when they fail."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import anyio
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from services.errors import DigestMismatch, EmptyUpload, InvalidRequest, TooLarge, UnsupportedMediaType
from services.storage import ObjectStorage, StoredObject, Upload

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

__all__ = ["announced_sha256", "capped", "clean_up", "form_files", "stored_body"]

logger = logging.getLogger("forgetd.api")
SNIFF_BYTES = 512  # a tar's first header
MAX_PART_HEADER_BYTES = 8192


async def capped(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in pieces, refused as soon as it is, or says it will be, longer than the limit."""
    problem = TooLarge(f"This upload takes at most {limit} bytes.", limit=limit)
    if int(request.headers.get("content-length") or 0) > limit:
        raise problem
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise problem
        yield chunk


def announced_sha256(*headers: str | None) -> str | None:
    """The SHA-256 that Content-Digest or Repr-Digest (RFC 9530) names, in hexadecimal."""
    for header in headers:
        for member in (header or "").split(","):
            name, _, value = member.strip().partition("=")
            if name.lower() != "sha-256":
                continue
            try:
                digest = base64.b64decode(value.removeprefix(":").removesuffix(":"), validate=True)
            except binascii.Error:
                digest = b""
            if len(digest) != 32 or not (value.startswith(":") and value.endswith(":")):
                raise InvalidRequest("A digest header reads sha-256=:BASE64:, with the 32 bytes of the SHA-256.")
            return digest.hex()
    return None


@asynccontextmanager
async def stored_body(
    request: Request,
    storage: ObjectStorage,
    key: str,
    *,
    limit: int,
    sha256: str | None,
    inspect: Callable[[bytes, int | None], None],
    recorded: Callable[[], bool],
) -> AsyncIterator[StoredObject]:
    """Stream the body into the store; an error inside the block, or a caller who leaves, takes it out again.

    Unless a row names it by then: the reply to a COMMIT can be lost. Where nobody can tell, the janitor will.

    Args:
        request: Whose body.
        storage: The store.
        key: Where it goes.
        limit: Most bytes.
        sha256: What the whole must digest to; None: not checked.
        inspect: Looks at the first bytes and the announced length, and raises if the file cannot be what it must be.
        recorded: Whether the block's work was kept after all; asked only once the object is whole.
    """
    upload = storage.upload(key)
    stored = False
    try:
        await _receive(request, upload, limit, inspect)
        if sha256 is not None and upload.sha256() != sha256:
            raise DigestMismatch("The bytes that arrived have another SHA-256 than announced; send the file again.")
        source = await run_in_threadpool(upload.finish)
        stored = True
        yield source
    except BaseException:
        await clean_up(_take_out, storage, upload, key, recorded if stored else None)
        raise


async def clean_up(undo: Callable[..., None], *arguments: object) -> None:
    """Undo in a thread, also when the caller is gone; a failure is logged and does not hide what went wrong before."""
    with anyio.CancelScope(shield=True):
        try:
            await run_in_threadpool(undo, *arguments)
        except Exception as error:
            logger.warning("%s failed with %s", undo.__name__, type(error).__name__)


def _take_out(storage: ObjectStorage, upload: Upload, key: str, recorded: Callable[[], bool] | None) -> None:
    if recorded is None:
        upload.abort()
    elif recorded():
        return
    storage.erase(key)


async def _receive(request: Request, upload: Upload, limit: int, inspect: Callable[[bytes, int | None], None]) -> None:
    length = request.headers.get("content-length")
    head: bytes | None = b""
    async for chunk in capped(request, limit):
        if head is not None:
            head += chunk[:SNIFF_BYTES]
            if len(head) >= SNIFF_BYTES:
                inspect(head, int(length) if length else None)
                head = None
        upload.feed(chunk)
        if upload.wants_flush():
            await run_in_threadpool(upload.flush)
    if upload.bytes == 0:
        raise EmptyUpload("Send the file's bytes as the body: curl --data-binary @FILE.")
    if head is not None:
        inspect(head, upload.bytes)


async def form_files(request: Request, *, field: str, max_file_bytes: int, max_bytes: int) -> AsyncIterator[bytes]:
    """The files of one field of a multipart form, in order, one at a time in memory and never on disk.

    Starlette's own form parsing spools files to a temporary directory, where personal data has no business.
    """
    media_type, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if media_type != b"multipart/form-data" or not boundary:
        raise UnsupportedMediaType(f'Send multipart/form-data with each image as a file in the field "{field}".')
    form = _Form(field, max_file_bytes)
    parser = MultipartParser(boundary, cast("MultipartCallbacks", form.callbacks()))
    async for chunk in capped(request, max_bytes):
        try:
            parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest("The multipart form is malformed.") from error
        while form.files:
            yield form.files.pop(0)
    if not form.ended:
        raise InvalidRequest("The multipart form ends before its closing boundary.")


class _Form:
    """Collects what the parser calls back; ``files`` are complete and wait to be taken."""

    def __init__(self, field: str, max_file_bytes: int) -> None:
        self._field, self._max_file_bytes = field, max_file_bytes
        self._name, self._value, self._part = bytearray(), bytearray(), bytearray()
        self._disposition, self._header_bytes = b"", 0
        self._begun = 0
        self.files: list[bytes] = []
        self.ended = False

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """By the parser's names."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._disposition, self._header_bytes = b"", 0
        self._part = bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._value += data[start:end]

    def _count_header(self, count: int) -> None:
        self._header_bytes += count
        if self._header_bytes > MAX_PART_HEADER_BYTES:
            raise InvalidRequest(f"The headers of part {self._begun} are longer than {MAX_PART_HEADER_BYTES} bytes.")

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != self._field.encode():
            raise InvalidRequest(
                f'Part {self._begun} of the form is not in the field "{self._field}"; send nothing else.',
                errors=[{"parameter": self._field, "detail": "the only field of this form"}],
            )

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._part += data[start:end]
        if len(self._part) > self._max_file_bytes:
            raise TooLarge(
                f"Image {self._begun} is larger than {self._max_file_bytes} bytes; scale it down.",
                index=self._begun,
                limit=self._max_file_bytes,
            )

    def _end(self) -> None:
        self.files.append(bytes(self._part))
        self._part = bytearray()
        self._begun += 1

    def _finish(self) -> None:
        self.ended = True
