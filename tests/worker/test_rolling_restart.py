"""Every process of a service is restarted, one after the other, and no caller can tell.

Two gateways on one listening socket, as a service manager passes it on; behind a load balancer the same holds, as long
as it sends nothing more to a gateway that is being stopped.
"""

from __future__ import annotations

import itertools
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from sqlalchemy import select

from services.database import Database
from services.tables import Checkpoint, Job, WorkerSlot
from services.tenancy import NewKey
from tests.worker import processes as children
from tests.worker.helpers import TERMINAL, Jobs, Process, eventually

CALLERS = 3
WAIT_SECONDS = 30  # of a long poll
GRACE_SECONDS = 20  # for what a gateway has begun, as in its container: less than a poll may last
ANSWER_SECONDS = 60.0  # of a loaded machine
MANIFEST = {"family": "class-prior", "channels": 3, "image_size": 8, "architecture": {"n_classes": 3}}


class Gateway:
    """A gateway that accepts from a socket which outlives it."""

    def __init__(self, process: Process, port: int) -> None:
        self._process, self.port = process, port
        eventually(lambda: "Uvicorn running" in process.log.read_text() or not process.running())
        assert process.running(), process.log.read_text()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """SIGTERM, and wait; what it had begun to answer it has answered."""
        self._process.send(signal.SIGTERM)
        self._process.wait()
        assert "Cancel" not in self._process.log.read_text()  # uvicorn's word for an answer that was cut off


class Caller(threading.Thread):
    """Posts a job, follows it to its end, posts the next. The first call that fails ends it and is kept."""

    def __init__(self, url: str, key: str, checkpoint_id: str) -> None:
        super().__init__(daemon=True)
        self.ended: list[str] = []
        self.failure: Exception | None = None
        self._enough = threading.Event()
        self._body = {"checkpoint": checkpoint_id, "target": {"class_label": 0, "where": "prior"}}
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=ANSWER_SECONDS,
            limits=httpx.Limits(max_keepalive_connections=0),  # an idle connection is closed without a word, by design
            trust_env=False,
        )

    def run(self) -> None:
        try:
            for follow in itertools.cycle((self._poll, self._stream)):
                if self._enough.is_set():
                    return
                posted = self._client.post("/jobs/forget", json=self._body)
                assert posted.status_code == 202, posted.text
                follow(posted.json()["id"])
                self.ended.append(posted.json()["id"])
        except Exception as error:
            self.failure = error

    def finish(self) -> None:
        """Let it follow its last job to the end."""
        self._enough.set()
        self.join(ANSWER_SECONDS)
        assert not self.is_alive()
        self._client.close()

    def _poll(self, job_id: str) -> None:
        while True:
            got = self._client.get(f"/jobs/{job_id}", params={"wait": WAIT_SECONDS})
            assert got.status_code == 200, got.text
            if got.json()["status"] in TERMINAL:
                return

    def _stream(self, job_id: str) -> None:
        """Follow the events, and again from the last one where the stream ended before the job, as browsers do."""
        events: list[str] = []
        ids = [""]
        while "succeeded" not in events:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": ids[-1]} if ids[-1] else {})
            with self._client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as stream:
                assert stream.status_code == 200
                for line in stream.iter_lines():
                    name, _, value = line.partition(": ")
                    ids += [value] if name == "id" else []
                    events += [value] if name == "event" else []
        assert len(ids) == len(set(ids)), "an event came twice"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where callers call."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener


@pytest.fixture
def start_gateway(listener: socket.socket, fork: Callable[..., Process]) -> Callable[[], Gateway]:
    """Starts gateways on that socket."""
    return lambda: Gateway(fork(children.gateway, listener, GRACE_SECONDS), listener.getsockname()[1])


@pytest.fixture
def callers(listener: socket.socket, api_key: NewKey, database: Database, jobs: Jobs) -> Iterator[list[Caller]]:
    """Callers, at work until the test ends."""
    with database.transaction() as session:
        session.get_one(Checkpoint, jobs.checkpoint_id).manifest = MANIFEST
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    callers = [Caller(url, api_key.secret, jobs.checkpoint_id) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    yield callers
    for caller in callers:
        caller.finish()


def restarted(database: Database, worker: Process, start: Callable[[], Process]) -> Process:
    """A worker stopped by SIGTERM, and another in its place, at work."""
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    fresh = start()
    eventually(lambda: present(database, fresh))
    return fresh


def present(database: Database, worker: Process) -> bool:
    """Whether a worker has said that it lives."""
    with database.transaction() as session:
        return any(f"-{worker.pid}-" in name for name in session.scalars(select(WorkerSlot.id)))


def test_who_waits_is_answered_when_the_gateway_leaves(
    listener: socket.socket, start_gateway: Callable[[], Gateway], api_key: NewKey, jobs: Jobs
) -> None:
    gateway, job_id = start_gateway(), jobs.queue()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/jobs/{job_id}"
    key = {"Authorization": f"Bearer {api_key.secret}"}
    with ThreadPoolExecutor(2) as pool:
        poll = pool.submit(httpx.get, f"{url}?wait={WAIT_SECONDS}", headers=key, timeout=ANSWER_SECONDS)
        stream = pool.submit(
            httpx.get, f"{url}/events", headers=key | {"Accept": "text/event-stream"}, timeout=ANSWER_SECONDS
        )
        eventually(lambda: established(gateway) == 2)

        gateway.stop()

        assert poll.result().json()["status"] == "queued"
        assert stream.result().status_code == 200


def established(gateway: Gateway) -> int:
    """How many callers it has."""
    found = psutil.Process(gateway.pid).net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == gateway.port for one in found)


def test_every_process_is_restarted_in_turn_and_no_call_or_attempt_is_lost(
    start_control: Callable[[], Process],
    start_worker: Callable[[], Process],
    start_gateway: Callable[[], Gateway],
    callers: list[Caller],
    jobs: Jobs,
    database: Database,
) -> None:
    gateways = [start_gateway(), start_gateway()]
    control = start_control()
    workers = [start_worker(), start_worker()]
    moved = jobs.queue(steps=5000, state_every=100, step_seconds=0.02, hurry=True)  # until its worker is restarted
    eventually(lambda: all(caller.ended for caller in callers))
    eventually(jobs.has_state(moved))

    for old in gateways:
        start_gateway()
        old.stop()
    control.send(signal.SIGTERM)
    assert control.wait() == 0
    start_control()
    for old in workers:
        before = [len(caller.ended) for caller in callers]
        restarted(database, old, start_worker)
        eventually(lambda: all(len(c.ended) > count for c, count in zip(callers, before, strict=True)))  # noqa: B023 asked at once
    for caller in callers:
        caller.finish()

    assert [caller.failure for caller in callers] == [None] * CALLERS
    with database.transaction() as session:
        rows = session.execute(select(Job.id, Job.status, Job.attempt, Job.infrastructure_losses)).all()
    ours = {row.id: tuple(row[1:]) for row in rows}
    assert set(ours) >= {job_id for caller in callers for job_id in caller.ended}
    assert set(ours.values()) == {("succeeded", 1, 0)}  # which a drain leaves as it was
    assert "drained" in [kind for kind, _ in jobs.events(moved)]
