"""A worker that the store refuses gives its job to another, takes none meanwhile, and works again once it is let in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from services.settings import Settings
from services.storage import ObjectStorage
from tests.relays import AskingRelay, relaying
from tests.worker.helpers import PATIENCE_SECONDS, Jobs
from worker import supervisor as module
from worker.supervisor import Supervisor

REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"  # another key, or a clock that is wrong


@dataclass
class Host:
    """A worker behind a way to the store that can be closed."""

    supervisor: Supervisor
    relay: AskingRelay

    def refused(self, refused: bool) -> None:
        self.relay.asked = lambda _: REFUSED if refused else None


@pytest.fixture
def host(
    settings: Settings, make_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Host]:
    monkeypatch.setattr(module, "PING_SECONDS", 0.05)
    url = str(settings.s3_endpoint_url)
    with relaying(AskingRelay, url) as relay:
        changed = {"s3_endpoint_url": relay.instead_of(url), "store_patience_seconds": 0.5}
        behind = settings.model_copy(update=changed)
        yield Host(make_supervisor(settings=behind, storage=ObjectStorage(behind)), relay)


def test_a_worker_that_the_store_refuses_leaves_its_jobs_to_others(
    host: Host, supervisor: Supervisor, jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(steps=1)
    host.refused(True)

    assert host.supervisor.run(job_id) == "queued"
    row = jobs.row(job_id)
    assert (row.attempt, row.infrastructure_losses, row.status) == (0, 0, "queued")
    assert dict(jobs.events(job_id))["drained"]["why"] == "the store did not answer this worker"

    waiting = in_background(host.supervisor, job_id)  # rung again
    assert supervisor.run(job_id) == "succeeded"
    assert not waiting.done()
    host.supervisor.start_draining()
    assert waiting.result(PATIENCE_SECONDS) == "not claimed"
    assert jobs.row(job_id).attempt == 1


def test_it_works_again_once_the_store_answers(
    host: Host, jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(steps=1)
    host.refused(True)
    assert host.supervisor.run(job_id) == "queued"
    done = in_background(host.supervisor, job_id)

    host.refused(False)

    assert done.result(PATIENCE_SECONDS) == "succeeded"
