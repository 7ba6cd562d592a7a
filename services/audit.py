"""The audit trail: one row per change, in the transaction of the change, without personal data."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from services.tables import AuditEvent

__all__ = ["record"]


def record(
    session: Session, tenant_id: str, *, actor: str, action: str, subject: str, data: dict[str, Any] | None = None
) -> None:
    """Append one event. ``actor`` is an API key's id or a process's name; ``subject`` the id acted upon."""
    session.execute(
        insert(AuditEvent).values(tenant_id=tenant_id, actor=actor, action=action, subject=subject, data=data or {})
    )
