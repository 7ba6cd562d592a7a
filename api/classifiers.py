"""Classifiers: uploaded as a stream, loaded and tried once in a sandbox, listed, read, erased."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api import answers
from api.conditional import represent
from api.dependencies import (
    AppDatabase,
    AppSettings,
    AppStorage,
    Authenticated,
    ClassifierId,
    IdempotencyKey,
    IfNoneMatch,
    Limit,
    Transaction,
)
from api.limits import LoopLimiter
from api.problems import documented
from api.queries import ClassifierQuery
from api.schemas import ClassifierPage, ClassifierResource
from api.uploads import announced_sha256, stored_body
from services import checkpoint_files, classifiers, idempotency, object_keys
from services.database import Database
from services.errors import (
    ClassifierInUse,
    ClassifierRefused,
    DigestMismatch,
    EmptyUpload,
    IdempotencyKeyReused,
    NotAClassifier,
    NotFound,
    TooLarge,
    UnsupportedMediaType,
)
from services.ids import ID_PATTERNS, new_id
from services.sandbox import TRIALS, try_classifier
from services.storage import ObjectStorage, StoredObject
from services.tenancy import Caller

__all__ = ["router"]

router = APIRouter(tags=["classifiers"])
ROUTE = "POST /classifiers"
BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
Digest = Annotated[str | None, Header(description="sha-256=:BASE64: of the file; other bytes are refused")]


@router.post(
    "/classifiers",
    status_code=201,
    response_model=ClassifierResource,
    responses=documented(
        ClassifierRefused,
        EmptyUpload,
        DigestMismatch,
        NotAClassifier,
        IdempotencyKeyReused,
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
    query: Annotated[ClassifierQuery, Query()],
    content_digest: Digest = None,
    repr_digest: Digest = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Upload a classifier as the raw body: an ONNX file with its weights inside.

    It takes float images (N, c, h, w) and answers with one figure a class, or a single one for two classes. It is
    loaded and run once on images of zeros, in a sandbox.
    """
    checkpoint_files.require_media_type(request.headers.get("content-type"))
    sha256 = announced_sha256(content_digest, repr_digest)
    classifier_id = new_id("clf")
    key = object_keys.classifier(caller.tenant_id, classifier_id)
    limit, inspect = settings.max_classifier_bytes, classifiers.inspect

    def recorded() -> bool:
        with database.transaction() as session:
            return classifiers.exists(session, caller.tenant_id, classifier_id)

    async with stored_body(
        request, storage, key, limit=limit, sha256=sha256, inspect=inspect, recorded=recorded
    ) as source:
        takes = await anyio.to_thread.run_sync(_try, storage, source, query, limiter=_door.here())
        answer, replayed = await run_in_threadpool(
            _register, database, caller, classifier_id, query, takes, source, idempotency_key
        )
    if replayed:
        await run_in_threadpool(storage.erase, key)
    return answers.send(answer, replayed=replayed)


# Uploads that wait for a trial wait here, in order, and not in the threads that all other requests need.
_door = LoopLimiter("classifier doors", TRIALS)


def _try(storage: ObjectStorage, source: StoredObject, query: ClassifierQuery) -> dict[str, int | None]:
    chunks = storage.stream(source.key)
    return try_classifier(chunks, source.bytes, output=query.output, classes=len(query.classes))


def _register(
    database: Database,
    caller: Caller,
    classifier_id: str,
    query: ClassifierQuery,
    takes: dict[str, int | None],
    source: StoredObject,
    key: str | None,
) -> tuple[idempotency.Answer, bool]:
    facts = query.facts()
    with database.transaction() as session:

        def act() -> idempotency.Answer:
            row = classifiers.register(session, caller, classifier_id, facts=facts, takes=takes, source=source)
            return answers.created(ClassifierResource.of(row), f"/classifiers/{row.id}")

        content = query.model_dump(mode="json") | {"sha256": source.sha256}
        return idempotency.once(session, caller, route=ROUTE, key=key, content=content, act=act)


@router.get("/classifiers", response_model=ClassifierPage, responses=documented())
def list_classifiers(
    caller: Authenticated,
    session: Transaction,
    after: Annotated[str | None, Query(pattern=ID_PATTERNS["clf"])] = None,
    limit: Limit = 20,
) -> ClassifierPage:
    """Your classifiers that were not erased, newest first."""
    rows, more = classifiers.list_page(session, caller.tenant_id, after=after, limit=limit)
    items = [ClassifierResource.of(row) for row in rows]
    return ClassifierPage(items=items, has_more=more, next_cursor=rows[-1].id if more else None)


@router.get("/classifiers/{classifier_id}", response_model=ClassifierResource, responses=documented(NotFound))
def read(
    classifier_id: ClassifierId, caller: Authenticated, session: Transaction, if_none_match: IfNoneMatch = None
) -> Response:
    """One classifier: what was said of it, and what its trial found."""
    row = classifiers.get(session, caller.tenant_id, classifier_id)
    return represent(ClassifierResource.of(row), row.version, if_none_match=if_none_match)


@router.delete(
    "/classifiers/{classifier_id}", response_model=ClassifierResource, responses=documented(NotFound, ClassifierInUse)
)
def erase(classifier_id: ClassifierId, caller: Authenticated, session: Transaction, storage: AppStorage) -> Response:
    """Erase the file now, every version of it. What it was stays readable, with the time of its erasure."""
    row = classifiers.erase(session, storage, caller, classifier_id)
    return represent(ClassifierResource.of(row), row.version)
