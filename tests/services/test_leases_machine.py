"""Any order of claims, silences, cancels and endings, also at once: at most one holder ends a job, every job ends once.

Each rule does what workers, owners and the reaper do. Its answer is compared with what ``Expected`` promises, and after
each an ``Auditor`` looks at rows, events and audit log. Three mutants of the statements show that the auditor sees what
each condition is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from datetime import timedelta
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import ColumnElement, and_, func, select, update
from sqlalchemy.orm import Session

from services import leases, reaper
from services.database import Database
from services.leases import Claim
from services.tables import AuditEvent, Job, JobEvent
from services.tenancy import Caller
from tests.services.leases_machine import (
    ACTS,
    OTHERS,
    TERMINAL,
    Auditor,
    Broken,
    Expected,
    Waiting,
    locks,
    perform,
    prefix_of,
)
from tests.services.test_leases import Protocol

NAMES_ARTIFACTS = ("publish", "report")
EVERYTHING = ("claim", "claim", *OTHERS, *ACTS)
FEW = ("claim", "lose", "cancel", "release", "fail", "publish")
"""Enough to miss each of the conditions."""


class World:
    """The jobs of one run of the machine: the database, what is promised of each, and whose artifacts are stored."""

    def __init__(self, protocol: Protocol, pool: ThreadPoolExecutor, *, oracle: bool) -> None:
        self.protocol, self.pool, self.oracle = protocol, pool, oracle
        self.jobs: dict[str, Expected] = {}
        self.claims: dict[str, list[Claim]] = {}
        self.auditors: dict[str, Auditor] = {}
        self.stored: set[tuple[str, str]] = set()
        self._workers = 0

    def queue(self) -> None:
        """One more job."""
        job_id = self.protocol.queue()
        self.jobs[job_id], self.claims[job_id], self.auditors[job_id] = Expected(), [], Auditor()

    def job(self, which: int) -> str:
        """One of the newest jobs; 0: the newest."""
        return list(self.jobs)[-1 - which]

    def session(self) -> Session:
        """A session whose transaction ends where somebody says so."""
        return Session(self.protocol.database.engine, expire_on_commit=False)

    def statements(self, act: str, job_id: str, pick: int) -> tuple[str, Callable[[Session], Any], int | None]:
        """An act of one of the job's attempts, or of somebody else: its name, what it does, and its token."""
        claims = self.claims[job_id]
        if act in OTHERS:
            self._workers += 1
            worker = f"worker-{self._workers}"
            return act, lambda session: perform(session, self.protocol.caller, act, job_id, None, worker), None
        if not claims:
            return self.statements("claim", job_id, pick)  # it has to begin with one
        claim = claims[-1 - pick % len(claims)]
        if act in NAMES_ARTIFACTS:
            self.stored.add((job_id, prefix_of(claim.token)))  # uploaded before, by zombies too
        return act, lambda session: perform(session, self.protocol.caller, act, job_id, claim), claim.token

    def alone(self, act: str, job_id: str, pick: int) -> None:
        """An act in a transaction that nobody is beside."""
        act, statements, token = self.statements(act, job_id, pick)
        with self.session() as session:
            answer = statements(session)
            session.commit()
        self.promised(act, job_id, token, answer)

    def promised(self, act: str, job_id: str, token: int | None, answer: Any) -> None:
        """Compare an answer with what is promised, once its transaction is committed."""
        expected = self.jobs[job_id].answer(act, token)
        if isinstance(answer, Claim):
            self._taken(job_id, answer)
        if self.oracle and (answer is not None if act == "claim" else answer) != expected:
            raise Broken(f"{act} said {answer} and not {expected}")

    def changes_nothing(self, act: str, job_id: str, token: int | None, answer: Any) -> None:
        """An answer of a statement that saw the job while another transaction had it."""
        if isinstance(answer, Claim):
            self._taken(job_id, answer)
        if self.oracle and locks(act, answer):
            raise Broken(f"{act} said {answer} beside a transaction that had the job")

    def would_wait(self, act: str, job_id: str, token: int | None) -> bool:
        """Whether a statement wants a row that another transaction has, by what is committed."""
        return act != "reap" and locks(act, copy(self.jobs[job_id]).answer(act, token))

    def _taken(self, job_id: str, claim: Claim) -> None:
        newest = max((one.token for claims in self.claims.values() for one in claims), default=0)
        if claim.token <= newest:
            raise Broken(f"token {claim.token} came after {newest}")
        self.claims[job_id].append(claim)
        self.jobs[job_id].token = claim.token

    def audit(self) -> None:
        """Look at every job."""
        with self.protocol.database.transaction() as session:
            rows = session.scalars(select(Job).where(Job.id.in_(self.jobs))).all()
            events: dict[str, list[tuple[str, dict[str, Any]]]] = {job_id: [] for job_id in self.jobs}
            of_jobs = select(JobEvent).where(JobEvent.job_id.in_(self.jobs)).order_by(JobEvent.id)
            for event in session.scalars(of_jobs):
                events[event.job_id].append((event.type, event.data))
            endings: dict[str, list[str]] = {job_id: [] for job_id in self.jobs}
            wanted = [f"job.{status}" for status in TERMINAL]
            of_jobs_too = AuditEvent.subject.in_(self.jobs), AuditEvent.action.in_(wanted)
            for one in session.scalars(select(AuditEvent).where(*of_jobs_too)):
                endings[one.subject].append(one.action.removeprefix("job."))
        for row in rows:
            self.auditors[row.id].look(row, [("queued", {}), *events[row.id]], endings[row.id])
            if row.published_prefix is not None and (row.id, row.published_prefix) not in self.stored:
                raise Broken("artifacts were named that are not there")
            job = self.jobs[row.id]
            found = (row.status, row.attempt, row.infrastructure_losses, row.published_prefix)
            if self.oracle and found != (job.status, job.attempt, job.losses, job.published):
                raise Broken(f"the row is {found}, and was promised to be {job}")


def machine(world: Callable[[], World], acts: Sequence[str]) -> type[RuleBasedStateMachine]:
    """The machine, of these acts; each run of it has a world of its own."""

    class Machine(RuleBasedStateMachine):
        which = st.sampled_from([0, 0, 0, 1])
        pick = st.sampled_from([0, 1])

        def __init__(self) -> None:
            super().__init__()
            self.world = world()

        @initialize()
        def begin(self) -> None:
            self.world.queue()
            self.world.queue()

        @precondition(lambda self: self.world.jobs[self.world.job(0)].status in TERMINAL)
        @rule()
        def queue(self) -> None:
            """The next job, once the newest is over."""
            self.world.queue()

        @rule(which=which, act=st.sampled_from(acts), pick=pick)
        def alone(self, which: int, act: str, pick: int) -> None:
            """A transaction that nobody is beside."""
            job_id = self.world.job(which)
            self.world.alone(act, job_id, pick)

        @rule(
            which=which,
            pair=st.tuples(st.sampled_from(acts), st.sampled_from(acts)),
            picks=st.tuples(pick, pick),
            commits=st.booleans(),
        )
        def at_once(self, which: int, pair: tuple[str, str], picks: tuple[int, int], commits: bool) -> None:
            """A transaction is open while another one comes: that waits, is refused, or passes by."""
            if not self.world.oracle:
                return  # what a mutant breaks, it breaks one after another too
            job_id = self.world.job(which)
            (one, first, token), (two, second, other) = (
                self.world.statements(act, job_id, pick) for act, pick in zip(pair, picks, strict=True)
            )
            with self.world.session() as session, self.world.session() as observer:
                answer = first(session)
                observer.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
                beside = Waiting(self.world.pool, self.world.session(), second)
                waits = beside.waits(observer)
                taken = locks(one, answer)
                if self.world.oracle and waits != (taken and self.world.would_wait(two, job_id, other)):
                    raise Broken(f"{two} {'waits' if waits else 'does not wait'} for {one}")
                if not waits and taken:
                    self.world.changes_nothing(two, job_id, other, beside.answer())
                elif not waits:
                    self.world.promised(two, job_id, other, beside.answer())
                if commits:
                    session.commit()
                else:
                    session.rollback()
            if commits and (waits or taken):
                self.world.promised(one, job_id, token, answer)
            if waits:
                self.world.promised(two, job_id, other, beside.answer())

        @rule(which=which, pick=pick, arrives=st.booleans())
        def publish_without_a_reply(self, which: int, pick: int, arrives: bool) -> None:
            """The COMMIT's outcome is unknown: the attempt asks again, then by its token, and erases what is lost."""
            job_id = self.world.job(which)
            act, statements, token = self.world.statements("publish", job_id, pick)
            if act == "claim":
                return
            with self.world.session() as session:
                answer = statements(session)
                if arrives:
                    session.commit()
            if arrives:
                self.world.promised("publish", job_id, token, answer)
            with self.world.session() as session:
                again = statements(session)
                now = leases.standing(session, job_id)
                session.commit()
            self.world.promised("publish", job_id, token, again)
            assert now is not None
            assert token is not None
            if not again and now.published_prefix != prefix_of(token):
                self.world.stored.discard((job_id, prefix_of(token)))

        @rule(which=which, arrives=st.booleans())
        def claim_without_a_reply(self, which: int, arrives: bool) -> None:
            """The claim's outcome is unknown: the worker looks for a lease in its name, and else claims again."""
            job_id = self.world.job(which)
            _, statements, _ = self.world.statements("claim", job_id, 0)
            worker = f"worker-{self.world._workers}"
            with self.world.session() as session:
                first = statements(session)
                if arrives:
                    session.commit()
            with self.world.session() as session:
                found = leases.adopt(session, job_id, worker=worker)
                if self.world.oracle and found != (first if arrives else None):
                    raise Broken(f"a worker whose claim was {first} found {found}")
                found = found or statements(session)
                session.commit()
            self.world.promised("claim", job_id, None, found)

        @rule(which=which)
        def change_of_hands(self, which: int) -> None:
            """A holder falls silent, the reaper gives the job to somebody else: the first is a zombie."""
            job_id = self.world.job(which)
            self.world.alone("claim", job_id, 0)
            self.lapse(which)
            self.world.alone("reap", job_id, 0)
            self.world.alone("claim", job_id, 0)

        @rule(which=which, pick=pick)
        def zombie_uploads(self, which: int, pick: int) -> None:
            """An attempt writes under its own prefix whenever it likes."""
            job_id = self.world.job(which)
            claims = self.world.claims[job_id]
            if not claims:
                return
            self.world.stored.add((job_id, prefix_of(claims[-1 - pick % len(claims)].token)))

        @rule(which=which)
        def lapse(self, which: int) -> None:
            """The holder falls silent for a lease."""
            job_id = self.world.job(which)
            with self.world.protocol.database.transaction() as session:
                past = func.clock_timestamp() - timedelta(seconds=1)
                held = Job.id == job_id, Job.lease_until.is_not(None)
                session.execute(update(Job).where(*held).values(lease_until=past))
            self.world.jobs[job_id].lapsed = self.world.jobs[job_id].held

        @rule(which=which)
        def deadline_passes(self, which: int) -> None:
            """A job is late from now on."""
            job_id = self.world.job(which)
            job = self.world.jobs[job_id]
            if job.status in TERMINAL or len(self.world.claims[job_id]) < 2:  # or few jobs would be in time
                return
            self.world.protocol.change(job_id, deadline_at=func.clock_timestamp() - timedelta(seconds=1))
            job.late = True

        @rule()
        def fail_what_is_too_late(self) -> None:
            """The control loop ends queued jobs whose deadline has passed."""
            with self.world.protocol.database.transaction() as session:
                found = set(reaper.expire_queued(session)) & set(self.world.jobs)
            late = {job_id for job_id, job in self.world.jobs.items() if job.status == "queued" and job.late}
            for job_id in late:
                self.world.jobs[job_id].status = "failed"
            if self.world.oracle and found != late:
                raise Broken(f"{found} were ended as late and not {late}")

        @invariant()
        def every_promise_holds(self) -> None:
            self.world.audit()

        def teardown(self) -> None:
            """Whatever is left comes to its end."""
            if not self.world.oracle:
                return
            self.fail_what_is_too_late()
            for job_id, job in self.world.jobs.items():
                if job.status == "queued":
                    self.world.alone("claim", job_id, 0)
                if job.held:
                    self.world.alone("acknowledge" if job.status == "cancelling" else "fail", job_id, 0)
            self.world.audit()
            assert all(job.status in TERMINAL for job in self.world.jobs.values())

    return Machine


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for transactions that wait."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


def run(
    protocol: Protocol, pool: ThreadPoolExecutor, *, oracle: bool, acts: Sequence[str] = EVERYTHING, **changes: Any
) -> None:
    """Run the machine, always the same way."""
    values: dict[str, Any] = {"max_examples": 30, "stateful_step_count": 25, **changes}
    fixed = settings(
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        **values,
    )
    made = machine(lambda: World(protocol, pool, oracle=oracle), acts)
    run_state_machine_as_test(made, settings=fixed)  # type: ignore[no-untyped-call]  # hypothesis does not annotate it


@pytest.fixture
def protocol(database: Database, caller: Caller) -> Protocol:
    """The protocol on a fresh database."""
    return Protocol(database, caller)


def test_at_most_one_attempt_ends_a_job_and_every_job_ends_once(protocol: Protocol, pool: ThreadPoolExecutor) -> None:
    run(protocol, pool, oracle=True)


def without_token(job_id: str, token: int, statuses: tuple[str, ...] = leases.HELD) -> ColumnElement[bool]:
    """The fence of a protocol without tokens."""
    return and_(Job.id == job_id, Job.status.in_(statuses))


def without_status(job_id: str, token: int, statuses: tuple[str, ...] = leases.HELD) -> ColumnElement[bool]:
    """The fence of a protocol that asks who ends a job, and not whether it may be ended so."""
    return and_(Job.id == job_id, Job.fencing_token == token)


genuine_claim = leases.claim


def claim_of_any(session: Session, job_id: str, **given: Any) -> Claim | None:
    """A claim that takes a job whoever has it."""
    held = Job.id == job_id, Job.lease_until.is_not(None)
    session.execute(update(Job).where(*held).values(status="queued", lease_until=None))
    return genuine_claim(session, job_id, **given)


@pytest.mark.parametrize(
    ("name", "mutant", "broken"),
    [
        ("fenced", without_token, "a stale token acted|of an attempt were named that did not hold the lease"),
        ("fenced", without_status, "a cancel that came first was overruled|an end was not the end|nobody held"),
        ("claim", claim_of_any, "a claim took a job that was not waiting"),
    ],
    ids=["token", "status", "queued"],
)
def test_a_protocol_without_one_of_its_conditions_is_caught_by_the_auditor(
    name: str, mutant: Any, broken: str, protocol: Protocol, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, name, mutant)

    with pytest.raises(Broken, match=broken):
        run(protocol, pool, oracle=False, acts=FEW, max_examples=100, phases=[Phase.generate])
