"""JSON bodies without surprises: one meaning for every reader, and nothing that the database cannot keep."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from services.errors import UnsupportedMediaType

__all__ = ["StrictJsonRoute"]

MAX_DEPTH = 32
UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class StrictJsonRoute(APIRoute):
    """A route whose JSON body must be UTF-8, without duplicate keys, NaN, NUL or deep nesting."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler around a stricter request."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def strict(request: Request) -> Response:
            if not _is_json(request.headers.get("content-type", "")):
                raise UnsupportedMediaType("Send JSON, with Content-Type: application/json.")
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        return await run_in_threadpool(_parse, await self.body())  # a full body takes a while: not on the event loop


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _parse(body: bytes) -> Any:
    """The value; raises ``json.JSONDecodeError`` for whatever is wrong, as FastAPI expects."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError:
        raise json.JSONDecodeError("it is not UTF-8", "", 0) from None
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
    except ValueError as error:
        raise json.JSONDecodeError(str(error) if isinstance(error, _Fault) else "a number is too long", "", 0) from None
    _check(value, 0)
    return value


class _Fault(ValueError):
    """What is wrong, in words of ours."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Fault("an object has the same key twice")
    return value


def _constant(_name: str) -> Any:
    raise _Fault("NaN and Infinity are not JSON")


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise json.JSONDecodeError("it is nested too deeply", "", 0)
    if isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth + 1)
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise json.JSONDecodeError("a number is too large", "", 0)
    elif isinstance(value, str) and UNSTORABLE.search(value):
        raise json.JSONDecodeError("a string holds NUL or half a surrogate pair", "", 0)
