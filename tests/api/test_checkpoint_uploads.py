"""Large checkpoints go straight to the store: begun, sent in parts by presigned URLs, made whole, and nobody else's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url

from api.app import create_app
from services import object_keys, quotas, uploads
from services.database import Database
from services.errors import NotFound
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Job, Tenant
from services.tenancy import Caller, NewKey
from services.uploads import PART_BYTES
from tests.relays import AskingRelay, Connection, Relay, RelayThread
from tests.worker.helpers import eventually
from worker.janitor import UNFINISHED_HOURS

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


@pytest.fixture
def relay(settings: Settings) -> Iterator[AskingRelay]:
    """What stands between a gateway and the store."""
    with RelayThread() as thread:
        relay = AskingRelay(thread, int(str(settings.s3_endpoint_url).rpartition(":")[2]))
        yield relay
        relay.close()


class LosingRelay(Relay):
    """Loses the first answer of the store to a write in parts that is begun."""

    _lost: Connection | None = None

    async def forward(self, data: bytes, connection: Connection) -> bytes | None:
        if self._lost is None and data.startswith(b"POST ") and b"?uploads" in data.split(b"\r\n")[0]:
            self._lost = connection
        return data

    async def back(self, data: bytes, connection: Connection) -> bytes | None:
        return None if connection is self._lost else data


@pytest.fixture
def behind(settings: Settings, relay: AskingRelay) -> Settings:
    """The settings of that gateway; callers reach the store itself."""
    ends = {"s3_endpoint_url": f"http://127.0.0.1:{relay.port}", "s3_public_endpoint_url": settings.s3_endpoint_url}
    return settings.model_copy(update=ends)


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


def test_an_upload_that_is_ended_leaves_nothing_and_frees_its_place(
    client: httpx.Client, storage: ObjectStorage, caller: Caller, limit: Callable[[int], None]
) -> None:
    limit(1)
    upload = begin(client, PART_BYTES + 5)
    httpx.put(upload["missing"][1]["url"], content=bytes(5), trust_env=False)

    ended = client.delete(f"/checkpoints/uploads/{upload['id']}")
    late = httpx.put(upload["missing"][0]["url"], content=bytes(PART_BYTES), trust_env=False)

    assert (ended.status_code, ended.content) == (204, b"")
    assert late.status_code == 404
    assert begun(storage, caller) == 0
    assert storage.keys(object_keys.checkpoint_prefix(caller.tenant_id, upload["id"])) == []
    assert client.delete(f"/checkpoints/uploads/{upload['id']}").status_code == 404
    begin(client)  # there is room again


def test_an_upload_that_is_whole_is_not_ended(client: httpx.Client, storage: ObjectStorage, caller: Caller) -> None:
    upload = begin(client)
    send(upload)
    joined = uploads.find(storage, caller.tenant_id, upload["id"])
    uploads.finish(storage, caller.tenant_id, joined, sha256=SHA256, recorded=lambda: False)  # and its row is to come

    ended = client.delete(f"/checkpoints/uploads/{upload['id']}")

    assert ended.status_code == 404
    assert complete(client, upload).status_code == 202
    assert storage.read(object_keys.checkpoint_source(caller.tenant_id, upload["id"])) == FILE


# How many at once.


@pytest.fixture
def limit(database: Database, caller: Caller) -> Callable[[int], None]:
    """Gives the caller's tenant a limit of its own."""

    def give(jobs: int) -> None:
        with database.transaction() as session:
            quotas.set_limits(session, session.get_one(Tenant, caller.tenant_id).name, max_open_jobs=jobs)

    return give


def begun(storage: ObjectStorage, caller: Caller) -> int:
    return len(storage.unfinished(object_keys.tenant_prefix(caller.tenant_id)))


def test_uploads_under_way_and_open_jobs_share_one_limit(
    client: httpx.Client, storage: ObjectStorage, caller: Caller, limit: Callable[[int], None]
) -> None:
    limit(2)
    first = begin(client)
    send(first)
    assert complete(client, first).status_code == 202  # a job now: its validation
    begin(client)

    refused = client.post("/checkpoints/uploads", json={"bytes": 5})

    assert (refused.status_code, refused.json()["type"]) == (429, "urn:forgetd:problem:quota-exceeded")
    assert (refused.json()["limit"], refused.json()["open"]) == (2, 2)
    assert begun(storage, caller) == 1


def test_a_job_that_came_meanwhile_costs_no_upload_its_place(
    client: httpx.Client, body: dict[str, Any], limit: Callable[[int], None]
) -> None:
    limit(1)
    upload = begin(client)
    send(upload)
    assert client.post("/jobs/forget", json=body).status_code == 202

    answer = complete(client, upload)

    assert answer.status_code == 202, answer.text
    refused = client.post("/checkpoints/uploads", json={"bytes": 5})
    assert (refused.status_code, refused.json()["limit"]) == (429, 1)


def test_an_upload_whose_record_was_refused_takes_no_place(
    relay: AskingRelay,
    behind: Settings,
    serve: Callable[..., httpx.Client],
    api_key: NewKey,
    storage: ObjectStorage,
    caller: Caller,
) -> None:
    client = serve(create_app(behind), api_key)
    unavailable = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    relay.asked = lambda head: unavailable if head.startswith(b"PUT ") and b"source.upload" in head else None

    answer = client.post("/checkpoints/uploads", json={"bytes": 5})

    assert (answer.status_code, answer.json()["server"]) == (503, "storage")
    assert begun(storage, caller) == 0


def test_an_upload_begun_when_the_database_went_takes_no_place(
    relay: AskingRelay,
    behind: Settings,
    serve: Callable[..., httpx.Client],
    api_key: NewKey,
    storage: ObjectStorage,
    caller: Caller,
) -> None:
    url = make_url(behind.database_url.get_secret_value())
    with RelayThread() as thread:
        cable = Relay(thread, url.port or 0)
        url = url.set(host="127.0.0.1", port=cable.port)
        app = create_app(behind.model_copy(update={"database_url": SecretStr(url.render_as_string(False))}))
        client = serve(app, api_key)
        relay.asked = lambda head: cable.close() if b"source.upload" in head else None  # between the two looks

        answer = client.post("/checkpoints/uploads", json={"bytes": 5})

    assert (answer.status_code, answer.json()["server"]) == (503, "database")
    assert begun(storage, caller) == 0


def test_a_begin_that_the_store_answered_twice_takes_one_place(
    settings: Settings,
    serve: Callable[..., httpx.Client],
    api_key: NewKey,
    storage: ObjectStorage,
    caller: Caller,
    limit: Callable[[int], None],
) -> None:
    limit(2)
    with RelayThread() as thread:
        relay = LosingRelay(thread, int(str(settings.s3_endpoint_url).rpartition(":")[2]))
        app = create_app(settings.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{relay.port}"}))
        client = serve(app, api_key)
        answers = [client.post("/checkpoints/uploads", json={"bytes": 5}) for _ in range(2)]
        relay.close()

    assert [answer.status_code for answer in answers] == [201, 201]
    assert begun(storage, caller) == 3  # of two checkpoints


def test_of_many_uploads_begun_at_once_none_is_too_many(
    client: httpx.Client,
    connect: Callable[[NewKey], httpx.Client],
    api_key: NewKey,
    storage: ObjectStorage,
    caller: Caller,
    limit: Callable[[int], None],
) -> None:
    limit(2)
    clients = [connect(api_key) for _ in range(6)]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda each: each.post("/checkpoints/uploads", json={"bytes": 5}), clients))

    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {201, 429}
    assert statuses.count(201) == begun(storage, caller) <= 2
    for _ in range(2 - statuses.count(201)):  # those that stood in each other's way find their place
        begin(client)


def test_begins_at_once_with_one_key_leave_one_upload(
    connect: Callable[[NewKey], httpx.Client], api_key: NewKey, storage: ObjectStorage, caller: Caller
) -> None:
    clients = [connect(api_key) for _ in range(4)]
    asked = {"json": {"bytes": 5}, "headers": {"Idempotency-Key": "k"}}

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda each: each.post("/checkpoints/uploads", **asked), clients))

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert begun(storage, caller) == 1
    assert clients[0].get(answers[0].headers["location"]).status_code == 200


def test_a_repeat_is_answered_however_full_it_is(client: httpx.Client, limit: Callable[[int], None]) -> None:
    asked: dict[str, Any] = {"json": {"bytes": 5}, "headers": {"Idempotency-Key": "k"}}
    first = client.post("/checkpoints/uploads", **asked)
    limit(1)

    again = client.post("/checkpoints/uploads", **asked)

    assert (again.status_code, again.content) == (201, first.content)
