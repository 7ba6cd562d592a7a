"""Jobs: accepted, listed, read, cancelled."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api import answers
from api.conditional import changed, represent, retry_after, wait_until
from api.dependencies import (
    AppDatabase,
    Authenticated,
    IdempotencyKey,
    IfNoneMatch,
    JobId,
    Limit,
    Transaction,
    Wait,
)
from api.problems import documented
from api.schemas import JobPage, JobResource, Status
from api.strict_json import StrictJsonRoute
from services import idempotency, jobs
from services.database import Database
from services.errors import (
    CheckpointNotReady,
    ClassifierErased,
    IdempotencyKeyReused,
    ImageSetErased,
    JobEnded,
    NotFound,
    TooLarge,
    UnsupportedMediaType,
)
from services.ids import ID_PATTERNS
from services.requests import DebiasRequest, ForgetRequest
from services.tables import Job
from services.tenancy import Caller

__all__ = ["router"]

router = APIRouter(tags=["jobs"], route_class=StrictJsonRoute)
ACCEPTING = documented(
    NotFound,
    CheckpointNotReady,
    ClassifierErased,
    ImageSetErased,
    IdempotencyKeyReused,
    TooLarge,
    UnsupportedMediaType,
)


@router.post("/jobs/forget", status_code=202, response_model=JobResource, responses=ACCEPTING)
def forget(
    body: ForgetRequest, caller: Authenticated, session: Transaction, idempotency_key: IdempotencyKey = None
) -> Response:
    """Ask for a checkpoint that forgets: what images show, how often samples show attributes, a class, or a concept.

    The answer is the queued job.
    """
    return _accept("POST /jobs/forget", body, caller, session, idempotency_key)


@router.post("/jobs/debias", status_code=202, response_model=JobResource, responses=ACCEPTING)
def debias(
    body: DebiasRequest, caller: Authenticated, session: Transaction, idempotency_key: IdempotencyKey = None
) -> Response:
    """Ask for a checkpoint whose samples are spread over the classes of an attribute as stated.

    The answer is the queued job. It succeeds when the confidence interval of every sampled fraction lies within the
    tolerance of its target.
    """
    return _accept("POST /jobs/debias", body, caller, session, idempotency_key)


def _accept(
    route: str, body: ForgetRequest | DebiasRequest, caller: Caller, session: Session, key: str | None
) -> Response:
    def act() -> idempotency.Answer:
        job = jobs.create(session, caller, body)
        return answers.accepted(JobResource.of(job), f"/jobs/{job.id}", job.version)

    content = body.model_dump(mode="json", by_alias=True)
    answer, replayed = idempotency.once(session, caller, route=route, key=key, content=content, act=act)
    return answers.send(answer, replayed=replayed)


@router.get("/jobs", response_model=JobPage, responses=documented())
def list_jobs(
    caller: Authenticated,
    session: Transaction,
    after: Annotated[str | None, Query(pattern=ID_PATTERNS["job"])] = None,
    limit: Limit = 20,
    status: Status | None = None,
    checkpoint: Annotated[str | None, Query(pattern=ID_PATTERNS["ckpt"])] = None,
) -> JobPage:
    """Your jobs, newest first."""
    rows, more = jobs.list_page(
        session, caller.tenant_id, after=after, limit=limit, status=status, checkpoint=checkpoint
    )
    items = [JobResource.of(row) for row in rows]
    return JobPage(items=items, has_more=more, next_cursor=rows[-1].id if more else None)


@router.get("/jobs/{job_id}", response_model=JobResource, responses=documented(NotFound))
async def read(
    request: Request,
    job_id: JobId,
    caller: Authenticated,
    database: AppDatabase,
    wait: Wait = 0,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """One job. ``?wait=`` holds the answer until the job differs from If-None-Match, or without it until it changes."""
    first = await run_in_threadpool(_version, database, caller, job_id)

    def settled() -> bool:
        now = _version(database, caller, job_id)
        if if_none_match is not None:
            return now is None or changed(if_none_match, now[0])
        return now != first or now is None or now[1] in jobs.TERMINAL

    if wait:
        await wait_until(settled, wait, request)
    return await run_in_threadpool(_read, database, caller, job_id, if_none_match)


def _version(database: Database, caller: Caller, job_id: str) -> tuple[int, str] | None:
    with database.transaction() as session:
        return jobs.version(session, caller.tenant_id, job_id)


def _read(database: Database, caller: Caller, job_id: str, if_none_match: str | None) -> Response:
    with database.transaction() as session:
        job = jobs.get(session, caller.tenant_id, job_id)
    return represent(JobResource.of(job), job.version, if_none_match=if_none_match, headers=_pace(job))


def _pace(job: Job) -> dict[str, str]:
    if job.status in jobs.TERMINAL:
        return {}
    return {"Retry-After": retry_after((job.progress or {}).get("eta_seconds"))}


@router.post(
    "/jobs/{job_id}/cancel", status_code=202, response_model=JobResource, responses=documented(NotFound, JobEnded)
)
def cancel(job_id: JobId, caller: Authenticated, session: Transaction) -> Response:
    """Ask a job to end: a queued one is cancelled at once, a running one soon. Twice is as once."""
    job = jobs.cancel(session, caller, job_id)
    headers = {"Location": f"/jobs/{job.id}"} | _pace(job)
    return represent(JobResource.of(job), job.version, status=202, headers=headers)
