"""Whether this process lives, and whether it can work."""

from __future__ import annotations

import anyio
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from api.dependencies import AppDatabase, AppSettings, AppStorage
from api.problems import documented
from services import readiness
from services.errors import Unavailable

__all__ = ["router"]

router = APIRouter(tags=["service"])
PATIENCE_SECONDS = 5.0


class Alive(BaseModel):
    """This process answers."""

    status: str = "alive"


class Ready(BaseModel):
    """Requests can be served."""

    status: str = "ready"
    database: str = "ok"
    storage: str = "ok"
    broker: str


@router.get("/healthz", responses=documented())
async def healthz() -> Alive:
    """Whether the process lives; asks nothing of any other server."""
    return Alive()


@router.get("/readyz", responses=documented())
async def readyz(database: AppDatabase, storage: AppStorage, settings: AppSettings) -> Ready:
    """Whether PostgreSQL (with this version's schema) and the store answer. Without the broker, jobs wait."""
    try:
        with anyio.fail_after(PATIENCE_SECONDS):
            await anyio.to_thread.run_sync(readiness.require_database, database, abandon_on_cancel=True)
            await anyio.to_thread.run_sync(readiness.require_storage, storage, abandon_on_cancel=True)
    except TimeoutError as error:
        raise Unavailable(f"A server behind this one did not answer within {PATIENCE_SECONDS:g} s.") from error
    broker = await run_in_threadpool(readiness.broker_answers, settings)
    return Ready(broker="ok" if broker else "silent")
