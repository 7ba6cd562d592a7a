"""One record an event on standard error, as a line or as JSON, with whom it is about and without what callers sent.

What a record is written on behalf of, an attempt or a request, is known from its context (``about``), so that no
message needs to say it. Threads do not inherit a context by themselves: start them with ``inheriting``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token, copy_context
from functools import wraps
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import psycopg
from sqlalchemy.exc import StatementError

__all__ = [
    "JsonFormatter",
    "Level",
    "LineFormatter",
    "Style",
    "about",
    "configure_logging",
    "fields",
    "forget_about",
    "inheriting",
    "set_about",
]

Style = Literal["line", "json"]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
P = ParamSpec("P")
R = TypeVar("R")

QUIET = ("botocore", "boto3", "s3transfer", "urllib3", "amqp", "kombu", "celery.redirected")
SILENT = ("opentelemetry",)  # a collector that is away is no event of ours, and would be one every few seconds
SERVER = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
OWN = ("time", "level", "logger", "message", "exception")  # members that no field replaces

ExceptionInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]  # as logging has it
)
Subject: TypeAlias = Callable[[], Mapping[str, object]]

_subject: ContextVar[Subject | None] = ContextVar("forgetd_log_subject", default=None)


@contextlib.contextmanager
def about(**facts: object) -> Iterator[None]:
    """Everything logged in this block, and in threads started ``inheriting`` in it, carries these fields."""
    known = {**fields(), **facts}
    token = _subject.set(lambda: known)
    try:
        yield
    finally:
        _subject.reset(token)


def set_about(subject: Subject) -> Token[Subject | None]:
    """As ``about``, for a subject whose fields come to be known as it goes on; end it with ``forget_about``."""
    return _subject.set(subject)


def forget_about(token: Token[Subject | None]) -> None:
    """Back to the subject before."""
    _subject.reset(token)


def fields() -> Mapping[str, object]:
    """The fields of what is being worked on here."""
    subject = _subject.get()
    return subject() if subject is not None else {}


def inheriting(work: Callable[P, R]) -> Callable[P, R]:
    """The function as if it ran here: for threads, which begin with an empty context. Any number may run it at once."""
    context = copy_context()

    @wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return context.copy().run(work, *args, **kwargs)

    return run


class LineFormatter(logging.Formatter):
    """UTC time, level, where from, what. Of what the database refused, never the values: they are in its details."""

    _second = (0, "")  # the last one, written out: most records share theirs with the one before

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """UTC, to the millisecond."""
        second, written = self._second
        if second != int(record.created):
            second = int(record.created)
            written = time.strftime(datefmt or "%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second, written
        return f"{written}.{int(record.msecs):03d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, and the fields that its message does not say."""
        line = f"{self.formatTime(record)} {record.levelname} {record.name} {record.message}"
        for name, value in fields().items():
            if not _says(record.message, name, value):
                line += f" {name}={value}"
        return line

    def formatException(self, ei: ExceptionInfo) -> str:
        """The chain of exceptions, the first cause first, as Python prints it."""
        chain: list[BaseException] = []
        error = ei[1]
        while error is not None and error not in chain:
            chain.insert(0, error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\nwhich led to:\n".join(_told(error) for error in chain)


class JsonFormatter(LineFormatter):
    """The same as one JSON object a line: time, level, logger, message, the fields, and of an error its exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as an object."""
        told: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        facts = {**fields(), **getattr(record, "facts", {})}
        told |= {name: value for name, value in facts.items() if name not in OWN}
        if record.exc_info and record.exc_info[0] is not None:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def _says(message: str, name: str, value: object) -> bool:
    """Whether a message tells a field already: a word by itself, a number with its name."""
    return (isinstance(value, str) and value in message) or f"{name} {value}" in message


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


def configure_logging(style: Style = "line", level: Level = "INFO") -> None:
    """Set up the logging of a process: its own records, and those of the libraries and the server that it runs."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # nobody reads them, all pay
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    for name in SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in SERVER:
        server = logging.getLogger(name)
        server.handlers[:] = []
        server.propagate = name != "uvicorn.access"  # which then is not even asked: the gateway writes its own
