"""The one place that writes RFC 9457 problems, for every way in which a request can go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as StoreConnectionError
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from services.errors import (
    ForgetdError,
    Internal,
    InvalidRequest,
    MethodNotAllowed,
    MissingKey,
    NotFound,
    TooLarge,
    Unavailable,
    UnknownPath,
    UnsupportedMediaType,
    WrongKey,
)
from services.logs import fields

__all__ = ["COMMON", "PROBLEM_JSON", "documented", "ended", "install", "respond"]

PROBLEM_JSON = "application/problem+json"
COMMON = (MissingKey, WrongKey, InvalidRequest, Internal, Unavailable)  # what any call with a key can answer
CLIENT_CLOSED = 499  # nobody is there to read it
READING = ("GET", "HEAD")
PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "format": "uri", "description": "stable; see docs/problems.md"},
        "title": {"type": "string", "description": "the same for every problem of this type"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what is wrong here, and what to do"},
        "errors": {
            "type": "array",
            "description": "where: a JSON pointer into the body, or the name of a parameter or header",
            "items": {
                "type": "object",
                "required": ["detail"],
                "properties": {
                    "pointer": {"type": "string"},
                    "parameter": {"type": "string"},
                    "header": {"type": "string"},
                    "detail": {"type": "string"},
                },
            },
        },
    },
}


def respond(error: ForgetdError) -> Response:
    """An error as its problem; where the fault is ours, with the id of the request, which is in the log too."""
    told = error.problem()
    if error.status >= Internal.status and (request := fields().get("request")) is not None:
        told |= {"request_id": request}
    return JSONResponse(told, error.status, headers=error.headers, media_type=PROBLEM_JSON)


def documented(*leaves: type[ForgetdError]) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route for OpenAPI: these refusals and the common ones, by status."""
    by_status: dict[int | str, dict[str, Any]] = {}
    common: tuple[type[ForgetdError], ...] = COMMON
    for leaf in common + leaves:
        name = leaf.slug.replace("-", "_")
        title = (leaf.__doc__ or "").strip().splitlines()[0]
        entry = by_status.setdefault(
            leaf.status,
            {"description": "", "content": {PROBLEM_JSON: {"schema": PROBLEM_SCHEMA, "examples": {}}}},
        )
        entry["description"] = f"{entry['description']} {title}".strip()
        example = {"type": f"urn:forgetd:problem:{leaf.slug}", "title": title, "status": leaf.status, "detail": "..."}
        entry["content"][PROBLEM_JSON]["examples"][name] = {"value": example}
    return by_status


def install(app: FastAPI) -> None:
    """Answer every error that a route lets rise; what is left over is ``api.edge``'s."""
    app.add_exception_handler(ForgetdError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(ClientDisconnect, _gone)
    for error in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(error, _database_silent)
    # ConnectionError is the language's own, of an answer that is shorter than what was asked for.
    for store_error in (HTTPClientError, StoreConnectionError, IncompleteReadError, ConnectionError, ClientError):
        app.add_exception_handler(store_error, _store_silent)


def _ours(_request: Request, error: Exception) -> Response:
    if not isinstance(error, ForgetdError):
        raise error
    return respond(error)


def _invalid(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    errors = [_where(item["loc"]) | {"detail": _sentence(item)} for item in error.errors()]
    detail = "; ".join(f"{next(iter(item.values()))}: {item['detail']}" for item in errors[:3])
    return respond(InvalidRequest(detail or "The request could not be read.", errors=errors))


def _where(location: Sequence[str | int]) -> dict[str, str]:
    """A place in the request: a JSON pointer (RFC 6901) into the body, or a parameter's or header's name."""
    part, *path = location
    if part == "body":
        steps = [] if path and path[0] == "json" else path
        return {"pointer": "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in steps)}
    return {"header" if part == "header" else "parameter": ".".join(str(step) for step in path)}


def _sentence(item: dict[str, Any]) -> str:
    """What is wrong, without quoting what was sent."""
    if item["type"] == "json_invalid":
        return f"not acceptable JSON: {item['ctx']['error']}"
    return str(item["msg"]).removeprefix("Value error, ")


def _framework(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    problem: ForgetdError
    match error.status_code:
        case 404:
            problem = UnknownPath("See /docs for the paths of this service.")
        case 405:
            problem = MethodNotAllowed("See /docs for the methods of this path, or the Allow header.")
        case 413:
            problem = TooLarge("Send a smaller body.")
        case 415:
            problem = UnsupportedMediaType("See /docs for the media types of this path.")
        case status if status < 500:
            problem = InvalidRequest("The request could not be read.")
        case _:
            problem = Unavailable("Try again later.")
    response = respond(problem)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


def _database_silent(request: Request, _error: Exception) -> Response:
    return respond(Unavailable(f"The database does not answer; {_left_by(request.method)}", server="database"))


def _store_silent(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
        raise error
    return respond(Unavailable(f"The object store does not answer; {_left_by(request.method)}", server="storage"))


def ended(method: str) -> Response:
    """For a request that was still under way when the gateway had to end."""
    return respond(Unavailable(f"This gateway is stopped; {_left_by(method)}", server="gateway"))


def _left_by(method: str) -> str:
    """What became of a request that a server of ours left without an answer, and what to do."""
    if method in READING:
        return "nothing was changed. Try again."
    # A COMMIT may count although its reply was lost, and an erasure stops anywhere.
    return "it is not known whether this was done. Repeat it with the same Idempotency-Key; without one, look first."


def not_found(text: str) -> NotFound:
    """For an id that has not even the form of one: it is not echoed."""
    return NotFound(f"There is no {text} of that id.")
