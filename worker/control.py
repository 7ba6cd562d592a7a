"""The control loop: rings doorbells, takes expired leases back, and sweeps. Any number may run at once.

Start it with ``python -m worker.control``. It owns no state: killing it delays jobs and loses nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence

from celery import Celery
from kombu.exceptions import OperationalError as BrokerAway
from redis.exceptions import RedisError
from sqlalchemy import text

from services import dispatch as doorbells
from services import reaper
from services.counted import note
from services.database import Database
from services.logs import configure_logging
from services.metrics import Metrics, Push
from services.settings import Settings, get_settings
from services.storage import ObjectStorage
from services.tracing import Tracing, open_tracing
from worker import janitor
from worker.celery_app import RUN_TASK, make_app, unheard
from worker.patience import database_away, store_away

__all__ = ["dispatch", "main", "reap"]

logger = logging.getLogger(__name__)

AFTER_A_FAULT_SECONDS = 1.0
SWEEP_SECONDS = 5.0
TIDY_SECONDS = 3600.0
LEAVE_SECONDS = 2.0
LOOK_SECONDS = 1.0  # between two looks after loops that may stand still
STALLED_STATUS = 70
# A loop that is stopped in the middle (SIGSTOP, a lost host) must not keep the rows that it had locked.
LOCKS_SECONDS = 10


def dispatch(
    database: Database,
    app: Celery,
    *,
    ring_seconds: float,
    running_jobs: int | None = None,
    rounds: dict[str, str] | None = None,
) -> int:
    """Ring for the jobs that can start now. Returns how many bells were rung.

    Publish, then stamp, in one transaction: a broker that fails rolls the stamps back, and what was rung twice claims
    nothing the second time. Bells that nobody has heard yet are not rung anew on top of themselves: whoever is slow to
    hear them would have ever more to hear.
    """
    with database.transaction() as session:
        session.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCKS_SECONDS}s'"))
        due = doorbells.dispatchable(session, ring_seconds=ring_seconds, running_jobs=running_jobs, rounds=rounds)
        due = _unheard_left_out(app, due) if due else due
        for job_id, queue in due:
            app.send_task(RUN_TASK, args=[job_id], queue=queue, retry=False, ignore_result=True)
            note(session, "doorbells")
        if due:
            doorbells.stamp_dispatched(session, [job_id for job_id, _ in due])
    return len(due)


def _unheard_left_out(app: Celery, due: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """As many of these bells, best first, as there are more of a queue's than messages that wait in it."""
    rung: list[tuple[str, str]] = []
    for queue in dict.fromkeys(queue for _, queue in due):
        of_queue = [bell for bell in due if bell[1] == queue]
        lying = unheard(app, queue)
        if lying:
            logger.debug("%s: %d bells lie there unheard, so that as many fewer ring", queue, lying)
        rung += of_queue[: max(0, len(of_queue) - lying)]
    return rung


def reap(database: Database, *, budget: int) -> dict[str, str]:
    """Take back the jobs whose holder fell silent, and end those that waited past their deadline.

    Returns their new statuses.
    """
    with database.transaction() as session:
        session.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCKS_SECONDS}s'"))
        outcomes = {job.id: reaper.reap(session, job, budget=budget) for job in reaper.expired_leases(session)}
    for job_id, status in outcomes.items():
        logger.warning("%s: its lease expired; the job is %s", job_id, status)
    with database.transaction() as session:
        session.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCKS_SECONDS}s'"))
        late = reaper.expire_queued(session)
        reaper.move_queued(session)
    for job_id in late:
        logger.info("%s: its deadline passed before a worker was free; the job is failed", job_id)
    return outcomes | dict.fromkeys(late, "failed")


class _Loop(threading.Thread):
    """Does one thing again and again. A fault is logged when it begins and when it is over, and ends nothing."""

    def __init__(
        self,
        name: str,
        interval: float,
        once: Callable[[], object],
        stop: threading.Event,
        metrics: Metrics,
        elsewhere_at: Callable[[], float],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._interval, self._once, self._stop_event, self._metrics = interval, once, stop, metrics
        self._elsewhere_at = elsewhere_at
        self._began: float | None = None
        self._failing: str | None = None

    def still_for(self) -> float:
        """Seconds since the turn that is under way began, or since the store moved for it; 0 between two turns."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - max(began, self._elsewhere_at())

    def run(self) -> None:
        """Until told to stop."""
        while not self._stop_event.is_set():
            pause = self._interval
            try:
                self._began = time.monotonic()
                self._once()
            except Exception as error:
                self._count(error)
                self._say(error)
                pause = max(pause, AFTER_A_FAULT_SECONDS)
            else:
                if self._failing is not None:
                    logger.info("%s: works again", self.name)
                    self._failing = None
            self._began = None
            self._stop_event.wait(pause)

    def _count(self, error: Exception) -> None:
        self._metrics.count("loop_faults", loop=self.name)
        if isinstance(error, BrokerAway | RedisError):
            self._metrics.count("broker_errors")

    def _say(self, error: Exception) -> None:
        kind = type(error).__name__
        if kind == self._failing:
            return
        self._failing = kind
        if isinstance(error, BrokerAway | RedisError | OSError) or database_away(error) or store_away(error):
            logger.warning("%s: no answer (%s); going on trying", self.name, kind)
        else:
            logger.exception("%s: failed; going on", self.name)


def loops(
    settings: Settings,
    database: Database,
    storage: ObjectStorage,
    stop: threading.Event,
    *,
    metrics: Metrics,
    tracing: Tracing,
) -> list[_Loop]:
    """The loop's parts, each in a thread, so that a broker or a store that hangs delays nobody else."""
    app = make_app(settings)
    rounds: dict[str, str] = {}

    def ring() -> None:
        begun = time.time_ns()
        rung = dispatch(
            database, app, ring_seconds=settings.ring_seconds, running_jobs=settings.tenant_running_jobs, rounds=rounds
        )
        if rung:
            tracing.past("dispatch", begun, {"forgetd.doorbells": rung})

    def loop(
        name: str, interval: float, once: Callable[[], object], elsewhere_at: Callable[[], float] = lambda: 0.0
    ) -> _Loop:
        return _Loop(name, interval, once, stop, metrics, elsewhere_at)

    def stored_at() -> float:
        return storage.moved_at

    return [
        loop("dispatch", settings.control_interval_seconds, ring),
        loop("reap", settings.control_interval_seconds, lambda: reap(database, budget=settings.infrastructure_budget)),
        loop("sweep", SWEEP_SECONDS, lambda: janitor.sweep(database, storage), stored_at),
        loop("tidy", TIDY_SECONDS, lambda: janitor.tidy(database, storage), stored_at),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT."""
    argparse.ArgumentParser(prog="python -m worker.control", description=__doc__).parse_args(argv)
    settings = get_settings()
    configure_logging(settings.log_format, settings.log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    metrics, tracing = Metrics(), open_tracing(settings, "forgetd-control", instance=name)
    database = Database(settings.database_url.get_secret_value(), counted=metrics)
    storage = ObjectStorage(settings, counted=metrics)
    push = Push(database, metrics, process=name, kind="control")
    running = loops(settings, database, storage, stop, metrics=metrics, tracing=tracing)
    for loop in (*running, push):
        loop.start()
    logger.info("control loop started")
    while not stop.wait(LOOK_SECONDS):
        for loop in running:
            if loop.still_for() > settings.stall_seconds:
                logger.critical("%s: got nowhere for %.0f s; leaving, to be started again", loop.name, loop.still_for())
                os._exit(STALLED_STATUS)  # a thread that waits for a call which does not return cannot be ended
    for loop in running[:2]:
        loop.join(LEAVE_SECONDS)  # a sweep is left where it is: its transaction rolls back
    push.leave()
    tracing.close()
    logger.info("control loop stopped")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
