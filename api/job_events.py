"""What happens to a job, as pages or as a stream of server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from api.conditional import crowd
from api.dependencies import AppDatabase, Authenticated, JobId, Limit
from api.problems import documented
from api.schemas import EventPage, EventResource
from services import jobs
from services.database import Database
from services.errors import NotFound
from services.tenancy import Caller

__all__ = ["router"]

router = APIRouter(tags=["jobs"])
EVENT_STREAM = "text/event-stream"
POLL_SECONDS = 0.5
PING_SECONDS = 15.0
STREAM_SECONDS = 600.0  # then the caller reconnects, with Last-Event-ID
RECONNECT_MILLISECONDS = 2000
BATCH = 100
LARGEST_ID = 2**63 - 1

Cursor = Annotated[int, Query(ge=0, le=LARGEST_ID, description="only events after this id")]
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", pattern=r"^[0-9]{1,18}$", description="sent by reconnecting streams")
]


@router.get(
    "/jobs/{job_id}/events",
    response_model=EventPage,
    responses={**documented(NotFound), 200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}},
)
async def read(
    request: Request,
    job_id: JobId,
    caller: Authenticated,
    database: AppDatabase,
    after: Cursor = 0,
    limit: Limit = 100,
    last_event_id: LastEventId = None,
) -> Response:
    """The job's events, oldest first; with ``Accept: text/event-stream`` a stream that ends with the job.

    The stream's ``progress`` frames carry no id: they show where the job is and are not repeated on reconnection.
    """
    if EVENT_STREAM in request.headers.get("accept", ""):
        view = await run_in_threadpool(_look, database, caller, job_id, int(last_event_id or after), BATCH)
        frames = _frames(request, database, caller, job_id, view)
        return StreamingResponse(frames, media_type=EVENT_STREAM, headers={"X-Accel-Buffering": "no"})
    view = await run_in_threadpool(_look, database, caller, job_id, after, limit + 1)
    more = len(view.events) > limit
    items = view.events[:limit]
    page = EventPage(items=items, has_more=more, next_cursor=str(items[-1].id) if more else None)
    return Response(page.model_dump_json(), media_type="application/json")


@dataclass(frozen=True)
class _View:
    """A job at one moment: its row's version and progress, and the events after a cursor."""

    events: list[EventResource]
    cursor: int
    version: int
    finished: bool
    progress: dict[str, Any]


def _look(database: Database, caller: Caller, job_id: str, after: int, limit: int) -> _View:
    with database.transaction() as session:
        # The row first: what made it terminal wrote its event in the same transaction.
        job = jobs.get(session, caller.tenant_id, job_id)
        rows = jobs.events(session, caller.tenant_id, job_id, after=after, limit=limit)
    events = [EventResource(id=id, type=type, data=data, created_at=at) for id, type, data, at in rows]
    progress = {"status": job.status, "phase": job.phase, "attempt": job.attempt, "progress": job.progress}
    cursor = events[-1].id if events else after
    return _View(events, cursor, job.version, job.finished_at is not None, progress)


async def _frames(
    request: Request, database: Database, caller: Caller, job_id: str, view: _View
) -> AsyncIterator[bytes]:
    """Every event once, progress when it changed, a comment when nothing did; ends with the job."""
    yield format_sse_event(retry=RECONNECT_MILLISECONDS)
    ends, pinged, shown = time.monotonic() + STREAM_SECONDS, time.monotonic(), -1
    with crowd.member():
        while True:
            for event in view.events:
                yield format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.id))
            full = len(view.events) == BATCH
            if view.finished and not full:
                return
            if view.version != shown and not full:
                shown, pinged = view.version, time.monotonic()
                yield format_sse_event(data_str=json.dumps(view.progress), event="progress")
            if time.monotonic() > ends or crowd.leaving or await request.is_disconnected():
                return
            if time.monotonic() - pinged > PING_SECONDS:
                pinged = time.monotonic()
                yield format_sse_event(comment="still here")
            if not full:
                await crowd.pause(POLL_SECONDS)
            view = await run_in_threadpool(_look, database, caller, job_id, view.cursor, BATCH)
