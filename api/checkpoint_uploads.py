"""Large checkpoints: their parts go straight to the store, and then become a checkpoint that is validated."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from api import answers
from api.checkpoints import register_source
from api.dependencies import AppDatabase, AppSettings, AppStorage, Authenticated, CheckpointId, IdempotencyKey
from api.problems import documented
from api.queries import UploadBody, UploadQuery, UploadWhole
from api.schemas import CheckpointResource, UploadPart, UploadParts, UploadResource
from api.strict_json import StrictJsonRoute
from services import checkpoints, idempotency, quotas, uploads
from services.database import Database
from services.errors import (
    IdempotencyKeyReused,
    NotACheckpoint,
    NotFound,
    QuotaExceeded,
    TooLarge,
    UnsupportedMediaType,
    UploadIncomplete,
)
from services.ids import new_id
from services.storage import ObjectStorage
from services.tables import Checkpoint
from services.tenancy import Caller

__all__ = ["router"]

router = APIRouter(tags=["checkpoints"], route_class=StrictJsonRoute)
BEGIN, COMPLETE = "POST /checkpoints/uploads", "POST /checkpoints/uploads/complete"


@router.post(
    "/checkpoints/uploads",
    status_code=201,
    response_model=UploadResource,
    responses=documented(IdempotencyKeyReused, QuotaExceeded, TooLarge, UnsupportedMediaType),
)
def begin(
    body: UploadBody,
    caller: Authenticated,
    database: AppDatabase,
    storage: AppStorage,
    settings: AppSettings,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Begin the upload of a large model in parts, which go straight to the store: GET the upload for where."""
    if body.bytes > settings.max_checkpoint_bytes:
        limit = settings.max_checkpoint_bytes
        raise TooLarge(f"A checkpoint has at most {limit} bytes.", limit=limit)

    asked: dict[str, Any] = {"route": BEGIN, "key": idempotency_key, "content": body.model_dump(mode="json")}
    with database.transaction() as session:
        known = idempotency.repeated(session, caller, **asked)
    if known is not None:
        return answers.send(known, replayed=True)
    _refuse_if_full(database, storage, caller, settings.tenant_open_jobs, own=0)
    # No connection waits for the store.
    upload = uploads.begin(
        storage, caller.tenant_id, new_id("ckpt"), size=body.bytes, name=body.name, declared=body.declared()
    )
    made = answers.created(UploadResource.of(upload), f"/checkpoints/uploads/{upload.id}")
    committing = False
    try:
        _refuse_if_full(database, storage, caller, settings.tenant_open_jobs, own=1)
        with database.transaction() as session:
            answer, replayed = idempotency.once(session, caller, act=lambda: made, **asked)
            committing = idempotency_key is not None  # and an error does not tell whether it is committed
    except Exception:
        if not (committing and _is_answer(database, caller, made, asked)):
            uploads.discard(storage, caller.tenant_id, upload.id)
        raise
    if replayed:
        uploads.discard(storage, caller.tenant_id, upload.id)
    return answers.send(answer, replayed=replayed)


def _is_answer(database: Database, caller: Caller, made: idempotency.Answer, asked: dict[str, Any]) -> bool:
    """Whether repeats of a request are given this answer, from now on at the latest; raises where it cannot be told."""
    try:
        # Not a look: that would not see a COMMIT which is still on its way. A second record waits for its end.
        with database.transaction() as session:
            answer, _ = idempotency.once(session, caller, act=lambda: made, **asked)
    except IdempotencyKeyReused:
        return False
    return answer == made


def _refuse_if_full(database: Database, storage: ObjectStorage, caller: Caller, open_jobs: int, *, own: int) -> None:
    """Asked before a write is begun, and of many at once again when it is: so that no one too many stays."""
    others = uploads.under_way(storage, caller.tenant_id) - own
    with database.transaction() as session:
        quotas.refuse_if_full(session, caller.tenant_id, open_jobs=open_jobs, uploads=others)


@router.get("/checkpoints/uploads/{checkpoint_id}", response_model=UploadParts, responses=documented(NotFound))
def read(checkpoint_id: CheckpointId, caller: Authenticated, storage: AppStorage) -> Response:
    """An upload that is under way: the parts that have not arrived, and for each a URL that takes it by PUT."""
    upload = uploads.find(storage, caller.tenant_id, checkpoint_id)
    missing = [
        UploadPart.model_validate(it, from_attributes=True) for it in uploads.parts(storage, caller.tenant_id, upload)
    ]
    resource = UploadParts(**UploadResource.of(upload).model_dump(), missing=missing)
    return Response(resource.model_dump_json(), media_type="application/json")


@router.delete("/checkpoints/uploads/{checkpoint_id}", status_code=204, responses=documented(NotFound))
def abort(checkpoint_id: CheckpointId, caller: Authenticated, storage: AppStorage) -> Response:
    """End an upload that is not to be completed: what has arrived of it is gone, and its place is free."""
    uploads.abort(storage, caller.tenant_id, uploads.find(storage, caller.tenant_id, checkpoint_id))
    return Response(status_code=204)


@router.post(
    "/checkpoints/uploads/{checkpoint_id}/complete",
    status_code=202,
    response_model=CheckpointResource,
    responses=documented(NotFound, UploadIncomplete, NotACheckpoint, IdempotencyKeyReused, UnsupportedMediaType),
)
def complete(
    checkpoint_id: CheckpointId,
    body: UploadWhole,
    caller: Authenticated,
    database: AppDatabase,
    storage: AppStorage,
) -> Response:
    """Every part has arrived: make them a checkpoint, which is then validated, its SHA-256 first. Twice is as once."""
    row = _known(database, caller, checkpoint_id)
    if row is None:
        try:
            return _complete(checkpoint_id, body, caller, database, storage)
        except NotFound:
            row = _known(database, caller, checkpoint_id)  # by now, of a call beside this one, which ended the upload
            if row is None:
                raise
    return answers.send(answers.accepted(CheckpointResource.of(row), f"/checkpoints/{row.id}", row.version))


def _complete(
    checkpoint_id: str, body: UploadWhole, caller: Caller, database: Database, storage: ObjectStorage
) -> Response:
    upload = uploads.find(storage, caller.tenant_id, checkpoint_id)
    source = uploads.finish(
        storage,
        caller.tenant_id,
        upload,
        sha256=body.sha256,
        recorded=lambda: _known(database, caller, checkpoint_id) is not None,
    )
    query = UploadQuery.model_validate({"name": upload.name, **upload.declared})
    answer, replayed = register_source(
        database,
        caller,
        checkpoint_id,
        query,
        source,
        route=COMPLETE,
        key=checkpoint_id,
        open_jobs=None,  # its place was taken when it was begun
    )
    uploads.forget(storage, caller.tenant_id, checkpoint_id)
    return answers.send(answer, replayed=replayed)


def _known(database: Database, caller: Caller, checkpoint_id: str) -> Checkpoint | None:
    with database.transaction() as session:
        if not checkpoints.exists(session, caller.tenant_id, checkpoint_id):
            return None
        return checkpoints.get(session, caller.tenant_id, checkpoint_id)
