"""Jobs: accepted, listed, read, cancelled."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session

from api import answers
from api.conditional import changed, represent, retry_after, unchanged, wait_until
from api.dependencies import (
    AppSettings,
    AskedJob,
    Authenticated,
    IdempotencyKey,
    IfNoneMatch,
    JobId,
    Limit,
    Transaction,
    Wait,
    asked_job,
    lookups_of,
)
from api.problems import documented
from api.schemas import JobPage, JobResource, Status
from api.strict_json import StrictJsonRoute
from services import idempotency, jobs
from services.errors import (
    CheckpointNotReady,
    ClassifierErased,
    IdempotencyKeyReused,
    ImageSetErased,
    JobEnded,
    NotFound,
    QuotaExceeded,
    TooLarge,
    UnsupportedMediaType,
)
from services.ids import ID_PATTERNS
from services.lookups import Asked, JobMark, JobView
from services.requests import DebiasRequest, ForgetRequest
from services.settings import Settings
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
    QuotaExceeded,
    TooLarge,
    UnsupportedMediaType,
)


class _ReadRoute(APIRoute):
    """Answers at once what asks for no more than the job.

    What FastAPI does for a signature, which documents this route, takes a third of the time of such an answer.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Put the short way before FastAPI's."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            if request.scope["query_string"]:
                return await handle(request)
            return await _read(request, asked_job(request), request.headers.get("if-none-match"))

        return answer


async def read(request: Request, asked: AskedJob, wait: Wait = 0, if_none_match: IfNoneMatch = None) -> Response:
    """One job. ``?wait=`` holds the answer until the job differs from If-None-Match, or without it until it changes."""
    marks = lookups_of(request).marks
    if wait:
        first = await marks.ask(asked)

        async def settled() -> bool:
            now = await marks.ask(asked)
            if if_none_match is not None:
                return changed(if_none_match, now.version)
            return now.version != first.version or now.status in jobs.TERMINAL

        await wait_until(settled, wait, request)
    return await _read(request, asked, if_none_match)


async def _read(request: Request, asked: Asked, if_none_match: str | None) -> Response:
    lookups = lookups_of(request)
    if if_none_match is not None:
        mark = await lookups.marks.ask(asked)
        if not changed(if_none_match, mark.version):
            return unchanged(mark.version, _pace(mark))
    job = await lookups.views.ask(asked)
    return represent(JobResource.of(job), job.version, if_none_match=if_none_match, headers=_pace(job))


# Before the others, since routes are tried in their order and this is what is asked most.
router.add_api_route(
    "/jobs/{job_id}",
    read,
    methods=["GET"],
    response_model=JobResource,
    responses=documented(NotFound),
    route_class_override=_ReadRoute,
)


@router.post("/jobs/forget", status_code=202, response_model=JobResource, responses=ACCEPTING)
def forget(
    body: ForgetRequest,
    caller: Authenticated,
    session: Transaction,
    settings: AppSettings,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Ask for a checkpoint that forgets: what images show, how often samples show attributes, a class, or a concept.

    The answer is the queued job.
    """
    return _accept("POST /jobs/forget", body, caller, session, settings, idempotency_key)


@router.post("/jobs/debias", status_code=202, response_model=JobResource, responses=ACCEPTING)
def debias(
    body: DebiasRequest,
    caller: Authenticated,
    session: Transaction,
    settings: AppSettings,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Ask for a checkpoint whose samples are spread over the classes of an attribute as stated.

    The answer is the queued job. It succeeds when the confidence interval of every sampled fraction lies within the
    tolerance of its target.
    """
    return _accept("POST /jobs/debias", body, caller, session, settings, idempotency_key)


def _accept(
    route: str,
    body: ForgetRequest | DebiasRequest,
    caller: Caller,
    session: Session,
    settings: Settings,
    key: str | None,
) -> Response:
    def act() -> idempotency.Answer:
        job = jobs.create(session, caller, body, open_jobs=settings.tenant_open_jobs)
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


@router.post(
    "/jobs/{job_id}/cancel", status_code=202, response_model=JobResource, responses=documented(NotFound, JobEnded)
)
def cancel(job_id: JobId, caller: Authenticated, session: Transaction) -> Response:
    """Ask a job to end: a queued one is cancelled at once, a running one soon. Twice is as once."""
    job = jobs.cancel(session, caller, job_id)
    headers = {"Location": f"/jobs/{job.id}"} | _pace(job)
    return represent(JobResource.of(job), job.version, status=202, headers=headers)


def _pace(job: Job | JobView | JobMark) -> dict[str, str]:
    if job.status in jobs.TERMINAL:
        return {}
    return {"Retry-After": retry_after((job.progress or {}).get("eta_seconds"))}
