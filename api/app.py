"""The gateway as an ASGI application: ``uvicorn api.app:app``."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from api import (
    checkpoint_uploads,
    checkpoints,
    classifiers,
    health,
    image_sets,
    job_events,
    job_outputs,
    jobs,
    metrics,
    problems,
)
from api.conditional import crowd
from api.dependencies import Lookups
from api.edge import Edge, PathOnly
from api.observed import Observed
from services.database import Database
from services.logs import configure_logging
from services.metrics import Metrics, Push
from services.settings import Settings, get_settings
from services.storage import ObjectStorage
from services.tracing import open_tracing

__all__ = ["create_app", "process_app"]

# Routes are tried in this order; that of a job is asked most.
MODULES = (
    jobs,
    checkpoints,
    checkpoint_uploads,
    classifiers,
    image_sets,
    job_events,
    job_outputs,
    health,
    metrics,
)
DESCRIPTION = "POST an image set against a checkpoint; get back one that no longer makes it, with evidence."


def process_app() -> FastAPI:
    """The gateway of a process of its own, whose logging it sets up."""
    settings = get_settings()
    configure_logging(settings.log_format, settings.log_level)
    app = create_app(settings)
    gc.collect()
    gc.freeze()  # what is loaded by now stays: looking for garbage among it takes a tenth of an answer's time
    return app


def create_app(settings: Settings | None = None) -> FastAPI:
    """The gateway over the servers of these settings; connects to none of them while it is made."""
    settings = settings or get_settings()
    counted = Metrics()
    app = FastAPIOffline(
        redoc_url=None,
        static_url="/docs/assets",
        title="forgetd",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=_lifespan,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    app.state.metrics = counted
    app.state.tracing = open_tracing(settings, "forgetd-gateway", instance=app.state.name)
    app.state.database = Database(settings.database_url.get_secret_value(), counted=counted)
    app.state.lookups = Lookups(app.state.database)
    app.state.storage = ObjectStorage(settings, counted=counted)
    for module in MODULES:
        app.include_router(module.router)
    problems.install(app)
    app.add_middleware(Edge, max_json_bytes=settings.max_json_bytes)
    app.add_middleware(Observed, metrics=counted, tracing=app.state.tracing)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    access, paths = logging.getLogger("uvicorn.access"), PathOnly()
    access.addFilter(paths)
    push = Push(app.state.database, app.state.metrics, process=app.state.name, kind="gateway")
    push.start()
    _let_waiting_callers_go()
    try:
        yield
    finally:
        access.removeFilter(paths)
        push.leave()
        app.state.tracing.close()
        app.state.lookups.close()
        app.state.database.close()


def _let_waiting_callers_go() -> None:
    """At the signals that end the server, before it counts the seconds that open answers have left."""
    if threading.current_thread() is not threading.main_thread():
        return  # a server in somebody's thread; signals are not its
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def leave(received: int, frame: FrameType | None, before: Any = before) -> None:
            crowd.leaving = True
            if callable(before):
                before(received, frame)

        signal.signal(number, leave)


def __getattr__(name: str) -> Any:
    """Make ``app`` when a server asks for it: importing this module reads no setting."""
    if name == "app":
        return process_app()
    raise AttributeError(name)
