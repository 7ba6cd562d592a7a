"""A job that has not succeeded by its deadline fails, wherever it is by then, and publishes nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from services import reaper
from services.database import Database
from services.tables import AuditEvent
from services.tenancy import Caller
from tests.services.test_leases import Protocol


@pytest.fixture
def protocol(database: Database, caller: Caller) -> Protocol:
    """The protocol on a fresh database."""
    return Protocol(database, caller)


def soon(protocol: Protocol) -> str:
    """A queued job whose deadline is an hour away."""
    return protocol.queue(deadline_at=func.clock_timestamp() + timedelta(hours=1))


def pass_by(protocol: Protocol, job_id: str) -> None:
    """The deadline was a second ago."""
    protocol.change(job_id, deadline_at=func.clock_timestamp() - timedelta(seconds=1))


def expire_queued(protocol: Protocol) -> list[str]:
    with protocol.database.transaction() as session:
        return reaper.expire_queued(session)


def failed_by_its_deadline(protocol: Protocol, job_id: str) -> bool:
    row = protocol.row(job_id)
    problem = (row.problem or {}).get("type")
    assert (row.published_prefix, row.artifacts, row.lease_until) == (None, None, None)
    assert protocol.events(job_id).count("failed") == 1
    return (row.status, row.reason, problem) == ("failed", "deadline_exceeded", "urn:forgetd:problem:deadline-exceeded")


def test_a_queued_job_fails_once(protocol: Protocol) -> None:
    late, waiting, unhurried = soon(protocol), soon(protocol), protocol.queue()
    pass_by(protocol, late)

    assert expire_queued(protocol) == [late]
    assert expire_queued(protocol) == []

    assert failed_by_its_deadline(protocol, late)
    assert {protocol.row(job_id).status for job_id in (waiting, unhurried)} == {"queued"}
    with protocol.database.transaction() as session:
        audited = session.scalars(select(AuditEvent.action).where(AuditEvent.subject == late)).all()
    assert audited == ["job.failed"]


def test_a_late_doorbell_starts_nothing(protocol: Protocol) -> None:
    job_id = soon(protocol)
    pass_by(protocol, job_id)

    assert protocol.claim(job_id) is None


def test_the_holder_learns_of_it_with_its_renewal(protocol: Protocol) -> None:
    claim = protocol.claimed(soon(protocol))

    assert protocol.renew(claim) == "held"
    pass_by(protocol, claim.job_id)
    assert protocol.renew(claim) == "expired"
    assert protocol.expire_held(claim)

    assert failed_by_its_deadline(protocol, claim.job_id)


def test_nobody_ends_a_job_by_a_deadline_that_has_not_passed(protocol: Protocol) -> None:
    for claim in (protocol.claimed(soon(protocol)), protocol.claimed(protocol.queue())):
        assert not protocol.expire_held(claim)
        assert protocol.publish(claim)


def test_what_comes_after_the_deadline_is_not_published(protocol: Protocol) -> None:
    claim = protocol.claimed(soon(protocol))
    pass_by(protocol, claim.job_id)

    assert not protocol.publish(claim)
    assert not protocol.miss(claim)

    assert protocol.expire_held(claim)
    assert failed_by_its_deadline(protocol, claim.job_id)


def test_a_failure_that_publishes_nothing_keeps_its_own_reason(protocol: Protocol) -> None:
    claim = protocol.claimed(soon(protocol))
    pass_by(protocol, claim.job_id)

    assert protocol.fail(claim)

    assert protocol.row(claim.job_id).reason == "internal"


def test_a_success_is_dated_within_the_deadline(protocol: Protocol) -> None:
    claim = protocol.claimed(soon(protocol))

    assert protocol.publish(claim)

    row = protocol.row(claim.job_id)
    assert row.finished_at is not None
    assert row.deadline_at is not None
    assert row.finished_at <= row.deadline_at


def test_a_job_whose_worker_died_is_not_queued_again(protocol: Protocol) -> None:
    claim = protocol.claimed(soon(protocol))
    pass_by(protocol, claim.job_id)
    protocol.expire(claim.job_id)

    assert protocol.reap() == {claim.job_id: "failed"}

    assert failed_by_its_deadline(protocol, claim.job_id)


def test_a_job_whose_runner_died_is_not_queued_again(protocol: Protocol) -> None:
    claim = protocol.claimed(soon(protocol))
    pass_by(protocol, claim.job_id)

    assert protocol.lose(claim) == "failed"

    assert failed_by_its_deadline(protocol, claim.job_id)


@pytest.mark.parametrize("act", [Protocol.release, Protocol.retry_smaller], ids=lambda act: act.__name__)
def test_what_is_handed_back_late_fails_in_the_queue(protocol: Protocol, act: Callable[..., bool]) -> None:
    claim = protocol.claimed(soon(protocol))
    pass_by(protocol, claim.job_id)

    assert act(protocol, claim)
    assert expire_queued(protocol) == [claim.job_id]

    assert failed_by_its_deadline(protocol, claim.job_id)


def test_a_cancel_that_came_first_wins(protocol: Protocol) -> None:
    claim = protocol.claimed(soon(protocol))
    protocol.cancel(claim.job_id)
    pass_by(protocol, claim.job_id)

    assert protocol.renew(claim) == "cancel"
    assert not protocol.expire_held(claim)
    assert protocol.cancelled(claim)


def test_a_stale_token_ends_nothing_by_a_deadline(protocol: Protocol) -> None:
    stale = protocol.claimed(soon(protocol), "worker-a")
    protocol.expire(stale.job_id)
    protocol.reap()
    holder = protocol.claimed(stale.job_id, "worker-b")
    pass_by(protocol, stale.job_id)

    assert not protocol.expire_held(stale)
    assert protocol.expire_held(holder)
