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

from sqlalchemy.exc import DataError

from services import leases, object_keys
from services.database import Database
from services.leases import Claim
from services.settings import Settings
from services.storage import ObjectStorage
from worker import assets, inputs, memory, publication
from worker.assets import AssetKeeper
from worker.endings import INTERRUPTED_STATUS, Ending, classify, internal, problem
from worker.lease import LeaseKeeper
from worker.patience import GaveUp, database_away, patiently, store_away
from worker.process import RUNNER_COMMAND, Malformed, RunnerProcess, runner_environment
from worker.scratch import Scratch
from worker.states import StateKeeper

__all__ = ["Supervisor"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
STATE_WAIT_SECONDS = 0.5
SIGNAL_SPREAD_SECONDS = 1.0
# A finished attempt goes on asking for its publication through an outage; the token keeps that safe past the lease.
SETTLING_SECONDS = 900.0


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
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._scratch = scratch
        self._worker = worker
        self._command = tuple(runner_command)
        self._oom_kills = oom_kills
        self._here: set[str] = set()
        self._lock = threading.Lock()
        self.drain = threading.Event()
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
        if self.drain.is_set():
            return "not claimed"
        before = time.monotonic()
        claim = self._claim(job_id)
        if claim is None:
            logger.info("%s: the doorbell found nothing to claim", job_id)
            return "not claimed"
        logger.info("%s attempt %d: claimed, token %d", claim.job_id, claim.attempt, claim.token)
        keeper = LeaseKeeper(self._database, claim, ttl_seconds=self._settings.lease_ttl_seconds, claimed_at=before)
        with keeper, self._scratch.attempt(claim.job_id, claim.token) as folder:
            try:
                ending = _Attempt(self, claim, keeper, folder).work()
            except Exception as error:
                # A fault of ours: the job goes back to the queue at once, within its budget.
                logger.exception("%s attempt %d: the supervisor failed", claim.job_id, claim.attempt)
                ending = Ending("lost", why=f"supervisor: {type(error).__name__}")
            outcome = self._settle(claim, keeper, ending)
        logger.info("%s attempt %d: %s", claim.job_id, claim.attempt, outcome)
        return outcome

    def _claim(self, job_id: str) -> Claim | None:
        """Claim, even if the reply to a COMMIT is lost on the way: then the lease is found by this worker's name."""
        unsure = False

        def once() -> Claim | None:
            nonlocal unsure
            adopt, unsure = unsure, True
            with self._database.transaction() as session:
                if adopt and (found := leases.adopt(session, job_id, worker=self._worker)) is not None:
                    return found
                return leases.claim(session, job_id, worker=self._worker, ttl_seconds=self._settings.lease_ttl_seconds)

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

    def _settle(self, claim: Claim, keeper: LeaseKeeper, ending: Ending) -> str:
        """Bring the attempt's end into the database, or learn that it is not ours to bring."""
        if ending.kind == "gone":
            self._erase_own(claim)
            return "lost"
        limit = time.monotonic() + SETTLING_SECONDS

        def going_on() -> bool:
            return time.monotonic() < min(limit, self._drain_by)

        notes: list[tuple[str, dict[str, Any] | None]] = []

        def once(ending: Ending) -> str:
            notes.extend(keeper.take_notes())
            with self._database.transaction() as session:
                for phase, progress in notes:
                    leases.record_progress(session, claim, phase=phase, progress=progress)
                return ending.write(session, claim, self._settings) or self._already(session, claim, ending)

        def settle(ending: Ending) -> str:
            what = f"{claim.job_id}: ending"
            return patiently(lambda: once(ending), away=database_away, going_on=going_on, what=what)

        last_words = internal("The runner's last words hold something that the database refuses.")
        try:
            # What the database refuses once it would refuse again: first the progress is given up, then the ending.
            for words in (ending, ending, last_words):
                try:
                    outcome = settle(words)
                    break
                except DataError as error:
                    what = type(error.orig).__name__
                    logger.error("%s attempt %d: its end cannot be stored (%s)", *_name(claim), what)
                    notes.clear()
            else:
                return "unsettled"
        except GaveUp:
            return "unsettled"  # the reaper will find the lease expired
        if outcome == "lost":
            self._erase_own(claim)
        return outcome

    @staticmethod
    def _already(session: Any, claim: Claim, ending: Ending) -> str:
        """The fenced statements changed nothing: our own earlier COMMIT arrived after all, or the lease is gone."""
        now = leases.standing(session, claim.job_id)
        if now is None or now.token != claim.token:
            return "lost"
        if now.published_prefix is not None and now.published_prefix == ending.prefix:
            return now.status
        # Our token, yet not held: we or the reaper gave it back; either way what we wrote is referenced by nobody.
        return now.status if ending.prefix is None else "lost"

    def _erase_own(self, claim: Claim) -> None:
        """Leave no artifacts behind that nobody will ever name."""
        try:
            self._storage.erase(object_keys.attempt_prefix(claim.tenant_id, claim.job_id, claim.token))
        except Exception as error:
            logger.warning("%s attempt %d: leftovers stay (%s)", claim.job_id, claim.attempt, type(error).__name__)


class _Attempt:
    """The time between claim and ending. ``work`` says how it ended and touches no status."""

    def __init__(self, supervisor: Supervisor, claim: Claim, keeper: LeaseKeeper, folder: Path) -> None:
        self._supervisor = supervisor
        self._settings = supervisor._settings
        self._database, self._storage = supervisor._database, supervisor._storage
        self._claim, self._keeper, self._folder = claim, keeper, folder
        self._result: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None

    def work(self) -> Ending:
        """Fetch, run, publish to the store."""
        try:
            ending = self._supervise()
        except inputs.InputMissing as error:
            told = problem("input-missing", "An input of the job is gone", str(error), pointer=error.pointer)
            return Ending.failed("user_error", told)
        except GaveUp:
            return self._interrupted()
        if ending.artifacts is None:
            return ending
        self._keeper.note("publishing")
        try:
            return patiently(
                lambda: ending.uploaded(self._storage, self._claim),
                away=store_away,
                going_on=self._may_save,
                what=f"{self._claim.job_id}: artifact upload",
            )
        except GaveUp:
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
        """Relay until the runner has said its last; stop it on cancel and drain, kill it once the lease may be lost.

        A runner that hangs in a driver still reads its beats: what it does not do is talk, so silence ends it too.
        """
        kill_at: float | None = None
        heard_at = time.monotonic()
        while not process.ended:
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
            if kill_at is None and (self._keeper.cancel.is_set() or self._supervisor.drain.is_set()):
                cancel = self._keeper.cancel.is_set()
                grace = self._settings.cancel_grace_seconds if cancel else self._settings.drain_grace_seconds
                kill_at = time.monotonic() + grace
                process.terminate()
            if kill_at is not None and self._keeper.cancel.is_set():
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
        if self._result is not None or self._keeper.cancel.is_set():
            return
        while self._may_save() and not states.wait(STATE_WAIT_SECONDS):
            continue
        while self._error is None and self._may_save() and not kept.wait(STATE_WAIT_SECONDS):
            continue

    def _interrupted(self) -> Ending:
        """Why an attempt without a result of its own stopped."""
        if self._keeper.taken:
            return Ending("gone")
        if self._keeper.cancel.is_set():
            return Ending("cancelled")
        if self._supervisor.drain.is_set():
            return Ending("released")
        return Ending("lost", why="the database did not answer for a whole lease")

    def _going_on(self) -> bool:
        return self._keeper.held and not self._keeper.cancel.is_set() and not self._supervisor.drain.is_set()

    def _may_save(self) -> bool:
        """States and artifacts are still worth their upload while draining: that is what the drain is for."""
        return self._keeper.held and not self._keeper.cancel.is_set() and time.monotonic() < self._supervisor._drain_by

    def _name(self) -> tuple[str, int]:
        return _name(self._claim)


def _name(claim: Claim) -> tuple[str, int]:
    return claim.job_id, claim.attempt
