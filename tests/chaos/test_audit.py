"""The auditor sees what it is there to see: a promise broken on purpose is found, and one that was kept is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import insert, text, update

from services import object_keys
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Job, JobEvent
from services.tenancy import Caller
from tests.chaos.audit import Findings, audit, unsettled
from tests.chaos.callers import Promised
from tests.worker.helpers import Jobs
from worker.scratch import Scratch
from worker.supervisor import Supervisor

RUNNER = Path(__file__).with_name("runner.py")


@dataclass
class Scene:
    """One job that succeeded, and what its caller was told."""

    jobs: Jobs
    job_id: str
    image_set: str
    promised: Promised
    trace: Path

    def audit(self) -> Findings:
        return audit(self.jobs.database, self.jobs.storage, self.promised, self.trace, budget=5)

    def change(self, **values: object) -> None:
        with self.jobs.database.transaction() as session:
            session.execute(update(Job).where(Job.id == self.job_id).values(**values))

    def event(self, kind: str) -> None:
        with self.jobs.database.transaction() as session:
            session.execute(insert(JobEvent).values(tenant_id=self.jobs.tenant_id, job_id=self.job_id, type=kind))

    def put(self, key: str) -> None:
        self.jobs.storage.put(key, b"{}", media_type="application/json")

    def attempt(self, token: int) -> str:
        return object_keys.attempt_prefix(self.jobs.tenant_id, self.job_id, token)


@pytest.fixture
def scene(database: Database, storage: ObjectStorage, settings: Settings, caller: Caller, tmp_path: Path) -> Scene:
    trace = tmp_path / "trace"
    trace.mkdir()
    storage.erase("tenants/")  # of earlier tests: the store is one for all
    jobs = Jobs(database, storage, caller, tmp_path / "unused")
    image_set = jobs.image_set()
    job_id = jobs.queue(image_set=image_set)
    scratch = Scratch(settings.scratch_dir)
    command = (sys.executable, "-S", "-P", str(RUNNER), str(trace), "0")
    outcome = Supervisor(settings, database, storage, scratch, worker="w", runner_command=command).run(job_id)
    scratch.close()
    assert outcome == "succeeded"  # as the profile of seed 7 says
    return Scene(jobs, job_id, image_set, Promised(jobs={job_id: 7}, image_sets={image_set: job_id}), trace)


def test_a_promise_that_was_kept_is_not_found_broken(scene: Scene) -> None:
    findings = scene.audit()

    assert vars(findings) == vars(Findings())
    assert not unsettled(scene.jobs.database)


def _lose(scene: Scene) -> None:
    scene.promised.jobs["job_" + "0" * 32] = 1


def _leave_waiting(scene: Scene) -> None:
    scene.jobs.queue()


def _succeed_again(scene: Scene) -> None:
    scene.event("succeeded")


def _serve_another_attempt(scene: Scene) -> None:
    scene.change(published_prefix=scene.attempt(10**9))


def _leave_an_object(scene: Scene) -> None:
    scene.audit()
    scene.put(f"tenants/{scene.jobs.tenant_id}/elsewhere/object")


def _leave_an_upload(scene: Scene) -> None:
    storage = scene.jobs.storage
    key = f"tenants/{scene.jobs.tenant_id}/elsewhere/upload"
    storage._client.create_multipart_upload(Bucket=storage.bucket, Key=key)
    storage.abort_unfinished = lambda *_args, **_more: 0  # type: ignore[method-assign]  # a janitor that overlooks it


def _leave_a_state(scene: Scene) -> None:
    scene.audit()
    scene.put(object_keys.states_prefix(scene.jobs.tenant_id, scene.job_id) + "1/00000001.safetensors")


def _leave_an_attempt(scene: Scene) -> None:
    scene.audit()
    scene.put(f"{scene.attempt(10**9)}tamed.safetensors")


def _give_up_early(scene: Scene) -> None:
    scene.change(status="failed", reason="attempts_exhausted", infrastructure_losses=1)


def _keep_images(scene: Scene) -> None:
    scene.promised.image_sets[scene.jobs.image_set()] = scene.job_id


def _hold_on(scene: Scene) -> None:
    scene.change(worker="w")


def _overrule_a_cancel(scene: Scene) -> None:
    scene.promised.cancelled.add(scene.job_id)


def _go_on_after_the_end(scene: Scene) -> None:
    scene.event("phase")


def _miscount(scene: Scene) -> None:
    scene.change(attempt=2)


def _change_bytes(scene: Scene) -> None:
    scene.put(f"{scene.jobs.row(scene.job_id).published_prefix}report.json")


def _lose_bytes(scene: Scene) -> None:
    scene.jobs.storage.erase(f"{scene.jobs.row(scene.job_id).published_prefix}tamed.safetensors")


def _forget_who_computed(scene: Scene) -> None:
    for path in scene.trace.iterdir():
        path.unlink()


def _answer_a_key_twice(scene: Scene) -> None:
    scene.jobs.queue()


def _end_otherwise(scene: Scene) -> None:
    scene.change(status="failed", reason="internal")


@pytest.mark.parametrize(
    ("deed", "found"),
    [
        (_lose, "lost"),
        (_leave_waiting, "stuck"),
        (_succeed_again, "published_twice"),
        (_serve_another_attempt, "published_twice"),
        (_leave_an_object, "orphans"),
        (_leave_an_upload, "orphans"),
        (_leave_a_state, "orphans"),
        (_leave_an_attempt, "orphans"),
        (_keep_images, "orphans"),
        (_hold_on, "held_by_the_dead"),
        (_overrule_a_cancel, "broken"),
        (_go_on_after_the_end, "broken"),
        (_miscount, "broken"),
        (_change_bytes, "broken"),
        (_lose_bytes, "broken"),
        (_forget_who_computed, "broken"),
        (_answer_a_key_twice, "broken"),
        (_end_otherwise, "broken"),
        (_give_up_early, "broken"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else value,
)
def test_a_promise_that_was_broken_is_found(scene: Scene, deed: Callable[[Scene], None], found: str) -> None:
    deed(scene)

    findings = scene.audit()

    assert getattr(findings, found)


def test_what_a_stale_attempt_wrote_after_the_sweep_may_lie_there_until_the_next(scene: Scene) -> None:
    scene.audit()
    scene.change(infrastructure_losses=1)
    scene.put(f"{scene.attempt(10**9)}tamed.safetensors")

    assert not scene.audit().orphans


def test_a_job_that_nobody_swept_behind_is_not_settled(scene: Scene) -> None:
    with scene.jobs.database.transaction() as session:
        session.execute(text("UPDATE jobs SET swept_at = NULL"))

    assert unsettled(scene.jobs.database) == 1
