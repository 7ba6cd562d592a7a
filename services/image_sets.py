"""Image sets: decoded at the door, kept for a day at most, erased with the job that needed them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from services import audit, object_keys
from services.errors import ImageSetErased, ImageSetInUse, NotFound
from services.ids import is_id
from services.mentions import LABELLED_SETS, mentions
from services.statuses import is_open
from services.storage import ObjectStorage
from services.tables import ImageSet, Job
from services.tenancy import Caller

__all__ = ["begin", "complete", "condemn", "discard", "due", "erase", "erase_now", "get", "live", "register"]


def register(
    session: Session, caller: Caller, image_set_id: str, *, images: list[dict[str, Any]], hours: float
) -> ImageSet:
    """Record a set whose images are already in the store, in one step."""
    begin(session, caller, image_set_id, hours=hours)
    session.flush()
    return complete(session, caller, image_set_id, images)


def begin(session: Session, caller: Caller, image_set_id: str, *, hours: float) -> None:
    """Record that images are about to be stored, so that they are erased even if this process dies meanwhile.

    Until ``complete`` the set has no images and is nobody's to see.
    """
    session.add(
        ImageSet(
            id=image_set_id,
            tenant_id=caller.tenant_id,
            count=0,
            total_bytes=0,
            images=[],
            expires_at=func.now() + timedelta(hours=hours),
        )
    )


def complete(session: Session, caller: Caller, image_set_id: str, images: list[dict[str, Any]]) -> ImageSet:
    """Show a set whose images are in the store: ``[{index, width, height, mode, bytes, sha256}]``."""
    row = session.scalars(
        update(ImageSet)
        .where(ImageSet.tenant_id == caller.tenant_id, ImageSet.id == image_set_id, ImageSet.erased_at.is_(None))
        .values(count=len(images), total_bytes=sum(image["bytes"] for image in images), images=images)
        .returning(ImageSet)
    ).one()
    audit.record(session, caller.tenant_id, actor=caller.key_id, action="image_set.uploaded", subject=row.id)
    return row


def discard(session: Session, storage: ObjectStorage, caller: Caller, image_set_id: str) -> None:
    """Undo ``begin``: a refused upload leaves neither object nor row. A set that is complete after all stays."""
    unfinished = and_(ImageSet.tenant_id == caller.tenant_id, ImageSet.id == image_set_id, ImageSet.count == 0)
    row = session.scalar(select(ImageSet).where(unfinished).with_for_update())
    if row is None:
        return
    storage.erase(object_keys.image_set_prefix(caller.tenant_id, image_set_id))
    session.execute(delete(ImageSet).where(unfinished))


def _owned(tenant_id: str, image_set_id: str) -> ColumnElement[bool]:
    return and_(ImageSet.tenant_id == tenant_id, ImageSet.id == image_set_id, ImageSet.count > 0)


def get(session: Session, tenant_id: str, image_set_id: str) -> ImageSet:
    """A caller's image set; raises ``NotFound``."""
    row = session.scalar(select(ImageSet).where(_owned(tenant_id, image_set_id)))
    if row is None:
        raise NotFound(f"There is no image set {image_set_id}. Upload one: POST /image-sets.")
    return row


def live(session: Session, tenant_id: str, image_set_id: str, *, pointer: str) -> ImageSet:
    """A set whose images are still there, locked against erasure until the transaction ends."""
    query = select(ImageSet, ImageSet.expires_at <= func.clock_timestamp()).where(_owned(tenant_id, image_set_id))
    found = session.execute(query.with_for_update(read=True)).one_or_none()
    if found is None:
        raise NotFound(
            f"There is no image set {image_set_id}. Upload one: POST /image-sets.",
            errors=[{"pointer": pointer, "detail": "unknown image set"}],
        )
    row, expired = found
    if row.erased_at is not None or expired:
        raise ImageSetErased(
            f"The images of {image_set_id} were erased after use or after a day; upload them again.",
            errors=[{"pointer": pointer, "detail": "erased image set"}],
        )
    return row


def condemn(session: Session, job_id: str) -> bool:
    """Let the sets expire that a job read which has ended, where nobody needs them any more: photos of the forgotten.

    One that an open job still reads stays, until that job ends or the cap is reached. Once the transaction is committed
    no job is accepted that reads a set which has expired, so that ``erase`` needs no lock.

    Returns:
        False where a job that reads one of them is just being accepted: ask again, it cannot be seen yet.
    """
    job = session.execute(select(Job.tenant_id, Job.request).where(Job.id == job_id)).one()
    read = {name for name in _texts(job.request) if is_id("imgs", name)}
    if not read:
        return True
    here = select(ImageSet.id).where(
        ImageSet.tenant_id == job.tenant_id, ImageSet.id.in_(read), ImageSet.erased_at.is_(None), ~_expired()
    )
    ids = set(session.scalars(here.with_for_update(skip_locked=True)))
    if ids < set(session.scalars(here)):
        return False
    session.execute(
        update(ImageSet)
        .where(ImageSet.id.in_(ids), _used_up())
        .values(expires_at=func.now(), version=ImageSet.version + 1)
    )
    return True


def due(session: Session, *, limit: int = 20, but_not: Collection[str] = ()) -> dict[str, str]:
    """Sets whose images must go, by id, and why: past their cap, or photos of the forgotten whose job ended."""
    wanted = and_(ImageSet.erased_at.is_(None), _expired(), ImageSet.id.not_in(but_not))
    ids = select(ImageSet.id).where(wanted).order_by(ImageSet.expires_at).limit(limit)
    rows = session.execute(select(ImageSet.id, _used_up()).where(ImageSet.id.in_(list(session.scalars(ids)))))
    return {name: "job ended" if used else "expired" for name, used in rows}


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _expired() -> ColumnElement[bool]:
    return ImageSet.expires_at <= func.now()


def _used_up() -> ColumnElement[bool]:
    """Whether a job that ended was to forget whom the enclosing statement's set shows, and no open job reads it."""
    ended = (
        select(Job.id)
        .where(
            Job.kind == "forget",
            Job.tenant_id == ImageSet.tenant_id,
            Job.finished_at >= ImageSet.created_at,  # implied, and what the index is asked: a day of jobs at most
            or_(_names("target"), _names("evaluation", "same_identity")),
        )
        .exists()
    )
    return ended & ~_still_read()


def _still_read() -> ColumnElement[bool]:
    """Whether an open job reads the set of the enclosing statement."""
    roles = [("target",), ("replace_with",), ("remember",), ("evaluation", "same_identity"), ("evaluation", "held_out")]
    labelled = mentions(LABELLED_SETS, ImageSet.id)
    return (
        select(Job.id)
        .where(
            Job.tenant_id == ImageSet.tenant_id,
            is_open(),
            or_(*(_names(*role) for role in roles), labelled),
        )
        .exists()
    )


def _names(*role: str) -> ColumnElement[bool]:
    """Whether a job's request names the set in that role."""
    named: ColumnElement[bool] = Job.request[(*role, "images")].astext == ImageSet.id
    return named


def erase_now(session: Session, storage: ObjectStorage, caller: Caller, image_set_id: str) -> ImageSet:
    """Erase a set because its owner asks; a second time changes nothing.

    Raises:
        NotFound: not the caller's.
        ImageSetInUse: a job that has not ended reads it.
    """
    row = session.scalar(select(ImageSet).where(_owned(caller.tenant_id, image_set_id)).with_for_update())
    if row is None:
        raise NotFound(f"There is no image set {image_set_id}.")
    if row.erased_at is None:
        if session.scalar(select(_still_read()).select_from(ImageSet).where(ImageSet.id == row.id)):
            raise ImageSetInUse("Wait for the job that reads it, or cancel that job: its end erases its target.")
        erase(session, storage, row, why="asked by its owner", actor=caller.key_id)
        session.refresh(row)
    return row


def erase(session: Session, storage: ObjectStorage, row: ImageSet, *, why: str, actor: str = "janitor") -> int:
    """Delete every version of every image, prove it by listing, and record it, once. Returns the objects deleted."""
    gone = storage.erase(object_keys.image_set_prefix(row.tenant_id, row.id))
    recorded = session.scalar(
        update(ImageSet)
        .where(ImageSet.id == row.id, ImageSet.erased_at.is_(None))
        .values(images=[], erased_at=func.clock_timestamp(), version=ImageSet.version + 1)
        .returning(ImageSet.id)
    )
    if recorded is None:  # its owner and the janitor at the same time
        return gone
    audit.record(
        session,
        row.tenant_id,
        actor=actor,
        action="image_set.erased",
        subject=row.id,
        data={"objects": gone, "why": why},
    )
    return gone
