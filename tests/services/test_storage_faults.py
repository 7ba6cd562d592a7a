"""Answers of a store that break off: nothing that is cut short passes for whole, and nothing waits for ever."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from services.settings import Settings
from services.storage import ObjectStorage
from worker.patience import store_away

WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "e"\r\n\r\nwhole'
REFUSAL = b"<Error><Code>EntityTooLarge</Code><Message>no</Message></Error>"


class BrokenStore:
    """Answers every request with the same bytes and hangs up."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.answer = b""
        self.asked: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
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
def behind(broken_store: BrokenStore, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> ObjectStorage:
    """The store behind that server, which is asked once."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    address = f"http://127.0.0.1:{broken_store.port}"
    storage = ObjectStorage(settings.model_copy(update={"s3_endpoint_url": address}))
    storage._client.meta.config.retries["total_max_attempts"] = 1  # type: ignore[attr-defined]  # botocore's own name
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
@pytest.mark.parametrize("read", ["fetch", "stream", "size", "head", "size of a whole", "parts", "begin", "begun"])
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
        "parts": lambda: behind.multipart.stored("key", "id"),
        "begin": lambda: behind.multipart.begin("key"),
        "begun": lambda: behind.multipart.begun("tenants/"),
    }

    with pytest.raises((ConnectionError, BotoCoreError)) as failed:
        asking[read]()

    assert store_away(failed.value)


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
