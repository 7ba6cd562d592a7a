"""The doorbell: a Celery app whose one message is a job's id. Nothing is lost when a message is."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from celery import Celery
from kombu.connection import Connection
from redis import Redis

from services.settings import Settings

__all__ = ["RUN_TASK", "make_app", "unheard"]

RUN_TASK = "forgetd.run"
VISIBILITY_SECONDS = 3600  # messages are acknowledged early, so that this only bounds a crash between pop and hand-over
SOCKET_SECONDS = 5.0  # above Celery's blocking pop of 1 s
CONNECT_SECONDS = 2.0
SOONEST_SECONDS, LATEST_SECONDS = 0.2, 2.0  # between two looks for a broker that is away


class _SoonBack(Connection):
    """A connection that is back soon after its broker: Celery has no setting for its pauses, which grow to 30 s."""

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        pauses = {"interval_start": SOONEST_SECONDS, "interval_step": SOONEST_SECONDS, "interval_max": LATEST_SECONDS}
        return super().ensure_connection(*args, **{**pauses, **kwargs})  # type: ignore[no-untyped-call]  # kombu's


def make_app(settings: Settings, run: Callable[[str], None] | None = None) -> Celery:
    """The app of the control loop (which only sends) or, with ``run``, of a worker.

    What Celery offers beyond a queue is off: the row in the database is the truth about order, retries and results.
    """
    app = Celery("forgetd", broker=settings.broker_url.get_secret_value(), set_as_current=False)
    app.conf.update(
        # A message is an identifier: whoever owns the broker can ring a bell, and no more.
        accept_content=["json"],
        task_serializer="json",
        result_backend=None,
        task_ignore_result=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        # Late acknowledgement runs a task again, beside itself, once it is longer than the visibility timeout.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=0,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # A worker waits for its broker as long as it takes; the control loop does not wait at all.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=CONNECT_SECONDS,
        task_publish_retry=False,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_SECONDS,
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_keepalive": True,
        },
    )
    app.amqp.Connection = _SoonBack
    if run is not None:
        app.task(name=RUN_TASK, ignore_result=True, shared=False)(run)
    return app


def unheard(app: Celery, queue: str) -> int:
    """How many messages wait in a queue. Of a broker that is away, redis-py's errors, soon."""
    return int(_broker(app.conf.broker_url).llen(queue))  # a queue of Celery's is a list of its name


@lru_cache(maxsize=1)
def _broker(url: str) -> Redis:
    return Redis.from_url(url, socket_timeout=SOCKET_SECONDS, socket_connect_timeout=CONNECT_SECONDS)
