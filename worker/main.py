"""A worker process: ``python -m worker.main --queues gpu.flow,gpu.diffusion [--slots 1] [--name HOST]``.

It answers doorbells with one supervisor a slot, says every few seconds that it lives, and drains on SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from typing import Any

from celery import signals

from services import dispatch
from services.database import Database
from services.logs import configure_logging
from services.metrics import Metrics, Push
from services.settings import Settings, get_settings
from services.storage import ObjectStorage
from services.tracing import open_tracing
from worker.celery_app import make_app
from worker.process import RUNNER_COMMAND
from worker.scratch import Scratch
from worker.supervisor import Supervisor

__all__ = ["main", "serve"]

logger = logging.getLogger(__name__)

SEEN_SECONDS = 3.0  # well within dispatch.WORKER_SILENT_SECONDS
SEEN_AGAIN_SECONDS = 0.5  # after a fault
LEAVE_SECONDS = 5.0  # that the end of the process waits for its last word
LOOK_SECONDS = 0.1  # a free slot looks for its next doorbell
STALLED_STATUS = 70  # whoever keeps workers running starts another
EXIT_SECONDS = 10.0  # past the drain's grace, whatever still hangs is left behind
SLOTS_HELP = (
    "jobs at once (default: 1); more only for queues without a GPU, since all slots use the first one: "
    "start one worker for each GPU, with CUDA_VISIBLE_DEVICES set"
)


class Presence(threading.Thread):
    """Says that the worker lives, whatever the database does; takes it back when the worker leaves."""

    def __init__(self, database: Database, worker: str, queues: list[str], slots: int) -> None:
        super().__init__(name="presence", daemon=True)
        self._database, self._worker, self._queues, self._slots = database, worker, queues, slots
        self._leaving, self._left = threading.Event(), threading.Event()

    def run(self) -> None:
        """Until the worker leaves."""
        away = False
        while not self._leaving.is_set():
            try:
                with self._database.transaction() as session:
                    dispatch.see_worker(session, self._worker, self._queues, self._slots)
            except Exception as error:
                if not away:
                    logger.warning("the database does not answer (%s); going on trying", type(error).__name__)
                away = True
            else:
                if away:
                    logger.info("the database answers again")
                away = False
            self._leaving.wait(SEEN_AGAIN_SECONDS if away else SEEN_SECONDS)

    def leave(self) -> None:
        """Get no further doorbells. A database that is away will notice the silence instead.

        Who asks second waits for the first: a drain says it in a thread that the end of the process would cut off.
        """
        if self._leaving.is_set():
            self._left.wait(LEAVE_SECONDS)
            return
        self._leaving.set()
        self.join(SEEN_SECONDS)
        try:
            with self._database.transaction() as session:
                dispatch.retire_worker(session, self._worker)
        except Exception as error:
            logger.warning("leaving without a word to the database (%s)", type(error).__name__)
        self._left.set()


def serve(
    settings: Settings,
    *,
    queues: list[str],
    slots: int = 1,
    name: str | None = None,
    runner_command: Sequence[str] = RUNNER_COMMAND,
) -> int:
    """Work until told to stop. Returns the exit status."""
    # Unique to the process: a lease found under this name was taken by this process and by no other.
    worker_id = f"{name or socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    metrics, tracing = Metrics(), open_tracing(settings, "forgetd-worker", instance=worker_id)
    database = Database(settings.database_url.get_secret_value(), counted=metrics)
    scratch = Scratch(settings.scratch_dir)
    supervisor = Supervisor(
        settings,
        database,
        ObjectStorage(settings, counted=metrics),
        scratch,
        worker=worker_id,
        runner_command=runner_command,
        metrics=metrics,
        tracing=tracing,
        on_stall=lambda: os._exit(STALLED_STATUS),  # nothing orderly is left to do: a thread of ours does not return
    )
    push = Push(database, metrics, process=worker_id, kind="worker")

    def run(job_id: str) -> None:
        try:
            supervisor.run(job_id)
        except Exception:  # not left to Celery, whose line would quote all that the exception says
            logger.exception("%s: the supervisor failed; what it holds is left to the reaper", job_id)

    app = make_app(settings, run)
    presence = Presence(database, worker_id, queues, slots)

    def drain(**_: object) -> None:
        # Runs inside Celery's signal handler: flags and threads only.
        supervisor.start_draining()
        threading.Thread(target=presence.leave, name="leave", daemon=True).start()
        last = threading.Timer(settings.drain_grace_seconds + EXIT_SECONDS, os._exit, args=(1,))
        last.daemon = True
        last.start()

    ready: list[object] = []

    def look_often(sender: Any, **_: object) -> None:
        # Celery's loop looks for the next bell when something wakes it: a job's end does not, its timer of 1 s does.
        if not ready:
            ready.append(sender.hub.call_repeatedly(LOOK_SECONDS, _nothing))

    signals.worker_ready.connect(look_often, weak=False)
    signals.worker_shutting_down.connect(drain, weak=False)
    signals.setup_logging.connect(_logging_is_ours, weak=False)
    worker = app.Worker(
        hostname=worker_id,
        pool="threads",
        concurrency=slots,
        queues=queues,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    presence.start()
    push.start()
    logger.info("worker %s started: queues %s, slots %d", worker_id, ",".join(queues), slots)
    try:
        worker.start()
    finally:
        supervisor.start_draining()
        presence.leave()
        scratch.close()
        push.leave()
        tracing.close()
        signals.worker_ready.disconnect(look_often)
        signals.worker_shutting_down.disconnect(drain)
        signals.setup_logging.disconnect(_logging_is_ours)
    logger.info("worker %s stopped", worker_id)
    return 0


def _nothing() -> None:
    """Wakes a loop."""


def _logging_is_ours(**_: object) -> None:
    """Celery configures no logging where this signal has a receiver."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and work."""
    parser = argparse.ArgumentParser(prog="python -m worker.main", description="Run jobs of the given queues.")
    parser.add_argument("--queues", required=True, help="comma-separated, such as gpu.flow,gpu.diffusion")
    parser.add_argument("--slots", type=int, default=1, help=SLOTS_HELP)
    parser.add_argument("--name", help="how the worker is called in the logs (default: the host's name)")
    arguments = parser.parse_args(argv)
    queues = [queue.strip() for queue in arguments.queues.split(",") if queue.strip()]
    if not queues or arguments.slots < 1:
        parser.error("give at least one queue and one slot")
    settings = get_settings()
    configure_logging(settings.log_format, settings.log_level)
    return serve(settings, queues=queues, slots=arguments.slots, name=arguments.name)


if __name__ == "__main__":
    raise SystemExit(main())
