"""One attempt at one job: claim, fetch, start the runner, watch over it, and bring what it made to its one end.

Whatever happens here, the job stays consistent: everything that this process writes is fenced by the claim's token,
and everything that it fails to write is taken up by the reaper once the lease is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from services import leases
from services.database import Database
from services.leases import Claim
from services.logs import about
from services.metrics import Metrics
from services.settings import Settings
from services.storage import ObjectStorage, Stopped
from services.tracing import Tracing
from worker import assets, inputs, memory, publication
from worker.assets import AssetKeeper
from worker.endings import INTERRUPTED_STATUS, Ending, classify, problem
from worker.lease import LeaseKeeper
from worker.patience import GaveUp, StayedAway, database_away, patiently, store_away
from worker.phases import Phases, traced
from worker.process import RUNNER_COMMAND, Malformed, RunnerProcess, runner_environment
from worker.scratch import Scratch
from worker.settlement import Settlement
from worker.states import StateKeeper

__all__ = ["Supervisor"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
STATE_WAIT_SECONDS = 0.5
SIGNAL_SPREAD_SECONDS = 1.0
CUT_OFF_SECONDS = 60.0  # that a worker without a store sits on a doorbell
PING_SECONDS = 5.0
SILENCE = Ending("lost", why="the database did not answer for a whole lease")


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
        self._command = tuple(runner_command)
        self._oom_kills, self._on_stall = oom_kills, on_stall
        self._metrics, self._tracing = metrics or Metrics(), tracing or Tracing()
        self._settlement = Settlement(settings, database, self._metrics, until=lambda: self._drain_by)
        self._here: set[str] = set()
        self._lock = threading.Lock()
        self.drain = threading.Event()
        self._cut_off = threading.Event()  # the store did not answer this worker for so long that it gave a job back
        self._drain_by = float("inf")

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
        """Whether the store answers, asked only after it did not: else this worker would take jobs from those who can.

        Keeps its slot busy for a while, so that no further bell is heard here.
        """
        if not self._cut_off.is_set():
            return True
        limit = time.monotonic() + CUT_OFF_SECONDS
        while time.monotonic() < limit and not self.drain.is_set():
            try:
                self._storage.ping()
            except Exception as error:
                logger.warning("taking no job: the store does not answer (%s)", type(error).__name__)
                self.drain.wait(PING_SECONDS)
            else:
                logger.info("the store answers again")
                self._cut_off.clear()
                return True
        return False

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
        with keeper, self._scratch.attempt(claim.job_id, claim.token) as folder:
            try:
                ending = _Attempt(self, storage, claim, keeper, folder, phases).work()
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


class _Attempt:
    """The time between claim and ending. ``work`` says how it ended and touches no status."""

    def __init__(
        self,
        supervisor: Supervisor,
        storage: ObjectStorage,
        claim: Claim,
        keeper: LeaseKeeper,
        folder: Path,
        phases: Phases,
    ) -> None:
        self._supervisor, self._storage = supervisor, storage
        self._settings, self._database = supervisor._settings, supervisor._database
        self._claim, self._keeper, self._folder, self._phases = claim, keeper, folder, phases
        self._result: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None

    def work(self) -> Ending:
        """Fetch, run, publish to the store."""
        try:
            ending = self._supervise()
        except inputs.InputMissing as error:
            told = problem("input-missing", "An input of the job is gone", str(error), pointer=error.pointer)
            return Ending.failed("user_error", told)
        except StayedAway:
            # Nothing is computed yet, and another host may reach the store, or have credentials that it takes.
            self._supervisor._cut_off.set()
            return self._interrupted(Ending("released", why="the store did not answer this worker"))
        except (GaveUp, Stopped):
            return self._interrupted()
        if ending.artifacts is None:
            return ending
        self._phases.enter("publishing")
        self._keeper.note("publishing")
        try:
            return patiently(
                lambda: ending.uploaded(self._storage, self._claim, self._may_save),
                away=store_away,
                going_on=self._may_save,
                what=f"{self._claim.job_id}: artifact upload",
            )
        except (GaveUp, Stopped):
            return self._interrupted()

    def _plan(self) -> inputs.Plan:
        def look_up() -> inputs.Plan:
            with self._database.transaction() as session:
                return inputs.plan(session, self._claim, self._settings)

        return patiently(look_up, away=database_away, going_on=self._going_on, what=f"{self._claim.job_id}: inputs")

    def _fetch(self, plan: inputs.Plan) -> None:
        resumable = patiently(
            lambda: inputs.fetch(self._storage, plan, self._folder, going_on=self._going_on),
            away=store_away,
            going_on=self._going_on,
            what=f"{self._claim.job_id}: inputs",
            pause=self._supervisor.drain,
            within=self._settings.store_patience_seconds,
        )
        if not self._going_on():
            raise GaveUp
        if self._claim.resume is not None and not resumable:
            logger.warning("%s attempt %d: its state is gone or damaged; starting from the beginning", *self._name())
        job = {**plan.job, "resume": inputs.STATE} if resumable else plan.job
        if "fisher" in job["inputs"]:
            job = {**job, "inputs": {**job["inputs"], "fisher": self._fetch_assets()}}
        inputs.write_job(self._folder, job)

    def _fetch_assets(self) -> dict[str, str]:
        return patiently(
            lambda: assets.fetch(self._storage, self._claim, self._folder, going_on=self._going_on),
            away=store_away,
            going_on=self._going_on,
            what=f"{self._claim.job_id}: assets",
            pause=self._supervisor.drain,
            within=self._settings.store_patience_seconds,
        )

    def _supervise(self) -> Ending:
        # Loading its libraries takes the runner as long as we take to fetch; where it reads a hostile file, it is to
        # load nothing before its walls stand, and these need to know the job: then nothing is named ahead.
        plan = self._plan()
        if not plan.ahead:
            self._fetch(plan)
        kills_before = self._supervisor._oom_kills()
        process = RunnerProcess(
            self._supervisor._command,
            self._folder,
            environment=runner_environment(self._folder, self._supervisor._scratch.cache),
            ahead=plan.ahead,
        )
        malformed: Malformed | None = None
        status: int | None = None
        with (
            StateKeeper(self._database, self._storage, self._claim, going_on=self._may_save) as states,
            AssetKeeper(
                self._database,
                self._storage,
                self._claim,
                going_on=self._may_save,
                leaving=self._supervisor.drain.is_set,
            ) as kept,
        ):
            try:
                self._keeper.beat_into(process.beat)
                if plan.ahead:
                    self._fetch(plan)
                self._watch(process, states, kept)
            except Malformed as error:
                malformed = error
                process.kill()
            except BaseException:
                process.kill()
                raise
            finally:
                self._keeper.beat_into(None)
                status = process.finish()
            self._wait_for(states, kept)
        if self._keeper.taken:
            return Ending("gone")
        if status == INTERRUPTED_STATUS:
            # Whoever stops a machine signals everything at once: our own turn to drain may come a moment later.
            self._supervisor.drain.wait(SIGNAL_SPREAD_SECONDS)
        oom = self._supervisor._oom_kills() > kills_before
        if status != 0 and self._result is None:
            logger.warning("%s attempt %d: runner ended with %s at %s", *self._name(), status, process.crash_note())
        if self._result is None and self._error is None and malformed is None and not self._going_on():
            return self._interrupted()
        return classify(
            self._claim,
            self._settings,
            status=status,
            oom_kill=oom,
            result=self._result,
            error=self._error,
            malformed=malformed,
            folder=self._folder,
        )

    def _watch(self, process: RunnerProcess, states: StateKeeper, kept: AssetKeeper) -> None:
        """Relay until the runner has said its last; stop it on cancel, deadline and drain, kill it without a lease.

        A runner that hangs in a driver still reads its beats: what it does not do is talk, so silence ends it too.
        """
        kill_at: float | None = None
        heard_at = time.monotonic()
        while not process.ended:
            self._keeper.moved()
            message = process.next_message(POLL_SECONDS)
            if message is not None:
                heard_at = time.monotonic()
                self._take(message, states, kept)
            if time.monotonic() > heard_at + self._settings.runner_silence_seconds:
                logger.warning("%s attempt %d: the runner said nothing for too long; killing it", *self._name())
                process.kill()
                return
            if not self._keeper.held:
                logger.warning("%s attempt %d: the lease is lost; killing the runner", *self._name())
                process.kill()
                return
            if kill_at is None and (self._keeper.unwanted.is_set() or self._supervisor.drain.is_set()):
                unwanted = self._keeper.unwanted.is_set()
                grace = self._settings.cancel_grace_seconds if unwanted else self._settings.drain_grace_seconds
                kill_at = time.monotonic() + grace
                process.terminate()
            if kill_at is not None and self._keeper.unwanted.is_set():
                kill_at = min(kill_at, time.monotonic() + self._settings.cancel_grace_seconds)
            if kill_at is not None and time.monotonic() > kill_at:
                logger.warning("%s attempt %d: the runner did not stop in time; killing it", *self._name())
                process.kill()
                return

    def _take(self, message: dict[str, Any], states: StateKeeper, kept: AssetKeeper) -> None:
        kind = message["type"]
        if kind in ("phase", "progress"):
            phase = message.get("phase")
            if phase not in ("validating", "replay", "fisher", "unlearning", "evaluating"):
                raise Malformed("an unknown phase")
            progress = {key: value for key, value in message.items() if key != "type"} if kind == "progress" else None
            self._phases.enter(phase)
            self._keeper.note(phase, progress)
        elif kind == "state":
            path, step = message.get("path"), message.get("step")
            if not isinstance(path, str) or not isinstance(step, int) or path != f"state/{Path(path).name}":
                raise Malformed("an odd state")
            states.add(publication.plain_file(self._folder, path), step)
        elif kind == "asset":
            kept.add(assets.offered(message, self._folder))
        elif kind == "result":
            self._result = message
        elif kind == "error":
            self._error = message

    def _wait_for(self, states: StateKeeper, kept: AssetKeeper) -> None:
        """The last state of an interrupted attempt is what the next one starts from, and so is what it worked out."""
        if self._result is not None or self._keeper.unwanted.is_set():
            return
        while self._worth_saving() and not states.wait(STATE_WAIT_SECONDS):
            continue
        while self._error is None and self._worth_saving() and not kept.wait(STATE_WAIT_SECONDS):
            continue

    def _interrupted(self, otherwise: Ending = SILENCE) -> Ending:
        """Why an attempt without a result of its own stopped."""
        if self._keeper.taken:
            return Ending("gone")
        if self._keeper.unwanted.is_set():
            return Ending("stopped")
        if self._supervisor.drain.is_set():
            return Ending("released")
        return otherwise

    def _going_on(self) -> bool:
        self._keeper.moved()
        return self._wanted() and not self._supervisor.drain.is_set()

    def _may_save(self) -> bool:
        """States and artifacts are still worth their upload while draining: that is what the drain is for.

        Asked by who uploads, between two tries.
        """
        self._keeper.moved()
        return self._worth_saving()

    def _worth_saving(self) -> bool:
        """The same, asked by who waits for an upload, and would not notice that it stands still."""
        return self._wanted() and time.monotonic() < self._supervisor._drain_by

    def _wanted(self) -> bool:
        return self._keeper.held and not self._keeper.unwanted.is_set()

    def _name(self) -> tuple[str, int]:
        return _name(self._claim)


def _name(claim: Claim) -> tuple[str, int]:
    return claim.job_id, claim.attempt


def _method(claim: Claim) -> str:
    return "import" if claim.kind == "import" else str(claim.request.get("method"))
