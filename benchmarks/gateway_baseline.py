"""What the gateway is held against: a bare FastAPI route that does one SELECT of a job's row by its id.

No key, no tenant, no entity tag, no resource: the columns that the gateway reads, as JSON, by the fastest way that
FastAPI and psycopg offer. Each connection commits by itself, prepares its statement and is taken from a plain queue,
which costs less than a pool that looks after its connections. ``/sync`` is a function in FastAPI's threads, ``/async``
a coroutine on its loop.
"""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from psycopg import AsyncConnection, Connection
from psycopg.rows import DictRow, dict_row
from pydantic_core import to_json

from services.lookups import JobView

__all__ = ["CONNECTIONS", "DATABASE", "create_app"]

DATABASE = "BASELINE_DATABASE"  # the environment variable that names it, as libpq takes it
CONNECTIONS = 10
BY_ID = f"SELECT {', '.join(JobView._fields)} FROM jobs WHERE id = %s"  # noqa: S608 names of ours; the gateway's columns

Idle = queue.SimpleQueue[Connection[DictRow]]
AsyncIdle = asyncio.Queue[AsyncConnection[DictRow]]


def create_app() -> FastAPI:
    """The two routes, over connections that are opened before the first request."""
    app = FastAPI(lifespan=_lifespan, openapi_url=None)
    app.add_api_route("/sync/jobs/{job_id}", _sync(app), response_model=None)
    app.add_api_route("/async/jobs/{job_id}", _async(app), response_model=None)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    url = os.environ[DATABASE]
    idle, async_idle = Idle(), AsyncIdle()
    for _ in range(CONNECTIONS):
        idle.put(Connection.connect(url, autocommit=True, row_factory=dict_row))
        async_idle.put_nowait(await AsyncConnection.connect(url, autocommit=True, row_factory=dict_row))
    app.state.idle, app.state.async_idle = idle, async_idle
    try:
        yield
    finally:
        for _ in range(CONNECTIONS):
            idle.get().close()
            await (await async_idle.get()).close()


def _sync(app: FastAPI) -> Any:
    def read(job_id: str) -> Response:
        idle: Idle = app.state.idle
        connection = idle.get()
        try:
            row = connection.execute(BY_ID, (job_id,)).fetchone()
        finally:
            idle.put(connection)
        return _answer(row)

    return read


def _async(app: FastAPI) -> Any:
    async def read(job_id: str) -> Response:
        idle: AsyncIdle = app.state.async_idle
        connection = await idle.get()
        try:
            row = await (await connection.execute(BY_ID, (job_id,))).fetchone()
        finally:
            idle.put_nowait(connection)
        return _answer(row)

    return read


def _answer(row: DictRow | None) -> Response:
    if row is None:
        return Response(status_code=404)
    return Response(to_json(row), media_type="application/json")
