"""The job protocol against the real database: who may hold a job, who may publish, and that every job ends once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update

from services import dispatch, jobs, leases, reaper
from services.database import Database
from services.ids import new_id
from services.leases import Claim
from services.tables import Checkpoint, Job, JobEvent
from services.tenancy import Caller

TTL = 30.0
RING = 5.0


class Protocol:
    """The statements of ``services.leases``, each in a transaction of its own."""

    def __init__(self, database: Database, caller: Caller) -> None:
        self.database, self.caller = database, caller
        self.checkpoint_id = new_id("ckpt")
        with database.transaction() as session:
            session.add(
                Checkpoint(
                    id=self.checkpoint_id,
                    tenant_id=caller.tenant_id,
                    name="base",
                    declared={},
                    source_bytes=1,
                    source_sha256="",
                )
            )

    def queue(self, *, kind: str = "forget", queue: str = "gpu.flow", **values: Any) -> str:
        job_id = new_id("job")
        with self.database.transaction() as session:
            session.add(
                Job(
                    id=job_id,
                    tenant_id=self.caller.tenant_id,
                    kind=kind,
                    queue=queue,
                    checkpoint_id=self.checkpoint_id,
                    request={},
                    seed=0,
                    **values,
                )
            )
        return job_id

    def row(self, job_id: str) -> Job:
        with self.database.transaction() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def events(self, job_id: str) -> list[str]:
        with self.database.transaction() as session:
            return list(session.scalars(select(JobEvent.type).where(JobEvent.job_id == job_id).order_by(JobEvent.id)))

    def clock(self) -> datetime:
        """The database's."""
        with self.database.transaction() as session:
            return session.execute(select(func.clock_timestamp())).scalar_one()

    def change(self, job_id: str, **values: Any) -> None:
        with self.database.transaction() as session:
            session.execute(update(Job).where(Job.id == job_id).values(**values))

    def expire(self, job_id: str) -> None:
        """The holder fell silent a lease ago."""
        self.change(job_id, lease_until=func.clock_timestamp() - timedelta(seconds=1))

    def claim(self, job_id: str, worker: str = "worker", *, running_jobs: int | None = None) -> Claim | None:
        with self.database.transaction() as session:
            return leases.claim(session, job_id, worker=worker, ttl_seconds=TTL, running_jobs=running_jobs)

    def claimed(self, job_id: str, worker: str = "worker") -> Claim:
        claim = self.claim(job_id, worker)
        if claim is None:
            raise AssertionError("the job could not be claimed")
        return claim

    def adopt(self, job_id: str, worker: str) -> Claim | None:
        with self.database.transaction() as session:
            return leases.adopt(session, job_id, worker=worker)

    def renew(self, claim: Claim) -> str:
        with self.database.transaction() as session:
            return leases.renew(session, claim.job_id, claim.token, ttl_seconds=TTL)

    def publish(self, claim: Claim) -> bool:
        with self.database.transaction() as session:
            return leases.publish(session, claim, prefix=prefix_of(claim), artifacts=[], summary={})

    def fail(self, claim: Claim) -> bool:
        with self.database.transaction() as session:
            return leases.fail(session, claim, reason="internal", problem={})

    def miss(self, claim: Claim) -> bool:
        """The run ended, missed its criteria, and has a report to show."""
        with self.database.transaction() as session:
            return leases.fail(
                session, claim, reason="criteria_not_met", problem={}, prefix=prefix_of(claim), artifacts=[]
            )

    def expire_held(self, claim: Claim) -> bool:
        with self.database.transaction() as session:
            return leases.expire(session, claim)

    def cancelled(self, claim: Claim) -> bool:
        with self.database.transaction() as session:
            return leases.cancelled(session, claim)

    def release(self, claim: Claim) -> bool:
        with self.database.transaction() as session:
            return leases.release(session, claim)

    def retry_smaller(self, claim: Claim) -> bool:
        with self.database.transaction() as session:
            return leases.retry_smaller(session, claim)

    def lose(self, claim: Claim, budget: int = 5, why: str = "signal 9") -> str | None:
        with self.database.transaction() as session:
            return reaper.lose(session, claim, why=why, budget=budget)

    def progress(self, claim: Claim) -> bool:
        with self.database.transaction() as session:
            return leases.record_progress(session, claim, phase="unlearning", progress={"step": 1})

    def state(self, claim: Claim) -> bool:
        with self.database.transaction() as session:
            return leases.record_state(session, claim, {"key": prefix_of(claim), "step": 1})

    def reap(self, budget: int = 5) -> dict[str, str]:
        with self.database.transaction() as session:
            return {job.id: reaper.reap(session, job, budget=budget) for job in reaper.expired_leases(session)}

    def cancel(self, job_id: str) -> None:
        with self.database.transaction() as session:
            jobs.cancel(session, self.caller, job_id)

    def see(self, worker: str = "worker", queues: tuple[str, ...] = ("gpu.flow",), slots: int = 1) -> None:
        with self.database.transaction() as session:
            dispatch.see_worker(session, worker, list(queues), slots)

    def due(self, **options: Any) -> list[str]:
        with self.database.transaction() as session:
            return [job_id for job_id, _ in dispatch.dispatchable(session, ring_seconds=RING, **options)]

    def stamp(self, *job_ids: str) -> None:
        with self.database.transaction() as session:
            dispatch.stamp_dispatched(session, list(job_ids))


def prefix_of(claim: Claim) -> str:
    return f"attempts/{claim.token}/"


@pytest.fixture
def protocol(database: Database, caller: Caller) -> Protocol:
    """The protocol on a fresh database."""
    return Protocol(database, caller)


# The claim.


def test_a_queued_job_is_claimed_once(protocol: Protocol) -> None:
    job_id = protocol.queue()

    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda n: protocol.claim(job_id, f"worker-{n}"), range(8)))

    assert len([claim for claim in claims if claim is not None]) == 1
    assert protocol.row(job_id).attempt == 1


def test_tokens_grow_from_claim_to_claim(protocol: Protocol) -> None:
    job_id = protocol.queue()

    tokens = []
    for _ in range(3):
        claim = protocol.claimed(job_id)
        tokens.append(claim.token)
        protocol.release(claim)

    assert tokens == sorted(set(tokens))


def test_a_claim_whose_reply_was_lost_is_found_by_its_worker_alone(protocol: Protocol) -> None:
    job_id = protocol.queue()
    claim = protocol.claimed(job_id, "worker-a")

    assert protocol.adopt(job_id, "worker-a") == claim
    assert protocol.adopt(job_id, "worker-b") is None


# Fencing.

ENDINGS: list[Callable[[Protocol, Claim], object]] = [
    Protocol.publish,
    Protocol.fail,
    Protocol.release,
    Protocol.retry_smaller,
    Protocol.lose,
    Protocol.cancelled,
    Protocol.progress,
    Protocol.state,
]


@pytest.mark.parametrize("act", ENDINGS, ids=lambda act: act.__name__)
def test_a_stale_token_changes_nothing_after_the_reaper(
    protocol: Protocol, act: Callable[[Protocol, Claim], object]
) -> None:
    job_id = protocol.queue()
    stale = protocol.claimed(job_id)
    protocol.expire(job_id)
    protocol.reap()
    before = protocol.row(job_id)

    done = act(protocol, stale)

    after = protocol.row(job_id)
    assert not done
    assert (after.status, after.version, after.fencing_token) == ("queued", before.version, before.fencing_token)


@pytest.mark.parametrize("act", ENDINGS, ids=lambda act: act.__name__)
def test_a_stale_token_changes_nothing_for_the_next_holder(
    protocol: Protocol, act: Callable[[Protocol, Claim], object]
) -> None:
    job_id = protocol.queue()
    stale = protocol.claimed(job_id, "worker-a")
    protocol.expire(job_id)
    protocol.reap()
    holder = protocol.claimed(job_id, "worker-b")

    done = act(protocol, stale)

    assert not done
    assert protocol.renew(stale) == "lost"
    assert protocol.renew(holder) == "held"


def test_a_stale_attempt_cannot_publish_after_its_successor(protocol: Protocol) -> None:
    job_id = protocol.queue()
    stale = protocol.claimed(job_id, "worker-a")
    protocol.expire(job_id)
    protocol.reap()
    holder = protocol.claimed(job_id, "worker-b")

    assert protocol.publish(holder)
    assert not protocol.publish(stale)

    assert protocol.row(job_id).published_prefix == prefix_of(holder)
    assert protocol.events(job_id).count("succeeded") == 1


def test_an_expired_lease_that_nobody_reaped_still_publishes(protocol: Protocol) -> None:
    job_id = protocol.queue()
    claim = protocol.claimed(job_id)
    protocol.expire(job_id)

    assert protocol.publish(claim)
    assert protocol.reap() == {}


# Cancelling.


@pytest.mark.parametrize("act", [Protocol.publish, Protocol.fail, Protocol.release, Protocol.retry_smaller])
def test_a_cancel_that_came_first_wins(protocol: Protocol, act: Callable[[Protocol, Claim], object]) -> None:
    job_id = protocol.queue()
    claim = protocol.claimed(job_id)
    protocol.cancel(job_id)

    assert protocol.renew(claim) == "cancel"
    assert not act(protocol, claim)
    assert protocol.cancelled(claim)
    assert protocol.row(job_id).published_prefix is None


def test_a_cancelled_queue_entry_cannot_be_claimed(protocol: Protocol) -> None:
    job_id = protocol.queue()
    protocol.cancel(job_id)

    assert protocol.claim(job_id) is None


def test_a_cancelling_job_whose_worker_died_is_cancelled(protocol: Protocol) -> None:
    job_id = protocol.queue()
    protocol.claimed(job_id)
    protocol.cancel(job_id)
    protocol.expire(job_id)

    assert protocol.reap() == {job_id: "cancelled"}


# Budgets.


def test_a_drain_consumes_no_attempt(protocol: Protocol) -> None:
    job_id = protocol.queue()

    for _ in range(10):
        protocol.release(protocol.claimed(job_id))

    row = protocol.row(job_id)
    assert (row.status, row.attempt, row.infrastructure_losses) == ("queued", 0, 0)


def test_a_job_that_keeps_losing_its_worker_fails(protocol: Protocol) -> None:
    job_id = protocol.queue()

    for _ in range(3):
        protocol.claimed(job_id)
        protocol.expire(job_id)
        outcome = protocol.reap(budget=2)

    row = protocol.row(job_id)
    assert outcome == {job_id: "failed"}
    assert (row.reason, row.attempt, row.infrastructure_losses) == ("attempts_exhausted", 3, 2)


def test_a_runner_that_keeps_dying_is_given_pauses_and_then_up(protocol: Protocol) -> None:
    job_id = protocol.queue()
    protocol.see()

    outcomes, waits = [], []
    for _ in range(3):
        outcomes.append(protocol.lose(protocol.claimed(job_id), budget=2))
        waits.append(protocol.row(job_id).not_before is not None)

    assert outcomes == ["queued", "queued", "failed"]
    assert waits == [False, True, True]


def test_the_last_loss_is_told_where_it_is_known(protocol: Protocol) -> None:
    dies, falls_silent = protocol.queue(), protocol.queue()
    for why in ("exit 137", "signal 9"):
        protocol.lose(protocol.claimed(dies), budget=1, why=why)
    protocol.claimed(falls_silent)
    protocol.expire(falls_silent)
    protocol.reap(budget=0)

    assert [(protocol.row(job_id).problem or {})["detail"] for job_id in (dies, falls_silent)] == [
        "2 attempts ended without a result, more than the budget of 1; the last time: signal 9. Nothing was published.",
        "1 attempts ended without a result, more than the budget of 0. Nothing was published.",
    ]


def test_pauses_between_lost_attempts_double_up_to_a_minute(protocol: Protocol) -> None:
    job_id = protocol.queue()
    protocol.lose(protocol.claimed(job_id), budget=9)  # the first loss, after which there is none

    for seconds in (2, 4, 8, 16, 32, 60, 60, 60):
        claim = protocol.claimed(job_id)
        before = protocol.clock()
        protocol.lose(claim, budget=9)
        after = protocol.clock()

        until = protocol.row(job_id).not_before
        assert until is not None
        assert until - after <= timedelta(seconds=seconds) <= until - before


def test_a_job_that_pauses_is_not_rung(protocol: Protocol) -> None:
    job_id = protocol.queue()
    protocol.see()
    protocol.change(job_id, not_before=func.clock_timestamp() + timedelta(seconds=60))

    assert protocol.due() == []


def test_a_failed_import_rejects_its_checkpoint(protocol: Protocol) -> None:
    job_id = protocol.queue(kind="import", queue="cpu")
    protocol.claimed(job_id)
    protocol.expire(job_id)

    protocol.reap(budget=0)

    with protocol.database.transaction() as session:
        assert session.get_one(Checkpoint, protocol.checkpoint_id).status == "rejected"
