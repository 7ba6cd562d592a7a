"""Large checkpoints on their way: the caller writes parts straight to the store, and no byte of them comes by here.

What is under way the store alone knows: a write in parts, and beside it a record of what was said of it. Both lie under
the checkpoint-to-be: the sweep behind its import removes the record, the janitor all of an upload that nobody finished.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from services import checkpoint_files, checkpoints, object_keys
from services.errors import NotACheckpoint, NotFound, UploadIncomplete
from services.storage import ObjectStorage, StoredObject

__all__ = [
    "UNFINISHED_HOURS",
    "Part",
    "Upload",
    "abort",
    "begin",
    "discard",
    "find",
    "finish",
    "forget",
    "parts",
    "under_way",
]

logger = logging.getLogger(__name__)

PART_BYTES = 32 * 2**20
PARTS_AT_MOST = 1000  # of the store's 10,000: one answer names them all
UNFINISHED_HOURS = 22.0  # the janitor, which looks every hour, removes what is older and no row names
OPEN_HOURS = UNFINISHED_HOURS - 1.0  # nothing becomes a row so late that the janitor may not have seen it
SNIFF_BYTES = 512  # a tar's first header
NAMED_MISSING = 20


@dataclass(frozen=True)
class Upload:
    """A checkpoint that is being uploaded, as its record says it."""

    id: str  # the checkpoint's, from the beginning
    store_id: str  # of the write in parts
    bytes: int
    part_bytes: int  # of every part but the last
    name: str
    declared: dict[str, Any]
    expires_at: str  # ISO 8601

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes of each part by its number, from 1."""
        count = -(-self.bytes // self.part_bytes)
        return {n: min(self.part_bytes, self.bytes - (n - 1) * self.part_bytes) for n in range(1, count + 1)}


@dataclass(frozen=True)
class Part:
    """A part that has not arrived, and the URL that takes it."""

    number: int
    first: int  # byte of the file
    bytes: int
    url: str


def begin(
    storage: ObjectStorage, tenant_id: str, checkpoint_id: str, *, size: int, name: str, declared: dict[str, Any]
) -> Upload:
    """Begin the upload of a file of so many bytes, as this checkpoint."""
    key = checkpoints.source_key(tenant_id, checkpoint_id)
    upload = Upload(
        id=checkpoint_id,
        store_id=storage.multipart.begin(key),
        bytes=size,
        part_bytes=max(PART_BYTES, -(-size // PARTS_AT_MOST)),
        name=name,
        declared=declared,
        expires_at=(datetime.now(UTC) + timedelta(hours=OPEN_HOURS)).isoformat(timespec="seconds"),
    )
    record = json.dumps(asdict(upload)).encode()
    try:
        storage.put(object_keys.upload_record(tenant_id, checkpoint_id), record, media_type="application/json")
    except Exception:
        with suppress(Exception):  # else its place is taken until the janitor comes
            storage.multipart.abort(key, upload.store_id)
        raise
    return upload


def find(storage: ObjectStorage, tenant_id: str, checkpoint_id: str) -> Upload:
    """A caller's upload that is under way; raises ``NotFound``."""
    try:
        upload = Upload(**json.loads(storage.read(object_keys.upload_record(tenant_id, checkpoint_id))))
    except KeyError:
        upload = None
    if upload is None:
        raise _over(checkpoint_id)
    _refuse_if_over(upload)
    return upload


def under_way(storage: ObjectStorage, tenant_id: str) -> int:
    """How many checkpoints of a tenant's are being written to the store: in parts by it, or streamed by a gateway."""
    keys = set(storage.multipart.begun(object_keys.checkpoints_prefix(tenant_id)))  # twice where a reply was lost
    return sum(object_keys.is_source(key) for key in keys)  # a worker writes assets beside them


def parts(storage: ObjectStorage, tenant_id: str, upload: Upload) -> list[Part]:
    """The parts that have not arrived, in order, with fresh URLs; none once the upload is whole."""
    key = checkpoints.source_key(tenant_id, upload.id)
    try:
        there = storage.multipart.stored(key, upload.store_id)
    except KeyError:
        return []
    return [
        Part(n, (n - 1) * upload.part_bytes, size, storage.multipart.url(key, upload.store_id, n, size))
        for n, size in upload.sizes.items()
        if n not in there or there[n].bytes != size
    ]


def finish(
    storage: ObjectStorage, tenant_id: str, upload: Upload, *, sha256: str, recorded: Callable[[], bool]
) -> StoredObject:
    """Join the parts into the checkpoint's file; twice is as once. The import, which reads it, checks its SHA-256.

    Args:
        storage: The store.
        tenant_id: Whose.
        upload: As ``find`` gave it.
        sha256: Of the whole, as its owner says.
        recorded: Whether the checkpoint has its row by now: then its file is not to be touched.

    Raises:
        UploadIncomplete: a part is missing; nothing was changed.
        NotACheckpoint: the file cannot be one; the upload is gone.
        NotFound: the upload is gone, or its time is over.
        ConnectionError: the store's answer broke off; nothing is known of the file, and nothing was changed.
    """
    key = checkpoints.source_key(tenant_id, upload.id)
    try:
        _join(storage, key, upload)
        first = storage.multipart.head(key, SNIFF_BYTES)
    except KeyError as error:
        raise NotFound(f"The upload {upload.id} is not under way any more. Begin another.") from error
    if len(first) < min(SNIFF_BYTES, upload.bytes):
        raise ConnectionError("the store's answer broke off")
    try:
        checkpoint_files.inspect(first, upload.bytes)
    except NotACheckpoint:
        if not recorded():
            discard(storage, tenant_id, upload.id)
        raise
    _refuse_if_over(upload)  # joining takes its time, and the janitor is not to find what becomes a row
    return StoredObject(key, upload.bytes, sha256)


def abort(storage: ObjectStorage, tenant_id: str, upload: Upload) -> None:
    """End an upload before it is whole: what has arrived is gone. One that is joined by now is left alone.

    Raises:
        NotFound: it is joined: a checkpoint, or about to be one.
    """
    key = checkpoints.source_key(tenant_id, upload.id)
    storage.multipart.abort(key, upload.store_id)
    try:
        storage.multipart.size(key)
    except KeyError:
        forget(storage, tenant_id, upload.id)
    else:
        raise _over(upload.id)


def _refuse_if_over(upload: Upload) -> None:
    if datetime.fromisoformat(upload.expires_at) < datetime.now(UTC):
        raise _over(upload.id)


def _over(checkpoint_id: str) -> NotFound:
    return NotFound(f"No upload {checkpoint_id} is under way. Begin one: POST /checkpoints/uploads.")


def _join(storage: ObjectStorage, key: str, upload: Upload) -> None:
    try:
        there = storage.multipart.stored(key, upload.store_id)
        missing = [n for n, size in upload.sizes.items() if n not in there or there[n].bytes != size]
        if missing:
            raise UploadIncomplete(
                f"{len(missing)} of {len(upload.sizes)} parts have not arrived; GET /checkpoints/uploads/{upload.id} "
                "says where they go.",
                missing=missing[:NAMED_MISSING],
            )
        storage.multipart.finish(key, upload.store_id, {n: there[n] for n in upload.sizes})
    except KeyError:
        # Gone, or joined by a call whose answer was lost.
        if storage.multipart.size(key) != upload.bytes:
            raise


def forget(storage: ObjectStorage, tenant_id: str, checkpoint_id: str) -> None:
    """The upload is over: the checkpoint has its row, or is not to come."""
    storage.erase(object_keys.upload_record(tenant_id, checkpoint_id))


def discard(storage: ObjectStorage, tenant_id: str, checkpoint_id: str) -> None:
    """Remove an upload with all that has arrived of it; no row names it."""
    storage.erase(object_keys.checkpoint_prefix(tenant_id, checkpoint_id))
