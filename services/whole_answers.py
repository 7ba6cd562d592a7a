"""Answers of the store that broke off are none.

To the language's HTTP client the end of a connection ends a head, wherever that was, and a body that was announced
longer; botocore asks for no more. Of an object then the length or the checksum is missing or cut, its part of a file is
empty, a listing names nothing. Here both raise as a connection does that ends before it answers: botocore asks again,
and says in the end that the store is away.
"""

from __future__ import annotations

from http.client import HTTPResponse, IncompleteRead, RemoteDisconnected
from typing import IO, TYPE_CHECKING, Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["WholeAnswer", "take_only_whole_answers"]


def take_only_whole_answers(client: S3Client) -> None:
    """From now on; for a client that has not asked anything yet."""
    session = client._endpoint.http_session  # type: ignore[attr-defined]  # nothing public leads to the connections
    session._pool_classes_by_scheme.update(http=_Pool, https=_SecurePool)


class WholeAnswer(HTTPResponse):
    """An HTTP answer that raises where it broke off."""

    def begin(self) -> None:
        """Read the head.

        Raises:
            RemoteDisconnected: it lacks its end, or it does not say where the end of the body is.
        """
        stream = self.fp
        lines = _Lines(stream)
        self.fp = lines  # type: ignore[assignment]  # a head asks it for lines alone
        super().begin()
        self.fp = stream
        if not lines.last:
            raise RemoteDisconnected("the store's answer broke off")
        if self.length is None and not self.chunked and self.status < 300:
            raise RemoteDisconnected("the store's answer does not say how long it is")

    def read(self, amt: int | None = None) -> bytes:
        """The next bytes of the body.

        Raises:
            IncompleteRead: there were to be more.
        """
        data = super().read(amt)
        if amt and not data and self.length:
            raise IncompleteRead(data, self.length)
        return data


class _Lines:
    """A stream that remembers the last line that was read: empty at its end alone."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def readline(self, limit: int) -> bytes:
        self.last = self._stream.readline(limit)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Connection(AWSHTTPConnection):
    response_class = WholeAnswer  # type: ignore[assignment]  # botocore's own is for Expect alone


class _SecureConnection(AWSHTTPSConnection):
    response_class = WholeAnswer  # type: ignore[assignment]  # botocore's own is for Expect alone


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):
    ConnectionCls = _SecureConnection
