"""The gateway's log after calls that carried names, keys and pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import httpx
from PIL import Image

from services.tenancy import NewKey

CANARY = "Ada-Lovelace-51.5074N"


def test_log_tells_of_calls_but_not_of_people_or_keys(
    client: httpx.Client, gateway: Any, api_key: NewKey, body: dict[str, Any], image_files: Callable[..., Any]
) -> None:
    file = io.BytesIO()
    Image.new("L", (9, 9)).save(file, "PNG")
    binary = {"Content-Type": "application/octet-stream"}
    calls = [
        client.post(f"/checkpoints?name={CANARY}", content=b"\x02\0\0\0\0\0\0\0{}", headers=binary),
        client.post(f"/checkpoints?name={CANARY}", content=b"bad", headers=binary),
        client.post("/image-sets", files=[("images", (f"{CANARY}.png", file.getvalue()))]),
        client.post("/image-sets", files=[("images", (f"{CANARY}.png", CANARY.encode()))]),
        client.post(
            f"/image-sets?{CANARY}", content=CANARY, headers={"Content-Type": "multipart/form-data; boundary=b"}
        ),
        client.post("/jobs/forget", json=body | {"metadata": {"subject": CANARY}}, headers={"Idempotency-Key": CANARY}),
        client.post("/jobs/forget", json=body | {CANARY: CANARY}),
        client.get(f"/jobs?status={CANARY}"),
    ]

    log = gateway.log.read_text()
    assert [answer.status_code for answer in calls] == [202, 422, 201, 422, 422, 202, 422, 422]
    assert '"POST /checkpoints HTTP/1.1" 202' in log
    assert CANARY not in log
    assert api_key.secret not in log
    assert "Traceback" not in log
