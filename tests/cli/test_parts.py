"""Large files in parts: each goes again for itself, nothing is kept that is not whole, and a way around is found."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cli.client import Client
from cli.errors import ProblemError, Unreachable
from cli.parts import FETCHED_PART_BYTES, LARGE_BYTES, Part, StoreOutOfReach, fetch_parts, send_parts
from services.ids import new_id
from services.storage import ObjectStorage
from tests.cli.scripted import Answer, ScriptedServer

MakeServer = Callable[..., ScriptedServer]
Connect = Callable[..., Client]
PART = 5 * 2**20  # the protocol's least, but for the last
SLOW_SECONDS = 1.5
NONE_MISSING = Answer(200, json.dumps({"missing": []}).encode())


class Written:
    """A write in parts of a file, and what is missing of it."""

    def __init__(self, storage: ObjectStorage, path: Path) -> None:
        self.storage, self.key, self.size = storage, f"tests/{new_id('ckpt')}", path.stat().st_size
        self.id = storage.multipart.begin(self.key)
        self.rounds = 0

    def missing(self) -> list[Part]:
        self.rounds += 1
        there = self.storage.multipart.stored(self.key, self.id)
        return [
            Part(first, count, self.storage.multipart.url(self.key, self.id, number, count))
            for number, first in enumerate(range(0, self.size, PART), start=1)
            if number not in there
            for count in (min(PART, self.size - first),)
        ]

    def finish(self) -> bytes:
        self.storage.multipart.finish(self.key, self.id, self.storage.multipart.stored(self.key, self.id))
        return self.storage.read(self.key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three parts."""
    path = tmp_path / "base.safetensors"
    path.write_bytes(os.urandom(2 * PART + 77))
    return path


@pytest.fixture
def slow_link() -> Iterator[str]:
    """Where something takes some of a part, for a while, and hangs up."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(2 * 2**20, socket.MSG_WAITALL)
            time.sleep(SLOW_SECONDS)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/p"
        server.shutdown()


def test_parts_make_the_file(storage: ObjectStorage, path: Path) -> None:
    written, steps = Written(storage, path), list[tuple[int, int]]()

    send_parts(path, written.missing, timeout=10, patience=10, progress=lambda *step: steps.append(step))

    assert written.finish() == path.read_bytes()
    assert steps[-1] == (written.size, written.size)


def test_part_that_fails_goes_again_with_a_fresh_url_and_the_others_do_not(storage: ObjectStorage, path: Path) -> None:
    written, asked, steps = Written(storage, path), list[list[int]](), list[int]()

    def missing() -> list[Part]:
        parts = written.missing()
        asked.append([part.first for part in parts])
        if len(asked) == 1:
            parts[2] = Part(parts[2].first, parts[2].bytes, parts[2].url + "0")
        return parts

    send_parts(path, missing, timeout=10, patience=10, progress=lambda done, _: steps.append(done))

    assert asked == [[0, PART, 2 * PART], [2 * PART], []]
    assert written.finish() == path.read_bytes()
    assert steps[-1] == written.size


def test_store_that_never_took_a_part_is_out_of_reach(path: Path) -> None:
    nowhere = [Part(0, path.stat().st_size, "http://127.0.0.1:1/nowhere")]

    with pytest.raises(StoreOutOfReach, match=r"127\.0\.0\.1:1 takes no part"):
        send_parts(path, lambda: nowhere, timeout=1, patience=0)


def test_a_break_after_a_long_round_is_followed_by_another_round(
    storage: ObjectStorage, path: Path, slow_link: str
) -> None:
    written = Written(storage, path)

    def missing() -> list[Part]:
        parts = written.missing()
        return parts if written.rounds > 1 else [Part(it.first, it.bytes, slow_link) for it in parts[:1]]

    send_parts(path, missing, timeout=10, patience=SLOW_SECONDS / 2)

    assert written.finish() == path.read_bytes()


def test_a_link_that_breaks_again_and_again_comes_to_an_end(path: Path, slow_link: str) -> None:
    asked = list[int]()

    def missing() -> list[Part]:
        asked.append(1)
        return [Part(0, PART, slow_link)]

    with pytest.raises(StoreOutOfReach, match="takes no part"):
        send_parts(path, missing, timeout=10, patience=SLOW_SECONDS / 2)
    assert len(asked) == 3  # one round, and another


def test_a_store_that_takes_no_connection_is_not_tried_for_long(path: Path) -> None:
    asked = list[int]()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, closing(socket.socket()) as first:
        first.connect(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/p"

        def missing() -> list[Part]:
            asked.append(1)
            return [Part(0, PART, url)]

        with pytest.raises(StoreOutOfReach, match="takes no part"):
            send_parts(path, missing, timeout=1, patience=0.5)
    assert len(asked) == 2  # one round


def test_store_that_takes_no_more_is_no_reason_to_begin_anew(storage: ObjectStorage, path: Path) -> None:
    written = Written(storage, path)

    def missing() -> list[Part]:
        parts = written.missing()
        return [*parts[:-1], Part(parts[-1].first, parts[-1].bytes, parts[-1].url + "0")]

    with pytest.raises(Unreachable) as raised:
        send_parts(path, missing, timeout=10, patience=0)
    assert not isinstance(raised.value, StoreOutOfReach)


def test_parts_that_are_taken_and_never_arrive_come_to_an_end(make_server: MakeServer, path: Path) -> None:
    server = make_server(Answer(200))
    size = path.stat().st_size

    with pytest.raises(StoreOutOfReach, match="takes no part of the file: what it took is still missing"):
        send_parts(path, lambda: [Part(0, size, f"{server.url}/p")], timeout=5, patience=0.9)

    assert 1 <= len(server.received) <= 3  # a pause between any two


def test_a_link_that_expires_under_way_is_asked_for_anew_once_for_all(
    storage: ObjectStorage, make_server: MakeServer, tmp_path: Path
) -> None:
    content = os.urandom(3 * FETCHED_PART_BYTES + 5)
    key, asked = f"tests/{new_id('ckpt')}", list[int]()
    storage.put(key, content, media_type="application/octet-stream")
    expired = make_server(Answer(403, b"expired"))

    def fresh() -> str:
        asked.append(1)
        return storage.presigned_get(key, filename="f", media_type="application/octet-stream")

    with (tmp_path / "f").open("x+b") as file:
        digest = fetch_parts(f"{expired.url}/f", file.fileno(), len(content), timeout=10, fresh=fresh)

    assert digest == hashlib.sha256(content).hexdigest()
    assert len(asked) == 1


def test_checkpoint_goes_through_the_service_where_the_store_is_out_of_reach(
    make_server: MakeServer, connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(LARGE_BYTES)
    part = {"number": 1, "first": 0, "bytes": LARGE_BYTES, "url": "http://127.0.0.1:1/nowhere"}
    begun = Answer(201, json.dumps({"id": "ckpt_1"}).encode())
    where = Answer(200, json.dumps({"missing": [part]}).encode())
    made = Answer(202, json.dumps({"id": "ckpt_2", "name": "large", "status": "validating"}).encode())
    server, notices = make_server(begun, where, where, Answer(204, b""), made), list[str]()

    checkpoint = connect(server.url, patience=0.0).push_checkpoint(path, wait=False, notice=notices.append)

    assert checkpoint.id == "ckpt_2"
    assert [(request.method, request.path.partition("?")[0]) for request in server.received] == [
        ("POST", "/checkpoints/uploads"),
        ("GET", "/checkpoints/uploads/ckpt_1"),
        ("GET", "/checkpoints/uploads/ckpt_1"),  # did nothing arrive after all?
        ("DELETE", "/checkpoints/uploads/ckpt_1"),
        ("POST", "/checkpoints"),
    ]
    assert len(server.received[-1].body) == LARGE_BYTES
    assert "through the service" in notices[0]


@pytest.mark.parametrize(
    "answers",
    [[Answer(403)], [NONE_MISSING, Answer(409, b'{"title": "Parts have not arrived."}')]],
    ids=["the key was revoked", "parts went missing"],
)
def test_an_upload_that_comes_to_nothing_is_ended(
    make_server: MakeServer, connect: Connect, tmp_path: Path, answers: list[Answer]
) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(LARGE_BYTES)
    begun = Answer(201, json.dumps({"id": "ckpt_1"}).encode())
    server = make_server(begun, *answers, Answer(204, b""))

    with pytest.raises(ProblemError):
        connect(server.url, patience=0.0).push_checkpoint(path, wait=False)

    assert (server.received[-1].method, server.received[-1].path) == ("DELETE", "/checkpoints/uploads/ckpt_1")


def test_an_upload_outlives_a_restart_of_the_gateway(make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(LARGE_BYTES)
    begun, away = Answer(201, json.dumps({"id": "ckpt_1"}).encode()), Answer(503)
    made = Answer(202, json.dumps({"id": "ckpt_1", "name": "large", "status": "validating"}).encode())
    server = make_server(begun, away, NONE_MISSING, away, made)

    checkpoint = connect(server.url, patience=0.0).push_checkpoint(path, wait=False)

    assert checkpoint.id == "ckpt_1"
    assert len(server.received) == 5


def test_ranges_make_the_file_and_its_digest(storage: ObjectStorage, tmp_path: Path) -> None:
    content = os.urandom(FETCHED_PART_BYTES) + b"the rest"
    key, steps = f"tests/{new_id('ckpt')}", list[tuple[int, int]]()
    storage.put(key, content, media_type="application/octet-stream")
    url = storage.presigned_get(key, filename="f", media_type="application/octet-stream")

    with (tmp_path / "f").open("x+b") as file:
        digest = fetch_parts(url, file.fileno(), len(content), timeout=10, progress=lambda *step: steps.append(step))

    assert (tmp_path / "f").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()
    assert steps[-1] == (len(content), len(content))


@pytest.mark.parametrize("answer", [Answer(200, b"all of it"), Answer(206, b"to"), Answer(403, b"expired")])
def test_range_that_does_not_come_is_told(make_server: MakeServer, tmp_path: Path, answer: Answer) -> None:
    server = make_server(answer)

    with (tmp_path / "f").open("x+b") as file, pytest.raises(Unreachable):
        fetch_parts(f"{server.url}/f", file.fileno(), 9, timeout=10)
