"""The figures of the whole fleet for Prometheus, at any gateway."""

from __future__ import annotations

import hmac
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Header, Response
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from api.dependencies import AppDatabase, AppSettings
from api.limits import LoopLimiter
from api.problems import documented
from services import metrics, metrics_gauges, metrics_table
from services.database import Database
from services.errors import MissingKey, WrongKey

__all__ = ["router"]

router = APIRouter(tags=["service"])
TEXT = "text/plain; version=0.0.4; charset=utf-8"
PATIENCE_SECONDS = 2.5
AT_ONCE = 2  # threads that may hang on a database that does not answer
_scrapes = LoopLimiter("scrapes", AT_ONCE)


@router.get("/metrics", response_class=Response, responses={**documented(), 200: {"content": {"text/plain": {}}}})
async def scrape(
    database: AppDatabase, settings: AppSettings, authorization: Annotated[str | None, Header()] = None
) -> Response:
    """How the service stands and what it has counted, all processes of all hosts together: see docs/metrics.md.

    Where `FORGETD_METRICS_TOKEN` is set, it is the bearer token. Of a silent database the answer says only that.
    """
    if settings.metrics_token is not None:
        _admit(settings.metrics_token.get_secret_value(), authorization)
    text = None
    with anyio.move_on_after(PATIENCE_SECONDS):
        text = await anyio.to_thread.run_sync(_figures, database, abandon_on_cancel=True, limiter=_scrapes.here())
    return Response(text or metrics_gauges.database_up(False), media_type=TEXT)


def _admit(token: str, authorization: str | None) -> None:
    scheme, _, presented = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not presented:
        raise MissingKey("Send the header Authorization: Bearer with the token of FORGETD_METRICS_TOKEN.")
    if not hmac.compare_digest(presented.strip().encode(), token.encode()):
        raise WrongKey("Check the token: it is the value of FORGETD_METRICS_TOKEN.")


def _figures(database: Database) -> str | None:
    try:
        with database.transaction() as session:
            standing = metrics_gauges.gauges(session)
            return standing + metrics_table.expose(metrics_table.totals(session), metrics.headers())
    except (DBAPIError, PoolTimeout):
        return None
