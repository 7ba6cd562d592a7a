"""Image sets: decoded at the door, kept for a day at most, erased on request."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from api import answers
from api.conditional import represent
from api.dependencies import (
    AppDatabase,
    AppSettings,
    AppStorage,
    Authenticated,
    IdempotencyKey,
    IfNoneMatch,
    ImageSetId,
    Transaction,
)
from api.limits import LoopLimiter
from api.problems import documented
from api.schemas import ImageSetResource
from api.uploads import clean_up, form_files
from services import idempotency, image_sets
from services.database import Database
from services.errors import (
    IdempotencyKeyReused,
    ImageRefused,
    ImageSetInUse,
    NotFound,
    TooLarge,
    UnsupportedMediaType,
)
from services.ids import new_id
from services.image_intake import ImageIntake
from services.sandbox import DECODERS
from services.settings import Settings
from services.storage import ObjectStorage
from services.tenancy import Caller

__all__ = ["router"]

router = APIRouter(tags=["image sets"])
ROUTE = "POST /image-sets"
FIELD = "images"
FORM = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": [FIELD],
            "properties": {FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}},
        }
    }
}


@router.post(
    "/image-sets",
    status_code=201,
    response_model=ImageSetResource,
    responses=documented(ImageRefused, IdempotencyKeyReused, TooLarge, UnsupportedMediaType),
    openapi_extra={"requestBody": {"required": True, "content": FORM}},
)
async def upload(
    request: Request,
    caller: Authenticated,
    database: AppDatabase,
    storage: AppStorage,
    settings: AppSettings,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Upload images (JPEG, PNG, WebP) as files in the field ``images``. One bad image refuses the set.

    Each is decoded and stored as a plain PNG: no metadata, upright, 8 bits, transparency over white.
    Images with the same pixels are kept once.
    """
    files = form_files(
        request, field=FIELD, max_file_bytes=settings.max_image_bytes, max_bytes=settings.max_image_set_bytes
    )
    async with _intake(database, storage, settings, caller) as (image_set_id, intake):
        async for file in files:
            await anyio.to_thread.run_sync(intake.add, file, limiter=_door.here())
        answer, replayed = await run_in_threadpool(
            _complete, database, storage, caller, image_set_id, intake, idempotency_key
        )
    return answers.send(answer, replayed=replayed)


# Uploads that wait for a decoder wait here, in order, and not in the threads that all other requests need.
_door = LoopLimiter("image doors", 2 * DECODERS)  # so that one can store while another decodes


@contextlib.asynccontextmanager
async def _intake(
    database: Database, storage: ObjectStorage, settings: Settings, caller: Caller
) -> AsyncIterator[tuple[str, ImageIntake]]:
    """A set being filled; an error inside the block, or a caller who leaves, takes out all of it.

    A set that was completed after all stays: the reply to a COMMIT can be lost. Where the taking out fails too, the
    set's row stays, and with it the cap on the life of its images.
    """
    image_set_id = new_id("imgs")
    await run_in_threadpool(_begin, database, caller, image_set_id, settings.image_set_hours)
    try:
        intake = await run_in_threadpool(
            ImageIntake, settings, storage, tenant_id=caller.tenant_id, image_set_id=image_set_id
        )
        try:
            yield image_set_id, intake
        finally:
            await clean_up(intake.close)
    except BaseException:
        await clean_up(_discard, database, storage, caller, image_set_id)
        raise


def _begin(database: Database, caller: Caller, image_set_id: str, hours: float) -> None:
    with database.transaction() as session:
        image_sets.begin(session, caller, image_set_id, hours=hours)


def _discard(database: Database, storage: ObjectStorage, caller: Caller, image_set_id: str) -> None:
    with database.transaction() as session:
        image_sets.discard(session, storage, caller, image_set_id)


def _complete(
    database: Database,
    storage: ObjectStorage,
    caller: Caller,
    image_set_id: str,
    intake: ImageIntake,
    key: str | None,
) -> tuple[idempotency.Answer, bool]:
    images = intake.finish()
    with database.transaction() as session:

        def act() -> idempotency.Answer:
            row = image_sets.complete(session, caller, image_set_id, images)
            resource = ImageSetResource.of(row, duplicates_dropped=intake.duplicates)
            return answers.created(resource, f"/image-sets/{row.id}")

        content = {"images": [image["sha256"] for image in images], "duplicates": intake.duplicates}
        answer, replayed = idempotency.once(session, caller, route=ROUTE, key=key, content=content, act=act)
        if replayed:
            image_sets.discard(session, storage, caller, image_set_id)
    return answer, replayed


@router.get("/image-sets/{image_set_id}", response_model=ImageSetResource, responses=documented(NotFound))
def read(
    image_set_id: ImageSetId, caller: Authenticated, session: Transaction, if_none_match: IfNoneMatch = None
) -> Response:
    """What is known of an image set; never an image."""
    row = image_sets.get(session, caller.tenant_id, image_set_id)
    return represent(ImageSetResource.of(row), row.version, if_none_match=if_none_match)


@router.delete(
    "/image-sets/{image_set_id}",
    response_model=ImageSetResource,
    responses=documented(NotFound, ImageSetInUse),
)
def erase(image_set_id: ImageSetId, caller: Authenticated, session: Transaction, storage: AppStorage) -> Response:
    """Erase the images now, every version of them. The empty set stays readable, with the time of its erasure."""
    row = image_sets.erase_now(session, storage, caller, image_set_id)
    return represent(ImageSetResource.of(row), row.version)
