"""A worker whose scratch disk is full takes no job, and what fails on a disk is the host's fault."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from tests.worker.helpers import PATIENCE_SECONDS, Jobs
from worker import supervisor as module
from worker.scratch import Scratch
from worker.supervisor import ROOM_BYTES, Supervisor


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is left of it, for the first worker that a test makes."""
    left = {"bytes": ROOM_BYTES}
    monkeypatch.setattr(module, "PING_SECONDS", 0.05)
    return left


@pytest.fixture
def host(
    disk: dict[str, int], make_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> Supervisor:
    host = make_supervisor()
    monkeypatch.setattr(host._scratch, "free_bytes", lambda: disk["bytes"])
    return host


def test_a_worker_without_room_leaves_jobs_to_others_and_works_again_once_there_is_some(
    host: Supervisor,
    supervisor: Supervisor,
    disk: dict[str, int],
    jobs: Jobs,
    in_background: Callable[..., Future[str]],
) -> None:
    disk["bytes"] = ROOM_BYTES - 1
    first, second = jobs.queue(steps=1), jobs.queue(steps=1)
    waiting = in_background(host, first)

    assert supervisor.run(first) == "succeeded"
    assert not waiting.done()
    disk["bytes"] = ROOM_BYTES
    assert waiting.result(PATIENCE_SECONDS) == "not claimed"  # the other had it

    assert host.run(second) == "succeeded"
    assert [(jobs.row(job).attempt, jobs.row(job).infrastructure_losses) for job in (first, second)] == [(1, 0)] * 2


def test_it_sits_on_a_doorbell_for_a_while_and_drains_at_once(
    host: Supervisor,
    disk: dict[str, int],
    jobs: Jobs,
    in_background: Callable[..., Future[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk["bytes"] = 0
    job = jobs.queue(steps=1)
    waiting = in_background(host, job)
    host.start_draining()
    assert waiting.result(PATIENCE_SECONDS) == "not claimed"

    host.drain.clear()
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.1)
    assert host.run(job) == "not claimed"
    assert (jobs.row(job).status, jobs.row(job).attempt) == ("queued", 0)


def test_a_folder_that_cannot_be_made_costs_an_attempt_and_no_lease(
    supervisor: Supervisor, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_self: Scratch, _job_id: str, _token: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Scratch, "attempt", refused)
        job = jobs.queue(steps=1)
        assert supervisor.run(job) == "queued"

    row = jobs.row(job)
    assert (row.status, row.infrastructure_losses, row.lease_until) == ("queued", 1, None)
    assert supervisor.run(job) == "succeeded"
