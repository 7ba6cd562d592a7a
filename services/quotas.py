"""What a tenant may have at once: jobs that have not ended, and jobs that run. Both are counted exactly.

A count and what it allows are one: the tenant's row is locked between them. Foreign keys do not mind that lock.
A large upload takes its place when it is begun, and what becomes of it is asked nothing more: jobs that came meanwhile
cost nobody an upload of hours. By so many may the open ones be more than the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from services import audit
from services.errors import NotFound, QuotaExceeded
from services.statuses import is_held, is_open
from services.tables import Job, Tenant

__all__ = ["Usage", "admit", "may_run", "refuse_if_full", "set_limits", "usage"]

SHOWN_AT_MOST = 10_000  # jobs that ``usage`` counts


@dataclass(frozen=True)
class Usage:
    """A tenant, its own limits (None: the settings'), and what it has now, counted up to ``SHOWN_AT_MOST``."""

    id: str
    name: str
    max_open_jobs: int | None
    max_running_jobs: int | None
    open_jobs: int
    running_jobs: int


def admit(session: Session, tenant_id: str, *, open_jobs: int | None) -> None:
    """Let one more job in, in the transaction that adds its row.

    Args:
        session: Its transaction keeps the tenant's row locked, so that of many requests at once no one too many passes.
        tenant_id: Whose job.
        open_jobs: The limit of a tenant that has none of its own; None: it was let in before, no limit counts.

    Raises:
        QuotaExceeded: The tenant has as many jobs that have not ended as it may.
    """
    own = select(Tenant.max_open_jobs).where(Tenant.id == tenant_id).with_for_update(key_share=True)
    limit = session.scalar(own)
    if open_jobs is not None:
        _refuse(session, tenant_id, limit, open_jobs)


def refuse_if_full(session: Session, tenant_id: str, *, open_jobs: int, uploads: int = 0) -> None:
    """Refuse early what ``admit`` would refuse now: before a large body is read. Locks nothing and promises nothing.

    Args:
        session: Any transaction.
        tenant_id: Who asks for one more.
        open_jobs: The limit of a tenant that has none of its own.
        uploads: How many large uploads it has under way, each of which is to become a job.

    Raises:
        QuotaExceeded: as ``admit``, uploads and jobs together.
    """
    own = select(Tenant.max_open_jobs).where(Tenant.id == tenant_id)
    _refuse(session, tenant_id, session.scalar(own), open_jobs, uploads)


def _refuse(session: Session, tenant_id: str, own: int | None, default: int, uploads: int = 0) -> None:
    limit = default if own is None else own
    count = uploads + _count(session, tenant_id, is_open(), at_most=limit)
    if count >= limit:
        raise QuotaExceeded(
            f"{limit} jobs may be open at once, uploads under way or being validated included. Wait until one has "
            "ended, cancel some, or ask the operator for more: forgetd tenants limit.",
            limit=limit,
            open=count,
        )


def may_run(session: Session, job_id: str, *, running_jobs: int | None) -> bool:
    """Whether the job's tenant may have one more at work; true until the transaction ends, in which it is claimed.

    Args:
        session: Its transaction locks the tenant's row where there is a limit, and nothing where there is none.
        job_id: Which job; an unknown one may run.
        running_jobs: The limit of a tenant that has none of its own; None: as many as there are workers.
    """
    limit = func.coalesce(Tenant.max_running_jobs, running_jobs)
    row = session.execute(
        select(Tenant.id, limit.label("limit")).join(Job, Job.tenant_id == Tenant.id).where(Job.id == job_id)
    ).one_or_none()
    if row is None or row.limit is None:
        return True
    locked = select(limit).where(Tenant.id == row.id).with_for_update(key_share=True)
    now = session.scalar(locked)
    return now is None or _count(session, row.id, is_held(), at_most=now) < now


def usage(session: Session) -> list[Usage]:
    """Every tenant with its limits and what it has, by name, for the operator."""
    rows = session.execute(
        select(Tenant.id, Tenant.name, Tenant.max_open_jobs, Tenant.max_running_jobs).order_by(Tenant.name)
    ).all()
    return [
        Usage(
            *row,
            open_jobs=_count(session, row.id, is_open(), at_most=SHOWN_AT_MOST),
            running_jobs=_count(session, row.id, is_held(), at_most=SHOWN_AT_MOST),
        )
        for row in rows
    ]


def set_limits(session: Session, tenant: str, **limits: int | None) -> None:
    """Give the tenant of this name limits of its own; None: the settings' again.

    Args:
        session: The transaction.
        tenant: Its name.
        **limits: ``max_open_jobs``, ``max_running_jobs``, or both; what is left out stays.

    Raises:
        NotFound: There is no such tenant.
    """
    tenant_id = session.execute(
        update(Tenant).where(Tenant.name == tenant).values(**limits).returning(Tenant.id)
    ).scalar_one_or_none()
    if tenant_id is None:
        raise NotFound(f"There is no tenant {tenant}; see: forgetd tenants list.")
    audit.record(session, tenant_id, actor="operator", action="tenant.limited", subject=tenant_id, data=dict(limits))


def _count(session: Session, tenant_id: str, of: ColumnElement[bool], *, at_most: int) -> int:
    """How many of its jobs, counted no further than the limit: a count costs at most that."""
    some = select(Job.id).where(Job.tenant_id == tenant_id, of).limit(at_most).subquery()
    return session.scalar(select(func.count()).select_from(some)) or 0
