"""What a job produced: report, artifacts, and the tamed checkpoint."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from api.dependencies import AppSettings, AppStorage, Authenticated, IfNoneMatch, JobId, Transaction
from api.problems import documented
from api.schemas import ArtifactList, DownloadLink
from services import jobs, results
from services.errors import NotFound, ResultNotAvailable, ResultWithheld
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Job

__all__ = ["router"]

router = APIRouter(tags=["results"])
# A report is a document of ours with figures of a caller's model: it may draw, and nothing else.
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
IMMUTABLE = "private, max-age=86400, immutable"
LINK: dict[int | str, dict[str, Any]] = {307: {"model": DownloadLink, "description": "Location is a link to the file"}}


@router.get(
    "/jobs/{job_id}/report",
    responses={
        **documented(NotFound, ResultNotAvailable),
        200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/html": {}}},
    },
)
def report(
    request: Request,
    job_id: JobId,
    caller: Authenticated,
    session: Transaction,
    storage: AppStorage,
    format: Annotated[Literal["json", "html"] | None, Query(description="instead of Accept")] = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The job's report: JSON, or with ``Accept: text/html`` or ``?format=html`` one page that opens offline."""
    html = format == "html" or (format is None and _prefers_html(request.headers.get("accept", "")))
    job = jobs.get(session, caller.tenant_id, job_id)
    item = results.artifact(job, results.REPORT_HTML if html else results.REPORT_JSON)
    headers = {"ETag": f'"{item["sha256"]}"', "Cache-Control": IMMUTABLE, "Vary": "Accept"} | _digest(item)
    if if_none_match == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    policy = {"Content-Security-Policy": REPORT_POLICY} if html else {}
    return Response(storage.read(results.key(job, item)), headers=headers | policy, media_type=item["media_type"])


def _prefers_html(accept: str) -> bool:
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    return "text/html" in kinds and "application/json" not in kinds[: kinds.index("text/html")]


def _digest(item: dict[str, Any]) -> dict[str, str]:
    """The file's SHA-256 as RFC 9530 writes it."""
    return {"Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(item['sha256'])).decode()}:"}


@router.get("/jobs/{job_id}/artifacts", response_model=ArtifactList, responses=documented(NotFound))
def artifacts(job_id: JobId, caller: Authenticated, session: Transaction) -> ArtifactList:
    """The files that the job published, with sizes and digests; none before its end."""
    job = jobs.get(session, caller.tenant_id, job_id)
    return ArtifactList.model_validate({"items": results.published(job)})


@router.get(
    "/jobs/{job_id}/artifacts/{name}",
    status_code=307,
    responses={**documented(NotFound, ResultNotAvailable, ResultWithheld), **LINK},
)
def artifact(
    job_id: JobId, name: str, caller: Authenticated, session: Transaction, storage: AppStorage, settings: AppSettings
) -> Response:
    """A link to one published file, good for some minutes. Follow it without the API key."""
    job = jobs.get(session, caller.tenant_id, job_id)
    return _link(job, results.artifact(job, name), storage, settings)


@router.get(
    "/jobs/{job_id}/checkpoint",
    status_code=307,
    responses={**documented(NotFound, ResultNotAvailable, ResultWithheld), **LINK},
)
def checkpoint(
    job_id: JobId, caller: Authenticated, session: Transaction, storage: AppStorage, settings: AppSettings
) -> Response:
    """A link to the tamed checkpoint, good for some minutes, with its SHA-256. Follow it without the API key."""
    job = jobs.get(session, caller.tenant_id, job_id)
    return _link(job, results.weights(job), storage, settings)


def _link(job: Job, item: dict[str, Any], storage: ObjectStorage, settings: Settings) -> Response:
    name = f"{job.id}-{item['name']}"
    url = storage.presigned_get(results.key(job, item), filename=name, media_type=item["media_type"])
    expires_at = datetime.now(UTC) + timedelta(seconds=settings.presign_seconds)
    link = DownloadLink.model_validate(item | {"url": url, "expires_at": expires_at})
    headers = {"Location": url, "Cache-Control": "no-store"} | _digest(item)
    return Response(link.model_dump_json(), 307, headers, "application/json")
