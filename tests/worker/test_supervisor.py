"""One attempt from claim to end, by a supervisor in this process and the stub runner in its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, update

from services import jobs as job_rows
from services import reaper
from services.settings import Settings
from services.tables import Job
from services.tenancy import Caller
from tests.worker.helpers import LONG, PATIENCE_SECONDS, Jobs, alive, eventually
from worker.supervisor import Supervisor


def cancel(jobs: Jobs, caller: Caller, job_id: str) -> None:
    with jobs.database.transaction() as session:
        job_rows.cancel(session, caller, job_id)


def reap(jobs: Jobs, job_id: str) -> None:
    """The reaper takes the job, whatever the lease says."""
    with jobs.database.transaction() as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(lease_until=func.clock_timestamp() - timedelta(seconds=1))
        )
        for job in reaper.expired_leases(session):
            reaper.reap(session, job, budget=5)


def test_a_job_is_claimed_run_and_published(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue()

    outcome = supervisor.run(job_id)

    row = jobs.row(job_id)
    assert outcome == row.status == "succeeded"
    assert [artifact["name"] for artifact in row.artifacts or []] == ["tamed.safetensors", "report.json"]
    assert f"attempts/{row.fencing_token}/manifest.json" in jobs.keys(job_id)


def test_a_duplicate_doorbell_claims_nothing(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=1)
    supervisor.run(job_id)

    again = supervisor.run(job_id)

    assert again == "not claimed"
    assert len(jobs.starts(job_id)) == jobs.row(job_id).attempt == 1


def test_the_owner_sees_every_phase(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=10)

    supervisor.run(job_id)

    phases = [data["phase"] for kind, data in jobs.events(job_id) if kind == "phase"]
    assert phases == ["unlearning", "evaluating", "publishing"]


def test_the_runner_sees_no_credential(
    supervisor: Supervisor, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, in_background: Callable[..., Future[str]]
) -> None:
    monkeypatch.setenv("FORGETD_DATABASE_URL", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    job_id = jobs.queue(**LONG)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    environment = Path(f"/proc/{jobs.starts(job_id)[0]['pid']}/environ").read_bytes()

    supervisor.start_draining()
    done.result(PATIENCE_SECONDS)
    assert b"FORGETD" not in environment
    assert b"AWS" not in environment
    assert b"secret" not in environment


def test_scratch_is_private_and_gone_afterwards(
    supervisor: Supervisor, settings: Settings, jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(**LONG)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    [folder] = settings.scratch_dir.glob("worker-*/job_*")
    modes = [path.stat().st_mode & 0o077 for path in (settings.scratch_dir, folder.parent, folder)]

    supervisor.start_draining()
    done.result(PATIENCE_SECONDS)
    assert modes == [0, 0, 0]
    assert not folder.exists()


# Draining and resuming.


def test_a_drain_consumes_no_attempt_and_the_next_one_resumes(
    make_supervisor: Callable[..., Supervisor], jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(**LONG)
    first = make_supervisor()
    done = in_background(first, job_id)
    eventually(jobs.at_step(job_id, 7))

    first.start_draining()

    assert done.result(PATIENCE_SECONDS) == "queued"
    row = jobs.row(job_id)
    assert (row.attempt, row.infrastructure_losses) == (0, 0)
    stopped_at = (row.resume or {})["step"]
    assert stopped_at == max(line["step"] for line in jobs.trace(job_id))
    second = make_supervisor()
    done = in_background(second, job_id)
    eventually(lambda: len(jobs.starts(job_id)) == 2)
    assert jobs.starts(job_id)[1]["step"] == stopped_at
    second.start_draining()
    done.result(PATIENCE_SECONDS)


def test_a_draining_worker_claims_nothing(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue()
    supervisor.start_draining()

    assert supervisor.run(job_id) == "not claimed"
    assert jobs.row(job_id).status == "queued"


def test_a_runner_killed_in_the_middle_is_resumed_at_once(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=20, die_at=12)

    first = supervisor.run(job_id)
    second = supervisor.run(job_id)

    assert (first, second) == ("queued", "succeeded")
    assert [start["step"] for start in jobs.starts(job_id)] == [0, 10]
    row = jobs.row(job_id)
    assert (row.attempt, row.infrastructure_losses) == (2, 1)


def test_a_damaged_state_costs_the_work_and_not_the_job(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=20, die_at=12)
    supervisor.run(job_id)
    key = (jobs.row(job_id).resume or {})["key"]
    jobs.storage.put(key, b"something else", media_type="application/octet-stream")

    outcome = supervisor.run(job_id)

    assert outcome == "succeeded"
    assert [start["step"] for start in jobs.starts(job_id)] == [0, 0]


def test_only_the_newest_state_is_kept(
    supervisor: Supervisor, jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(**LONG)
    done = in_background(supervisor, job_id)
    eventually(lambda: ((jobs.row(job_id).resume or {}).get("step") or 0) >= 20)

    supervisor.start_draining()
    done.result(PATIENCE_SECONDS)

    states = [key for key in jobs.keys(job_id) if key.startswith("state/")]
    assert len(states) == 1
    assert (jobs.row(job_id).resume or {})["key"].endswith(states[0])


# Cancelling.


def test_a_cancelled_job_ends_and_publishes_nothing(
    supervisor: Supervisor, jobs: Jobs, caller: Caller, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(**LONG)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    cancel(jobs, caller, job_id)

    assert done.result(PATIENCE_SECONDS) == "cancelled"
    assert jobs.row(job_id).published_prefix is None
    assert not alive(jobs.starts(job_id)[0]["pid"])


def test_a_runner_that_ignores_the_cancel_is_killed(
    supervisor: Supervisor, jobs: Jobs, caller: Caller, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(**LONG, deaf=True)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    cancel(jobs, caller, job_id)

    assert done.result(PATIENCE_SECONDS) == "cancelled"
    assert not alive(jobs.starts(job_id)[0]["pid"])


# Losing the lease.


def test_an_attempt_whose_lease_was_taken_publishes_nothing(
    make_supervisor: Callable[..., Supervisor], jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(steps=60, step_seconds=0.02)
    first = in_background(make_supervisor(), job_id)
    eventually(jobs.at_step(job_id, 1))
    reap(jobs, job_id)
    second = in_background(make_supervisor(), job_id)

    outcomes = first.result(PATIENCE_SECONDS), second.result(PATIENCE_SECONDS)

    assert outcomes == ("lost", "succeeded")
    row = jobs.row(job_id)
    prefixes = {key.split("/")[1] for key in jobs.keys(job_id) if key.startswith("attempts/")}
    assert prefixes == {str(row.fencing_token)}
    assert [kind for kind, _ in jobs.events(job_id)].count("succeeded") == 1


def test_the_runner_is_killed_when_the_lease_was_taken(
    supervisor: Supervisor, jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(**LONG)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    reap(jobs, job_id)

    assert done.result(PATIENCE_SECONDS) == "lost"
    assert not alive(jobs.starts(job_id)[0]["pid"])
