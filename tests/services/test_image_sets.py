"""Which image sets the janitor may erase, also while jobs are being accepted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from services import image_sets
from services.database import Database
from services.ids import new_id
from services.tables import Checkpoint, ImageSet, Job
from services.tenancy import Caller


@pytest.fixture
def image_set(database: Database, caller: Caller) -> str:
    image_set_id = new_id("imgs")
    images = [{"index": 0, "width": 2, "height": 2, "mode": "L", "bytes": 10, "sha256": "0"}]
    with database.transaction() as session:
        image_sets.register(session, caller, image_set_id, images=images, hours=1)
    return image_set_id


def _job(database: Database, caller: Caller, request: dict[str, Any], *, ended: bool) -> str:
    """As the service accepts one: the sets are locked, then the job is inserted."""
    with database.transaction() as session:
        return _accept(session, caller, request, ended=ended)


def _accept(session: Session, caller: Caller, request: dict[str, Any], *, ended: bool = False) -> str:
    job_id = new_id("job")
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
            id=job_id,
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
    session.flush()
    return job_id


def _erasable(database: Database, *ended: str) -> dict[str, str]:
    """What goes once the janitor has been behind these jobs, and why."""
    for job_id in ended:
        with database.transaction() as session:
            assert image_sets.condemn(session, job_id)
    with database.transaction() as session:
        return image_sets.due(session)


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
    job_id = _job(database, caller, _request(role, image_set), ended=True)

    assert _erasable(database, job_id) == ({image_set: "job ended"} if goes else {})


@pytest.mark.parametrize(
    "role", ["target", "same_identity", "remember", "held_out", "attributes", "attribute", "replace_with", "judge"]
)
def test_a_set_that_an_open_job_reads_stays(database: Database, caller: Caller, image_set: str, role: str) -> None:
    ended = _job(database, caller, _request("target", image_set), ended=True)
    reader = _job(database, caller, _request(role, image_set), ended=False)

    assert _erasable(database, ended) == {}

    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == reader).values(status="cancelled", finished_at=func.now()))
    assert _erasable(database, reader) == {image_set: "job ended"}  # whatever it read the set for


def test_a_job_that_is_being_accepted_keeps_its_images(database: Database, caller: Caller, image_set: str) -> None:
    """It has locked its sets and is not committed yet, so that nobody sees it."""
    ended = _job(database, caller, _request("target", image_set), ended=True)

    with database.transaction() as session:
        _accept(session, caller, _request("remember", image_set))
        with database.transaction() as another:
            assert not image_sets.condemn(another, ended)

    assert _erasable(database, ended) == {}


def test_a_set_past_its_cap_goes_whoever_reads_it(database: Database, caller: Caller, image_set: str) -> None:
    _job(database, caller, _request("remember", image_set), ended=False)
    assert _erasable(database) == {}

    with database.transaction() as session:
        session.execute(update(ImageSet).values(expires_at=func.now()))

    assert _erasable(database) == {image_set: "expired"}
