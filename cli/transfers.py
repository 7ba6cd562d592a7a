"""Files on their way: read in pieces, digested, and kept only when every byte is the announced one."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from cli.errors import DownloadCorrupt, Unreachable
from cli.parts import LARGE_BYTES, fetch_parts
from cli.transport import is_loopback

__all__ = ["LazyFile", "digest_header", "file_chunks", "file_digest", "save", "sha256_of_header"]

CHUNK_BYTES = 2**20

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0: unknown)


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def digest_header(digest: bytes) -> str:
    """A digest as RFC 9530 writes it in Content-Digest and Repr-Digest."""
    return f"sha-256=:{base64.b64encode(digest).decode()}:"


def sha256_of_header(value: str) -> str | None:
    """The SHA-256 named in a Repr-Digest or Content-Digest header, in hexadecimal; None where there is none."""
    for member in value.split(","):
        name, _, text = member.strip().partition("=")
        if name.lower() == "sha-256" and text.startswith(":") and text.endswith(":"):
            try:
                return base64.b64decode(text[1:-1], validate=True).hex()
            except ValueError:
                return None
    return None


def file_chunks(path: Path, progress: Progress | None = None) -> Iterator[bytes]:
    """A file in pieces, however large, telling how far it is."""
    total, done = path.stat().st_size, 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            done += len(chunk)
            yield chunk
            if progress:
                progress(done, total)


class LazyFile(io.RawIOBase):
    """A file that is open only while it is being read, so that thousands can go into one upload."""

    def __init__(self, path: Path, finished: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._path = path
        self._finished = finished
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; the end is asked of the file system."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._path.stat().st_size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        with self._path.open("rb") as stream:
            stream.seek(self._position)
            data = stream.read(size)
        self._position += len(data)
        if not data and self._finished:
            self._finished()
        return data


def save(
    url: str,
    target: Path,
    *,
    sha256: str,
    timeout: float,
    progress: Progress | None = None,
    fresh: Callable[[], str] | None = None,
) -> Path:
    """Fetch a presigned URL into a file; the file appears whole and verified, or not at all.

    The store gets the URL and nothing else: no API key, no cookie. ``fresh`` asks for another such URL: a large file
    is fetched in ranges, and may take longer than the first is good for.

    Raises:
        DownloadCorrupt: The bytes have another SHA-256.
        Unreachable: The store did not answer to the end.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("x+b") as file:
            found = _stream(url, file, timeout=timeout, progress=progress, fresh=fresh)
            file.flush()
            os.fsync(file.fileno())
        if found != sha256.lower():
            raise DownloadCorrupt(
                f"{target.name} arrived with SHA-256 {found}, announced was {sha256}; nothing was kept."
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _stream(
    url: str,
    file: io.BufferedRandom,
    *,
    timeout: float,
    progress: Progress | None,
    fresh: Callable[[], str] | None,
) -> str:
    digest, done = hashlib.sha256(), 0
    try:
        with httpx.stream("GET", url, timeout=timeout, trust_env=not is_loopback(url)) as answer:
            if answer.status_code != httpx.codes.OK:
                raise Unreachable(
                    f"The object store answers {answer.status_code}: the link may have expired, try again."
                )
            total = int(answer.headers.get("content-length", 0))
            if total >= LARGE_BYTES and answer.headers.get("accept-ranges") == "bytes":
                answer.close()
                return fetch_parts(url, file.fileno(), total, timeout=timeout, progress=progress, fresh=fresh)
            for chunk in answer.iter_bytes(CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
    except httpx.TransportError as error:
        host = httpx.URL(url).netloc.decode()
        raise Unreachable(
            f"The object store at {host} did not answer to the end: {error or type(error).__name__}."
        ) from error
    return digest.hexdigest()
