"""A worker that the store refuses gives its job to another, takes none meanwhile, and works again once it is let in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from services.settings import Settings
from services.storage import PING_SECONDS, ObjectStorage
from tests.relays import AskingRelay, relaying
from tests.worker.helpers import PATIENCE_SECONDS, Jobs, eventually
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
        changed = {"s3_endpoint_url": relay.instead_of(url), "store_patience_seconds": 0.5, "infrastructure_budget": 1}
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


def test_a_job_whose_input_alone_is_refused_comes_to_an_end(host: Host, jobs: Jobs) -> None:
    job_id, other = jobs.queue(steps=1, image_set=jobs.image_set()), jobs.queue(steps=1)
    [image_set] = [jobs.row(job_id).request["target"]["images"]]
    host.relay.asked = lambda head: REFUSED if head.startswith(b"GET ") and image_set.encode() in head else None

    assert host.supervisor.run(job_id) == "queued"
    row = jobs.row(job_id)
    assert (row.attempt, row.infrastructure_losses) == (1, 1)
    assert dict(jobs.events(job_id))["attempt_lost"]["why"] == "the store answers and keeps refusing what the job reads"

    assert host.supervisor.run(other) == "succeeded"
    assert host.supervisor.run(job_id) == "failed"
    assert jobs.row(job_id).reason == "attempts_exhausted"


def test_a_job_that_gets_further_between_two_refusals_goes_on(host: Host, jobs: Jobs) -> None:
    images = jobs.image_set()
    job_id = jobs.queue(steps=1, image_set=images)
    refusals = {f"{images}/000000": 4, f"{images}/000001": 7}  # the fifth alone would be too long after the first

    def asked(head: bytes) -> bytes | None:
        for name, left in refusals.items():
            if head.startswith(b"GET ") and name.encode() in head and left:
                refusals[name] -= 1
                return REFUSED
        return None

    host.relay.asked = asked

    assert host.supervisor.run(job_id) == "succeeded"
    assert jobs.row(job_id).attempt == 1
    assert set(refusals.values()) == {0}


def test_a_store_that_takes_the_question_and_says_nothing_does_not_hide_a_drain(
    host: Host, jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(steps=1)
    host.refused(True)
    assert host.supervisor.run(job_id) == "queued"
    asking = threading.Event()

    def asked(head: bytes) -> bytes | None:
        if head.startswith(b"HEAD "):
            host.relay.mute()
            asking.set()
        return None

    host.relay.asked = asked
    waiting = in_background(host.supervisor, job_id)
    eventually(asking.is_set)

    host.supervisor.start_draining()

    assert waiting.result(5 * PING_SECONDS) == "not claimed"


def test_asking_for_the_store_hides_no_call_that_stands_still(storage: ObjectStorage) -> None:
    before = storage.moved_at

    storage.ping_once()

    assert storage.moved_at == before
    storage.ping()
    assert storage.moved_at > before
