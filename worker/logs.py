"""One line an event on standard error, without the values that a caller sent: the database's own words quote them."""

from __future__ import annotations

import logging
import time
import traceback
from types import TracebackType
from typing import TypeAlias

import psycopg
from sqlalchemy.exc import StatementError

__all__ = ["LineFormatter", "configure_logging"]

QUIET = ("botocore", "boto3", "s3transfer", "urllib3", "amqp", "kombu")

ExceptionInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]  # as logging has it
)


class LineFormatter(logging.Formatter):
    """UTC time, level, where from, what. Of what the database refused, never the values: they are in its details."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")

    def formatException(self, ei: ExceptionInfo) -> str:
        """The chain of exceptions, the first cause first, as Python prints it."""
        chain: list[BaseException] = []
        error = ei[1]
        while error is not None and error not in chain:
            chain.insert(0, error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\nwhich led to:\n".join(_told(error) for error in chain)


def _told(error: BaseException) -> str:
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{frames}{_last_line(error)}"


def _last_line(error: BaseException) -> str:
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    if isinstance(error, StatementError):
        return name  # its text repeats its cause's, and the statement
    if isinstance(error, psycopg.DataError):
        return f"{name} {error.sqlstate or ''}".rstrip()  # even the first line quotes what was refused
    if isinstance(error, psycopg.Error) and error.sqlstate:
        return f"{name} {error.sqlstate}: {error.diag.message_primary}"
    return "".join(traceback.format_exception_only(error)).rstrip()


def configure_logging(level: int = logging.INFO) -> None:
    """Set up the root logger of a process."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
