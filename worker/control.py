"""The control loop: rings doorbells, takes expired leases back, and sweeps. Any number may run at once.

Start it with ``python -m worker.control``. It owns no state: killing it delays jobs and loses nothing.
"""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Callable, Sequence

from celery import Celery
from kombu.exceptions import OperationalError as BrokerAway
from redis.exceptions import RedisError
from sqlalchemy import text

from services import leases
from services.database import Database
from services.settings import Settings, get_settings
from services.storage import ObjectStorage
from worker import janitor
from worker.celery_app import RUN_TASK, make_app
from worker.logs import configure_logging
from worker.patience import database_away, store_away

__all__ = ["dispatch", "main", "reap"]

logger = logging.getLogger(__name__)

AFTER_A_FAULT_SECONDS = 1.0
SWEEP_SECONDS = 5.0
TIDY_SECONDS = 3600.0
LEAVE_SECONDS = 2.0
# A loop that is stopped in the middle (SIGSTOP, a lost host) must not keep the rows that it had locked.
LOCKS_SECONDS = 10


def dispatch(database: Database, app: Celery, *, ring_seconds: float) -> int:
    """Ring for the jobs that can start now. Returns how many bells were rung.

    Publish, then stamp, in one transaction: a broker that fails rolls the stamps back, and what was rung twice claims
    nothing the second time.
    """
    with database.transaction() as session:
        session.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCKS_SECONDS}s'"))
        due = leases.dispatchable(session, ring_seconds=ring_seconds)
        for job_id, queue in due:
            app.send_task(RUN_TASK, args=[job_id], queue=queue, retry=False, ignore_result=True)
        if due:
            leases.stamp_dispatched(session, [job_id for job_id, _ in due])
    return len(due)


def reap(database: Database, *, budget: int) -> dict[str, str]:
    """Take back the jobs whose holder fell silent. Returns their new statuses."""
    with database.transaction() as session:
        session.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCKS_SECONDS}s'"))
        outcomes = {job.id: leases.reap(session, job, budget=budget) for job in leases.expired_leases(session)}
    for job_id, status in outcomes.items():
        logger.warning("%s: its lease expired; the job is %s", job_id, status)
    return outcomes


class _Loop(threading.Thread):
    """Does one thing again and again. A fault is logged when it begins and when it is over, and ends nothing."""

    def __init__(self, name: str, interval: float, once: Callable[[], object], stop: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self._interval, self._once, self._stop_event = interval, once, stop
        self._failing: str | None = None

    def run(self) -> None:
        """Until told to stop."""
        while not self._stop_event.is_set():
            pause = self._interval
            try:
                self._once()
            except Exception as error:
                self._say(error)
                pause = max(pause, AFTER_A_FAULT_SECONDS)
            else:
                if self._failing is not None:
                    logger.info("%s: works again", self.name)
                    self._failing = None
            self._stop_event.wait(pause)

    def _say(self, error: Exception) -> None:
        kind = type(error).__name__
        if kind == self._failing:
            return
        self._failing = kind
        if isinstance(error, BrokerAway | RedisError | OSError) or database_away(error) or store_away(error):
            logger.warning("%s: no answer (%s); going on trying", self.name, kind)
        else:
            logger.exception("%s: failed; going on", self.name)


def loops(settings: Settings, database: Database, storage: ObjectStorage, stop: threading.Event) -> list[_Loop]:
    """The loop's parts, each in a thread, so that a broker or a store that hangs delays nobody else."""
    app = make_app(settings)
    return [
        _Loop(
            "dispatch",
            settings.control_interval_seconds,
            lambda: dispatch(database, app, ring_seconds=settings.ring_seconds),
            stop,
        ),
        _Loop(
            "reap",
            settings.control_interval_seconds,
            lambda: reap(database, budget=settings.infrastructure_budget),
            stop,
        ),
        _Loop("sweep", SWEEP_SECONDS, lambda: janitor.sweep(database, storage), stop),
        _Loop("tidy", TIDY_SECONDS, lambda: janitor.tidy(database, storage), stop),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT."""
    argparse.ArgumentParser(prog="python -m worker.control", description=__doc__).parse_args(argv)
    configure_logging()
    settings = get_settings()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database = Database(settings.database_url.get_secret_value())
    running = loops(settings, database, ObjectStorage(settings), stop)
    for loop in running:
        loop.start()
    logger.info("control loop started")
    stop.wait()
    for loop in running[:2]:
        loop.join(LEAVE_SECONDS)  # a sweep is left where it is: its transaction rolls back
    logger.info("control loop stopped")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
