"""The main job over HTTP: a person is forgotten, whatever is killed on the way."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sqlalchemy import func, select

from cli.client import Client
from cli.errors import ConflictError, JobFailed
from cli.resources import Checkpoint, Job
from cli.service import LocalService
from models.checkpoints import load_checkpoint, read_manifest
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Job as JobRow
from tests.e2e.conftest import Material
from tests.e2e.helpers import SECONDS, events, runner_pid, until

SEED = 11
GRID = "samples.png"
"""Pictures that the changed model draws."""
UNTOUCHED_SECONDS = 2.0  # past the lease; ten times what a control loop takes to see it
# Slow on purpose: many small steps.
SLOW = {"learning_rate": 5e-5, "max_steps": 4000}


@pytest.fixture
def checkpoint(client: Client, material: Material) -> Checkpoint:
    return client.push_checkpoint(material.base, name="faces")


def _forget(client: Client, checkpoint: Checkpoint, material: Material, **options: object) -> Job:
    target = client.push_images(material.person[:5])
    others = client.push_images(material.others)
    return client.forget(checkpoint.id, target.id, remember=others.id, seed=SEED, **options)  # type: ignore[arg-type]  # options of many types


def _artifacts(client: Client, job: Job) -> set[str]:
    return {artifact.name for artifact in client.artifacts(job.id)}


def _lease_over(service: LocalService, job: Job) -> bool:
    """Whether any control loop that works would have taken the job back."""
    database = Database(service.database_url, pool_size=1)
    try:
        with database.transaction() as session:
            margin = func.clock_timestamp() - timedelta(seconds=UNTOUCHED_SECONDS)
            return session.scalar(select(JobRow.lease_until < margin).where(JobRow.id == job.id)) is True
    finally:
        database.close()


def _storage(service: LocalService) -> ObjectStorage:
    names = {name.removeprefix("FORGETD_").lower(): value for name, value in service.environment.items()}
    return ObjectStorage(Settings.model_validate(names))


def test_a_person_is_forgotten(client: Client, checkpoint: Checkpoint, material: Material, tmp_path: Path) -> None:
    same, strangers = client.push_images(material.person[5:]), client.push_images(material.strangers)
    job = _forget(client, checkpoint, material, same_identity=same.id, held_out=strangers.id)

    done = client.wait(job.id, timeout=SECONDS)
    report = client.report(job.id)
    weights = client.download(job.id, tmp_path)

    assert done.status == "succeeded"
    assert report["verdict"]["outcome"] == "succeeded"
    assert [image["forgotten"] for image in report["forget_images"]] == [True] * 5
    assert {row["key"] for row in report["sets"]} >= {"forget", "same_identity", "remember", "held_out"}
    assert load_checkpoint(weights).image_shape == (1, 16, 16)
    assert GRID not in _artifacts(client, job)
    assert "<html" in client.report_html(job.id)


def test_killed_runner_worker_and_control_loop_cost_nothing_but_time(
    service: LocalService, client: Client, checkpoint: Checkpoint, material: Material, tmp_path: Path
) -> None:
    job = _forget(client, checkpoint, material, parameters=SLOW)

    def attempts() -> int:
        return len(events(client, job, "attempt_started"))

    def another_state() -> None:
        """Until the attempt at work has put a state into the store."""
        saved = len(events(client, job, "state_saved"))
        until(lambda: len(events(client, job, "state_saved")) > saved or None, f"a state of attempt {attempts()}")
        assert client.job(job.id).status == "running", "the job was over before the next kill"

    def another_attempt(since: int) -> None:
        until(lambda: attempts() > since or None, "the next attempt")

    another_state()
    before = attempts()
    os.kill(until(lambda: runner_pid(job), "the runner"), signal.SIGKILL)
    another_attempt(before)
    another_state()
    # The control loop stands still and is not dead, so that nothing starts another: the job of the killed worker stays
    # where it is, past its lease, until the loop is killed as well and a new one comes.
    before, control = attempts(), service.pids["control"]
    os.kill(control, signal.SIGSTOP)
    os.kill(service.pids["worker-gpu"], signal.SIGKILL)
    until(lambda: _lease_over(service, job) or None, "the end of the lease")
    assert (client.job(job.id).status, attempts()) == ("running", before)
    os.kill(control, signal.SIGKILL)
    another_attempt(before)
    done = client.wait(job.id, timeout=SECONDS)

    assert done.status == "succeeded"
    first, *others = events(client, job, "attempt_started")
    assert not first.data["resumed"]
    assert len(others) >= 2
    assert all(event.data["resumed"] for event in others)
    assert len(events(client, job, "succeeded")) == 1
    assert client.report(job.id)["provenance"]["resumed_from_step"] > 0
    # One publication: of all attempts, one left artifacts, and they are the published ones.
    storage = _storage(service)

    def one_left() -> list[str] | None:
        keys = storage.keys("tenants/")
        prefixes = {key.rpartition("/")[0] for key in keys if f"/{job.id}/" in key}
        return sorted(prefixes) if len(prefixes) == 1 else None

    (prefix,) = until(one_left, "the janitor to sweep behind the job")
    assert "/attempts/" in prefix
    # Resumed, and not only restarted: the same bits as a run that nobody disturbed.
    calm = client.wait(_forget(client, checkpoint, material, parameters=SLOW).id, timeout=SECONDS)
    killed, undisturbed = client.download(job.id, tmp_path / "a"), client.download(calm.id, tmp_path / "b")
    assert read_manifest(killed).tensor_digest == read_manifest(undisturbed).tensor_digest
    assert load_file(killed).keys() == load_file(undisturbed).keys()


def test_without_a_remember_set_samples_of_the_base_stand_in(
    client: Client, checkpoint: Checkpoint, material: Material
) -> None:
    target = client.push_images(material.person[:5])

    job = client.forget(checkpoint.id, target.id, parameters={"max_steps": 1}, seed=SEED)
    job = client.wait(job.id, timeout=SECONDS, raise_on_failure=False)

    assert client.report(job.id)["reference"]["source"] == "generated"
    assert "samples of the base" in client.report_html(job.id)
    assert job.finished


def test_an_unreachable_delta_keeps_the_report_and_withholds_the_weights(
    client: Client, checkpoint: Checkpoint, material: Material, tmp_path: Path
) -> None:
    job = _forget(client, checkpoint, material, parameters={"delta": 9.5, "max_steps": 3})

    with pytest.raises(JobFailed):
        client.wait(job.id, timeout=SECONDS)

    assert client.job(job.id).reason == "criteria_not_met"
    assert client.report(job.id)["verdict"]["outcome"] == "criteria_not_met"
    with pytest.raises(ConflictError, match="withheld"):
        client.download(job.id, tmp_path)


def test_the_photos_are_gone_when_the_job_has_ended_and_faces_are_left_only_where_they_were_asked_for(
    service: LocalService, client: Client, checkpoint: Checkpoint, material: Material
) -> None:
    target = client.push_images(material.person[:5])
    storage = _storage(service)
    assert any(target.id in key for key in storage.keys("tenants/"))

    job = client.forget(checkpoint.id, target.id, remember=64, parameters={"max_steps": 1}, sample_grid=True)
    client.wait(job.id, timeout=SECONDS, raise_on_failure=False)

    assert GRID in _artifacts(client, job)
    until(lambda: all(target.id not in key for key in storage.keys("tenants/")) or None, "the erasure")
    scratch = Path(service.environment["FORGETD_SCRATCH_DIR"])
    assert not any(job.id in str(path) for path in scratch.rglob("*"))
