"""What tests of uploads in parts do over and over: begin, send the parts, complete, and count those under way."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx

from services import object_keys
from services.storage import ObjectStorage
from services.tenancy import Caller

FILE = b"\x02\0\0\0\0\0\0\0{}" + bytes(90)
SHA256 = hashlib.sha256(FILE).hexdigest()


def begin(client: httpx.Client, size: int = len(FILE), **said: Any) -> dict[str, Any]:
    answer = client.post("/checkpoints/uploads", json={"bytes": size, **said})
    assert answer.status_code == 201, answer.text
    upload: dict[str, Any] = client.get(answer.headers["location"]).json()
    return upload


def send(upload: dict[str, Any], content: bytes = FILE) -> None:
    for part in upload["missing"]:
        piece = content[part["first"] : part["first"] + part["bytes"]]
        assert httpx.put(part["url"], content=piece, trust_env=False).status_code == 200


def complete(client: httpx.Client, upload: dict[str, Any], sha256: str = SHA256) -> httpx.Response:
    return client.post(f"/checkpoints/uploads/{upload['id']}/complete", json={"sha256": sha256})


def begun(storage: ObjectStorage, caller: Caller) -> int:
    return len(storage.unfinished(object_keys.tenant_prefix(caller.tenant_id)))
