"""Quotas and deadlines at the door: who is let in, and what a refusal says."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from api.app import create_app
from services import quotas
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Checkpoint, Job, Tenant
from services.tenancy import Caller, NewKey

FILE = {"content": b"\x02\0\0\0\0\0\0\0{}", "headers": {"Content-Type": "application/octet-stream"}}


@pytest.fixture
def full(database: Database, caller: Caller, job_id: str) -> str:
    """The one open job of a tenant that may have one."""
    with database.transaction() as session:
        name = session.get_one(Tenant, caller.tenant_id).name
        quotas.set_limits(session, name, max_open_jobs=1)
    return job_id


def refused(answer: httpx.Response) -> bool:
    """Whether it is the refusal, complete."""
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (429, "urn:forgetd:problem:quota-exceeded"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) > 0
    assert "cancel some" in problem["detail"]
    return (problem["limit"], problem["open"]) == (1, 1)


def test_a_job_over_the_quota_is_refused_and_leaves_nothing(
    client: httpx.Client, body: dict[str, Any], full: str, database: Database, caller: Caller
) -> None:
    assert refused(client.post("/jobs/forget", json=body))

    with database.transaction() as session:
        owned = session.scalars(select(Job.id).where(Job.tenant_id == caller.tenant_id)).all()
    assert owned == [full]


def test_a_place_is_free_again_once_a_job_has_ended(client: httpx.Client, body: dict[str, Any], full: str) -> None:
    client.post(f"/jobs/{full}/cancel")

    assert client.post("/jobs/forget", json=body).status_code == 202


def test_an_upload_over_the_quota_is_refused_before_it_is_read(
    gateway: Any, api_key: NewKey, full: str, database: Database, caller: Caller, storage: ObjectStorage
) -> None:
    head = (
        f"POST /checkpoints HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api_key.secret}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {2**30}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as line:
        line.sendall(head.encode())

        answer = line.makefile("rb").read()  # to its end: the gateway hangs up

    assert full
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert b"urn:forgetd:problem:quota-exceeded" in answer
    assert list(storage.keys(f"tenants/{caller.tenant_id}/checkpoints/")) == []
    with database.transaction() as session:
        assert session.scalar(select(func.count()).where(Checkpoint.tenant_id == caller.tenant_id)) == 1  # the job's


def test_an_upload_counts_as_an_open_job(
    client: httpx.Client, body: dict[str, Any], database: Database, caller: Caller
) -> None:
    with database.transaction() as session:
        quotas.set_limits(session, session.get_one(Tenant, caller.tenant_id).name, max_open_jobs=1)
    assert client.post("/checkpoints", **FILE).status_code == 202

    assert refused(client.post("/jobs/forget", json=body))


def test_repeats_are_answered_however_full_it_is(
    client: httpx.Client, body: dict[str, Any], database: Database, caller: Caller
) -> None:
    key = {"Idempotency-Key": "k"}
    upload = FILE | {"headers": FILE["headers"] | key}
    first = [client.post("/jobs/forget", json=body, headers=key), client.post("/checkpoints", **upload)]
    with database.transaction() as session:
        quotas.set_limits(session, session.get_one(Tenant, caller.tenant_id).name, max_open_jobs=1)

    again = [client.post("/jobs/forget", json=body, headers=key), client.post("/checkpoints", **upload)]

    assert [answer.status_code for answer in first] == [202, 202]
    assert [answer.content for answer in again] == [answer.content for answer in first]
    assert client.post("/jobs/forget", json=body, headers={"Idempotency-Key": "other"}).status_code == 429


def test_the_limit_of_the_settings_holds_for_whom_no_other_does(
    settings: Settings, serve: Callable[..., httpx.Client], api_key: NewKey, body: dict[str, Any]
) -> None:
    client = serve(create_app(settings.model_copy(update={"tenant_open_jobs": 1})), api_key)

    assert client.post("/jobs/forget", json=body).status_code == 202
    assert refused(client.post("/jobs/forget", json=body))


# Deadlines.


def ahead(**much: float) -> str:
    return (datetime.now(UTC) + timedelta(**much)).isoformat()


def test_a_deadline_is_kept_and_shown(client: httpx.Client, body: dict[str, Any]) -> None:
    moment = datetime.now(UTC) + timedelta(hours=2)

    made = client.post("/jobs/forget", json=body | {"deadline": moment.isoformat()})

    assert made.status_code == 202, made.text
    shown = client.get(made.headers["location"]).json()
    assert datetime.fromisoformat(shown["deadline_at"]) == moment
    assert shown == made.json()


def test_a_job_without_a_deadline_has_none(client: httpx.Client, job_id: str) -> None:
    assert client.get(f"/jobs/{job_id}").json()["deadline_at"] is None


@pytest.mark.parametrize(
    "deadline",
    [
        pytest.param(ahead(seconds=-1), id="past"),
        pytest.param(ahead(days=91), id="too far"),
        "2099-01-01T00:00:00",  # whose midnight?
        "2099-01-01",
        "in two hours",
        4_102_444_800,
        "4102444800",
        "2099-13-01T00:00:00Z",
        True,
    ],
)
def test_a_deadline_that_is_none_is_pointed_at(client: httpx.Client, body: dict[str, Any], deadline: object) -> None:
    answer = client.post("/jobs/forget", json=body | {"deadline": deadline})

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:forgetd:problem:invalid-request")
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/deadline"]


def test_a_repeat_is_answered_after_the_deadline_too(
    client: httpx.Client, body: dict[str, Any], database: Database
) -> None:
    asked = {"json": body | {"deadline": ahead(seconds=1.5)}, "headers": {"Idempotency-Key": "k"}}
    first = client.post("/jobs/forget", **asked)
    with database.transaction() as session:
        session.execute(select(func.pg_sleep(1.6)))

    again = client.post("/jobs/forget", **asked)

    assert (first.status_code, again.content) == (202, first.content)


# Queues.


A_CLASS = {"target": {"class_label": 0}}
A_CONCEPT = {"target": {"concept": "zero"}, "remember": {"concepts": ["one", "two"]}}


def queue_of(database: Database, checkpoint: str, kind: str) -> str:
    """Where the one job of that kind on the checkpoint waits."""
    with database.transaction() as session:
        asked = select(Job.queue).where(Job.checkpoint_id == checkpoint, Job.kind == kind)
        return session.execute(asked).scalar_one()


@pytest.mark.parametrize(
    ("family", "asked", "queue"),
    [
        ("glow", {}, "gpu.flow"),
        ("tarflow", {}, "gpu.flow"),
        ("vae", A_CLASS, "gpu.flow"),
        ("ddpm", A_CLASS, "gpu.diffusion"),
        ("stable-diffusion", A_CONCEPT, "gpu.diffusion"),
        ("stable-diffusion-xl", A_CONCEPT, "gpu.diffusion"),
    ],
)
def test_a_job_waits_for_a_worker_that_can_do_it(
    client: httpx.Client,
    body: dict[str, Any],
    ready_checkpoint: Callable[..., str],
    database: Database,
    caller: Caller,
    family: str,
    asked: dict[str, Any],
    queue: str,
) -> None:
    checkpoint = ready_checkpoint(caller, family, architecture={"n_classes": 3})

    answer = client.post("/jobs/forget", json=body | asked | {"checkpoint": checkpoint})

    assert answer.status_code == 202, answer.text
    assert queue_of(database, checkpoint, "forget") == queue


def test_the_validation_of_an_upload_waits_for_a_worker_without_a_gpu(client: httpx.Client, database: Database) -> None:
    checkpoint = client.post("/checkpoints", **FILE).json()["id"]

    assert queue_of(database, checkpoint, "import") == "cpu"
