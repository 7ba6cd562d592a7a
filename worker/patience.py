"""Waiting out a server that is away: which errors mean away, and how long to go on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

__all__ = ["GaveUp", "Headway", "StayedAway", "database_away", "patiently", "store_away"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
TRIES_AT_LEAST = 5  # before time alone says that it stays away: a try may be a long transfer
# Refused credentials are the operator's to mend, as an outage is: no job is to pay for a key that was changed.
AWAY = (401, 403, 408, 429)


class GaveUp(Exception):
    """The server stayed away for as long as the caller could wait."""


class StayedAway(GaveUp):
    """The server stayed away for longer than this caller was to wait for it, though he could have."""


class Headway:
    """How far transfers have come, in bytes and over all tries at them: what is sent once more is none.

    Else a server that breaks off at the same place each time would be waited for without end.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._furthest: dict[str, int] = {}

    def along(self, name: str) -> Callable[[int], None]:
        """To be told, all along a try at this transfer, how many of its bytes are here."""

        def arrived(count: int) -> None:
            if count > self._furthest.get(name, 0):
                self._furthest[name] = count
                self.steps += 1

        return arrived


def database_away(error: BaseException) -> bool:
    """Whether the statement may succeed when it is sent again: the fault lay with the connection or the server."""
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated


def store_away(error: BaseException) -> bool:
    """Whether the object store did not answer, or answered with a fault of its own."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        return status >= 500 or status in AWAY
    # Transfers wrap what they met in exceptions of their own, and an answer that broke off in the middle is no error of
    # botocore's tree either.
    return isinstance(error, BotoCoreError | ConnectionError | TimeoutError) or type(error).__module__.startswith(
        ("boto3.", "s3transfer.", "botocore.")
    )


def patiently(
    call: Callable[[], T],
    *,
    away: Callable[[BaseException], bool],
    going_on: Callable[[], bool],
    what: str,
    pause: threading.Event | None = None,
    within: float = float("inf"),
    headway: Headway | None = None,
) -> T:
    """Repeat the call while its server is away.

    Args:
        call: must be safe to repeat.
        away: which errors to wait out; others rise.
        going_on: asked before each further try.
        what: for the log.
        pause: an event that ends a pause early, such as a shutdown.
        within: seconds from the first failure after which a few tries were enough.
        headway: what the call gets along by; a failure behind more of it is a first one again.

    Raises:
        GaveUp: ``going_on`` said no.
        StayedAway: ``within`` is over.
    """
    seconds = FIRST_PAUSE_SECONDS
    tries, since, steps = 0, 0.0, 0
    while True:
        try:
            result = call()
        except Exception as error:
            if not away(error):
                raise
            if headway is not None and headway.steps > steps:
                tries, seconds, steps = 0, FIRST_PAUSE_SECONDS, headway.steps
            if tries == 0:
                since = time.monotonic()
                logger.warning("%s: no answer (%s); trying again", what, type(error).__name__)
            tries += 1
            if not going_on():
                raise GaveUp(what) from error
            if tries >= TRIES_AT_LEAST and time.monotonic() > since + within:
                raise StayedAway(what) from error
        else:
            if tries:
                logger.info("%s: answered after %d tries", what, tries)
            return result
        if pause is None:
            time.sleep(seconds)
        else:
            pause.wait(seconds)
        seconds = min(2 * seconds, LONGEST_PAUSE_SECONDS)
