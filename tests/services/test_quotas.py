"""A tenant has no more open jobs and no more running ones than it may, however many ask at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from services import quotas
from services.database import Database
from services.errors import NotFound, QuotaExceeded
from services.ids import new_id
from services.tables import AuditEvent, Job
from services.tenancy import Caller
from tests.services.test_leases import Protocol


@pytest.fixture
def protocol(database: Database, caller: Caller) -> Protocol:
    """The protocol on a fresh database."""
    return Protocol(database, caller)


def limit(database: Database, **limits: int | None) -> None:
    with database.transaction() as session:
        quotas.set_limits(session, "tenant", **limits)


def admitted(protocol: Protocol, *, open_jobs: int) -> str:
    """A job that was let in, or the refusal."""
    with protocol.database.transaction() as session:
        quotas.admit(session, protocol.caller.tenant_id, open_jobs=open_jobs)
        values = {
            "checkpoint_id": protocol.checkpoint_id,
            "kind": "forget",
            "queue": "gpu.flow",
            "request": {},
            "seed": 0,
        }
        job_id = new_id("job")
        session.add(Job(id=job_id, tenant_id=protocol.caller.tenant_id, **values))
    return job_id


def test_of_many_at_once_as_many_are_let_in_as_may_be_open(protocol: Protocol) -> None:
    def ask(_: int) -> bool:
        try:
            admitted(protocol, open_jobs=5)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(24)))

    assert answers.count(True) == 5


def test_queued_held_and_imported_are_open_and_what_ended_is_not(protocol: Protocol) -> None:
    protocol.queue(kind="import", queue="cpu")
    protocol.claimed(protocol.queue())
    cancelling = protocol.claimed(protocol.queue())
    protocol.cancel(cancelling.job_id)
    protocol.publish(protocol.claimed(protocol.queue()))

    with pytest.raises(QuotaExceeded) as refused:
        admitted(protocol, open_jobs=3)

    assert refused.value.members == {"limit": 3, "open": 3}
    assert admitted(protocol, open_jobs=4)


def test_a_limit_of_its_own_comes_before_that_of_the_settings(protocol: Protocol, database: Database) -> None:
    protocol.queue()
    limit(database, max_open_jobs=1)

    with pytest.raises(QuotaExceeded):
        admitted(protocol, open_jobs=100)
    limit(database, max_open_jobs=None)
    assert admitted(protocol, open_jobs=100)


def test_what_has_its_place_already_is_let_in_and_counts(protocol: Protocol, database: Database) -> None:
    protocol.queue()
    limit(database, max_open_jobs=1)

    assert admitted(protocol, open_jobs=None)

    with pytest.raises(QuotaExceeded) as refused, database.transaction() as session:
        quotas.refuse_if_full(session, protocol.caller.tenant_id, open_jobs=100)
    assert refused.value.members["limit"] == 1
    limit(database, max_open_jobs=2)
    with pytest.raises(QuotaExceeded):
        admitted(protocol, open_jobs=100)


def test_of_many_claims_at_once_as_many_succeed_as_may_run(protocol: Protocol) -> None:
    queued = [protocol.queue() for _ in range(10)]

    with ThreadPoolExecutor(10) as pool:
        claims = list(pool.map(lambda job_id: protocol.claim(job_id, job_id, running_jobs=3), queued))

    assert len([claim for claim in claims if claim is not None]) == 3


def test_a_late_doorbell_claims_nothing_over_the_limit(protocol: Protocol, database: Database) -> None:
    held = protocol.claimed(protocol.queue())
    job_id = protocol.queue()
    limit(database, max_running_jobs=1)

    assert protocol.claim(job_id) is None
    protocol.publish(held)
    assert protocol.claim(job_id) is not None


def test_a_tenant_that_may_run_none_pauses(protocol: Protocol, database: Database) -> None:
    limit(database, max_running_jobs=0)

    assert protocol.claim(protocol.queue(), running_jobs=5) is None


def test_the_operator_sees_what_a_tenant_has_and_may_have(protocol: Protocol, database: Database) -> None:
    protocol.claimed(protocol.queue())
    protocol.queue()
    limit(database, max_open_jobs=7)

    with database.transaction() as session:
        [row] = quotas.usage(session)

    assert (row.name, row.open_jobs, row.max_open_jobs) == ("tenant", 2, 7)
    assert (row.running_jobs, row.max_running_jobs) == (1, None)


def test_a_change_of_limits_is_audited(database: Database, caller: Caller) -> None:
    limit(database, max_open_jobs=7, max_running_jobs=None)

    with database.transaction() as session:
        found = session.execute(
            select(AuditEvent.actor, AuditEvent.data).where(AuditEvent.action == "tenant.limited")
        ).all()
    assert [tuple(row) for row in found] == [("operator", {"max_open_jobs": 7, "max_running_jobs": None})]


def test_a_tenant_that_is_not_there_has_no_limits(database: Database) -> None:
    with pytest.raises(NotFound, match="no tenant nobody"), database.transaction() as session:
        quotas.set_limits(session, "nobody", max_open_jobs=1)
