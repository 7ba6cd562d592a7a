"""Classifiers: judges of attributes in the store, tried once at the door, kept until their owner erases them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, select, update
from sqlalchemy.orm import Session

from services import audit, object_keys
from services.errors import ClassifierErased, ClassifierInUse, InvalidRequest, NotAClassifier, NotFound
from services.mentions import CLASSIFIERS, mentions
from services.statuses import is_open
from services.storage import ObjectStorage, StoredObject
from services.tables import Classifier, Job
from services.tenancy import Caller

__all__ = ["Facts", "erase", "exists", "get", "inspect", "list_page", "live", "register"]

# The first byte of every ONNX file: the tag of one of ModelProto's fields, with its wire type.
MODEL_TAGS = frozenset(b"\x08\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2\xca")


@dataclass(frozen=True)
class Facts:
    """What its owner says of a classifier, beside what the trial finds."""

    name: str
    classes: list[str]
    output: str
    threshold: float
    scale: dict[str, list[float]] | None

    def scaled_for(self, channels: int | None) -> dict[str, list[float]] | None:
        """The scale with a value for every channel, where their number is known.

        Raises:
            InvalidRequest: the scale is one of another number of channels.
        """
        if self.scale is None or channels is None:
            return self.scale
        given = len(self.scale["mean"])
        if given not in (1, channels):
            raise InvalidRequest(
                f"mean and std have {given} values, and the classifier takes images of {channels} channels; send one "
                "for each, or one for all.",
                errors=[{"parameter": "mean", "detail": f"{given} values for {channels} channels"}],
            )
        return {name: values * (channels // given) for name, values in self.scale.items()}


def inspect(head: bytes, _length: int | None) -> None:
    """Look at the first bytes of an upload; raises ``NotAClassifier`` if no ONNX file begins so."""
    if head[0] not in MODEL_TAGS:
        raise NotAClassifier("Send an ONNX file, as torch.onnx.export or onnx.save writes it.")


def register(
    session: Session,
    caller: Caller,
    classifier_id: str,
    *,
    facts: Facts,
    takes: dict[str, int | None],
    source: StoredObject,
) -> Classifier:
    """Record an uploaded file that passed its trial."""
    row = Classifier(
        id=classifier_id,
        tenant_id=caller.tenant_id,
        name=facts.name,
        classes=facts.classes,
        output=facts.output,
        threshold=facts.threshold,
        scale=facts.scaled_for(takes["channels"]),
        channels=takes["channels"],
        size=takes["size"],
        bytes=source.bytes,
        sha256=source.sha256,
        key=source.key,
    )
    session.add(row)
    session.flush()
    audit.record(session, caller.tenant_id, actor=caller.key_id, action="classifier.uploaded", subject=row.id)
    session.refresh(row)
    return row


def get(session: Session, tenant_id: str, classifier_id: str) -> Classifier:
    """A caller's classifier; raises ``NotFound``."""
    row = session.scalar(select(Classifier).where(Classifier.tenant_id == tenant_id, Classifier.id == classifier_id))
    if row is None:
        raise NotFound(f"There is no classifier {classifier_id}. Upload one: POST /classifiers.")
    return row


def exists(session: Session, tenant_id: str, classifier_id: str) -> bool:
    """Whether a caller has that classifier."""
    found = select(Classifier.id).where(Classifier.tenant_id == tenant_id, Classifier.id == classifier_id)
    return session.scalar(found) is not None


def live(session: Session, tenant_id: str, classifier_id: str, *, pointer: str) -> Classifier:
    """A classifier whose file is still there, locked against erasure until the transaction ends.

    Raises:
        NotFound: not the caller's.
        ClassifierErased: its owner erased it.
    """
    mine = and_(Classifier.tenant_id == tenant_id, Classifier.id == classifier_id)
    row = session.scalar(select(Classifier).where(mine).with_for_update(read=True))
    if row is None:
        raise NotFound(
            f"There is no classifier {classifier_id}. Upload one: POST /classifiers.",
            errors=[{"pointer": pointer, "detail": "unknown classifier"}],
        )
    if row.key is None:
        raise ClassifierErased(
            f"Classifier {classifier_id} was erased; upload it again.",
            errors=[{"pointer": pointer, "detail": "erased classifier"}],
        )
    return row


def list_page(session: Session, tenant_id: str, *, after: str | None, limit: int) -> tuple[list[Classifier], bool]:
    """Classifiers that were not erased, newest first, after the cursor (an id); and whether more follow."""
    mine = and_(Classifier.tenant_id == tenant_id, Classifier.erased_at.is_(None))
    query = select(Classifier).where(mine).order_by(Classifier.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Classifier.id < after)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def erase(session: Session, storage: ObjectStorage, caller: Caller, classifier_id: str) -> Classifier:
    """Delete a classifier's file because its owner asks; a second time changes nothing.

    Raises:
        NotFound: not the caller's.
        ClassifierInUse: a job that has not ended names it.
    """
    mine = and_(Classifier.tenant_id == caller.tenant_id, Classifier.id == classifier_id)
    row = session.scalar(select(Classifier).where(mine).with_for_update())
    if row is None:
        raise NotFound(f"There is no classifier {classifier_id}.")
    if row.erased_at is not None:
        return row
    if _needed(session, row):
        raise ClassifierInUse("Wait for the job that needs it, or cancel that job.")
    gone = storage.erase(object_keys.classifier_prefix(row.tenant_id, row.id))
    session.execute(
        update(Classifier)
        .where(Classifier.id == row.id)
        .values(key=None, erased_at=func.clock_timestamp(), version=Classifier.version + 1)
    )
    data: dict[str, Any] = {"objects": gone, "why": "asked by its owner"}
    audit.record(session, row.tenant_id, actor=caller.key_id, action="classifier.erased", subject=row.id, data=data)
    session.refresh(row)
    return row


def _needed(session: Session, row: Classifier) -> bool:
    """Whether an open job names the classifier."""
    wanted = (Job.tenant_id == row.tenant_id, is_open(), mentions(CLASSIFIERS, row.id))
    return session.scalar(select(Job.id).where(*wanted).limit(1)) is not None
