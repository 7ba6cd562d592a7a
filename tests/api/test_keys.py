"""Who may call, and that nobody sees another tenant's things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services import tenancy
from services.database import Database
from services.tenancy import NewKey

CLOSED = [
    ("GET", "/checkpoints"),
    ("POST", "/checkpoints"),
    ("POST", "/image-sets"),
    ("POST", "/jobs/forget"),
    ("GET", "/jobs"),
    ("GET", "/jobs/job_00000000000000000000000000000000"),
    ("POST", "/jobs/job_00000000000000000000000000000000/cancel"),
    ("GET", "/jobs/job_00000000000000000000000000000000/events"),
    ("DELETE", "/image-sets/imgs_00000000000000000000000000000000"),
]
WRONG = [
    "fgt_" + "0" * 32 + "_" + "x" * 43,
    "fgt_",
    "nonsense",
    "fgt_" + "0" * 32,
    "x" * 4000,
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_no_key_is_a_problem_that_says_how_to_send_one(anonymous: httpx.Client, method: str, path: str) -> None:
    json = {} if path == "/jobs/forget" else None

    answer = anonymous.request(method, path, json=json)

    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["type"] == "urn:forgetd:problem:missing-key"
    assert "Authorization" in answer.json()["detail"]


@pytest.mark.parametrize("key", WRONG)
def test_wrong_key_is_refused_without_saying_what_is_wrong(anonymous: httpx.Client, key: str) -> None:
    answer = anonymous.get("/jobs", headers={"Authorization": f"Bearer {key}"})

    assert answer.status_code == 401
    assert answer.json()["type"] == "urn:forgetd:problem:wrong-key"
    assert key not in answer.text


def test_right_id_with_wrong_secret_is_refused(anonymous: httpx.Client, api_key: NewKey) -> None:
    other = api_key.secret[:-1] + ("A" if api_key.secret[-1] != "A" else "B")

    answer = anonymous.get("/jobs", headers={"Authorization": f"Bearer {other}"})

    assert answer.json()["type"] == "urn:forgetd:problem:wrong-key"


def test_revoked_key_stops_working_at_once(client: httpx.Client, api_key: NewKey, database: Database) -> None:
    assert client.get("/jobs").status_code == 200
    with database.transaction() as session:
        tenancy.revoke_key(session, api_key.id)

    answer = client.get("/jobs")

    assert answer.status_code == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json", "/docs/assets/swagger-ui.css"])
def test_service_pages_need_no_key(anonymous: httpx.Client, path: str) -> None:
    assert anonymous.get(path).status_code == 200


def test_another_tenants_things_do_not_exist(
    client: httpx.Client,
    connect: Callable[[NewKey], httpx.Client],
    new_key: Callable[[], NewKey],
    publish: Callable[..., Any],
    body: dict[str, Any],
) -> None:
    job_id = client.post("/jobs/forget", json=body).json()["id"]
    publish(job_id)
    checkpoint, images = body["checkpoint"], body["target"]["images"]
    stranger = connect(new_key())

    paths = [
        f"/checkpoints/{checkpoint}",
        f"/checkpoints/{checkpoint}?wait=1",
        f"/image-sets/{images}",
        *(f"/jobs/{job_id}{part}" for part in ("", "?wait=1", "/events", "/report", "/artifacts", "/checkpoint")),
        f"/jobs/{job_id}/artifacts/report.json",
    ]
    statuses = {path: stranger.get(path).status_code for path in paths}
    statuses["cancel"] = stranger.post(f"/jobs/{job_id}/cancel").status_code
    statuses["erase"] = stranger.delete(f"/image-sets/{images}").status_code
    statuses["stream"] = stranger.get(f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}).status_code

    assert set(statuses.values()) == {404}, statuses
    assert stranger.get("/jobs").json()["items"] == []
    assert stranger.get("/checkpoints").json()["items"] == []
    assert client.get(f"/image-sets/{images}").json()["erased_at"] is None


@pytest.mark.parametrize("borrowed", ["checkpoint", "images"])
def test_job_cannot_use_another_tenants_things(
    connect: Callable[[NewKey], httpx.Client],
    new_key: Callable[[], NewKey],
    ready_checkpoint: Callable[..., str],
    image_files: Callable[..., Any],
    body: dict[str, Any],
    borrowed: str,
) -> None:
    from services.tenancy import Caller

    key = new_key()
    stranger = connect(key)
    mine = {
        "checkpoint": ready_checkpoint(Caller(key.tenant_id, key.id)),
        "target": {"images": "imgs_" + "0" * 32},
    }
    mixed = (
        {**mine, "checkpoint": body["checkpoint"]} if borrowed == "checkpoint" else {**mine, "target": body["target"]}
    )

    answer = stranger.post("/jobs/forget", json=mixed)

    assert answer.status_code == 404
