"""A supervisor that waits for a call which never returns lets its job go, and its worker ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from services.settings import Settings
from services.storage import ObjectStorage, StoredObject
from tests.chaos.hosts import relay_host
from tests.worker.helpers import PATIENCE_SECONDS, Jobs, Process, eventually
from tests.worker.processes import control_loop
from worker import control
from worker.control import STALLED_STATUS
from worker.supervisor import Supervisor

STALL_SECONDS = 3.0


class HangingStorage(ObjectStorage):
    """A store whose client waits for ever once artifacts or states are written; or, if so told, the first time."""

    only_once = False

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asked = False
        self.let_go = threading.Event()

    def put_file(self, *given: Any, **more: Any) -> StoredObject:
        if self.only_once and self.asked:
            return super().put_file(*given, **more)
        self.asked = True
        self.let_go.wait()
        raise ConnectionError


@pytest.fixture
def hanging(settings: Settings) -> Iterator[HangingStorage]:
    storage = HangingStorage(settings)
    yield storage
    storage.let_go.set()


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    return settings.model_copy(update={"stall_seconds": STALL_SECONDS})


@pytest.mark.parametrize("lease_ttl_seconds", [4.0])  # of supervisors in this process, whose job takes a blink
@pytest.mark.parametrize("where", [{"steps": 2, "state_every": 100}, {"steps": 4, "state_every": 2, "die_at": 3}])
def test_a_call_that_never_returns_holds_no_lease(
    where: dict[str, int],
    hanging: HangingStorage,
    impatient: Settings,
    make_supervisor: Callable[..., Supervisor],
    in_background: Callable[..., Future[str]],
    jobs: Jobs,
) -> None:
    stalled = threading.Event()
    job_id = jobs.queue(**where)
    zombie = in_background(make_supervisor(storage=hanging, settings=impatient, on_stall=stalled.set), job_id)

    eventually(stalled.is_set)
    eventually(lambda: job_id in control.reap(jobs.database, budget=5) or jobs.row(job_id).status == "queued")
    outcome = make_supervisor().run(job_id)

    assert outcome == "succeeded"
    assert jobs.row(job_id).infrastructure_losses == 1
    hanging.let_go.set()
    assert zombie.result(PATIENCE_SECONDS) == "lost"
    assert [kind for kind, _ in jobs.events(job_id)].count("succeeded") == 1


@pytest.mark.parametrize("lease_ttl_seconds", [4.0])
def test_a_neighbour_that_moves_hides_no_call_that_never_returns(
    hanging: HangingStorage,
    impatient: Settings,
    make_supervisor: Callable[..., Supervisor],
    in_background: Callable[..., Future[str]],
    jobs: Jobs,
) -> None:
    stalled = threading.Event()
    hanging.only_once = True
    supervisor = make_supervisor(storage=hanging, settings=impatient, on_stall=stalled.set)
    stuck = in_background(supervisor, jobs.queue(steps=2, state_every=100))
    eventually(lambda: hanging.asked)

    neighbour = in_background(supervisor, jobs.queue(steps=10_000, step_seconds=0.05, state_every=5))
    eventually(stalled.is_set)

    supervisor.start_draining()
    hanging.let_go.set()
    assert neighbour.result(PATIENCE_SECONDS) == "queued"
    stuck.result(PATIENCE_SECONDS)


def test_a_job_that_takes_its_time_is_no_stall(
    impatient: Settings, make_supervisor: Callable[..., Supervisor], jobs: Jobs
) -> None:
    stalled = threading.Event()
    seconds = 2 * STALL_SECONDS
    job_id = jobs.queue(steps=2, step_seconds=seconds / 2)

    outcome = make_supervisor(settings=impatient, on_stall=stalled.set).run(job_id)

    assert (outcome, stalled.is_set()) == ("succeeded", False)


def test_a_control_loop_whose_database_never_answers_ends_itself(
    environment: dict[str, str], fork: Callable[..., Process], jobs: Jobs
) -> None:
    with relay_host(environment) as host:
        loop = fork(control_loop, other={**host.environment, "FORGETD_STALL_SECONDS": str(STALL_SECONDS)})
        job_id = jobs.queue()
        eventually(lambda: "control loop started" in loop.log.read_text())

        host.mute()

        assert loop.wait() == STALLED_STATUS
    assert jobs.row(job_id).status == "queued"
