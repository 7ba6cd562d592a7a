"""Answers that are given once: a repeated POST with the same Idempotency-Key gets the first one's answer again.

The record is inserted in the transaction of the thing it answers for. Of concurrent requests one inserts; the others
wait on the unique index until it commits, then read its answer. A request that was refused leaves no record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import IdempotencyKeyReused
from services.tables import IdempotencyRecord
from services.tenancy import Caller

__all__ = ["Answer", "answered", "fingerprint", "once", "purge", "repeated"]

KEPT_HOURS = 24.0  # how long a key is honoured
PENDING = 0  # status of a record whose transaction has not yet made its answer; never seen by another one


@dataclass(frozen=True)
class Answer:
    """What a POST answered: ``body`` is the JSON text itself, so that a replay is the same to the byte."""

    status: int
    headers: dict[str, str]
    body: str


def fingerprint(content: Any) -> str:
    """SHA-256 of a request in one canonical form."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def once(
    session: Session, caller: Caller, *, route: str, key: str | None, content: Any, act: Callable[[], Answer]
) -> tuple[Answer, bool]:
    """Do it, or say what doing it answered before. The second value tells whether the answer is a replay.

    Args:
        session: The transaction in which ``act`` makes its rows.
        caller: Keys are their tenant's own.
        route: Keys are the route's own.
        key: The Idempotency-Key; None does it without a record.
        content: What must be the same for the request to be the same.
        act: Does it.

    Raises:
        IdempotencyKeyReused: the key answered for other content.
    """
    if key is None:
        return act(), False
    mark = fingerprint(content)
    row = {"tenant_id": caller.tenant_id, "route": route, "key": key}
    inserted = session.execute(
        insert(IdempotencyRecord)
        .values(**row, fingerprint=mark, status=PENDING, headers={}, body={})
        .on_conflict_do_nothing()
        .returning(IdempotencyRecord.key)
    ).scalar_one_or_none()
    if inserted is None:
        return _stored(session, row, mark), True
    answer = act()
    session.execute(
        update(IdempotencyRecord)
        .filter_by(**row)
        .values(status=answer.status, headers=answer.headers, body={"text": answer.body})
    )
    return answer, False


def answered(session: Session, caller: Caller, *, route: str, key: str | None) -> bool:
    """Whether this key has an answer: then the request may be a repeat, whatever a new one would be told now."""
    if key is None:
        return False
    return session.get(IdempotencyRecord, (caller.tenant_id, route, key)) is not None


def repeated(session: Session, caller: Caller, *, route: str, key: str | None, content: Any) -> Answer | None:
    """What this key answered, for a request whose work is done outside the transaction; None: nothing yet.

    Raises:
        IdempotencyKeyReused: as ``once``.
    """
    if key is None or not answered(session, caller, route=route, key=key):
        return None
    return _stored(session, {"tenant_id": caller.tenant_id, "route": route, "key": key}, fingerprint(content))


def _stored(session: Session, row: dict[str, str], mark: str) -> Answer:
    record = session.scalars(select(IdempotencyRecord).filter_by(**row)).one()
    if record.fingerprint != mark:
        raise IdempotencyKeyReused("Send a new key for a new request, or the same request with this key.")
    return Answer(record.status, record.headers, record.body["text"])


def purge(session: Session) -> int:
    """Forget the answers whose time is over; their fingerprints go with them. Returns how many."""
    old = IdempotencyRecord.created_at < func.now() - timedelta(hours=KEPT_HOURS)
    return len(session.execute(delete(IdempotencyRecord).where(old).returning(IdempotencyRecord.key)).all())
