"""Checkpoints: registered when uploaded, ready when validation has published their weights."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from services import audit, object_keys
from services.errors import CheckpointNotReady, NotFound
from services.storage import StoredObject
from services.tables import Checkpoint
from services.tenancy import Caller

__all__ = ["accept", "exists", "get", "list_page", "ready", "register", "reject"]


def register(
    session: Session, caller: Caller, checkpoint_id: str, *, name: str, declared: dict[str, Any], source: StoredObject
) -> Checkpoint:
    """Record an uploaded file; the caller's transaction also queues its validation (``jobs.create_import``)."""
    row = Checkpoint(
        id=checkpoint_id,
        tenant_id=caller.tenant_id,
        name=name,
        declared=declared,
        source_key=source.key,
        source_bytes=source.bytes,
        source_sha256=source.sha256,
    )
    session.add(row)
    session.flush()
    audit.record(session, caller.tenant_id, actor=caller.key_id, action="checkpoint.uploaded", subject=row.id)
    session.refresh(row)
    return row


def get(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint:
    """A caller's checkpoint; raises ``NotFound``."""
    row = session.scalar(select(Checkpoint).where(Checkpoint.tenant_id == tenant_id, Checkpoint.id == checkpoint_id))
    if row is None:
        raise NotFound(f"There is no checkpoint {checkpoint_id}. Upload one: POST /checkpoints.")
    return row


def exists(session: Session, tenant_id: str, checkpoint_id: str) -> bool:
    """Whether a caller has that checkpoint."""
    found = select(Checkpoint.id).where(Checkpoint.tenant_id == tenant_id, Checkpoint.id == checkpoint_id)
    return session.scalar(found) is not None


def ready(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint:
    """A caller's checkpoint that passed validation; raises ``NotFound`` or ``CheckpointNotReady``."""
    row = get(session, tenant_id, checkpoint_id)
    if row.status == "validating":
        raise CheckpointNotReady(
            f"Checkpoint {row.id} is still validating; ask GET /checkpoints/{row.id} until it is ready.",
            state=row.status,
        )
    if row.status == "rejected":
        why = (row.problem or {}).get("detail", "")
        raise CheckpointNotReady(f"Checkpoint {row.id} was rejected: {why}", state=row.status)
    return row


def list_page(session: Session, tenant_id: str, *, after: str | None, limit: int) -> tuple[list[Checkpoint], bool]:
    """Checkpoints, newest first, after the cursor (a checkpoint's id); and whether more follow."""
    query = select(Checkpoint).where(Checkpoint.tenant_id == tenant_id).order_by(Checkpoint.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Checkpoint.id < after)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def accept(
    session: Session,
    tenant_id: str,
    checkpoint_id: str,
    *,
    manifest: dict[str, Any],
    prefix: str,
    weights: dict[str, Any],
) -> None:
    """Validation succeeded: name the published weights. Called in the transaction of the fenced publication."""
    session.execute(
        update(Checkpoint)
        .where(Checkpoint.tenant_id == tenant_id, Checkpoint.id == checkpoint_id)
        .values(
            status="ready",
            manifest=manifest,
            weights_key=prefix + weights["name"],
            weights_bytes=weights["bytes"],
            weights_sha256=weights["sha256"],
            version=Checkpoint.version + 1,
        )
    )


def reject(session: Session, tenant_id: str, checkpoint_id: str, problem: dict[str, Any]) -> None:
    """Validation failed. Called in the transaction of the fenced failure."""
    session.execute(
        update(Checkpoint)
        .where(Checkpoint.tenant_id == tenant_id, Checkpoint.id == checkpoint_id)
        .values(status="rejected", problem=problem, version=Checkpoint.version + 1)
    )


def forget_source(session: Session, tenant_id: str, checkpoint_id: str) -> None:
    """The uploaded file is gone from the store (see ``object_keys.checkpoint_source``). Twice is as once."""
    session.execute(
        update(Checkpoint)
        .where(Checkpoint.tenant_id == tenant_id, Checkpoint.id == checkpoint_id, Checkpoint.source_key.is_not(None))
        .values(source_key=None, version=Checkpoint.version + 1)
    )


def source_key(tenant_id: str, checkpoint_id: str) -> str:
    """Where an upload is streamed to before its row exists."""
    return object_keys.checkpoint_source(tenant_id, checkpoint_id)
