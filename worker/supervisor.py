"""From a doorbell to a job's end: claim it, make an attempt at it, and bring what that made to its one end.

Whatever happens here, the job stays consistent: everything that this process writes is fenced by the claim's token,
and everything that it fails to write is taken up by the reaper once the lease is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from services import leases
from services.database import Database
from services.leases import Claim
from services.logs import about
from services.metrics import Metrics
from services.settings import Settings
from services.storage import ObjectStorage
from services.tracing import Tracing
from worker import memory
from worker.attempt import Attempt, Shared
from worker.endings import Ending
from worker.lease import LeaseKeeper
from worker.patience import GaveUp, database_away, patiently
from worker.phases import Phases, traced
from worker.process import RUNNER_COMMAND
from worker.scratch import Scratch
from worker.settlement import Settlement

__all__ = ["Supervisor"]

logger = logging.getLogger(__name__)

IDLE_SECONDS = 60.0  # that a worker without a store or a disk sits on a doorbell
PING_SECONDS = 5.0
ROOM_BYTES = 16 * 2**20  # of scratch, without which not even a small job gets anywhere


class Supervisor:
    """Runs claimed jobs for one worker process; ``drain`` makes every attempt hand its job back."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: ObjectStorage,
        scratch: Scratch,
        *,
        worker: str,
        runner_command: Sequence[str] = RUNNER_COMMAND,
        oom_kills: Callable[[], int] = memory.oom_kills,
        on_stall: Callable[[], None] = lambda: None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        # One an attempt at a time: what one of them moves says nothing of a neighbour that stands still.
        self._idle_storages = [storage]
        self._scratch = scratch
        self._worker = worker
        self._on_stall = on_stall
        self._metrics, self._tracing = metrics or Metrics(), tracing or Tracing()
        self._settlement = Settlement(settings, database, self._metrics, until=lambda: self._drain_by)
        self._here: set[str] = set()
        self._lock = threading.Lock()
        self.drain = threading.Event()
        self._drain_by = float("inf")
        self._cut_off = threading.Event()
        self._shared = Shared(
            settings=settings,
            database=database,
            command=tuple(runner_command),
            cache=scratch.cache,
            oom_kills=oom_kills,
            drain=self.drain,
            drain_by=lambda: self._drain_by,
            cut_off=self._cut_off,
        )

    def start_draining(self) -> None:
        """Take nothing more, and hand back what is at work within ``drain_grace_seconds``."""
        if not self.drain.is_set():
            self._drain_by = time.monotonic() + self._settings.drain_grace_seconds
            self.drain.set()

    def run(self, job_id: str) -> str:
        """Answer a doorbell. Returns how it ended: ``not claimed``, ``lost``, or the job's new status."""
        with self._lock:
            if job_id in self._here:
                return "not claimed"
            self._here.add(job_id)
        try:
            return self._run(job_id)
        finally:
            with self._lock:
                self._here.discard(job_id)

    def _run(self, job_id: str) -> str:
        if self.drain.is_set() or not self._can_work():
            return "not claimed"
        before = time.monotonic()
        claim = self._claim(job_id)
        if claim is None:
            logger.info("%s: the doorbell found nothing to claim", job_id)
            return "not claimed"
        with about(job=claim.job_id, attempt=claim.attempt, token=claim.token, worker=self._worker):
            return self._attempt(claim, before)

    def _can_work(self) -> bool:
        """Whether an attempt has a chance here: else this worker, idle first, would take jobs from those who can.

        Keeps its slot busy for a while where not, so that no further bell is heard here.
        """
        limit = time.monotonic() + IDLE_SECONDS
        while (why := self._useless()) is not None:
            logger.warning("taking no job: %s", why)
            if self.drain.wait(PING_SECONDS) or time.monotonic() > limit:
                return False
        return True

    def _useless(self) -> str | None:
        """Why no attempt would get anywhere. The store is asked only after it did not answer."""
        if (free := self._scratch.free_bytes()) < ROOM_BYTES:
            return f"the disk of the scratch folder is full ({free} bytes left)"
        if self._cut_off.is_set():
            try:
                self._storage.probe()
            except Exception as error:
                return f"the store does not answer ({type(error).__name__})"
            logger.info("the store answers again")
            self._cut_off.clear()
        return None

    def _attempt(self, claim: Claim, before: float) -> str:
        """From the claim, which was asked for at ``before``, to the end."""
        logger.info("%s attempt %d: claimed, token %d", claim.job_id, claim.attempt, claim.token)
        with self._lock:
            storage = self._idle_storages.pop() if self._idle_storages else self._storage.another()
        span = self._tracing.begin("job", parent=claim.traceparent)
        phases = Phases(self._metrics, span, method=_method(claim))
        keeper = LeaseKeeper(
            self._database,
            claim,
            ttl_seconds=self._settings.lease_ttl_seconds,
            claimed_at=before,
            stall_seconds=self._settings.stall_seconds,
            elsewhere_at=lambda: storage.moved_at,
            on_stall=self._on_stall,
        )
        with keeper, ExitStack() as attempt:
            try:
                folder = attempt.enter_context(self._scratch.attempt(claim.job_id, claim.token))
                ending = Attempt(self._shared, storage, claim, keeper, folder, phases).work()
            except Exception as error:
                # A fault of ours: the job goes back to the queue at once, within its budget.
                logger.exception("%s attempt %d: the supervisor failed", claim.job_id, claim.attempt)
                ending = Ending("lost", why=f"supervisor: {type(error).__name__}")
            outcome = self._settlement.settle(storage, claim, keeper, ending)
        with self._lock:
            self._idle_storages.append(storage)
        phases.end()
        span.end("job", traced(claim, outcome, _method(claim)), failed=outcome in ("failed", "lost", "unsettled"))
        logger.info("%s attempt %d: %s", claim.job_id, claim.attempt, outcome)
        return outcome

    def _claim(self, job_id: str) -> Claim | None:
        """Claim, even if the reply to a COMMIT is lost on the way: then the lease is found by this worker's name."""
        unsure = False

        def once() -> Claim | None:
            nonlocal unsure
            adopt, unsure = unsure, True
            with self._database.transaction() as session:
                claim = leases.claim(
                    session,
                    job_id,
                    worker=self._worker,
                    ttl_seconds=self._settings.lease_ttl_seconds,
                    running_jobs=self._settings.tenant_running_jobs,
                )
                # Asked second: the claim waits for the COMMIT whose reply was lost, where that is still on its way.
                return leases.adopt(session, job_id, worker=self._worker) if claim is None and adopt else claim

        limit = time.monotonic() + self._settings.lease_ttl_seconds
        try:
            return patiently(
                once,
                away=database_away,
                going_on=lambda: time.monotonic() < limit and not self.drain.is_set(),
                what=f"{job_id}: claim",
                pause=self.drain,
            )
        except GaveUp:
            return None  # a queued job is rung again; a lease that nobody knows of is reaped


def _method(claim: Claim) -> str:
    return "import" if claim.kind == "import" else str(claim.request.get("method"))
