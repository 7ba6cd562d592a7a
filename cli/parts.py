"""Large files to and from the object store: parts of them, several at once, each tried again for itself.

By the standard library: it moves bytes for a fraction of the processor time that httpx takes, which decides here.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from cli.errors import Unreachable
from cli.transport import is_loopback

__all__ = ["LARGE_BYTES", "Part", "StoreOutOfReach", "fetch_parts", "send_parts"]

LARGE_BYTES = 64 * 2**20  # from here on parts pay
AT_ONCE = 8
CHUNK_BYTES = 2**20
FETCHED_PART_BYTES = 16 * 2**20
TRIES = 4  # of a part that is fetched
PAUSE_SECONDS = 0.5
FIRST_PART_SECONDS = 5.0  # for so long nothing may arrive at all before the store counts as out of reach
FAULTS = (OSError, HTTPException)  # of a connection; urllib's are OSErrors

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class StoreOutOfReach(Unreachable):
    """The object store cannot be reached from here; the service may pass the file on."""


@dataclass(frozen=True)
class Part:
    """A range of a file, and the presigned URL that takes it."""

    first: int
    bytes: int
    url: str


class _Meter:
    """Adds up what several threads have done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._lock = threading.Lock()
        self._done = 0
        self.moved = False  # since the start

    def start(self, done: int) -> None:
        """So much is known to be done."""
        with self._lock:
            self._done, self.moved = done, False

    def add(self, count: int) -> None:
        """So many bytes more; fewer than none where a part has to go again."""
        with self._lock:
            self._done += count
            self.moved = self.moved or count > 0
            if self._progress:
                self._progress(self._done, self._total)


def send_parts(
    path: Path,
    missing: Callable[[], Sequence[Part]],
    *,
    timeout: float,
    patience: float,
    progress: Progress | None = None,
) -> None:
    """Send a file to the store in parts, until none is missing.

    Args:
        path: The file.
        missing: Asks which parts have not arrived, with fresh URLs: those of a round that failed go again.
        timeout: Seconds to connect, and between two pieces.
        patience: Seconds during which rounds in which no part arrives are begun again.
        progress: Called with bytes sent and bytes in all.

    Raises:
        StoreOutOfReach: Nothing could be sent there, from the first on.
        Unreachable: The store took some parts, and then no more.
    """
    parts = missing()
    total = path.stat().st_size
    meter = _Meter(total, progress)
    left, arrived, since = _bytes(parts), False, time.monotonic()
    while parts:
        meter.start(total - _bytes(parts))
        began = time.monotonic()
        fault = _round(path, parts, timeout, meter)
        # On a slow link a part takes minutes: a round in which bytes went out counts from its begin, so that a break is
        # followed by another round. Nor does it count how long the service is away.
        tried = began if meter.moved else time.monotonic()
        again = missing()
        # What counts is what is missing, not what was answered: a proxy may take what no store ever sees.
        if _bytes(again) < left:
            left, arrived, since = _bytes(again), True, time.monotonic()
        elif tried - since > (patience if arrived else min(patience, FIRST_PART_SECONDS)):
            kind = Unreachable if arrived else StoreOutOfReach
            told = fault or "what it took is still missing"
            raise kind(f"The object store at {_host(parts[0].url)} takes no part of the file: {told}.")
        elif fault is None:
            fault = "nothing arrived"
        if fault is not None and again:
            time.sleep(PAUSE_SECONDS)
        parts = again


def _bytes(parts: Sequence[Part]) -> int:
    return sum(part.bytes for part in parts)


def _round(path: Path, parts: Sequence[Part], timeout: float, meter: _Meter) -> str | None:
    """Send each part once, up to the first that fails: what went wrong."""
    opener, faults = _opener(parts[0].url), list[str]()

    def send(part: Part) -> None:
        if faults:
            return
        try:
            _send(opener, path, part, timeout, meter)
        except FAULTS as error:
            faults.append(_told(error))

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="part") as pool:
        try:
            list(pool.map(send, parts))
        except BaseException:
            faults.append("interrupted")
            raise
    return faults[0] if faults else None


def _send(opener: OpenerDirector, path: Path, part: Part, timeout: float, meter: _Meter) -> None:
    sent = 0

    def content() -> Iterator[bytes]:
        nonlocal sent
        with path.open("rb") as stream:
            stream.seek(part.first)
            while sent < part.bytes and (chunk := stream.read(min(CHUNK_BYTES, part.bytes - sent))):
                yield chunk
                sent += len(chunk)
                meter.add(len(chunk))

    headers = {"Content-Length": str(part.bytes), "Content-Type": "application/octet-stream"}
    try:
        with opener.open(Request(part.url, content(), headers, method="PUT"), timeout=timeout):  # noqa: S310 the service's own link
            return
    except BaseException:
        meter.add(-sent)
        raise


class _Link:
    """A presigned URL that several threads use, and that ends before they do."""

    def __init__(self, url: str, fresh: Callable[[], str] | None) -> None:
        self._url, self._fresh = url, fresh
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The newest."""
        return self._url

    def refused(self, url: str) -> None:
        """The store takes this one no more: the first to say so gets another for all."""
        with self._lock:
            if self._fresh is not None and url == self._url:
                self._url = self._fresh()


def fetch_parts(
    url: str,
    fd: int,
    size: int,
    *,
    timeout: float,
    progress: Progress | None = None,
    fresh: Callable[[], str] | None = None,
) -> str:
    """Fetch an object in ranges into an open file; the SHA-256 of what the file then holds, in hexadecimal.

    Args:
        url: Where the object is.
        fd: The file.
        size: Its bytes.
        timeout: Seconds to connect, and between two pieces.
        progress: Called with bytes received and bytes in all.
        fresh: Asks for another URL of the same object, where the store refuses the one before: it has expired.

    Raises:
        Unreachable: A range could not be had.
    """
    meter, digest, stopped = _Meter(size, progress), sha256(), threading.Event()
    opener, link = _opener(url), _Link(url, fresh)
    ranges = [(first, min(FETCHED_PART_BYTES, size - first)) for first in range(0, size, FETCHED_PART_BYTES)]

    def fetch(wanted: tuple[int, int]) -> None:
        if not stopped.is_set():
            _fetch(opener, link, fd, wanted, timeout, meter)

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="part") as pool:
        try:
            for (first, count), _ in zip(ranges, pool.map(fetch, ranges), strict=True):
                for at in range(first, first + count, CHUNK_BYTES):
                    digest.update(os.pread(fd, min(CHUNK_BYTES, first + count - at), at))
        except BaseException:
            stopped.set()
            raise
    return digest.hexdigest()


def _fetch(
    opener: OpenerDirector, link: _Link, fd: int, wanted: tuple[int, int], timeout: float, meter: _Meter
) -> None:
    """Write one range to its place in the file, in a few tries."""
    first, count = wanted
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for tries in range(1, TRIES + 1):
        done, fault, url = 0, "", link.url
        request = Request(url, headers={"Range": f"bytes={first}-{first + count - 1}"})  # noqa: S310 the service's own link
        try:
            with opener.open(request, timeout=timeout) as answer:
                if answer.status != HTTPStatus.PARTIAL_CONTENT:
                    raise Unreachable(f"The object store at {_host(url)} does not give parts of files.")
                while done < count and (got := answer.readinto(buffer[: count - done])):
                    os.pwrite(fd, buffer[:got], first + done)
                    done += got
                    meter.add(got)
            if done == count:
                return
        except FAULTS as error:
            fault = _told(error)
            if isinstance(error, HTTPError) and error.code == HTTPStatus.FORBIDDEN:
                link.refused(url)
        meter.add(-done)
        if tries < TRIES:
            time.sleep(PAUSE_SECONDS * tries)
    told = fault or f"{done} of {count} bytes came"
    raise Unreachable(f"The object store at {_host(url)} did not answer to the end: {told}.")


def _opener(url: str) -> OpenerDirector:
    """For one address: by the proxies of the environment, but for this machine's own."""
    return build_opener(ProxyHandler({})) if is_loopback(url) else build_opener()


def _told(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"it answers {error.code}"
    reason = error.reason if isinstance(error, URLError) else error
    return str(reason).rstrip(".") or type(reason).__name__


def _host(url: str) -> str:
    return urlsplit(url).netloc
