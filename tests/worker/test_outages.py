"""Servers that go away in the middle: the database, its reply to a COMMIT, the object store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.database import Database
from services.settings import Settings
from tests.conftest import Servers
from tests.relays import DatabaseRelay, LosingRelay, relaying
from tests.worker.helpers import PATIENCE_SECONDS, Jobs, alive, eventually, short_lease
from worker.supervisor import Supervisor


@pytest.fixture
def relay(settings: Settings) -> Iterator[DatabaseRelay]:
    """A way to the database that loses replies."""
    with relaying(DatabaseRelay, settings.database_url.get_secret_value()) as relay:
        yield relay


@pytest.fixture
def behind(settings: Settings, relay: DatabaseRelay) -> Iterator[Database]:
    """The database behind that way."""
    database = Database(relay.instead_of(settings.database_url.get_secret_value()))
    yield database
    database.close()


@pytest.mark.parametrize("mark", [b"nextval('fencing_tokens')", b"published_prefix="], ids=["claim", "publication"])
def test_a_commit_whose_reply_was_lost_counts_once(
    mark: bytes,
    relay: DatabaseRelay,
    behind: Database,
    make_supervisor: Callable[..., Supervisor],
    jobs: Jobs,
) -> None:
    job_id = jobs.queue(steps=2)
    supervisor = make_supervisor(database=behind)
    lost = threading.Event()
    relay.trap("reply lost", lost.set, after=mark)

    outcome = supervisor.run(job_id)

    row = jobs.row(job_id)
    assert lost.is_set()
    assert (outcome, row.status, row.attempt) == ("succeeded", "succeeded", 1)
    assert len(jobs.starts(job_id)) == 1
    assert f"attempts/{row.fencing_token}/manifest.json" in jobs.keys(job_id)


def test_a_database_outage_shorter_than_the_lease_costs_nothing(
    servers: Servers, supervisor: Supervisor, jobs: Jobs
) -> None:
    job_id = jobs.queue(steps=40, step_seconds=0.05)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(supervisor.run, job_id)
        eventually(jobs.at_step(job_id, 2))

        servers.stack.restart_postgres(kill=True)

        assert done.result(PATIENCE_SECONDS) == "succeeded"
    assert len(jobs.starts(job_id)) == jobs.row(job_id).attempt == 1


@short_lease
def test_a_database_outage_longer_than_the_lease_kills_the_runner(
    servers: Servers, supervisor: Supervisor, jobs: Jobs
) -> None:
    job_id = jobs.queue(steps=10_000, step_seconds=0.05)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(supervisor.run, job_id)
        eventually(jobs.at_step(job_id, 2))
        runner = jobs.starts(job_id)[0]["pid"]

        servers.stack.kill_server("postgres")
        try:
            eventually(lambda: not alive(runner))
        finally:
            servers.stack.start_server("postgres")

        assert done.result(PATIENCE_SECONDS) == "queued"


@short_lease
def test_a_lease_outlives_connections_that_say_nothing_any_more(
    settings: Settings, make_supervisor: Callable[..., Supervisor], jobs: Jobs
) -> None:
    job_id = jobs.queue(steps=140, step_seconds=0.05)
    url = settings.database_url.get_secret_value()
    with relaying(LosingRelay, url) as proxy, ThreadPoolExecutor(1) as pool:
        behind = Database(proxy.instead_of(url), answer_seconds=1.5 * settings.lease_ttl_seconds)
        done = pool.submit(make_supervisor(database=behind).run, job_id)
        eventually(jobs.at_step(job_id, 2))

        proxy.lose()

        assert done.result(PATIENCE_SECONDS) == "succeeded"
        behind.close()
    assert len(jobs.starts(job_id)) == jobs.row(job_id).attempt == 1


def test_a_store_outage_is_waited_out(servers: Servers, supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=2)
    servers.stack.kill_server("seaweedfs")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(supervisor.run, job_id)
        try:
            eventually(lambda: jobs.row(job_id).status == "running")
        finally:
            servers.stack.start_server("seaweedfs")

        assert done.result(PATIENCE_SECONDS) == "succeeded"
    assert jobs.row(job_id).attempt == 1
