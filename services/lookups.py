"""What callers ask all the time, many of them in one statement: whose key is this, and how is that job.

The key is checked in the statement that reads the job: one round trip, and nothing of a key or a job is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ARRAY, Connection, Select, Text, and_, bindparam, func, select

from services.errors import ForgetdError, NotFound, WrongKey
from services.tables import ApiKey, Job
from services.tenancy import Caller, Credential

__all__ = ["Asked", "JobMark", "JobView", "callers", "marks", "views"]

Asked = tuple[Credential, str]  # who asks, and for which job


class JobMark(NamedTuple):
    """What tells whether a job changed, and when to ask again; named as in its row."""

    version: int
    status: str
    progress: dict[str, Any] | None


class JobView(NamedTuple):
    """What a job's owner sees of it; named as in its row."""

    version: int
    id: str
    kind: str
    status: str
    phase: str | None
    checkpoint_id: str
    request: dict[str, Any]
    seed: int
    attempt: int
    progress: dict[str, Any] | None
    reason: str | None
    problem: dict[str, Any] | None
    summary: dict[str, Any] | None
    artifacts: list[dict[str, Any]] | None
    cancel_requested_at: datetime | None
    deadline_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


View = TypeVar("View", JobMark, JobView)


def callers(connection: Connection, credentials: Sequence[Credential]) -> list[Caller | ForgetdError]:
    """Who presents these keys, in their order; ``WrongKey`` for each that is none."""
    rows = connection.execute(_CALLERS, {"keys": [credential.key_id for credential in credentials]})
    return [_caller(credential, *row) for credential, row in zip(credentials, rows, strict=True)]


def marks(connection: Connection, asked: Sequence[Asked]) -> list[JobMark | ForgetdError]:
    """Whether these jobs changed, in their order; ``WrongKey`` or ``NotFound`` for who may not know."""
    return _found(connection, _MARKS, JobMark, asked)


def views(connection: Connection, asked: Sequence[Asked]) -> list[JobView | ForgetdError]:
    """These jobs, in their order; ``WrongKey`` or ``NotFound`` for who may not know."""
    return _found(connection, _VIEWS, JobView, asked)


def _found(
    connection: Connection, statement: Select[Any], kind: type[View], asked: Sequence[Asked]
) -> list[View | ForgetdError]:
    keys, jobs = [credential.key_id for credential, _ in asked], [job_id for _, job_id in asked]
    rows = connection.execute(statement, {"keys": keys, "jobs": jobs})
    return [_view(credential, job_id, kind, row) for (credential, job_id), row in zip(asked, rows, strict=True)]


def _view(credential: Credential, job_id: str, kind: type[View], row: Sequence[Any]) -> View | ForgetdError:
    caller = _caller(credential, row[0], row[1])
    if isinstance(caller, ForgetdError):
        return caller
    if row[2] is None:  # the version, which every job has
        return NotFound(f"There is no job {job_id}.")
    return kind._make(row[2:])


def _caller(credential: Credential, tenant_id: str | None, secret_sha256: bytes | None) -> Caller | ForgetdError:
    try:
        return credential.caller(tenant_id, secret_sha256)
    except WrongKey as refusal:
        return refusal


def _texts(name: str) -> Any:
    return bindparam(name, type_=ARRAY(Text))


def _who() -> Select[str, bytes]:
    """One row for each key that was asked about, in order; null where there is no live key of that id."""
    asked = func.unnest(_texts("keys")).table_valued("key_id", with_ordinality="place").render_derived()
    live = and_(ApiKey.id == asked.c.key_id, ApiKey.revoked_at.is_(None))
    return select(ApiKey.tenant_id, ApiKey.secret_sha256).select_from(asked).outerjoin(ApiKey, live).order_by("place")


def _whose(kind: type[JobMark] | type[JobView]) -> Select[Any]:
    """One row for each key and job that were asked about, in order: the key's, then the job's if it is the tenant's."""
    pairs = func.unnest(_texts("keys"), _texts("jobs"))
    asked = pairs.table_valued("key_id", "job_id", with_ordinality="place").render_derived()
    live = and_(ApiKey.id == asked.c.key_id, ApiKey.revoked_at.is_(None))
    own = and_(Job.tenant_id == ApiKey.tenant_id, Job.id == asked.c.job_id, Job.kind != "import")
    return (
        select(ApiKey.tenant_id, ApiKey.secret_sha256, *(getattr(Job, name) for name in kind._fields))
        .select_from(asked)
        .outerjoin(ApiKey, live)
        .outerjoin(Job, own)
        .order_by("place")
    )


# Built once: their cached compilation is found by identity.
_CALLERS, _MARKS, _VIEWS = _who(), _whose(JobMark), _whose(JobView)
