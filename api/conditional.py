"""Resources that change: entity tags, 304, long polls, and when to ask again."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import anyio
from fastapi import Request, Response
from pydantic import BaseModel

__all__ = ["Crowd", "changed", "crowd", "etag", "represent", "retry_after", "unchanged", "wait_until"]

FIRST_POLL_SECONDS = 0.05
LAST_POLL_SECONDS = 0.5
POLL_GROWTH = 1.3
CROWD_SECONDS = 0.01
MAX_RETRY_SECONDS = 30


def etag(version: int) -> str:
    """The strong entity tag of a row's version."""
    return f'"{version}"'


def changed(if_none_match: str | None, version: int) -> bool:
    """Whether the caller has not seen this version."""
    if if_none_match is None:
        return True
    seen = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag(version) not in seen and "*" not in seen


def represent(
    resource: BaseModel,
    version: int,
    *,
    if_none_match: str | None = None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A resource with its entity tag, or 304 when the caller has it."""
    if not changed(if_none_match, version):
        return unchanged(version, headers)
    tags = _tags(version, headers)
    return Response(resource.model_dump_json(), status, media_type="application/json", headers=tags)


def unchanged(version: int, headers: Mapping[str, str] | None = None) -> Response:
    """304: the caller has it."""
    return Response(status_code=304, headers=_tags(version, headers))


def _tags(version: int, headers: Mapping[str, str] | None) -> dict[str, str]:
    return {"ETag": etag(version), "Cache-Control": "private, no-cache", **(headers or {})}


def retry_after(eta_seconds: float | None) -> str:
    """Seconds until asking again is worth it: a quarter of what is left, at least 1."""
    return str(max(1, min(MAX_RETRY_SECONDS, int((eta_seconds or 4) / 4))))


class Crowd:
    """The callers that wait on this process: the more they are, the more seldom each one asks the database."""

    def __init__(self) -> None:
        self.waiting = 0
        self.leaving = False  # the process is to end: whoever waits is answered with what there is

    @contextmanager
    def member(self) -> Iterator[None]:
        """One more, for as long as the block lasts."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def pause(self, seconds: float, *, at_most: float = float("inf")) -> None:
        """Sleep that long, or longer where many wait: together they ask 1 / ``CROWD_SECONDS`` times a second."""
        await anyio.sleep(min(max(seconds, self.waiting * CROWD_SECONDS), at_most))


crowd = Crowd()  # of this process: one event loop, so nothing to lock


async def wait_until(done: Callable[[], Awaitable[bool]], seconds: float, request: Request) -> None:
    """Return when it is done, the time is over, or one side leaves. Holds no thread and no connection meanwhile."""
    deadline = time.monotonic() + seconds
    pause = FIRST_POLL_SECONDS
    with crowd.member():
        while not await done():
            left = deadline - time.monotonic()
            if left <= 0 or crowd.leaving or await request.is_disconnected():
                return
            await crowd.pause(pause, at_most=left)
            pause = min(LAST_POLL_SECONDS, pause * POLL_GROWTH)
