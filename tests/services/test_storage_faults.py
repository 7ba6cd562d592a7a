"""Answers of a store that break off: nothing that is cut short passes for whole, and nothing waits for ever."""

from __future__ import annotations

import io
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

from services import storage as storage_module
from services.settings import Settings
from services.storage import ObjectStorage, file_sha256
from services.streamed_upload import PART_BYTES
from services.whole_answers import WholeAnswer
from tests.relays import METHODS, Connection, Relay, RelayThread, relaying
from worker.patience import store_away

WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "e"\r\n\r\nwhole'
HEAD_BYTES = WHOLE.index(b"whole")
REFUSAL = b"<Error><Code>EntityTooLarge</Code><Message>no</Message></Error>"
LISTINGS: dict[str, Callable[[ObjectStorage], object]] = {
    "keys": lambda store: store.keys("tenants/"),
    "newest": lambda store: store.newest("tenants/"),
    "unfinished": lambda store: store.unfinished("tenants/"),
    "erase": lambda store: store.erase("tenants/"),
    "begun": lambda store: store.multipart.begun("tenants/"),
    "parts": lambda store: store.multipart.stored("key", "id"),
}


class BrokenStore:
    """Answers every request with the same bytes and hangs up."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.answer = b""
        self.asked: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # whoever accepts, wakes
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            with caller:
                caller.settimeout(0.2)
                request = b""
                try:
                    while piece := caller.recv(65536):
                        request += piece
                except OSError:  # it waits for our answer
                    pass
                self.asked.append(request)
                caller.sendall(self.answer)


@pytest.fixture
def broken_store() -> Iterator[BrokenStore]:
    store = BrokenStore()
    yield store
    store.close()


@pytest.fixture
def behind(broken_store: BrokenStore, settings: Settings) -> ObjectStorage:
    """The store behind that server, which is asked once."""
    return asking_once(settings, broken_store.port)


def asking_once(settings: Settings, port: int) -> ObjectStorage:
    """The store at this port, and no second try."""
    storage = ObjectStorage(settings.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{port}"}))
    storage._client.meta.events.unregister("needs-retry.s3", unique_id="retry-config-s3")  # botocore's own name
    return storage


def test_a_write_does_not_wait_for_the_rest_of_an_invitation(
    behind: ObjectStorage, broken_store: BrokenStore, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"words")
    broken_store.answer = b"HTTP/1.1 100 Continue\r\n"  # and no more: botocore reads on at the end of the stream
    ended = threading.Event()

    def write() -> None:
        with pytest.raises(Exception) as failed:  # noqa: PT011 which, is asked below
            behind.put_file("key", tmp_path / "file")
        assert store_away(failed.value)
        ended.set()

    threading.Thread(target=write, daemon=True).start()

    assert ended.wait(30)
    assert not any(b"expect:" in request.lower() for request in broken_store.asked)


@pytest.mark.parametrize("length", [len(b"HTTP/1.1 200 OK\r\n"), len(b"HTTP/1.1 200 OK\r\nContent-Len")])
@pytest.mark.parametrize("read", ["fetch", "stream", "size", "head", "size of a whole", *LISTINGS, "begin"])
def test_an_answer_that_breaks_off_in_its_head_is_no_answer(
    behind: ObjectStorage, broken_store: BrokenStore, tmp_path: Path, length: int, read: str
) -> None:
    broken_store.answer = WHOLE[:length]
    asking: dict[str, Callable[[], object]] = {
        "fetch": lambda: behind.fetch("key", tmp_path / "file"),
        "stream": lambda: list(behind.stream("key")),
        "size": lambda: behind.size("key"),
        "head": lambda: behind.multipart.head("key", 5),
        "size of a whole": lambda: behind.multipart.size("key"),
        "begin": lambda: behind.multipart.begin("key"),
        **{name: lambda: LISTINGS[read](behind) for name in LISTINGS},
    }

    with pytest.raises(BotoCoreError) as failed:
        asking[read]()

    assert store_away(failed.value)


@pytest.mark.parametrize("read", ["fetch", "size", "size of a whole"])
def test_an_object_whose_length_is_not_said_is_not_taken_for_one_that_is_gone(
    behind: ObjectStorage, broken_store: BrokenStore, tmp_path: Path, read: str
) -> None:
    broken_store.answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    if read == "fetch":
        broken_store.answer += b"5\r\nwhole\r\n0\r\n\r\n"
    asking: dict[str, Callable[[], object]] = {
        "fetch": lambda: behind.fetch("key", tmp_path / "file"),
        "size": lambda: behind.size("key"),
        "size of a whole": lambda: behind.multipart.size("key"),
    }

    with pytest.raises(ConnectionError) as failed:
        asking[read]()

    assert store_away(failed.value)


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_listing_without_its_body_is_not_empty(
    behind: ObjectStorage, broken_store: BrokenStore, listing: str
) -> None:
    broken_store.answer = WHOLE[:HEAD_BYTES]

    with pytest.raises(BotoCoreError) as failed:
        LISTINGS[listing](behind)

    assert store_away(failed.value)


def answered(sent: bytes) -> WholeAnswer:
    """What is made of these bytes and the end of the connection."""
    answer = WholeAnswer(SimpleNamespace(makefile=lambda _: io.BytesIO(sent)))  # type: ignore[arg-type]
    answer.begin()
    return answer


def body_of(answer: WholeAnswer) -> bytes:
    return b"".join(iter(lambda: answer.read(2), b""))


def test_there_is_no_place_where_an_answer_may_break_off() -> None:
    for length in range(HEAD_BYTES):
        with pytest.raises((ConnectionError, HTTPException)):
            answered(WHOLE[:length])
    for length in range(HEAD_BYTES, len(WHOLE)):
        answer = answered(WHOLE[:length])
        with pytest.raises(HTTPException):
            body_of(answer)

    assert body_of(answered(WHOLE)) == b"whole"


@pytest.mark.parametrize("head", [b"200 OK\r\n\r\n", b"206 Partial Content\r\nConnection: close\r\n\r\n"])
def test_an_answer_is_to_say_how_long_it_is(head: bytes) -> None:
    with pytest.raises(ConnectionError):
        answered(b"HTTP/1.1 " + head + b"whole")


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"204 No Content\r\n\r\n", b""),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n", b"whole"),
        (b"502 Bad Gateway\r\n\r\n<html>", b"<html>"),
    ],
)
def test_a_whole_answer_is_taken_as_it_is(head: bytes, body: bytes) -> None:
    assert body_of(answered(b"HTTP/1.1 " + head)) == body


def test_a_body_that_breaks_off_is_no_body(behind: ObjectStorage, broken_store: BrokenStore, tmp_path: Path) -> None:
    broken_store.answer = WHOLE[:-2]

    with pytest.raises(BotoCoreError) as failed:
        behind.fetch("key", tmp_path / "file")
    with pytest.raises(BotoCoreError):
        behind.multipart.head("key", 5)

    assert store_away(failed.value)


def test_a_refused_write_is_not_waited_out(behind: ObjectStorage, broken_store: BrokenStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"words")
    broken_store.answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(REFUSAL), REFUSAL)

    with pytest.raises(ClientError) as failed:
        behind.put_file("key", tmp_path / "file")

    assert not store_away(failed.value)


ASKED: dict[str, Callable[[bytes], bool]] = {
    "object": lambda head: head.startswith(b"GET ") and b"bytes=" not in head,
    "size": lambda head: head.startswith(b"HEAD "),
    "part": lambda head: b"bytes=8388608-" in head,
    "begin": lambda head: head.startswith(b"POST ") and b"?uploads" in head,
    "send": lambda head: b"partNumber=1" in head,
    "finish": lambda head: head.startswith(b"POST ") and b"?uploadId=" in head,
}


class BreakingRelay(Relay):
    """Breaks off the store's answer to each request that ``broken`` is about, behind the bytes that it names.

    What ``instead`` is about it answers itself, and goes on.
    """

    broken: Callable[[bytes], bytes | None]
    instead: Callable[[bytes], bytes | None]

    def __init__(self, thread: RelayThread, target: int) -> None:
        self._until: dict[Connection, bytes | None] = {}
        self.fair()
        super().__init__(thread, target)

    def fair(self) -> None:
        """Whatever it did is over."""
        self.broken = self.instead = lambda _: None

    async def forward(self, data: bytes, connection: Connection) -> bytes | None:
        if not data.startswith(METHODS):
            return data
        if (answer := self.instead(data)) is not None:
            connection.near.write(answer)
            return b""
        self._until[connection] = self.broken(data)
        return data

    async def back(self, data: bytes, connection: Connection) -> bytes | None:
        if (until := self._until.get(connection)) is None:
            return data
        connection.near.write(data[: data.index(until) + len(until)])
        with suppress(OSError):
            await connection.near.drain()
        return None


@pytest.fixture
def relay(settings: Settings) -> Iterator[BreakingRelay]:
    """What stands before the real store."""
    with relaying(BreakingRelay, str(settings.s3_endpoint_url)) as relay:
        yield relay


@pytest.fixture
def through(relay: BreakingRelay, settings: Settings) -> ObjectStorage:
    """The real store behind it, which is asked once."""
    return asking_once(settings, relay.port)


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that goes in three parts, and comes in three."""
    monkeypatch.setattr(storage_module, "PARALLEL_FROM_BYTES", PART_BYTES)
    path = tmp_path / "big"
    path.write_bytes(random.Random(0).randbytes(2 * PART_BYTES + 5))
    return path


@pytest.mark.parametrize(
    ("asked", "until"),
    [
        ("object", b"X-Amz-Meta-sha256: "),
        ("size", b"200 OK\r\n"),
        ("part", b"206 Partial Content\r\n"),
        ("part", b"Content-Range: bytes 8388608-16"),
        ("part", b"\r\n\r\n"),
    ],
)
def test_an_object_in_parts_comes_whole_or_not_at_all(
    relay: BreakingRelay,
    through: ObjectStorage,
    storage: ObjectStorage,
    big: Path,
    tmp_path: Path,
    asked: str,
    until: bytes,
) -> None:
    stored = storage.put_file("big", big)
    relay.broken = lambda head: until if ASKED[asked](head) else None

    with pytest.raises(Exception) as failed:  # noqa: PT011 which, is asked below
        through.fetch("big", tmp_path / "fetched")
    relay.fair()

    assert store_away(failed.value)
    assert through.fetch("big", tmp_path / "fetched") == stored.sha256 == file_sha256(tmp_path / "fetched")


def test_bytes_of_a_part_that_is_asked_for_again_have_not_arrived(
    relay: BreakingRelay, through: ObjectStorage, storage: ObjectStorage, big: Path, tmp_path: Path
) -> None:
    big.write_bytes(big.read_bytes()[: PART_BYTES + 5])
    storage.put_file("big", big)
    piece = bytes(600 * 2**10)  # of which s3transfer sees two chunks
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-8388607/8388613\r\nTransfer-Encoding: chunked\r\n"
    broken = head + b"\r\n%x\r\n%s\r\nno length\r\n" % (len(piece), piece)
    asked: list[bytes] = []

    def instead(head: bytes) -> bytes | None:
        if b"bytes=0-8388607" not in head:
            return None
        asked.append(head)
        return broken

    relay.instead = instead
    counts: list[int] = []

    with pytest.raises(Exception) as failed:  # noqa: PT011 which, is asked below
        through.fetch("big", tmp_path / "fetched", arrived=counts.append)

    assert store_away(failed.value)
    assert len(asked) > 2
    assert 0 < max(counts) <= len(piece) + 5


def test_a_part_that_is_shorter_than_asked_for_leaves_no_hole(
    relay: BreakingRelay, through: ObjectStorage, storage: ObjectStorage, big: Path, tmp_path: Path
) -> None:
    storage.put_file("big", big)
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nContent-Range: bytes 8388608-8388612/16777221\r\n\r\n"
    relay.instead = lambda asked: head + b"short" if ASKED["part"](asked) else None

    with pytest.raises(ConnectionError):
        through.fetch("big", tmp_path / "fetched")


@pytest.mark.parametrize(
    ("asked", "until"),
    [
        ("begin", b"200 OK\r\n"),
        ("begin", b"\r\n\r\n"),
        ("send", b"200 OK\r\n"),
        ("send", b'ETag: "'),
        ("finish", b"\r\n\r\n"),
    ],
)
def test_a_write_in_parts_that_is_not_answered_is_made_again(
    relay: BreakingRelay,
    through: ObjectStorage,
    big: Path,
    tmp_path: Path,
    asked: str,
    until: bytes,
) -> None:
    relay.broken = lambda head: until if ASKED[asked](head) else None

    with pytest.raises(HTTPClientError) as failed:
        through.put_file("big", big)
    relay.fair()

    assert store_away(failed.value)
    assert through.put_file("big", big).sha256 == through.fetch("big", tmp_path / "fetched")


@pytest.mark.parametrize("asked", ["begin", "send"])
def test_a_streamed_write_that_is_not_answered_says_so(
    relay: BreakingRelay, through: ObjectStorage, asked: str
) -> None:
    relay.broken = lambda head: b"200 OK\r\n" if ASKED[asked](head) else None
    upload = through.upload("streamed")
    upload.feed(b"words")

    with pytest.raises(HTTPClientError) as failed:  # which the gateway answers with 503
        upload.flush()
    relay.fair()

    assert store_away(failed.value)
    upload.finish()
    assert through.read("streamed") == b"words"


@pytest.mark.parametrize("asked", ["begin", "send", "finish"])
def test_an_answer_that_broke_off_once_is_asked_for_again(
    relay: BreakingRelay, settings: Settings, big: Path, tmp_path: Path, asked: str
) -> None:
    patient = ObjectStorage(settings.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{relay.port}"}))
    once = iter([b"200 OK\r\n"])
    relay.broken = lambda head: next(once, None) if ASKED[asked](head) else None

    stored = patient.put_file("big", big)

    assert next(once, None) is None
    assert patient.fetch("big", tmp_path / "fetched") == stored.sha256 == file_sha256(tmp_path / "fetched")
