"""The auditor sees what it is there to see: a promise broken on purpose is found, and one that was kept is not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, text, update

from services import object_keys
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Checkpoint, ImageSet, Job, JobEvent
from services.tenancy import Caller
from tests.chaos.audit import Findings, Unsettled, audit, leftovers_of_processes, unsettled
from tests.chaos.callers import Promised
from tests.chaos.figures import overlap
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
    assert unsettled(scene.jobs.database).count == 0


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


def _leave_what_a_lost_attempt_wrote(scene: Scene) -> None:
    scene.put(f"{scene.attempt(10**9)}tamed.safetensors")
    later = func.clock_timestamp() + timedelta(seconds=5)  # than that was written
    scene.change(infrastructure_losses=1, finished_at=later, swept_at=later)


def _end_as_no_report_says(scene: Scene) -> None:
    scene.change(seed=199)  # of a job that the real runner runs
    scene.promised.jobs[scene.job_id] = 199


def _overrule_what_was_told(scene: Scene) -> None:
    scene.promised.told[scene.job_id] = "cancelled"


def _lose_a_checkpoint(scene: Scene) -> None:
    scene.promised.checkpoints.add("ckpt_" + "0" * 32)


def _leave_a_checkpoint(scene: Scene) -> None:
    with scene.jobs.database.transaction() as session:
        checkpoint = session.scalar(select(Job.checkpoint_id).where(Job.id == scene.job_id))
        session.execute(
            update(Checkpoint).where(Checkpoint.id == checkpoint).values(status="rejected", weights_key=None)
        )
    scene.promised.checkpoints.add(str(checkpoint))


def _call_it_late(scene: Scene) -> None:
    scene.promised.hurried.add(scene.job_id)
    scene.change(status="failed", reason="deadline_exceeded", deadline_at=func.now() + timedelta(hours=1))


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
        (_leave_what_a_lost_attempt_wrote, "orphans"),
        (_end_as_no_report_says, "broken"),
        (_overrule_what_was_told, "broken"),
        (_lose_a_checkpoint, "lost"),
        (_leave_a_checkpoint, "broken"),
        (_call_it_late, "broken"),
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

    assert unsettled(scene.jobs.database) == Unsettled([], [scene.job_id])


def test_photos_that_nobody_erased_are_not_settled(scene: Scene) -> None:
    image_set = scene.jobs.image_set()
    with scene.jobs.database.transaction() as session:
        session.execute(update(ImageSet).where(ImageSet.id == image_set).values(expires_at=func.now()))

    assert unsettled(scene.jobs.database) == Unsettled([], [scene.job_id, image_set])


def test_a_runner_and_a_folder_that_outlive_their_attempt_are_found(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "worker-0" / "job_1").mkdir(parents=True)
    script = tmp_path / "runner.py"
    script.write_text("import time; time.sleep(60)")
    with subprocess.Popen([sys.executable, str(script)]) as runner:
        try:
            found = leftovers_of_processes(tmp_path, [tmp_path / "scratch"])
        finally:
            runner.kill()

    assert [str(runner.pid) in sentence for sentence in found.held_by_the_dead] == [True]
    assert ["job_1" in sentence for sentence in found.orphans] == [True]


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([(0, 3), (3, 5)], 0.0),
        ([(0, 3), (2, 5)], 1.0),
        ([(0, 60), (7, 8), (14, 40)], 26.0),  # the longest is not the neighbour
        ([(14, 40), (0, 60)], 26.0),
    ],
)
def test_runners_of_one_job_are_seen_beside_each_other(
    tmp_path: Path, spans: list[tuple[float, float]], seconds: float
) -> None:
    for number, (begin, end) in enumerate(spans):
        lines = ({"what": "start", "job": "job_1", "at": begin}, {"what": "end", "job": "job_1", "at": end})
        (tmp_path / str(number)).write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert overlap(tmp_path) == seconds


@pytest.mark.parametrize(
    ("token", "body", "found"),
    [
        (1, b"weights", []),
        (1, b"others", ["serves bytes that are not those of its row"]),
        (1, None, ["serves what is not there"]),
        (2, b"weights", ["was ended by token 1"]),
    ],
)
def test_weights_that_are_not_those_of_a_checkpoint_are_found(
    scene: Scene, token: int, body: bytes | None, found: list[str]
) -> None:
    jobs = scene.jobs
    job = jobs.row(jobs.queue(kind="import"))
    key = object_keys.attempt_prefix(jobs.tenant_id, job.id, token) + "tamed.safetensors"
    if body is not None:
        jobs.storage.put(key, body, media_type="application/octet-stream")
    weights = {"weights_key": key, "weights_sha256": hashlib.sha256(b"weights").hexdigest(), "weights_bytes": 7}
    with jobs.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(fencing_token=1))
        ready = update(Checkpoint).where(Checkpoint.id == job.checkpoint_id)
        session.execute(ready.values(status="ready", **weights))
    scene.promised.checkpoints.add(job.checkpoint_id)

    told = [it for sentences in vars(scene.audit()).values() for it in sentences if it.startswith(job.checkpoint_id)]

    assert [words in sentence for words, sentence in zip(found, told, strict=True)] == [True] * len(found)
