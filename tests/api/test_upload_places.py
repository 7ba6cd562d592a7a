"""How many large checkpoints a tenant may be sending: a place is taken once, given back, and never lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from api.app import create_app
from services import object_keys, quotas
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Tenant
from services.tenancy import Caller, NewKey
from services.uploads import PART_BYTES
from tests.api.upload_steps import begin, begun, complete, send
from tests.relays import UNAVAILABLE, AskingRelay, Commit, Connection, DatabaseRelay, Relay, relaying


class LosingRelay(Relay):
    """Loses the first answer of the store to a write in parts that is begun."""

    _lost: Connection | None = None

    async def forward(self, data: bytes, connection: Connection) -> bytes | None:
        if self._lost is None and data.startswith(b"POST ") and b"?uploads" in data.split(b"\r\n")[0]:
            self._lost = connection
        return data

    async def back(self, data: bytes, connection: Connection) -> bytes | None:
        return None if connection is self._lost else data


class DoorRelay(DatabaseRelay):
    """Asks the test whether it takes another connection, in the loop's thread."""

    asked: Callable[[], bool] = staticmethod(lambda: True)

    def admits(self) -> bool:
        return self.asked()


@pytest.fixture
def door(settings: Settings) -> Iterator[DoorRelay]:
    """What stands between ``impaired`` and the database."""
    with relaying(DoorRelay, settings.database_url.get_secret_value()) as door:
        yield door


@pytest.fixture
def impaired(settings: Settings, door: DoorRelay, serve: Callable[..., httpx.Client], api_key: NewKey) -> httpx.Client:
    """A caller of a gateway behind ``door``."""
    url = SecretStr(door.instead_of(settings.database_url.get_secret_value()))
    return serve(create_app(settings.model_copy(update={"database_url": url})), api_key)


@pytest.fixture
def limit(database: Database, caller: Caller) -> Callable[[int], None]:
    """Gives the caller's tenant a limit of its own."""

    def give(jobs: int) -> None:
        with database.transaction() as session:
            quotas.set_limits(session, session.get_one(Tenant, caller.tenant_id).name, max_open_jobs=jobs)

    return give


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
    relay.asked = lambda head: UNAVAILABLE if head.startswith(b"PUT ") and b"source.upload" in head else None

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
    url = behind.database_url.get_secret_value()
    with relaying(Relay, url) as cable:
        app = create_app(behind.model_copy(update={"database_url": SecretStr(cable.instead_of(url))}))
        client = serve(app, api_key)
        relay.asked = lambda head: cable.close() if b"source.upload" in head else None  # between the two looks

        answer = client.post("/checkpoints/uploads", json={"bytes": 5})

    assert (answer.status_code, answer.json()["server"]) == (503, "database")
    assert begun(storage, caller) == 0


@pytest.mark.parametrize(("lost", "back"), [("commit lost", True), ("reply lost", True), ("reply lost", False)])
def test_a_begin_of_unknown_outcome_takes_one_place_with_its_repeat(
    door: DoorRelay,
    impaired: httpx.Client,
    client: httpx.Client,
    storage: ObjectStorage,
    caller: Caller,
    lost: Commit,
    back: bool,
) -> None:
    asked: dict[str, Any] = {"json": {"bytes": 5}, "headers": {"Idempotency-Key": "k"}}

    def lose() -> None:
        door.asked = lambda: back

    door.trap(lost, lose, after=b"INSERT INTO idempotency")
    unknown = impaired.post("/checkpoints/uploads", **asked)
    again = client.post("/checkpoints/uploads", **asked)

    assert (unknown.status_code, unknown.json()["server"]) == (503, "database")
    assert again.status_code == 201
    assert client.get(again.headers["location"]).status_code == 200
    assert begun(storage, caller) == 1


@pytest.mark.parametrize("size", [5, 6], ids=["the same", "other content"])
def test_a_begin_that_lost_its_commit_and_then_its_key_takes_no_place(
    door: DoorRelay, impaired: httpx.Client, client: httpx.Client, storage: ObjectStorage, caller: Caller, size: int
) -> None:
    key, faster = {"Idempotency-Key": "k"}, list[httpx.Response]()

    def overtake() -> bool:
        if not faster:
            faster.append(client.post("/checkpoints/uploads", json={"bytes": size}, headers=key))
        return True

    def lose() -> None:
        door.reset()
        door.asked = overtake

    door.trap("commit lost", lose, after=b"INSERT INTO idempotency")
    unknown = impaired.post("/checkpoints/uploads", json={"bytes": 5}, headers=key)

    assert unknown.status_code == 503
    assert [answer.status_code for answer in faster] == [201]
    assert client.get(faster[0].headers["location"]).status_code == 200
    assert begun(storage, caller) == 1


def test_a_begin_that_the_store_answered_twice_takes_one_place(
    settings: Settings,
    serve: Callable[..., httpx.Client],
    api_key: NewKey,
    storage: ObjectStorage,
    caller: Caller,
    limit: Callable[[int], None],
) -> None:
    limit(2)
    url = str(settings.s3_endpoint_url)
    with relaying(LosingRelay, url) as relay:
        app = create_app(settings.model_copy(update={"s3_endpoint_url": relay.instead_of(url)}))
        client = serve(app, api_key)
        answers = [client.post("/checkpoints/uploads", json={"bytes": 5}) for _ in range(2)]

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
