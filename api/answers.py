"""Answers to POST: made once, stored with their Idempotency-Key, repeated to the byte."""

from __future__ import annotations

from fastapi import Response
from pydantic import BaseModel

from api.conditional import etag
from services.idempotency import Answer

__all__ = ["accepted", "created", "send"]

SOON_SECONDS = "1"


def accepted(resource: BaseModel, location: str, version: int) -> Answer:
    """202: it will be done; ask there."""
    headers = {"Location": location, "Retry-After": SOON_SECONDS, "ETag": etag(version), "Cache-Control": "no-store"}
    return Answer(202, headers, resource.model_dump_json())


def created(resource: BaseModel, location: str) -> Answer:
    """201: it is there."""
    return Answer(201, {"Location": location, "Cache-Control": "no-store"}, resource.model_dump_json())


def send(answer: Answer, *, replayed: bool = False) -> Response:
    """The answer as a response."""
    headers = answer.headers | ({"Idempotent-Replayed": "true"} if replayed else {})
    return Response(answer.body, answer.status, headers, "application/json")
