"""Holding a lease: a thread that renews it, carries progress along, and learns of a cancel, a deadline or a loss."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

from services import leases
from services.database import Database
from services.leases import Claim
from services.logs import inheriting
from worker.patience import database_away

__all__ = ["LeaseKeeper"]

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 4
ANSWERS_PER_LEASE = 3  # that may fail to come, each with its connection, before the lease is over
SLOWEST_VISIT_SECONDS = 2.0  # a cancel or a deadline is seen after this at the latest
PROGRESS_SECONDS = 1.0  # between two writes of progress in the same phase
RETRY_SECONDS = 0.25
LOOK_SECONDS = 1.0  # between two looks after a supervisor that may stand still
LEAVE_SECONDS = 5.0


@dataclass
class _Note:
    phase: str
    progress: dict[str, Any] | None


class LeaseKeeper:
    """Renews the lease of one claim until it is stopped. Every renewal that arrives is passed on as a beat.

    The time that counts is measured on this host from before the renewal was sent: that is never later than the
    database's own count, so that ``held`` turns false before anybody else can be given the job.

    A supervisor that waits for a call which never returns must not hold its job for ever: it calls ``moved`` as it goes
    along, and once it got nowhere for ``stall_seconds`` the lease is let go, and ``on_stall`` is called.

    Args:
        database: where the lease is; renewals have connections of their own to it.
        claim: whose it is.
        ttl_seconds: how long a lease holds.
        claimed_at: when the claim was sent (``time.monotonic``).
        stall_seconds: how long the supervisor may stand still.
        elsewhere_at: when something else that the attempt waits for last moved (``time.monotonic``).
        on_stall: called from this thread, once.
    """

    def __init__(
        self,
        database: Database,
        claim: Claim,
        *,
        ttl_seconds: float,
        claimed_at: float,
        stall_seconds: float = float("inf"),
        elsewhere_at: Callable[[], float] = lambda: 0.0,
        on_stall: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database.another(pool_size=1, answer_seconds=ttl_seconds / ANSWERS_PER_LEASE)
        self._claim = claim
        self._ttl = ttl_seconds
        self._stall, self._elsewhere_at, self._on_stall = stall_seconds, elsewhere_at, on_stall
        self._moved_at = time.monotonic()
        self._renewed_at = claimed_at
        self._lost = False
        self._beat: Callable[[], None] | None = None
        self._notes: list[_Note] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self.unwanted = threading.Event()  # set once the caller has cancelled or the deadline has passed
        self._thread = threading.Thread(target=inheriting(self._run), name=f"lease-{claim.job_id}", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        threading.Thread(target=inheriting(self._look_after), name="stall", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._wake.set()
        self._thread.join(LEAVE_SECONDS)  # it may be in the middle of a visit to a database that does not answer

    @property
    def held(self) -> bool:
        """Whether nobody else can have the job: not told otherwise, and renewed less than a lease ago."""
        return not self._lost and time.monotonic() < self._renewed_at + self._ttl

    @property
    def taken(self) -> bool:
        """Whether the database said that the lease is gone."""
        return self._lost

    def moved(self) -> None:
        """The attempt got somewhere."""
        self._moved_at = time.monotonic()

    def beat_into(self, beat: Callable[[], None] | None) -> None:
        """Call this after every renewal from now on."""
        self._beat = beat
        if beat is not None and self.held:
            beat()

    def note(self, phase: str, progress: dict[str, Any] | None = None) -> None:
        """Show where the attempt is, soon: at once for a new phase, else with the next visit."""
        with self._lock:
            if self._notes and self._notes[-1].phase == phase:
                self._notes[-1].progress = progress if progress is not None else self._notes[-1].progress
            else:
                self._notes.append(_Note(phase, progress))
        self._wake.set()

    def take_notes(self) -> list[tuple[str, dict[str, Any] | None]]:
        """What has not been written yet, for the transaction that ends the attempt."""
        with self._lock:
            notes, self._notes = self._notes, []
        return [(note.phase, note.progress) for note in notes]

    def _run(self) -> None:
        try:
            self._keep()
        finally:
            self._database.close()

    def _keep(self) -> None:
        pause = min(self._ttl / RENEWALS_PER_LEASE, SLOWEST_VISIT_SECONDS)
        phase = ""
        while not self._stopped.is_set() and not self._lost:
            with self._lock:
                notes, self._notes = self._notes, []
            before = time.monotonic()
            try:
                answer = self._visit(notes)
            except Exception as error:
                if not database_away(error):
                    logger.exception("%s attempt %d: renewal failed", self._claim.job_id, self._claim.attempt)
                with self._lock:
                    self._notes = notes + self._notes
                self._stopped.wait(RETRY_SECONDS)
                continue
            if answer == "lost":
                self._lost = True
                return
            self._renewed_at = before
            if answer in ("cancel", "expired"):
                self.unwanted.set()
            if (beat := self._beat) is not None:
                beat()
            if notes:
                phase = notes[-1].phase
            self._rest(before, pause, phase)

    def _look_after(self) -> None:
        """In a thread that waits for nobody: a visit to the database may be what does not return."""
        while not self._stopped.wait(LOOK_SECONDS):
            if time.monotonic() > max(self._moved_at, self._elsewhere_at()) + self._stall:
                self._let_go()
                return

    def _let_go(self) -> None:
        logger.critical(
            "%s attempt %d: its supervisor got nowhere for %.0f s; letting go of the lease",
            *(self._claim.job_id, self._claim.attempt, self._stall),
        )
        self._lost = True
        self._on_stall()

    def _rest(self, since: float, pause: float, phase: str) -> None:
        """Wait for the next visit: sooner for a new phase, after a second for progress in the old one."""
        while not self._stopped.is_set():
            self._wake.clear()
            with self._lock:
                new_phase = any(note.phase != phase for note in self._notes)
                waiting = bool(self._notes)
            if new_phase:
                return
            left = since + (min(pause, PROGRESS_SECONDS) if waiting else pause) - time.monotonic()
            if left <= 0:
                return
            self._wake.wait(left)

    def _visit(self, notes: list[_Note]) -> str:
        claim = self._claim
        with self._database.transaction() as session:
            answer = leases.renew(session, claim.job_id, claim.token, ttl_seconds=self._ttl)
            if answer != "lost" and notes:
                self._write(session, notes)
        return answer

    def _write(self, session: Session, notes: list[_Note]) -> None:
        """In a transaction within the renewal's: progress that the database refuses must not cost the lease."""
        try:
            with session.begin_nested():
                for note in notes:
                    leases.record_progress(session, self._claim, phase=note.phase, progress=note.progress)
        except DataError as error:
            kind = type(error.orig).__name__
            logger.warning("%s attempt %d: odd progress left out (%s)", self._claim.job_id, self._claim.attempt, kind)
