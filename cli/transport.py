"""How the client talks: one place for authentication, retries, problems and what a redirect may learn.

A call is repeated only where repeating cannot do harm: reads, and writes that carry an Idempotency-Key or are harmless
twice. A call that never reached the service (the connection was refused) is repeated whatever it is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

import httpx

from cli.errors import ClientError, Unreachable, problem_error

__all__ = ["Transport"]

BACKOFF_SECONDS = 0.2  # doubled with every try, jittered
BACKOFF_MAX_SECONDS = 5.0
RETRY_AFTER_MAX_SECONDS = 60.0
RETRY_STATUSES = (429, 502, 503, 504)
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _user_agent() -> str:
    try:
        return f"forgetd-client/{version('forgetd')}"
    except PackageNotFoundError:
        return "forgetd-client"


def is_loopback(url: str) -> bool:
    """Whether the address is this machine: a proxy from the environment has no business there."""
    return urlsplit(url).hostname in LOOPBACK


class Transport:
    """Sends requests to one service with one key; raises the leaves of ``cli.errors``.

    Args:
        url: Where the service is.
        key: The API key; sent to that address and nowhere else.
        timeout: Seconds to connect, and between two pieces of an answer.
        patience: Seconds during which a failing call is tried again.
        sleep: Waits; passed by tests.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout: float,
        patience: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ClientError(f"{url!r} is not an http or https address.")
        self.url = url.rstrip("/")
        self.patience = patience
        self._sleep = sleep
        self._timeout = timeout
        self._http = httpx.Client(
            base_url=self.url,
            headers={"User-Agent": _user_agent(), "Accept": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=timeout,
            trust_env=not is_loopback(url),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        *,
        repeatable: bool | None = None,
        patience: float | None = None,
        body: Callable[[], Any] | None = None,
        **options: Any,
    ) -> httpx.Response:
        """Send a request and return its answer, read whole; 2xx, 3xx and nothing else.

        Args:
            method: HTTP method.
            path: Below the service's address.
            repeatable: Whether it may be sent twice; by default reads may.
            patience: Seconds to keep trying; the client's by default.
            body: Makes the request's content anew for each try.
            **options: As httpx takes them.

        Raises:
            ProblemError: The service refused.
            Unreachable: No answer came.
        """
        may_repeat = method in ("GET", "HEAD") if repeatable is None else repeatable
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        tries = 0
        while True:
            tries += 1
            content = {"content": body()} if body else {}
            try:
                answer = self._http.request(method, path, **content, **options)
            except httpx.TransportError as error:
                if not (may_repeat or isinstance(error, NEVER_SENT)) or not self._pause(tries, deadline):
                    raise Unreachable(self._no_answer(error)) from error
                continue
            except httpx.InvalidURL as error:
                raise ClientError(f"{self.url!r} is not an address: {error}") from error
            if answer.status_code < 400:
                return answer
            wait = _retry_after(answer.headers)
            if answer.status_code in RETRY_STATUSES and may_repeat and self._pause(tries, deadline, wait):
                continue
            raise self._refusal(answer)

    def _pause(self, tries: int, deadline: float, wait: float | None = None) -> bool:
        """Wait before the next try; False when there is no time left for one."""
        backoff = min(BACKOFF_MAX_SECONDS, BACKOFF_SECONDS * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)  # noqa: S311 spreads callers, keeps no secret
        pause = backoff if wait is None else wait
        if time.monotonic() + pause > deadline:
            return False
        self._sleep(pause)
        return True

    def _no_answer(self, error: httpx.TransportError) -> str:
        if isinstance(error, NEVER_SENT):
            return f"Nothing answers at {self.url}: {_reason(error)}."
        return f"{self.url} did not answer to the end: {_reason(error)}."

    def _refusal(self, answer: httpx.Response) -> ClientError:
        media_type = answer.headers.get("content-type", "").partition(";")[0].strip()
        members: Any = None
        if media_type in ("application/problem+json", "application/json"):
            try:
                members = answer.json()
            except ValueError:
                members = None
        if isinstance(members, dict) and ("title" in members or "detail" in members):
            return problem_error(answer.status_code, members)
        if answer.status_code in (401, 403, 429) or answer.status_code >= 500:
            title = f"{self.url} answered {answer.status_code} {answer.reason_phrase}"
            return problem_error(answer.status_code, {"title": title})
        return Unreachable(f"{self.url} answers {answer.status_code}, but not as forgetd would. Is the address right?")


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the service asks to wait, from either form of the header."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.isdigit():
        seconds = float(value)
    else:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_SECONDS)
