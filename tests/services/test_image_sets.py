"""Which image sets the janitor may erase, also while jobs are being accepted."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import ColumnElement, func, or_, select, text

from services import image_sets
from services.database import Database
from services.ids import new_id
from services.tables import Checkpoint, Job
from services.tenancy import Caller

GATE = 7
PATIENCE_SECONDS = 10.0


@pytest.fixture
def image_set(database: Database, caller: Caller) -> str:
    image_set_id = new_id("imgs")
    images = [{"index": 0, "width": 2, "height": 2, "mode": "L", "bytes": 10, "sha256": "0"}]
    with database.transaction() as session:
        image_sets.register(session, caller, image_set_id, images=images, hours=1)
    return image_set_id


def _job(database: Database, caller: Caller, request: dict[str, Any], *, ended: bool) -> None:
    """As the service accepts one: the sets are locked, then the job is inserted."""
    with database.transaction() as session:
        checkpoint = Checkpoint(
            id=new_id("ckpt"), tenant_id=caller.tenant_id, name="", declared={}, source_bytes=1, source_sha256=""
        )
        session.add(checkpoint)
        session.flush()
        for part in (request, request.get("evaluation", {})):
            for role in part.values():
                if "images" in role:
                    image_sets.live(session, caller.tenant_id, role["images"], pointer="/")
        session.add(
            Job(
                id=new_id("job"),
                tenant_id=caller.tenant_id,
                kind="forget",
                queue="gpu.flow",
                checkpoint_id=checkpoint.id,
                request=request,
                seed=0,
                status="cancelled" if ended else "queued",
                finished_at=datetime.now(UTC) + timedelta(seconds=1) if ended else None,
            )
        )


def _erasable(database: Database) -> list[str]:
    with database.transaction() as session:
        return list(image_sets.condemn(session))


def _request(role: str, image_set_id: str) -> dict[str, Any]:
    images = {"images": image_set_id}
    judge = {"sets": {"a": "imgs_" + "0" * 32, "b": image_set_id}}
    if role == "attributes":
        return {"target": {"attributes": [{"classifier": "clf_" + "0" * 32}, {**judge, "class": "a", "at_most": 0.1}]}}
    if role == "attribute":
        return {"attribute": judge}
    if role == "judge":
        return {"target": {"class_label": 0}, "judge": judge}
    own = ("target", "replace_with", "remember")
    return {role: images} if role in own else {"evaluation": {role: images}}


@pytest.mark.parametrize(
    ("role", "goes"),
    [
        ("target", True),
        ("same_identity", True),
        ("replace_with", False),
        ("judge", False),
        ("remember", False),
        ("held_out", False),
        ("attributes", False),
        ("attribute", False),
    ],
)
def test_photos_of_the_forgotten_go_with_their_job(
    database: Database, caller: Caller, image_set: str, role: str, goes: bool
) -> None:
    assert _erasable(database) == []

    _job(database, caller, _request(role, image_set), ended=True)

    assert _erasable(database) == ([image_set] if goes else [])


@pytest.mark.parametrize(
    "role", ["target", "same_identity", "remember", "held_out", "attributes", "attribute", "replace_with", "judge"]
)
def test_a_set_that_an_open_job_reads_stays(database: Database, caller: Caller, image_set: str, role: str) -> None:
    _job(database, caller, _request("target", image_set), ended=True)

    _job(database, caller, _request(role, image_set), ended=False)

    assert _erasable(database) == []


def test_a_job_accepted_between_question_and_lock_keeps_its_images(
    database: Database, caller: Caller, image_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question is held after its snapshot is taken; meanwhile a job that reads the set is accepted."""
    _job(database, caller, _request("target", image_set), ended=True)
    asked = image_sets._still_read
    times = []

    def held_at_first() -> ColumnElement[bool]:
        times.append(None)
        gate = select(func.pg_advisory_xact_lock(GATE)).scalar_subquery()
        return or_(asked(), func.pg_typeof(gate) == text("'text'::regtype")) if len(times) == 1 else asked()

    monkeypatch.setattr(image_sets, "_still_read", held_at_first)
    found: list[list[str]] = []
    janitor = threading.Thread(target=lambda: found.append(_erasable(database)))
    with database.engine.connect() as gatekeeper:
        gatekeeper.execute(select(func.pg_advisory_lock(GATE)))
        janitor.start()
        _until_somebody_waits(database)
        _job(database, caller, _request("remember", image_set), ended=False)
        gatekeeper.execute(select(func.pg_advisory_unlock(GATE)))
    janitor.join(PATIENCE_SECONDS)

    assert found == [[]]
    assert len(times) == 2


def _until_somebody_waits(database: Database) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    while time.monotonic() < deadline:
        with database.transaction() as session:
            if session.scalar(waiting):
                return
        time.sleep(0.02)
    pytest.fail("nobody came to the gate")
