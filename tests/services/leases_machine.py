"""What the job protocol promises of one job, and what its statements do to the database: two sides of one machine."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from services import jobs, leases, reaper
from services.errors import JobEnded
from services.leases import Claim
from services.tables import Job
from services.tenancy import Caller

BUDGET = 2
TTL = 30.0
TERMINAL = ("succeeded", "failed", "cancelled")
WAIT_SECONDS = 20.0

ACTS = (
    "publish", "report", "fail", "expire", "release", "retry_smaller", "acknowledge", "lose",
    "renew", "progress", "state",
)  # fmt: skip
"""What an attempt does with its token."""
OTHERS = ("claim", "cancel", "reap")
"""What others do with a job."""


def prefix_of(token: int) -> str:
    """Where an attempt's artifacts lie."""
    return f"attempts/{token}/"


@dataclass
class Expected:
    """What the protocol promises about one job."""

    status: str = "queued"
    token: int | None = None
    """Of the newest claim."""
    attempt: int = 0
    losses: int = 0
    published: str | None = None
    lapsed: bool = False
    """Its lease is over."""
    late: bool = False
    """Its deadline has passed."""

    @property
    def held(self) -> bool:
        """Whether an attempt has it."""
        return self.status in ("running", "cancelling")

    def answer(self, act: str, token: int | None) -> Any:
        """What a statement must say; the job is then as it leaves it."""
        if act in OTHERS:
            return getattr(self, f"_{act}")()
        ours = self.held and self.token == token
        if act == "renew":
            return self._renew() if ours else "lost"
        if act == "lose":
            return self._given_back() if ours else None
        if act in ("progress", "state"):
            return ours
        return ours and self._ends(act)

    def _ends(self, act: str) -> bool:
        wanted = "cancelling" if act == "acknowledge" else "running"
        if self.status != wanted or (act in ("publish", "report") and self.late) or (act == "expire" and not self.late):
            return False
        if act in ("publish", "report"):
            assert self.token is not None
            self.published = prefix_of(self.token)
        if act == "release":
            self.attempt -= 1
        ends = {"publish": "succeeded", "release": "queued", "retry_smaller": "queued", "acknowledge": "cancelled"}
        self._leave(ends.get(act, "failed"))
        return True

    def _claim(self) -> bool:
        if self.status != "queued" or self.late:
            return False
        self.status, self.attempt = "running", self.attempt + 1
        return True

    def _cancel(self) -> str:
        if self.status in ("succeeded", "failed"):
            return "ended"
        if self.status == "queued":
            self.status = "cancelled"
        elif self.status == "running":
            self.status = "cancelling"
        return self.status

    def _reap(self) -> str | None:
        return self._given_back() if self.held and self.lapsed else None

    def _renew(self) -> str:
        self.lapsed = False
        if self.status == "cancelling":
            return "cancel"
        return "expired" if self.late else "held"

    def _given_back(self) -> str:
        if self.status == "cancelling":
            self._leave("cancelled")
        elif self.late or self.losses == BUDGET:
            self._leave("failed")
        else:
            self.losses += 1
            self._leave("queued")
        return self.status

    def _leave(self, status: str) -> None:
        self.status, self.lapsed = status, False


class Broken(AssertionError):
    """A promise that did not hold, in words."""


class Auditor:
    """Reads what the database shows of one job, as its owner could, and knows nothing of who did what."""

    def __init__(self) -> None:
        self._ended: str | None = None
        self._named: str | None = None
        self._token = 0

    def look(self, row: Job, events: list[tuple[str, dict[str, Any]]], audited: list[str]) -> None:
        """Compare the row with its history and with what it was before.

        Args:
            row: the job.
            events: all of its own, oldest first.
            audited: its endings in the audit log.

        Raises:
            Broken: a promise did not hold.
        """
        if self._ended not in (None, row.status):
            raise Broken(f"an end was not the end: {self._ended}, then {row.status}")
        if self._named not in (None, row.published_prefix):
            raise Broken("another prefix was named in the place of the first")
        if row.published_prefix not in (None, prefix_of(row.fencing_token or 0)):
            raise Broken("artifacts of an attempt were named that did not hold the lease")
        if (row.fencing_token or 0) < self._token:
            raise Broken("a token was smaller than one before it")
        at_last = _walked(events)
        if at_last != row.status:
            raise Broken(f"the row says {row.status}, its events {at_last}")
        if audited != [row.status] * (row.status in TERMINAL):
            raise Broken(f"the audit log has {audited} of a job that is {row.status}")
        self._ended = row.status if row.status in TERMINAL else None
        self._named, self._token = row.published_prefix, row.fencing_token or 0


GIVEN_BACK = ("drained", "out_of_memory", "attempt_lost", "lease_expired")


def _walked(events: list[tuple[str, dict[str, Any]]]) -> str:
    """The status to which the events lead, one by one; Broken where one may not follow."""
    status, attempt = "queued", 0
    for name, data in events[1:]:  # the first is what queued it
        if status in TERMINAL:
            raise Broken(f"an end was not the end: {status}, then {name}")
        if name == "attempt_started":
            if status != "queued":
                raise Broken("a claim took a job that was not waiting")
            status, attempt = "running", int(data["attempt"])
            continue
        if status == "cancelling" and name in ("succeeded", "failed", *GIVEN_BACK):
            raise Broken(f"a cancel that came first was overruled: {name}")
        if status == "queued" and name in ("succeeded", *GIVEN_BACK):
            raise Broken(f"a job that nobody held was {name}")
        if status == "running" and data.get("attempt", attempt) != attempt:
            raise Broken(f"a stale token acted: attempt {data['attempt']} was {name} while {attempt} held the job")
        status = "cancelling" if name == "cancel_requested" else "queued" if name in GIVEN_BACK else status
        status = name if name in TERMINAL else status
    return status


def locks(act: str, answer: Any) -> bool:
    """Whether an act that said so has the row until its transaction ends."""
    return act == "cancel" or answer not in (None, False, "lost")


def perform(session: Session, caller: Caller, act: str, job_id: str, claim: Claim | None, worker: str = "") -> Any:
    """The statements of an act, in a transaction that is left open."""
    if act == "claim":
        return leases.claim(session, job_id, worker=worker, ttl_seconds=TTL)
    if act == "cancel":
        try:
            return jobs.cancel(session, caller, job_id).status
        except JobEnded:
            return "ended"
    if act == "reap":
        found = [row for row in reaper.expired_leases(session) if row.id == job_id]
        return reaper.reap(session, found[0], budget=BUDGET) if found else None
    assert claim is not None
    return _attempts(session, act, claim)


def _attempts(session: Session, act: str, claim: Claim) -> Any:
    named: dict[str, Any] = {"prefix": prefix_of(claim.token), "artifacts": [], "summary": {}}
    match act:
        case "publish":
            return leases.publish(session, claim, **named)
        case "report":
            return leases.fail(session, claim, reason="criteria_not_met", problem={}, **named)
        case "fail":
            return leases.fail(session, claim, reason="internal", problem={})
        case "expire":
            return leases.expire(session, claim)
        case "release":
            return leases.release(session, claim)
        case "retry_smaller":
            return leases.retry_smaller(session, claim)
        case "acknowledge":
            return leases.cancelled(session, claim)
        case "lose":
            return reaper.lose(session, claim, why="signal 9", budget=BUDGET)
        case "renew":
            return leases.renew(session, claim.job_id, claim.token, ttl_seconds=TTL)
        case "progress":
            return leases.record_progress(session, claim, phase="unlearning", progress={"step": 1})
        case "state":
            return leases.record_state(session, claim, {"key": prefix_of(claim.token), "step": 1})
    raise ValueError(act)


class Waiting:
    """A transaction of somebody else's, in a thread: whether it has to wait, and what it says in the end."""

    def __init__(self, pool: ThreadPoolExecutor, session: Session, what: Any) -> None:
        self._session = session
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        self._pid = int(pid or 0)
        self._future: Future[Any] = pool.submit(self._work, what)

    def _work(self, what: Any) -> Any:
        with self._session as session:
            session.execute(text(f"SET LOCAL lock_timeout = '{WAIT_SECONDS}s'"))
            answer = what(session)
            session.commit()
            return answer

    def waits(self, observer: Session) -> bool:
        """Whether it waits for a lock. False: it is done."""
        limit = time.monotonic() + WAIT_SECONDS
        while not self._future.done():
            if observer.scalar(text("SELECT cardinality(pg_blocking_pids(:pid)) > 0"), {"pid": self._pid}):
                return True
            if time.monotonic() > limit:
                raise TimeoutError("a transaction neither waits nor ends")
            time.sleep(0.0005)
        return False

    def answer(self) -> Any:
        """What it said."""
        return self._future.result(WAIT_SECONDS)
