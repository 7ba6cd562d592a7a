"""Events as pages and as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from services import leases
from services.database import Database
from services.leases import Claim

STREAM = {"Accept": "text/event-stream"}


def frames(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Server-sent events as their fields, by the standard's reading."""
    frame: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            frame[name] = value.removeprefix(" ")
        elif frame:
            yield frame
            frame = {}


def test_pages_hold_every_event_once_oldest_first(
    client: httpx.Client, job_id: str, publish: Callable[..., Any]
) -> None:
    publish(job_id)

    seen: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": 1}
    while True:
        page = client.get(f"/jobs/{job_id}/events", params=query).json()
        seen += page["items"]
        if page["next_cursor"] is None:
            break
        query["after"] = page["next_cursor"]

    assert [event["type"] for event in seen] == ["queued", "attempt_started", "succeeded"]
    assert [event["id"] for event in seen] == sorted(event["id"] for event in seen)


def test_stream_tells_all_and_ends_with_the_job(
    client: httpx.Client, job_id: str, claim: Callable[[str], Claim], database: Database
) -> None:
    def listen() -> list[dict[str, str]]:
        with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            return list(frames(answer.iter_lines()))

    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(listen)
        held = claim(job_id)
        with database.transaction() as session:
            leases.record_progress(session, held, phase="unlearning", progress={"step": 3, "total": 9})
        client.post(f"/jobs/{job_id}/cancel")
        with database.transaction() as session:
            assert leases.cancelled(session, held)
        told = listening.result(20)

    events = [frame for frame in told if "id" in frame]
    assert [frame["event"] for frame in events] == [
        "queued",
        "attempt_started",
        "phase",
        "cancel_requested",
        "cancelled",
    ]
    assert told[-1]["event"] == "cancelled"
    assert all(json.loads(frame["data"])["type"] == frame["event"] for frame in events)


def test_stream_shows_progress_from_the_row(
    client: httpx.Client, job_id: str, claim: Callable[[str], Claim], database: Database
) -> None:
    held = claim(job_id)
    with database.transaction() as session:
        leases.record_progress(session, held, phase="unlearning", progress={"step": 3, "total": 9})

    with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as answer:
        progress = next(frame for frame in frames(answer.iter_lines()) if frame.get("event") == "progress")

    assert "id" not in progress
    assert json.loads(progress["data"])["progress"] == {"step": 3, "total": 9}


def test_reconnected_stream_continues_after_the_last_event_seen(
    client: httpx.Client, job_id: str, publish: Callable[..., Any]
) -> None:
    publish(job_id)
    first = client.get(f"/jobs/{job_id}/events").json()["items"][0]["id"]

    headers = STREAM | {"Last-Event-ID": str(first)}
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        told = [frame["event"] for frame in frames(answer.iter_lines()) if "id" in frame]

    assert told == ["attempt_started", "succeeded"]


def test_last_event_id_of_another_form_is_refused(client: httpx.Client, job_id: str) -> None:
    answer = client.get(f"/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "9" * 30})

    assert answer.status_code == 422
