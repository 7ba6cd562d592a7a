"""Checkpoints: uploaded as a stream, validated in the background, listed and read."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api import answers
from api.conditional import changed, represent, wait_until
from api.dependencies import (
    AppDatabase,
    AppSettings,
    AppStorage,
    Authenticated,
    CheckpointId,
    IdempotencyKey,
    IfNoneMatch,
    Limit,
    Transaction,
    Wait,
)
from api.problems import documented
from api.queries import UploadQuery
from api.schemas import CheckpointPage, CheckpointResource
from api.uploads import announced_sha256, stored_body
from services import checkpoint_files, checkpoints, idempotency, jobs, quotas
from services.database import Database
from services.errors import (
    DigestMismatch,
    EmptyUpload,
    IdempotencyKeyReused,
    NotACheckpoint,
    NotFound,
    QuotaExceeded,
    TooLarge,
    UnsupportedMediaType,
)
from services.ids import ID_PATTERNS, new_id
from services.storage import StoredObject
from services.tenancy import Caller

__all__ = ["register_source", "router"]

router = APIRouter(tags=["checkpoints"])
ROUTE = "POST /checkpoints"
BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
Digest = Annotated[str | None, Header(description="sha-256=:BASE64: of the file; other bytes are refused")]


@router.post(
    "/checkpoints",
    status_code=202,
    response_model=CheckpointResource,
    responses=documented(
        EmptyUpload,
        DigestMismatch,
        NotACheckpoint,
        IdempotencyKeyReused,
        QuotaExceeded,
        TooLarge,
        UnsupportedMediaType,
    ),
    openapi_extra={"requestBody": {"required": True, "content": BINARY}},
)
async def upload(
    request: Request,
    caller: Authenticated,
    database: AppDatabase,
    storage: AppStorage,
    settings: AppSettings,
    query: Annotated[UploadQuery, Query()],
    content_digest: Digest = None,
    repr_digest: Digest = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Upload a model: a safetensors file, a PyTorch state dict, or a diffusers folder as a tar. Validated later."""
    checkpoint_files.require_media_type(request.headers.get("content-type"))
    sha256 = announced_sha256(content_digest, repr_digest)
    await run_in_threadpool(_refuse_if_full, database, caller, settings.tenant_open_jobs, idempotency_key)
    checkpoint_id = new_id("ckpt")
    key = checkpoints.source_key(caller.tenant_id, checkpoint_id)
    limit, inspect = settings.max_checkpoint_bytes, checkpoint_files.inspect

    def recorded() -> bool:
        with database.transaction() as session:
            return checkpoints.exists(session, caller.tenant_id, checkpoint_id)

    async with stored_body(
        request, storage, key, limit=limit, sha256=sha256, inspect=inspect, recorded=recorded
    ) as source:
        answer, replayed = await run_in_threadpool(
            partial(register_source, route=ROUTE, key=idempotency_key, open_jobs=settings.tenant_open_jobs),
            database,
            caller,
            checkpoint_id,
            query,
            source,
        )
    if replayed:
        await run_in_threadpool(storage.erase, key)
    return answers.send(answer, replayed=replayed)


def _refuse_if_full(database: Database, caller: Caller, open_jobs: int, key: str | None) -> None:
    """Before the body is read, unless the request may be a repeat; it is counted again when the row is made."""
    with database.transaction() as session:
        if not idempotency.answered(session, caller, route=ROUTE, key=key):
            quotas.refuse_if_full(session, caller.tenant_id, open_jobs=open_jobs)


def register_source(
    database: Database,
    caller: Caller,
    checkpoint_id: str,
    query: UploadQuery,
    source: StoredObject,
    *,
    route: str,
    key: str | None,
    open_jobs: int | None,
) -> tuple[idempotency.Answer, bool]:
    """Make an uploaded file a checkpoint and queue its validation, once for a route's key; the answer to the POST."""
    with database.transaction() as session:

        def act() -> idempotency.Answer:
            row = checkpoints.register(
                session, caller, checkpoint_id, name=query.name, declared=query.declared(), source=source
            )
            jobs.create_import(session, row, actor=caller.key_id, open_jobs=open_jobs)
            return answers.accepted(CheckpointResource.of(row), f"/checkpoints/{row.id}", row.version)

        content = query.model_dump(mode="json") | {"sha256": source.sha256}
        return idempotency.once(session, caller, route=route, key=key, content=content, act=act)


@router.get("/checkpoints", response_model=CheckpointPage, responses=documented())
def list_checkpoints(
    caller: Authenticated,
    session: Transaction,
    after: Annotated[str | None, Query(pattern=ID_PATTERNS["ckpt"])] = None,
    limit: Limit = 20,
) -> CheckpointPage:
    """Your checkpoints, newest first."""
    rows, more = checkpoints.list_page(session, caller.tenant_id, after=after, limit=limit)
    items = [CheckpointResource.of(row) for row in rows]
    return CheckpointPage(items=items, has_more=more, next_cursor=rows[-1].id if more else None)


@router.get("/checkpoints/{checkpoint_id}", response_model=CheckpointResource, responses=documented(NotFound))
async def read(
    request: Request,
    checkpoint_id: CheckpointId,
    caller: Authenticated,
    database: AppDatabase,
    wait: Wait = 0,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """One checkpoint; ``?wait=`` holds the answer until validation has ended."""

    def settled() -> bool:
        with database.transaction() as session:
            row = checkpoints.get(session, caller.tenant_id, checkpoint_id)
            return row.status != "validating" and changed(if_none_match, row.version)

    if wait:
        await wait_until(lambda: run_in_threadpool(settled), wait, request)
    return await run_in_threadpool(_read, database, caller, checkpoint_id, if_none_match)


def _read(database: Database, caller: Caller, checkpoint_id: str, if_none_match: str | None) -> Response:
    with database.transaction() as session:
        row = checkpoints.get(session, caller.tenant_id, checkpoint_id)
    later = {"Retry-After": "1"} if row.status == "validating" else {}
    return represent(CheckpointResource.of(row), row.version, if_none_match=if_none_match, headers=later)
