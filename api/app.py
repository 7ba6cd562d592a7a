"""The gateway as an ASGI application: ``uvicorn api.app:app``."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from api import checkpoints, classifiers, health, image_sets, job_events, job_outputs, jobs, problems
from api.edge import Edge, PathOnly
from services.database import Database
from services.settings import Settings, get_settings
from services.storage import ObjectStorage

__all__ = ["create_app"]

DESCRIPTION = "POST an image set against a checkpoint; get back one that no longer makes it, with evidence."


def create_app(settings: Settings | None = None) -> FastAPI:
    """The gateway over the servers of these settings; connects to none of them before the first request."""
    settings = settings or get_settings()
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
    app.state.database = Database(settings.database_url.get_secret_value())
    app.state.storage = ObjectStorage(settings)
    for module in (checkpoints, classifiers, image_sets, jobs, job_events, job_outputs, health):
        app.include_router(module.router)
    problems.install(app)
    app.add_middleware(Edge, max_json_bytes=settings.max_json_bytes)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    access, paths = logging.getLogger("uvicorn.access"), PathOnly()
    access.addFilter(paths)
    try:
        yield
    finally:
        access.removeFilter(paths)
        app.state.database.close()


def __getattr__(name: str) -> Any:
    """Make ``app`` when a server asks for it: importing this module reads no setting."""
    if name == "app":
        return create_app()
    raise AttributeError(name)
