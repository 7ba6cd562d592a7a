"""Any order of claims, silences, cancels and endings: at most one holder can end a job, and every job ends once."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from services.database import Database
from services.leases import Claim
from services.tables import Job
from services.tenancy import Caller
from tests.services.test_leases import Protocol, prefix_of

BUDGET = 2
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Expected:
    """What the protocol promises about one job."""

    status: str = "queued"
    holder: int | None = None  # the token of the one attempt that may still act
    attempt: int = 0
    losses: int = 0
    published: str | None = None


def test_at_most_one_attempt_ends_a_job_and_every_job_ends_once(database: Database, caller: Caller) -> None:
    protocol = Protocol(database, caller)

    class Machine(RuleBasedStateMachine):
        """Rules do what workers, owners and the reaper do; stale claims stay in the bundle and are used again."""

        ids = Bundle("ids")
        claims = Bundle("claims")

        def __init__(self) -> None:
            super().__init__()
            self.expected: dict[str, Expected] = {}
            self.newest_token = 0

        @rule(target=ids)
        def queue(self) -> str:
            job_id = protocol.queue()
            self.expected[job_id] = Expected()
            return job_id

        @rule(target=claims, job_id=ids)
        def claim(self, job_id: str) -> object:
            job = self.expected[job_id]
            claim = protocol.claim(job_id)
            assert (claim is not None) == (job.status == "queued")
            if claim is None:
                return multiple()
            assert claim.token > self.newest_token
            self.newest_token = claim.token
            job.status, job.holder, job.attempt = "running", claim.token, job.attempt + 1
            assert claim.attempt == job.attempt
            return claim

        @rule(claim=claims)
        def renew(self, claim: Claim) -> None:
            job = self.expected[claim.job_id]
            answers = {"running": "held", "cancelling": "cancel"}
            assert protocol.renew(claim) == (answers[job.status] if job.holder == claim.token else "lost")

        @rule(claim=claims, kind=st.sampled_from(["progress", "state"]))
        def record(self, claim: Claim, kind: str) -> None:
            job = self.expected[claim.job_id]
            assert getattr(protocol, kind)(claim) == (job.holder == claim.token)

        @rule(claim=claims)
        def publish(self, claim: Claim) -> None:
            if self._ends(claim, protocol.publish(claim), "succeeded"):
                self.expected[claim.job_id].published = prefix_of(claim)

        @rule(claim=claims)
        def fail(self, claim: Claim) -> None:
            self._ends(claim, protocol.fail(claim), "failed")

        @rule(claim=claims)
        def release(self, claim: Claim) -> None:
            if self._ends(claim, protocol.release(claim), "queued"):
                self.expected[claim.job_id].attempt -= 1

        @rule(claim=claims)
        def retry_smaller(self, claim: Claim) -> None:
            self._ends(claim, protocol.retry_smaller(claim), "queued")

        @rule(claim=claims)
        def acknowledge_cancel(self, claim: Claim) -> None:
            job = self.expected[claim.job_id]
            allowed = job.holder == claim.token and job.status == "cancelling"
            assert protocol.cancelled(claim) == allowed
            if allowed:
                job.status, job.holder = "cancelled", None

        @rule(claim=claims)
        def lose(self, claim: Claim) -> None:
            job = self.expected[claim.job_id]
            outcome = protocol.lose(claim, budget=BUDGET)
            assert outcome == (self._lost(job) if job.holder == claim.token else None)

        @rule(job_id=ids)
        def fall_silent(self, job_id: str) -> None:
            job = self.expected[job_id]
            if job.holder is None:
                return
            protocol.expire(job_id)
            assert protocol.reap(budget=BUDGET) == {job_id: self._lost(job)}

        @rule(job_id=ids)
        def cancel(self, job_id: str) -> None:
            job = self.expected[job_id]
            if job.status in TERMINAL:
                return
            protocol.cancel(job_id)
            job.status = "cancelled" if job.status == "queued" else "cancelling"

        @invariant()
        def the_database_agrees(self) -> None:
            with database.transaction() as session:
                rows = session.scalars(select(Job).where(Job.id.in_(self.expected))).all()
            for row in rows:
                job = self.expected[row.id]
                found = (row.status, row.attempt, row.infrastructure_losses, row.published_prefix)
                assert found == (job.status, job.attempt, job.losses, job.published)
                assert (row.lease_until is not None) == (job.holder is not None)

        def teardown(self) -> None:
            for job_id, job in self.expected.items():
                if job.holder is not None:
                    self.fall_silent(job_id)
                if job.status == "queued":
                    protocol.publish(protocol.claimed(job_id))
                assert [event in TERMINAL for event in protocol.events(job_id)].count(True) == 1

        def _ends(self, claim: Claim, done: bool, status: str) -> bool:
            """Whether the holder's word counted: it does exactly while nobody cancelled."""
            job = self.expected[claim.job_id]
            assert done == (job.holder == claim.token and job.status == "running")
            if done:
                job.status, job.holder = status, None
            return done

        @staticmethod
        def _lost(job: Expected) -> str:
            job.holder = None
            if job.status == "cancelling":
                job.status = "cancelled"
            elif job.losses == BUDGET:
                job.status = "failed"
            else:
                job.status, job.losses = "queued", job.losses + 1
            return job.status

    run_state_machine_as_test(  # type: ignore[no-untyped-call]  # hypothesis does not annotate it
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
