"""The gateway's log after calls that carried names, keys and pictures."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from pydantic import SecretStr

from api.app import create_app
from services.settings import Settings
from services.tenancy import NewKey
from tests.api.conftest import ROOT, variables
from tests.worker.helpers import eventually

NOBODY = "postgresql+psycopg://nobody:x@127.0.0.1:9/none"  # the discard port: nobody listens
CANARY = "Ada-Lovelace-51.5074N"


def written(log: Path, text: str) -> str:
    """The log once it has this in it: a request's line is written behind its answer."""
    eventually(lambda: text in log.read_text(), what=text)
    return log.read_text()


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

    log = written(gateway.log, " INFO forgetd.access GET /jobs 422 ")
    assert [answer.status_code for answer in calls] == [202, 422, 201, 422, 422, 202, 422, 422]
    assert " INFO forgetd.access POST /checkpoints 202 " in log
    assert CANARY not in log
    assert api_key.secret not in log
    assert "Traceback" not in log


def test_an_answer_and_its_access_line_have_the_callers_request_id(anonymous: httpx.Client, gateway: Any) -> None:
    answer = anonymous.get("/jobs/anything?secret", headers={"X-Request-Id": "order-66.a_b"})

    log = written(gateway.log, "order-66.a_b")
    lines = [line for line in log.splitlines() if "order-66.a_b" in line]
    assert answer.headers.get_list("x-request-id") == ["order-66.a_b"]
    assert len(lines) == 1
    assert re.search(r" forgetd.access GET /jobs/\{job_id\} 401 [0-9.]+ ms request=order-66.a_b$", lines[0])


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "id\tid", "a/b", "name@host"])
def test_an_odd_request_id_is_replaced(anonymous: httpx.Client, gateway: Any, sent: str) -> None:
    answer = anonymous.get("/healthz", headers={"X-Request-Id": sent})

    assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])


def test_every_request_is_one_line_with_a_template_for_its_route(anonymous: httpx.Client, gateway: Any) -> None:
    anonymous.get("/healthz", headers={"X-Request-Id": "the-first"})
    before = written(gateway.log, "the-first").count("forgetd.access")

    anonymous.get(f"/{CANARY}/{CANARY}")
    anonymous.request("BREW", f"/{CANARY}")
    anonymous.get("/healthz", headers={"X-Request-Id": "the-last"})

    log = written(gateway.log, "the-last")
    assert log.count("forgetd.access") == before + 3
    assert " GET none 404 " in log
    assert " GET /healthz 200 " in log
    assert CANARY not in log


def test_a_problem_of_ours_names_the_request(settings: Settings, serve: Callable[..., httpx.Client]) -> None:
    client = serve(create_app(settings.model_copy(update={"database_url": SecretStr(NOBODY)})), None)
    key = f"fgt_{'0' * 32}_{'a' * 43}"

    answer = client.get("/jobs", headers={"Authorization": f"Bearer {key}", "X-Request-Id": "mine"})

    assert answer.status_code == 503
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"


def test_json_logs_are_objects_with_the_request_and_its_route(settings: Settings, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORGETD_")}
    code = (
        "from starlette.testclient import TestClient\nimport api.app\n"
        "with TestClient(api.app.process_app()) as client:\n"
        "    client.get('/healthz', headers={'x-request-id': 'mine'})"
    )

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment | variables(settings) | {"FORGETD_LOG_FORMAT": "json"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    [line] = [line for line in lines if line["logger"] == "forgetd.access"]
    assert {name: line[name] for name in ("level", "method", "route", "status", "request")} == {
        "level": "INFO",
        "method": "GET",
        "route": "/healthz",
        "status": 200,
        "request": "mine",
    }
    assert line["time"].endswith("Z")
    assert line["ms"] >= 0
