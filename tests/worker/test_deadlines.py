"""A job's time runs out while it is at work: the runner is stopped, and nothing is published."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, update

from services import jobs as job_rows
from services.settings import Settings
from services.storage import ObjectStorage, StoredObject
from services.tables import ImageSet, Job
from services.tenancy import Caller
from tests.worker.helpers import LONG, PATIENCE_SECONDS, Jobs, alive, eventually, short_lease
from worker import control, janitor
from worker.supervisor import Supervisor

InBackground = Callable[[Supervisor, str], Future[str]]
FAR = func.clock_timestamp() + timedelta(hours=1)


def set_deadline(jobs: Jobs, job_id: str, *, seconds: float) -> None:
    """Counted from now."""
    moment = func.clock_timestamp() + timedelta(seconds=seconds)
    with jobs.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(deadline_at=moment))


def told(jobs: Jobs, job_id: str) -> tuple[str, str | None, str | None]:
    row = jobs.row(job_id)
    return row.status, row.reason, row.published_prefix


@pytest.mark.parametrize("how", [{}, {"deaf": True}], ids=["stops", "is killed"])
def test_a_running_job_is_stopped(
    supervisor: Supervisor, jobs: Jobs, in_background: InBackground, how: dict[str, Any]
) -> None:
    job_id = jobs.queue(**LONG, **how, deadline_at=FAR)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    set_deadline(jobs, job_id, seconds=0)

    assert done.result(PATIENCE_SECONDS) == "failed"
    assert told(jobs, job_id) == ("failed", "deadline_exceeded", None)
    assert not alive(jobs.starts(job_id)[0]["pid"])


class Late(ObjectStorage):
    """A store that takes the manifest only once the deadlines have passed."""

    def __init__(self, settings: Settings, jobs: Jobs) -> None:
        super().__init__(settings)
        self._jobs = jobs

    def put(self, key: str, data: bytes, **options: Any) -> StoredObject:
        set_deadline(self._jobs, key.split("/")[3], seconds=0)
        return super().put(key, data, **options)


@pytest.mark.parametrize("outcome", ["succeeded", "criteria_not_met"])
def test_what_is_ready_too_late_is_not_published_and_does_not_stay(
    make_supervisor: Callable[..., Supervisor], jobs: Jobs, settings: Settings, outcome: str
) -> None:
    job_id = jobs.queue(steps=1, outcome=outcome, deadline_at=FAR)

    assert make_supervisor(storage=Late(settings, jobs)).run(job_id) == "failed"

    assert told(jobs, job_id) == ("failed", "deadline_exceeded", None)
    assert [key for key in jobs.keys(job_id) if key.endswith("manifest.json")] != []
    janitor.sweep(jobs.database, jobs.storage)
    assert jobs.keys(job_id) == []


def test_a_cancel_that_came_first_wins(
    supervisor: Supervisor, jobs: Jobs, caller: Caller, in_background: InBackground
) -> None:
    job_id = jobs.queue(**LONG, deaf=True, deadline_at=FAR)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    with jobs.database.transaction() as session:
        job_rows.cancel(session, caller, job_id)
        session.execute(update(Job).where(Job.id == job_id).values(deadline_at=func.clock_timestamp()))

    assert done.result(PATIENCE_SECONDS) == "cancelled"


def test_the_control_loop_ends_what_waited_too_long_and_its_images_go(jobs: Jobs, settings: Settings) -> None:
    image_set = jobs.image_set()
    job_id = jobs.queue(image_set=image_set, deadline_at=func.clock_timestamp() - timedelta(seconds=1))

    assert control.reap(jobs.database, budget=settings.infrastructure_budget) == {job_id: "failed"}

    janitor.sweep(jobs.database, jobs.storage)
    with jobs.database.transaction() as session:
        assert session.get_one(ImageSet, image_set).erased_at is not None


# A day at work.


def age(jobs: Jobs, job_id: str, *, hours: float) -> None:
    """Move everything that the job's row says of the past that far back."""
    back = timedelta(hours=hours)
    times = ("created_at", "started_at", "dispatched_at")
    with jobs.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values({name: getattr(Job, name) - back for name in times}))
        request = session.get_one(Job, job_id).request
        session.execute(
            update(ImageSet)
            .where(ImageSet.id == request["target"]["images"])
            .values(created_at=ImageSet.created_at - back, expires_at=ImageSet.expires_at - back)
        )


@short_lease
def test_a_job_that_has_run_for_a_day_goes_on_to_its_end(
    make_supervisor: Callable[..., Supervisor], jobs: Jobs, settings: Settings, in_background: InBackground
) -> None:
    image_set = jobs.image_set(hours=24)
    job_id = jobs.queue(**LONG | {"steps": 200}, image_set=image_set)
    done = in_background(make_supervisor(), job_id)
    eventually(jobs.has_state(job_id))

    age(jobs, job_id, hours=23.9)
    # Whatever works by the clock has its turn: nobody takes the job, its state or its images away.
    assert control.reap(jobs.database, budget=settings.infrastructure_budget) == {}
    janitor.sweep(jobs.database, jobs.storage)
    janitor.tidy(jobs.database, jobs.storage)
    with jobs.database.transaction() as session:
        assert session.get_one(ImageSet, image_set).erased_at is None
    before = (jobs.row(job_id).resume or {})["step"]
    eventually(lambda: (jobs.row(job_id).resume or {})["step"] > before, what="states are still recorded")

    assert done.result(PATIENCE_SECONDS) == "succeeded"
    row = jobs.row(job_id)
    assert (row.attempt, row.published_prefix is not None) == (1, True)
    assert row.started_at is not None
    assert row.finished_at is not None
    assert row.finished_at - row.started_at > timedelta(hours=23)


def test_images_go_at_their_hard_cap_and_the_attempt_that_has_them_ends_well(
    supervisor: Supervisor, jobs: Jobs, in_background: InBackground
) -> None:
    image_set = jobs.image_set(hours=24)
    job_id = jobs.queue(**LONG | {"steps": 200}, image_set=image_set)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    age(jobs, job_id, hours=24.1)
    janitor.sweep(jobs.database, jobs.storage)

    with jobs.database.transaction() as session:
        assert session.get_one(ImageSet, image_set).erased_at is not None
    assert done.result(PATIENCE_SECONDS) == "succeeded"


def test_a_drain_after_the_images_hard_cap_ends_the_job_and_says_why(
    make_supervisor: Callable[..., Supervisor], jobs: Jobs, in_background: InBackground
) -> None:
    job_id = jobs.queue(**LONG | {"steps": 60}, image_set=jobs.image_set(hours=24))
    first = make_supervisor()
    done = in_background(first, job_id)
    eventually(jobs.has_state(job_id))
    age(jobs, job_id, hours=24.1)
    janitor.sweep(jobs.database, jobs.storage)

    first.start_draining()
    assert done.result(PATIENCE_SECONDS) == "queued"
    make_supervisor().run(job_id)

    row = jobs.row(job_id)
    assert (row.status, row.reason) == ("failed", "user_error")
    assert "day" in (row.problem or {}).get("detail", "") or "hours" in (row.problem or {}).get("detail", "")


def test_a_job_that_loses_its_worker_after_a_day_goes_on_from_its_state(
    make_supervisor: Callable[..., Supervisor], jobs: Jobs, settings: Settings, in_background: InBackground
) -> None:
    job_id = jobs.queue(**LONG | {"steps": 60}, image_set=jobs.image_set(hours=24))
    first = make_supervisor()
    done = in_background(first, job_id)
    eventually(jobs.has_state(job_id))
    first.start_draining()
    assert done.result(PATIENCE_SECONDS) == "queued"

    age(jobs, job_id, hours=23.9)
    reached = (jobs.row(job_id).resume or {})["step"]

    assert make_supervisor().run(job_id) == "succeeded"
    assert jobs.starts(job_id)[-1]["step"] == reached
