"""Jobs through the door: accepted once, read cheaply, waited for, cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from services import leases
from services.database import Database
from services.leases import Claim
from services.tables import AuditEvent, Job, JobEvent
from services.tenancy import Caller, NewKey

PATIENCE_SECONDS = 10.0


def test_accepted_job_says_where_and_when_to_ask(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post("/jobs/forget", json=body | {"metadata": {"ticket": "R-1"}, "seed": 7})

    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert (job["status"], job["attempt"], job["seed"]) == ("queued", 0, 7)
    assert job["metadata"] == {"ticket": "R-1"}
    assert job["request"]["method"] == "flow-taming"
    assert client.get(answer.headers["location"]).json() == job


def test_accepted_job_is_committed_with_its_events(
    client: httpx.Client, body: dict[str, Any], database: Database
) -> None:
    job_id = client.post("/jobs/forget", json=body).json()["id"]

    with database.transaction() as session:
        events = session.scalars(select(JobEvent.type).where(JobEvent.job_id == job_id)).all()
        audited = session.scalars(select(AuditEvent.action).where(AuditEvent.subject == job_id)).all()
    assert (events, audited) == (["queued"], ["job.accepted.forget"])


@pytest.mark.parametrize(
    ("change", "status", "slug"),
    [
        ({"checkpoint": "ckpt_" + "0" * 32}, 404, "not-found"),
        ({"target": {"images": "imgs_" + "0" * 32}}, 404, "not-found"),
        ({"remember": {"images": "imgs_" + "0" * 32}}, 404, "not-found"),
        ({"evaluation": {"held_out": {"images": "imgs_" + "0" * 32}}}, 404, "not-found"),
    ],
)
def test_unknown_inputs_are_named(
    client: httpx.Client, body: dict[str, Any], change: dict[str, Any], status: int, slug: str
) -> None:
    answer = client.post("/jobs/forget", json=body | change)

    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:forgetd:problem:{slug}")


def test_checkpoint_still_validating_is_a_conflict(client: httpx.Client, body: dict[str, Any]) -> None:
    upload = client.post(
        "/checkpoints",
        content=b"\x02\0\0\0\0\0\0\0{}",
        headers={"Content-Type": "application/octet-stream"},
    )

    answer = client.post("/jobs/forget", json=body | {"checkpoint": upload.json()["id"]})

    assert (answer.status_code, answer.json()["state"]) == (409, "validating")


def test_erased_images_are_a_conflict(client: httpx.Client, body: dict[str, Any]) -> None:
    client.delete(f"/image-sets/{body['target']['images']}")

    answer = client.post("/jobs/forget", json=body)

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:forgetd:problem:image-set-erased")


# Idempotency.


def test_fifty_posts_with_one_key_make_one_job(
    gateway: Any, api_key: NewKey, body: dict[str, Any], database: Database, caller: Caller
) -> None:
    headers = {"Authorization": f"Bearer {api_key.secret}", "Idempotency-Key": "race"}
    limits = httpx.Limits(max_connections=50)
    start = threading.Barrier(50)

    with httpx.Client(base_url=gateway.url, headers=headers, timeout=60, limits=limits, trust_env=False) as client:

        def post(_: int) -> httpx.Response:
            start.wait()
            return client.post("/jobs/forget", json=body)

        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(post, range(50)))

    with database.transaction() as session:
        jobs = session.scalar(select(func.count()).where(Job.tenant_id == caller.tenant_id, Job.kind == "forget"))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert jobs == 1


def test_replay_repeats_the_first_answer_after_the_job_moved_on(
    client: httpx.Client, body: dict[str, Any], claim: Callable[[str], Claim]
) -> None:
    first = client.post("/jobs/forget", json=body, headers={"Idempotency-Key": "k"})
    claim(first.json()["id"])

    again = client.post("/jobs/forget", json=body, headers={"Idempotency-Key": "k"})

    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]


def test_spelled_out_defaults_are_the_same_request(client: httpx.Client, body: dict[str, Any]) -> None:
    first = client.post("/jobs/forget", json=body, headers={"Idempotency-Key": "k"})

    again = client.post("/jobs/forget", json=body | {"priority": 0}, headers={"Idempotency-Key": "k"})

    assert again.content == first.content


def test_key_used_for_another_request_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    client.post("/jobs/forget", json=body, headers={"Idempotency-Key": "k"})

    answer = client.post("/jobs/forget", json=body | {"priority": 1}, headers={"Idempotency-Key": "k"})

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:forgetd:problem:idempotency-key-reused")


def test_refused_request_does_not_use_its_key_up(client: httpx.Client, body: dict[str, Any]) -> None:
    refused = client.post(
        "/jobs/forget", json=body | {"checkpoint": "ckpt_" + "0" * 32}, headers={"Idempotency-Key": "k"}
    )

    answer = client.post("/jobs/forget", json=body, headers={"Idempotency-Key": "k"})

    assert (refused.status_code, answer.status_code) == (404, 202)


def test_keys_are_the_tenants_own(
    client: httpx.Client,
    body: dict[str, Any],
    connect: Callable[[NewKey], httpx.Client],
    new_key: Callable[[], NewKey],
) -> None:
    client.post("/jobs/forget", json=body, headers={"Idempotency-Key": "k"})

    answer = connect(new_key()).post("/jobs/forget", json=body, headers={"Idempotency-Key": "k"})

    assert answer.status_code == 404  # judged on its own, and the body names another tenant's checkpoint


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
def test_idempotency_key_of_another_form_is_refused(client: httpx.Client, body: dict[str, Any], key: str) -> None:
    answer = client.post("/jobs/forget", json=body, headers={"Idempotency-Key": key})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["header"] == "Idempotency-Key"


# Reading.


def test_unchanged_job_is_304_and_a_changed_one_is_not(
    client: httpx.Client, job_id: str, claim: Callable[[str], Claim]
) -> None:
    tag = client.get(f"/jobs/{job_id}").headers["etag"]

    same = client.get(f"/jobs/{job_id}", headers={"If-None-Match": f'"0", W/{tag}'})
    claim(job_id)
    other = client.get(f"/jobs/{job_id}", headers={"If-None-Match": tag})

    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert (other.status_code, other.json()["status"]) == (200, "running")
    assert other.headers["etag"] != tag


def test_running_job_says_when_to_ask_again_and_an_ended_one_does_not(
    client: httpx.Client, job_id: str, publish: Callable[..., Any]
) -> None:
    running = client.get(f"/jobs/{job_id}")
    publish(job_id)
    ended = client.get(f"/jobs/{job_id}")

    assert "retry-after" in running.headers
    assert "retry-after" not in ended.headers
    assert ended.json()["status"] == "succeeded"


@pytest.mark.parametrize("conditional", [True, False])
def test_long_poll_ends_with_the_change(
    client: httpx.Client, job_id: str, claim: Callable[[str], Claim], conditional: bool
) -> None:
    tag = client.get(f"/jobs/{job_id}").headers["etag"]
    headers = {"If-None-Match": tag} if conditional else {}
    asked = time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, f"/jobs/{job_id}?wait=30", headers=headers)
        time.sleep(0.3)  # not for a condition: the call is to be under way when the job changes
        claim(job_id)
        answer = waiting.result(PATIENCE_SECONDS)

    assert answer.json()["status"] == "running"
    assert 0.3 <= time.monotonic() - asked < PATIENCE_SECONDS


def test_long_poll_ends_unchanged_when_its_time_is_over(client: httpx.Client, job_id: str) -> None:
    tag = client.get(f"/jobs/{job_id}").headers["etag"]
    asked = time.monotonic()

    answer = client.get(f"/jobs/{job_id}?wait=0.5", headers={"If-None-Match": tag})

    assert answer.status_code == 304
    assert time.monotonic() - asked >= 0.5


def test_long_poll_of_an_ended_job_answers_at_once(client: httpx.Client, job_id: str) -> None:
    client.post(f"/jobs/{job_id}/cancel")
    asked = time.monotonic()

    answer = client.get(f"/jobs/{job_id}?wait=30")

    assert answer.json()["status"] == "cancelled"
    assert time.monotonic() - asked < PATIENCE_SECONDS


def test_pages_hold_every_job_once_newest_first(client: httpx.Client, body: dict[str, Any]) -> None:
    made = [client.post("/jobs/forget", json=body).json()["id"] for _ in range(5)]

    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = client.get("/jobs", params=query).json()
        seen += [job["id"] for job in page["items"]]
        assert page["has_more"] == (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        query["after"] = page["next_cursor"]

    assert seen == made[::-1]


def test_list_filters_by_status_and_checkpoint(client: httpx.Client, body: dict[str, Any]) -> None:
    first, second = (client.post("/jobs/forget", json=body).json()["id"] for _ in range(2))
    client.post(f"/jobs/{first}/cancel")

    def ids(**query: str) -> list[str]:
        return [job["id"] for job in client.get("/jobs", params=query).json()["items"]]

    assert ids(status="cancelled") == [first]
    assert ids(status="queued") == [second]
    assert ids(checkpoint=body["checkpoint"]) == [second, first]
    assert ids(checkpoint="ckpt_" + "0" * 32) == []


# Cancelling.


def test_queued_job_is_cancelled_at_once_and_twice_is_as_once(client: httpx.Client, job_id: str) -> None:
    first = client.post(f"/jobs/{job_id}/cancel")
    again = client.post(f"/jobs/{job_id}/cancel")

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["status"] == "cancelled"
    assert first.json() == again.json()


def test_running_job_is_told_to_end(client: httpx.Client, job_id: str, claim: Callable[[str], Claim]) -> None:
    claim(job_id)

    answer = client.post(f"/jobs/{job_id}/cancel")

    assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")
    assert answer.json()["cancel_requested_at"] is not None


def test_ended_job_cannot_be_cancelled(client: httpx.Client, job_id: str, publish: Callable[..., Any]) -> None:
    publish(job_id)

    answer = client.post(f"/jobs/{job_id}/cancel")

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:forgetd:problem:job-ended")


def test_an_ended_job_is_refused_while_somebody_has_its_row_locked(
    client: httpx.Client, job_id: str, publish: Callable[..., Any], database: Database
) -> None:
    publish(job_id)

    with database.transaction() as session:
        session.execute(select(Job.id).where(Job.id == job_id).with_for_update())
        answer = client.post(f"/jobs/{job_id}/cancel", timeout=PATIENCE_SECONDS)

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:forgetd:problem:job-ended")


def test_whole_queue_can_be_cancelled(client: httpx.Client, body: dict[str, Any], database: Database) -> None:
    made = [client.post("/jobs/forget", json=body).json()["id"] for _ in range(10)]

    for job_id in made:
        client.post(f"/jobs/{job_id}/cancel")

    with database.transaction() as session:
        held = session.scalars(select(Job.id).where(Job.id.in_(made), Job.finished_at.is_(None))).all()
        claims = [leases.claim(session, job_id, worker="late", ttl_seconds=60) for job_id in made]
    assert held == []
    assert claims == [None] * 10
