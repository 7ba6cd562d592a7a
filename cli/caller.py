"""What every part of the client stands on: one service, one key, calls that may be repeated, and lists by page."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from cli.transport import Transport

__all__ = ["LONG_POLL_SECONDS", "WAITING_PATIENCE_SECONDS", "BytesProgress", "Caller", "FilePath", "items", "once"]

TIMEOUT_SECONDS = 30.0
PATIENCE_SECONDS = 15.0
WAITING_PATIENCE_SECONDS = 120.0  # a wait outlives a restart of the gateway
LONG_POLL_SECONDS = 20.0  # the service holds 30 at most
PAGE_SIZE = 50

FilePath = str | Path
BytesProgress = Callable[[int, int], None]


class Caller:
    """A caller of one forgetd service.

    Args:
        url: Where the service is, e.g. ``http://127.0.0.1:8080``.
        key: The API key; sent to that address and nowhere else, in particular not to the object store.
        timeout: Seconds to connect, and between two pieces of an answer.
        patience: Seconds during which a call is repeated while the service does not answer.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._timeout = timeout
        self._transport = Transport(url, key, timeout=timeout, patience=patience)

    @property
    def url(self) -> str:
        """The service's address."""
        return self._transport.url

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _get(self, path: str, *, patience: float | None = None, **options: Any) -> httpx.Response:
        return self._transport.send("GET", path, patience=patience, **options)

    def _pages(self, path: str, query: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        params = {key: value for key, value in query.items() if value is not None} | {"limit": PAGE_SIZE}
        while True:
            page = self._get(path, params=params).json()
            yield from items(page)
            cursor = page.get("next_cursor") if isinstance(page, dict) else None
            if cursor is None:
                return
            params["after"] = cursor


def items(page: Any) -> list[dict[str, Any]]:
    """What a page of a list holds."""
    found: list[dict[str, Any]] = page["items"] if isinstance(page, dict) else page
    return found


def once(key: str | None) -> dict[str, str]:
    """The header that makes repeating a call the same as sending it once."""
    return {"Idempotency-Key": key or str(uuid.uuid4())}
