"""Large checkpoints go straight to the store: begun, sent in parts by presigned URLs, made whole, and nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from api.app import create_app
from services import object_keys, uploads
from services.database import Database
from services.errors import NotFound
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Job
from services.tenancy import Caller, NewKey
from services.uploads import PART_BYTES
from tests.api.upload_steps import FILE, SHA256, begin, complete, send
from tests.relays import AskingRelay
from tests.worker.helpers import eventually
from worker.janitor import UNFINISHED_HOURS


def test_parts_sent_to_the_store_become_a_checkpoint(
    client: httpx.Client, storage: ObjectStorage, caller: Caller
) -> None:
    upload = begin(client, name="faces", n_bits=5)
    send(upload)

    answer = complete(client, upload)

    checkpoint = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/checkpoints/{upload['id']}"
    assert (checkpoint["id"], checkpoint["name"], checkpoint["status"]) == (upload["id"], "faces", "validating")
    assert checkpoint["declared"] == {"n_bits": 5}
    assert checkpoint["source"] == {"bytes": len(FILE), "sha256": SHA256}
    assert storage.read(object_keys.checkpoint_source(caller.tenant_id, upload["id"])) == FILE
    assert client.get(f"/checkpoints/{upload['id']}").json() == checkpoint


def test_completed_upload_is_over_and_leaves_its_file_alone(
    client: httpx.Client, storage: ObjectStorage, caller: Caller
) -> None:
    upload = begin(client)
    send(upload)
    complete(client, upload)

    again = client.get(f"/checkpoints/uploads/{upload['id']}")
    late = httpx.put(upload["missing"][0]["url"], content=FILE, trust_env=False)

    prefix = object_keys.checkpoint_prefix(caller.tenant_id, upload["id"])
    assert again.status_code == 404
    assert late.status_code == 404
    assert storage.keys(prefix) == [f"{prefix}source"]
    assert storage.unfinished(prefix) == []


def test_large_file_is_told_its_parts_and_only_those_that_are_missing(client: httpx.Client) -> None:
    upload = begin(client, 2 * PART_BYTES + 5)
    parts = [(part["number"], part["first"], part["bytes"]) for part in upload["missing"]]
    last = upload["missing"][2]
    httpx.put(last["url"], content=bytes(5), trust_env=False)

    left = client.get(f"/checkpoints/uploads/{upload['id']}").json()["missing"]

    assert parts == [(1, 0, PART_BYTES), (2, PART_BYTES, PART_BYTES), (3, 2 * PART_BYTES, 5)]
    assert [part["number"] for part in left] == [1, 2]


@pytest.mark.parametrize("content", [FILE + b"x", FILE[:-1]])
def test_part_of_another_length_is_refused_by_the_store(client: httpx.Client, content: bytes) -> None:
    part = begin(client)["missing"][0]

    assert httpx.put(part["url"], content=content, trust_env=False).status_code == 403


def test_upload_that_lacks_a_part_is_not_completed(client: httpx.Client) -> None:
    upload = begin(client)

    answer = complete(client, upload)
    send(upload)

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:forgetd:problem:upload-incomplete")
    assert answer.json()["missing"] == [1]
    assert complete(client, upload).status_code == 202


def test_file_that_cannot_be_a_checkpoint_is_refused_and_not_kept(
    client: httpx.Client, storage: ObjectStorage, caller: Caller
) -> None:
    upload = begin(client, 100)
    send(upload, bytes(100))

    answer = complete(client, upload)

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:forgetd:problem:not-a-checkpoint")
    assert storage.keys(object_keys.checkpoint_prefix(caller.tenant_id, upload["id"])) == []


def test_completions_at_once_make_one_checkpoint_and_one_import(
    client: httpx.Client, connect: Callable[[NewKey], httpx.Client], api_key: NewKey, database: Any
) -> None:
    upload = begin(client)
    send(upload)
    clients = [connect(api_key) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda each: complete(each, upload), clients))

    with database.transaction() as session:
        imports = session.query(Job.id).filter_by(checkpoint_id=upload["id"]).all()
    assert {answer.status_code for answer in answers} == {202}
    assert {answer.json()["id"] for answer in answers} == {upload["id"]}
    assert len(imports) == 1


@pytest.mark.parametrize("asks_for", [b"/source.upload HTTP", b"/source?uploadId="], ids=["its record", "its parts"])
def test_a_completion_is_told_of_the_checkpoint_that_another_made_meanwhile(
    relay: AskingRelay,
    behind: Settings,
    serve: Callable[..., httpx.Client],
    api_key: NewKey,
    client: httpx.Client,
    storage: ObjectStorage,
    caller: Caller,
    asks_for: bytes,
) -> None:
    upload = begin(client)
    send(upload)
    slow, first = serve(create_app(behind), api_key), list[httpx.Response]()

    def overtake(head: bytes) -> None:
        if not first and head.startswith(b"GET ") and asks_for in head.split(b"\r\n")[0] + b"\r\n":
            first.append(complete(client, upload))
            storage.erase(object_keys.checkpoint_source(caller.tenant_id, upload["id"]))  # as its import does

    relay.asked = overtake
    second = complete(slow, upload)

    assert [answer.status_code for answer in (*first, second)] == [202, 202]
    assert second.json() == first[0].json()


def test_begin_with_one_key_begins_once(client: httpx.Client, storage: ObjectStorage, caller: Caller) -> None:
    headers = {"Idempotency-Key": "k"}

    answers = [client.post("/checkpoints/uploads", json={"bytes": 5}, headers=headers) for _ in range(2)]

    begun = storage.unfinished(object_keys.tenant_prefix(caller.tenant_id))
    assert answers[0].content == answers[1].content
    assert answers[1].headers["idempotent-replayed"] == "true"
    assert len(begun) == 1


def test_no_url_is_kept_with_the_answer(client: httpx.Client) -> None:
    answer = client.post("/checkpoints/uploads", json={"bytes": 5})

    assert set(answer.json()) == {"id", "bytes", "part_bytes", "expires_at"}


def test_another_tenants_upload_does_not_exist(
    client: httpx.Client, connect: Callable[[NewKey], httpx.Client], new_key: Callable[[], NewKey]
) -> None:
    upload = begin(client)
    send(upload)
    stranger = connect(new_key())

    statuses = [stranger.get(f"/checkpoints/uploads/{upload['id']}").status_code]
    statuses.append(complete(stranger, upload).status_code)
    statuses.append(stranger.delete(f"/checkpoints/uploads/{upload['id']}").status_code)

    assert statuses == [404, 404, 404]
    assert complete(client, upload).status_code == 202


@pytest.mark.parametrize(
    "body", [{}, {"bytes": 0}, {"bytes": 5, "family": "unknown"}, {"bytes": 5, "sha256": SHA256}, {"bytes": "many"}]
)
def test_body_of_another_form_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    assert client.post("/checkpoints/uploads", json=body).status_code == 422


def test_file_over_the_cap_is_refused_before_it_is_sent(
    settings: Settings, serve: Callable[..., httpx.Client], api_key: NewKey
) -> None:
    client = serve(create_app(settings.model_copy(update={"max_checkpoint_bytes": 1000})), api_key)

    answer = client.post("/checkpoints/uploads", json={"bytes": 1001})

    assert (answer.status_code, answer.json()["limit"]) == (413, 1000)


# A store that fails, hangs, or is slower than the upload's time.


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 206 Partial Content\r\n",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\n\x02\0\0",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 100\r\n\r\n\x02\0\0",
    ],
    ids=["in its head", "after the little that it announced", "in its body"],
)
def test_a_whole_upload_outlives_an_answer_of_the_store_that_breaks_off(
    relay: AskingRelay, behind: Settings, serve: Callable[..., httpx.Client], api_key: NewKey, answer: bytes
) -> None:
    client = serve(create_app(behind), api_key)
    upload = begin(client)
    send(upload)
    relay.asked = lambda head: answer if b"/source HTTP" in head and b"bytes=0-511" in head else None

    broken = complete(client, upload)
    relay.asked = lambda _: None

    assert (broken.status_code, broken.json()["server"]) == (503, "storage")
    assert complete(client, upload).status_code == 202


def test_parts_are_not_missing_because_the_store_broke_off(
    relay: AskingRelay, behind: Settings, serve: Callable[..., httpx.Client], api_key: NewKey
) -> None:
    client = serve(create_app(behind), api_key)
    upload = begin(client)
    send(upload)
    relay.asked = lambda head: b"HTTP/1.1 200 OK\r\n" if b"uploadId=" in head.split(b"\r\n")[0] else None

    answers = [client.get(f"/checkpoints/uploads/{upload['id']}"), complete(client, upload)]

    assert [answer.status_code for answer in answers] == [503, 503]


def test_a_file_that_has_its_row_is_not_taken_out(storage: ObjectStorage, caller: Caller, client: httpx.Client) -> None:
    upload = begin(client, 100)
    send(upload, bytes(100))
    known = uploads.find(storage, caller.tenant_id, upload["id"])

    with pytest.raises(Exception, match="Send a safetensors file"):
        uploads.finish(storage, caller.tenant_id, known, sha256=SHA256, recorded=lambda: True)

    assert storage.size(object_keys.checkpoint_source(caller.tenant_id, upload["id"])) == 100


def test_no_connection_of_the_database_waits_for_the_store(
    relay: AskingRelay, behind: Settings, serve: Callable[..., httpx.Client], api_key: NewKey
) -> None:
    app = create_app(behind)
    client, held = serve(app, api_key), list[bool]()
    pool = app.state.database.engine.pool

    def look(_: bytes) -> None:
        try:  # the process's figures are written now and then too, and do not wait for us
            eventually(lambda: pool.checkedout() == 0, within=2)
            held.append(False)
        except AssertionError:
            held.append(True)

    relay.asked = look
    answer = client.post("/checkpoints/uploads", json={"bytes": 5}, headers={"Idempotency-Key": "k"})

    assert answer.status_code == 201
    assert len(held) >= 3
    assert not any(held)


def test_an_upload_is_over_an_hour_before_the_janitor_looks_for_it(client: httpx.Client) -> None:
    upload = begin(client)

    left = datetime.fromisoformat(upload["expires_at"]) - datetime.now(UTC)
    assert left <= timedelta(hours=UNFINISHED_HOURS - 1)
    assert left > timedelta(hours=20)


def test_what_is_complete_too_late_becomes_no_row(
    client: httpx.Client, storage: ObjectStorage, caller: Caller, database: Database
) -> None:
    upload = begin(client)
    send(upload)
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat(timespec="seconds")
    late = replace(uploads.find(storage, caller.tenant_id, upload["id"]), expires_at=past)

    with pytest.raises(NotFound):  # its time ran out while it was joined
        uploads.finish(storage, caller.tenant_id, late, sha256=SHA256, recorded=lambda: False)
    record = object_keys.upload_record(caller.tenant_id, upload["id"])
    storage.put(record, json.dumps(asdict(late)).encode(), media_type="application/json")

    assert complete(client, upload).status_code == 404
    with database.transaction() as session:
        assert session.query(Job.id).filter_by(checkpoint_id=upload["id"]).all() == []


def test_an_upload_that_is_whole_is_not_ended(client: httpx.Client, storage: ObjectStorage, caller: Caller) -> None:
    upload = begin(client)
    send(upload)
    joined = uploads.find(storage, caller.tenant_id, upload["id"])
    uploads.finish(storage, caller.tenant_id, joined, sha256=SHA256, recorded=lambda: False)  # and its row is to come

    ended = client.delete(f"/checkpoints/uploads/{upload['id']}")

    assert ended.status_code == 404
    assert complete(client, upload).status_code == 202
    assert storage.read(object_keys.checkpoint_source(caller.tenant_id, upload["id"])) == FILE
