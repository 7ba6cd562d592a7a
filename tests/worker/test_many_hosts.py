"""Two workers on hosts of their own: the one that was cut off is fenced when it comes back, and works again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.chaos.hosts import Host, namespace_host, namespaces_allowed, relay_host
from tests.worker.helpers import Jobs, Process, alive, eventually, short_lease, worker_command

needs_namespaces = pytest.mark.skipif(not namespaces_allowed(), reason="needs to make network namespaces")
# Far longer than a lease, so that it is at work when the host is cut off; who goes on from a state hurries.
COMPUTING = {"steps": 2000, "step_seconds": 0.05, "state_every": 5, "hurry": True}
BESIDE_ITSELF_SECONDS = 0.2 * 6  # that the one who was cut off may compute beside the next: a fifth of a lease
# It ends while the host is cut off, and its end is all that is left to be told.
ENDING = {"steps": 40, "step_seconds": 0.05, "state_every": 5}


@pytest.fixture
def host(request: pytest.FixtureRequest, environment: dict[str, str]) -> Iterator[Host]:
    """The host that will be cut off."""
    make: Callable[[dict[str, str]], AbstractContextManager[Host]] = request.param
    with make(environment) as host:
        yield host


@short_lease
@pytest.mark.parametrize(
    ("host", "job"),
    [
        pytest.param(relay_host, COMPUTING, id="relays, while it computes"),
        pytest.param(relay_host, ENDING, id="relays, while it ends"),
        pytest.param(namespace_host, COMPUTING, id="namespace, while it computes", marks=needs_namespaces),
    ],
    indirect=["host"],
)
def test_a_host_that_was_cut_off_is_fenced_when_it_returns(
    host: Host,
    job: dict[str, float],
    jobs: Jobs,
    start: Callable[..., Process],
    start_worker: Callable[[], Process],
    start_control: Callable[[], Process],
) -> None:
    start_control()
    cut_off = start([*host.prefix, *worker_command()], host.environment)
    job_id = jobs.queue(**job)
    eventually(jobs.has_state(job_id))
    first = jobs.starts(job_id)[0]["pid"]

    host.cut()
    start_worker()
    row = jobs.end(job_id)
    eventually(lambda: not alive(first))
    host.mend()

    assert (row.status, row.infrastructure_losses, len(jobs.starts(job_id))) == ("succeeded", 1, 2)
    assert jobs.starts(job_id)[1]["resumed"]
    last = [line["at"] for line in jobs.trace(job_id) if line["pid"] == first][-1]
    assert last < jobs.starts(job_id)[1]["at"] + BESIDE_ITSELF_SECONDS
    eventually(lambda: "lost" in cut_off.log.read_text(), what="the returned worker learnt that it lost the job")
    _takes_another(jobs, cut_off)
    assert [kind for kind, _ in jobs.events(job_id)].count("succeeded") == 1
    assert {key.split("/")[1] for key in jobs.keys(job_id) if key.startswith("attempts/")} == {str(row.fencing_token)}


def _takes_another(jobs: Jobs, worker: Process) -> None:
    """Until the worker that was cut off has brought a job to its end."""

    def brought() -> bool:
        row = jobs.end(jobs.queue(steps=1))
        return f"{row.id} attempt 1: succeeded" in worker.log.read_text()

    eventually(brought, what="the returned worker works again")


def test_relays_leave_the_other_hosts_alone(environment: dict[str, str]) -> None:
    with relay_host(environment) as one, relay_host(environment) as other:
        assert {*one.environment.values()} & {*other.environment.values()} <= {*environment.values(), *os.environ}
        assert one.environment["FORGETD_DATABASE_URL"] != other.environment["FORGETD_DATABASE_URL"]
