"""One attempt at one job, from its claim to how it ended: fetch, run, watch over the runner, store what it made."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.database import Database
from services.leases import Claim
from services.settings import Settings
from services.storage import ObjectStorage, Stopped
from worker import assets, inputs, publication
from worker.assets import AssetKeeper
from worker.endings import INTERRUPTED_STATUS, Ending, classify, problem
from worker.lease import LeaseKeeper
from worker.patience import GaveUp, Headway, StayedAway, database_away, patiently, store_away
from worker.phases import Phases
from worker.process import Malformed, RunnerProcess, runner_environment
from worker.states import StateKeeper

__all__ = ["Attempt", "Shared"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL_SECONDS = 0.1
STATE_WAIT_SECONDS = 0.5
SIGNAL_SPREAD_SECONDS = 1.0
SILENCE = Ending("lost", why="the database did not answer for a whole lease")
CUT_OFF = Ending("released", why="the store did not answer this worker")
REFUSED = Ending("lost", why="the store answers and keeps refusing what the job reads")


class CutOff(GaveUp):
    """The store stayed away from all of this worker."""


@dataclass(frozen=True)
class Shared:
    """What the attempts of one worker have in common."""

    settings: Settings
    database: Database
    command: tuple[str, ...]  # that starts a runner
    cache: Path
    oom_kills: Callable[[], int]  # of the kernel, so far
    drain: threading.Event
    drain_by: Callable[[], float]  # when a draining worker has to go (``time.monotonic``)
    cut_off: threading.Event  # to be set where the store did not answer for so long that a job was given back


class Attempt:
    """The time between claim and ending. ``work`` says how it ended and touches no status."""

    def __init__(
        self, worker: Shared, storage: ObjectStorage, claim: Claim, keeper: LeaseKeeper, folder: Path, phases: Phases
    ) -> None:
        self._worker, self._storage = worker, storage
        self._settings, self._database = worker.settings, worker.database
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
        except CutOff:  # another may reach it, or have credentials that it takes
            self._worker.cut_off.set()
            return self._interrupted(CUT_OFF)
        except StayedAway:  # every host would meet that, for ever, were it not counted
            return self._interrupted(REFUSED)
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
        self._from_store(
            "inputs",
            lambda headway: inputs.fetch(self._storage, plan, self._folder, going_on=self._going_on, headway=headway),
        )
        if not self._going_on():
            raise GaveUp
        job = plan.job
        if plan.resume is not None and self._fetch_state(plan.resume):
            job = {**job, "resume": inputs.STATE}
        if "fisher" in job["inputs"]:
            job = {**job, "inputs": {**job["inputs"], "fisher": self._fetch_assets()}}
        inputs.write_job(self._folder, job)

    def _fetch_state(self, state: inputs.Input) -> bool:
        """False where there is none to be had: without it the job starts from the beginning."""

        def fetch(headway: Headway) -> bool:
            return inputs.fetch_state(self._storage, state, self._folder, going_on=self._going_on, headway=headway)

        try:
            if self._from_store("state", fetch):
                return True
            why = "gone or damaged"
        except StayedAway:
            why = "refused"
        logger.warning("%s attempt %d: its state is %s; starting from the beginning", *self._name(), why)
        return False

    def _fetch_assets(self) -> dict[str, str]:
        """As many as there are to be had: without one the job works it out itself."""

        def fetch(headway: Headway, *, refused_too: bool = False) -> dict[str, str]:
            return assets.fetch(
                self._storage,
                self._claim,
                self._folder,
                going_on=self._going_on,
                headway=headway,
                refused_too=refused_too,
            )

        try:
            return self._from_store("assets", fetch)
        except StayedAway:
            return fetch(Headway(), refused_too=True)

    def _from_store(self, what: str, fetch: Callable[[Headway], T]) -> T:
        """Wait for the store as long as an attempt waits that has nothing to save yet.

        Raises:
            StayedAway: it stayed away, and it is there: what it refuses is this.
            CutOff: it stayed away.
        """
        headway = Headway()
        try:
            return patiently(
                lambda: fetch(headway),
                away=store_away,
                going_on=self._going_on,
                what=f"{self._claim.job_id}: {what}",
                pause=self._worker.drain,
                within=self._settings.store_patience_seconds,
                headway=headway,
            )
        except StayedAway as refused:
            try:
                self._storage.probe()
            except Exception:
                raise CutOff(what) from refused
            raise

    def _supervise(self) -> Ending:
        # Loading its libraries takes the runner as long as we take to fetch; where it reads a hostile file, it is to
        # load nothing before its walls stand, and these need to know the job: then nothing is named ahead.
        plan = self._plan()
        if not plan.ahead:
            self._fetch(plan)
        kills_before = self._worker.oom_kills()
        process = RunnerProcess(
            self._worker.command,
            self._folder,
            environment=runner_environment(self._folder, self._worker.cache),
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
                leaving=self._worker.drain.is_set,
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
            self._worker.drain.wait(SIGNAL_SPREAD_SECONDS)
        oom = self._worker.oom_kills() > kills_before
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
            if kill_at is None and (self._keeper.unwanted.is_set() or self._worker.drain.is_set()):
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
        if self._worker.drain.is_set():
            return Ending("released")
        return otherwise

    def _going_on(self) -> bool:
        self._keeper.moved()
        return self._wanted() and not self._worker.drain.is_set()

    def _may_save(self) -> bool:
        """States and artifacts are still worth their upload while draining: that is what the drain is for.

        Asked by who uploads, between two tries.
        """
        self._keeper.moved()
        return self._worth_saving()

    def _worth_saving(self) -> bool:
        """The same, asked by who waits for an upload, and would not notice that it stands still."""
        return self._wanted() and time.monotonic() < self._worker.drain_by()

    def _wanted(self) -> bool:
        return self._keeper.held and not self._keeper.unwanted.is_set()

    def _name(self) -> tuple[str, int]:
        return _name(self._claim)


def _name(claim: Claim) -> tuple[str, int]:
    return claim.job_id, claim.attempt
