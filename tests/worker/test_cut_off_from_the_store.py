"""A worker that the store refuses gives its job to another, takes none meanwhile, and works again once it is let in."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from services import object_keys
from services.settings import Settings
from services.storage import PROBE, PROBE_SECONDS, PROBES, ObjectStorage
from tests.relays import AskingRelay, relaying
from tests.worker.helpers import PATIENCE_SECONDS, Jobs, eventually
from worker import supervisor as module
from worker.supervisor import Supervisor

REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"  # another key, or a clock that is wrong


@dataclass
class Host:
    """A worker behind a way to the store that can be closed."""

    supervisor: Supervisor
    storage: ObjectStorage
    relay: AskingRelay

    def refused(self, refused: bool) -> None:
        self.relay.asked = lambda _: REFUSED if refused else None

    def refuses(self, *beginnings: bytes, of: str = "") -> None:
        """Requests that begin so, of keys that hold this."""
        self.relay.asked = lambda head: REFUSED if head.startswith(beginnings) and of.encode() in head else None


@pytest.fixture
def host(
    settings: Settings, make_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Host]:
    monkeypatch.setattr(module, "PING_SECONDS", 0.05)
    url = str(settings.s3_endpoint_url)
    with relaying(AskingRelay, url) as relay:
        changed = {"s3_endpoint_url": relay.instead_of(url), "store_patience_seconds": 0.5, "infrastructure_budget": 1}
        behind = settings.model_copy(update=changed)
        storage = ObjectStorage(behind)
        yield Host(make_supervisor(settings=behind, storage=storage), storage, relay)


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
    host.refuses(b"GET ", of=image_set)

    assert host.supervisor.run(job_id) == "queued"
    row = jobs.row(job_id)
    assert (row.attempt, row.infrastructure_losses) == (1, 1)
    assert dict(jobs.events(job_id))["attempt_lost"]["why"] == "the store answers and keeps refusing what the job reads"

    assert host.supervisor.run(other) == "succeeded"
    assert host.supervisor.run(job_id) == "failed"
    row = jobs.row(job_id)
    assert row.reason == "attempts_exhausted"
    assert "; the last time: the store answers and keeps refusing what the job reads." in (row.problem or {})["detail"]


def test_a_bucket_that_answers_while_its_objects_do_not_costs_no_attempt(
    host: Host, jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(steps=1)
    host.refuses(b"GET ")
    host.storage.ping()

    assert host.supervisor.run(job_id) == "queued"
    assert (jobs.row(job_id).attempt, jobs.row(job_id).infrastructure_losses) == (0, 0)

    waiting = in_background(host.supervisor, job_id)
    host.refused(False)
    assert waiting.result(PATIENCE_SECONDS) == "succeeded"


@pytest.mark.parametrize("refused", [b"GET ", b"PUT "])
def test_a_store_works_that_takes_objects_and_gives_them_back(host: Host, refused: bytes) -> None:
    host.storage.probe()
    host.refuses(refused)

    with pytest.raises((BotoCoreError, ClientError)):
        host.storage.probe()


@pytest.fixture
def begun(supervisor: Supervisor, jobs: Jobs) -> str:
    """A job whose worker died and left a state."""
    job_id = jobs.queue(steps=8, state_every=2, die_at=6, step_seconds=0.1)
    assert supervisor.run(job_id) == "queued"
    assert jobs.row(job_id).resume is not None
    return job_id


def test_a_job_whose_state_alone_is_refused_starts_from_the_beginning(
    host: Host, jobs: Jobs, begun: str, caplog: pytest.LogCaptureFixture
) -> None:
    host.refuses(b"GET ", of=object_keys.states_prefix(jobs.tenant_id, begun))

    assert host.supervisor.run(begun) == "succeeded"

    assert [start["resumed"] for start in jobs.starts(begun)] == [False, False]
    assert jobs.row(begun).infrastructure_losses == 1  # the one before
    assert "its state is refused; starting from the beginning" in caplog.text


def test_a_state_is_not_given_up_while_all_of_the_store_is_away(
    host: Host, jobs: Jobs, begun: str, in_background: Callable[..., Future[str]]
) -> None:
    states = object_keys.states_prefix(jobs.tenant_id, begun)
    away = threading.Event()

    def asked(head: bytes) -> bytes | None:
        if states.encode() in head:
            away.set()
        return REFUSED if away.is_set() else None

    host.relay.asked = asked

    assert in_background(host.supervisor, begun).result(PATIENCE_SECONDS) == "queued"
    assert (jobs.row(begun).attempt, jobs.row(begun).infrastructure_losses) == (1, 1)  # of the one before
    host.refused(False)
    assert host.supervisor.run(begun) == "succeeded"
    assert [start["resumed"] for start in jobs.starts(begun)] == [False, True]


@pytest.mark.parametrize(
    ("refused", "found"),
    [("fisher-2.safetensors", ["fisher-1"]), ("list-type=2", [])],
    ids=["one of them", "their names"],
)
def test_assets_that_alone_are_refused_are_left_out(
    host: Host, supervisor: Supervisor, jobs: Jobs, tmp_path: Path, refused: str, found: list[str]
) -> None:
    asked = {"method": "selective-amnesia", "target": {"class_label": 0, "where": "weights"}, "replace_with": "noise"}
    left = {"fisher-1": "squares", "fisher-2": "more"}
    assert supervisor.run(jobs.queue(asked=asked, steps=1, assets=left)) == "succeeded"
    host.refuses(b"GET ", of=refused)
    job_id = jobs.queue(asked=asked, steps=1, keep_job=str(tmp_path / "job.json"))

    assert host.supervisor.run(job_id) == "succeeded"

    job: dict[str, Any] = json.loads((tmp_path / "job.json").read_text())
    assert sorted(job["inputs"]["fisher"]) == found
    assert jobs.row(job_id).attempt == 1


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
        if head.startswith(b"PUT "):
            host.relay.mute()
            asking.set()
        return None

    host.relay.asked = asked
    waiting = in_background(host.supervisor, job_id)
    eventually(asking.is_set)

    host.supervisor.start_draining()

    assert waiting.result(5 * PROBE_SECONDS) == "not claimed"


def test_asking_for_the_store_hides_no_call_that_stands_still(storage: ObjectStorage) -> None:
    before = storage.moved_at

    storage.probe()

    assert storage.moved_at == before
    storage.ping()
    assert storage.moved_at > before


def test_asking_for_the_store_leaves_one_small_object_a_host(storage: ObjectStorage) -> None:
    storage.probe()
    storage.probe()

    [key] = storage.keys(PROBES)
    assert storage.read(key) == PROBE
