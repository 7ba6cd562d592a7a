"""Checkpoints through the door: streamed, checked as they come, never half-kept."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import socket
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

import api.checkpoints
from api.app import create_app
from services import checkpoints, object_keys
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import Checkpoint, Job
from services.tenancy import Caller, NewKey

BINARY = {"Content-Type": "application/octet-stream"}
MIB = 2**20
LARGE = 300 * MIB
ALLOWED_GROWTH = 80 * MIB  # a part of 8 MiB, its copy for the store, and their like in flight; not the file
PATIENCE_SECONDS = 10.0
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before 1.6


def safetensors(payload: bytes = b"\0" * 16, *, header_bytes: int = 0) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}}).encode()
    header = header.ljust(header_bytes)
    return struct.pack("<Q", len(header)) + header + payload


def torch_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return file.getvalue()


def folder_tar(form: int = tarfile.PAX_FORMAT, mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=form) as archive:  # type: ignore[call-overload] # mode is a word
        member = tarfile.TarInfo("./model_index.json")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"{}"))
    return file.getvalue()


def digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def prefix(caller: Caller) -> str:
    return f"{object_keys.tenant_prefix(caller.tenant_id)}checkpoints/"


@pytest.mark.parametrize(
    "data",
    [
        safetensors(),
        torch_zip(),
        safetensors(header_bytes=0x0280),
        folder_tar(),
        folder_tar(tarfile.GNU_FORMAT),
        folder_tar(tarfile.USTAR_FORMAT),
    ],
    ids=["safetensors", "zip", "safetensors whose length looks like a pickle", "pax tar", "gnu tar", "ustar"],
)
def test_upload_is_stored_and_queued_for_validation(
    client: httpx.Client, storage: ObjectStorage, caller: Caller, database: Database, data: bytes
) -> None:
    declared: dict[str, Any] = {
        "image_size": 32,
        "n_bits": 5,
        "family": "tarflow",
        "noise_std": 0.05,
        "prediction_type": "v_prediction",
    }
    query = {"name": "base", **declared}

    answer = client.post("/checkpoints", params=query, content=data, headers=BINARY)

    resource = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/checkpoints/{resource['id']}"
    assert "retry-after" in answer.headers
    assert (resource["status"], resource["name"]) == ("validating", "base")
    assert resource["declared"] == declared
    assert resource["source"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert storage.read(object_keys.checkpoint_source(caller.tenant_id, resource["id"])) == data
    with database.transaction() as session:
        job = session.scalars(select(Job).where(Job.checkpoint_id == resource["id"])).one()
    assert (job.kind, job.status, job.request) == ("import", "queued", {"declared": resource["declared"]})
    assert client.get(f"/jobs/{job.id}").status_code == 404  # ours, not the caller's


@pytest.mark.parametrize(
    ("data", "slug"),
    [
        (b"", "empty-upload"),
        (b"hello", "not-a-checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "not-a-checkpoint"),
        (b"GGUF" + b"\0" * 100, "not-a-checkpoint"),
        (struct.pack("<Q", 2**63) + b"{" + b"\0" * 100, "not-a-checkpoint"),
        (struct.pack("<Q", 1000) + b'{"a": 1}', "not-a-checkpoint"),
        (safetensors()[:7], "not-a-checkpoint"),
        (b"PK\x05\x06" + b"\0" * 18, "not-a-checkpoint"),
        (LEGACY, "not-a-checkpoint"),
        (folder_tar()[:256], "not-a-checkpoint"),
        (folder_tar(mode="w:gz"), "not-a-checkpoint"),
        (folder_tar(mode="w:xz"), "not-a-checkpoint"),
    ],
)
def test_file_that_cannot_be_a_checkpoint_is_refused_and_not_kept(
    client: httpx.Client, storage: ObjectStorage, caller: Caller, data: bytes, slug: str
) -> None:
    answer = client.post("/checkpoints", content=data, headers=BINARY)

    assert (answer.status_code, answer.json()["type"]) == (422, f"urn:forgetd:problem:{slug}")
    assert storage.keys(prefix(caller)) == []
    assert client.get("/checkpoints").json()["items"] == []


def test_file_of_an_old_torch_is_refused_with_the_way_out(client: httpx.Client) -> None:
    answer = client.post("/checkpoints", content=LEGACY, headers=BINARY)

    assert "save it again with torch >= 1.6 (zip format) or as safetensors" in answer.json()["detail"]


@pytest.mark.parametrize(("mode", "unpack"), [("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")])
def test_compressed_tar_is_refused_with_the_way_out(client: httpx.Client, mode: str, unpack: str) -> None:
    answer = client.post("/checkpoints", content=folder_tar(mode=mode), headers=BINARY)

    assert f"unpack it ({unpack}), and send the plain tar" in answer.json()["detail"]


def test_tar_is_known_however_small_the_pieces_that_it_comes_in(client: httpx.Client) -> None:
    data = folder_tar()

    answer = client.post("/checkpoints", content=(data[at : at + 7] for at in range(0, len(data), 7)), headers=BINARY)

    assert answer.status_code == 202
    assert answer.json()["source"]["bytes"] == len(data)


@pytest.mark.parametrize("committed", [True, False])
def test_file_goes_after_a_database_error_only_if_no_row_names_it(
    settings: Settings,
    api_key: NewKey,
    storage: ObjectStorage,
    caller: Caller,
    serve: Callable[..., httpx.Client],
    monkeypatch: pytest.MonkeyPatch,
    committed: bool,
) -> None:
    register = api.checkpoints.register_source

    def unlucky(*arguments: Any, **options: Any) -> Any:
        if committed:
            register(*arguments, **options)
        raise OperationalError("COMMIT", {}, Exception("the connection is lost"))

    monkeypatch.setattr(api.checkpoints, "register_source", unlucky)

    answer = serve(create_app(settings), api_key).post("/checkpoints", content=safetensors(), headers=BINARY)

    assert answer.status_code >= 500
    assert len(storage.keys(prefix(caller))) == committed


@pytest.mark.parametrize("header", ["Content-Digest", "Repr-Digest"])
def test_announced_digest_is_checked(client: httpx.Client, storage: ObjectStorage, caller: Caller, header: str) -> None:
    data = safetensors()

    wrong = client.post("/checkpoints", content=data, headers=BINARY | {header: digest(b"other")})
    kept = storage.keys(prefix(caller))
    right = client.post("/checkpoints", content=data, headers=BINARY | {header: f"md5=:AA==:, {digest(data)}"})

    assert (wrong.status_code, wrong.json()["type"], kept) == (422, "urn:forgetd:problem:digest-mismatch", [])
    assert right.status_code == 202


@pytest.mark.parametrize("value", ["sha-256=abc", "sha-256=:!!:", "sha-256=:AAAA:"])
def test_malformed_digest_is_refused(client: httpx.Client, value: str) -> None:
    answer = client.post("/checkpoints", content=safetensors(), headers=BINARY | {"Repr-Digest": value})

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:forgetd:problem:invalid-request")


@pytest.mark.parametrize(
    "query",
    [
        "prediction_type=noise",
        "image_size=1",
        "image_size=1025",
        "n_bits=9",
        "family=unknown",
        "name=",
        "name=%00",
        "name=a%0Ab",
        "surplus=1",
    ],
)
def test_invalid_declaration_is_refused(client: httpx.Client, query: str) -> None:
    answer = client.post(f"/checkpoints?{query}", content=safetensors(), headers=BINARY)

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == query.partition("=")[0]


def test_form_instead_of_the_file_is_415(client: httpx.Client) -> None:
    answer = client.post("/checkpoints", files={"file": safetensors()})

    assert (answer.status_code, answer.json()["type"]) == (415, "urn:forgetd:problem:unsupported-media-type")


def _slow_head(key: NewKey, length: str) -> bytes:
    return (
        f"POST /checkpoints HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key.secret}\r\n"
        f"Content-Type: application/octet-stream\r\n{length}\r\n\r\n"
    ).encode()


def test_announced_size_past_the_cap_is_413_unread(gateway: Any, api_key: NewKey) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as line:
        line.sendall(_slow_head(api_key, f"Content-Length: {2**40}"))

        answer = line.makefile("rb").read()  # to its end: the gateway hangs up

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"urn:forgetd:problem:too-large" in answer


def test_memory_does_not_grow_with_the_upload(
    gateway: Any, api_key: NewKey, client: httpx.Client, storage: ObjectStorage, caller: Caller
) -> None:
    client.post("/checkpoints", content=safetensors(b"\1" * 17 * MIB), headers=BINARY)
    process = psutil.Process(gateway.pid)
    before = peak = process.memory_info().rss
    piece = os.urandom(MIB)
    head = struct.pack("<Q", 64) + b"{" + b" " * 63

    def pieces(count: int) -> Iterator[bytes]:
        nonlocal peak
        yield head
        for _ in range(count):
            peak = max(peak, process.memory_info().rss)
            yield piece

    answer = client.post("/checkpoints", content=pieces(LARGE // MIB), headers=BINARY, timeout=120)

    assert answer.status_code == 202, answer.text
    assert answer.json()["source"]["bytes"] == LARGE + len(head)
    assert peak - before < ALLOWED_GROWTH, f"grew by {(peak - before) / MIB:.0f} MiB"
    storage.erase(prefix(caller))


def test_unannounced_size_is_counted_and_cut_at_the_cap(
    settings: Settings, api_key: NewKey, storage: ObjectStorage, caller: Caller, serve: Callable[..., httpx.Client]
) -> None:
    app = create_app(settings.model_copy(update={"max_checkpoint_bytes": 9 * MIB}))
    head = struct.pack("<Q", 64) + b"{" + b" " * 63

    answer = serve(app, api_key).post("/checkpoints", content=iter([head, *[b"\0" * MIB] * 10]), headers=BINARY)

    assert (answer.status_code, answer.json()["limit"]) == (413, 9 * MIB)
    assert (storage.keys(prefix(caller)), storage.unfinished(prefix(caller))) == ([], [])


def test_caller_who_hangs_up_leaves_nothing(
    gateway: Any, api_key: NewKey, storage: ObjectStorage, caller: Caller
) -> None:
    data = safetensors(b"\0" * 20 * MIB)

    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as line:
        line.sendall(_slow_head(api_key, f"Content-Length: {len(data) + 1}") + data)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not storage.unfinished(prefix(caller)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert storage.unfinished(prefix(caller))
    while storage.unfinished(prefix(caller)) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert (storage.unfinished(prefix(caller)), storage.keys(prefix(caller))) == ([], [])


def test_idempotency_key_keeps_one_checkpoint(client: httpx.Client, storage: ObjectStorage, caller: Caller) -> None:
    headers = BINARY | {"Idempotency-Key": "k"}

    first = client.post("/checkpoints", content=safetensors(), headers=headers)
    again = client.post("/checkpoints", content=safetensors(), headers=headers)
    other = client.post("/checkpoints", content=safetensors(b"\1"), headers=headers)

    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert other.json()["type"] == "urn:forgetd:problem:idempotency-key-reused"
    assert len(storage.keys(prefix(caller))) == 1


def test_wait_ends_when_validation_does(client: httpx.Client, caller: Caller, database: Database) -> None:
    checkpoint_id = client.post("/checkpoints", content=safetensors(), headers=BINARY).json()["id"]

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, f"/checkpoints/{checkpoint_id}?wait=30")
        with database.transaction() as session:
            checkpoints.reject(session, caller.tenant_id, checkpoint_id, {"title": "t", "detail": "NaN in w"})
        answer = waiting.result(PATIENCE_SECONDS)

    assert answer.json()["status"] == "rejected"
    assert answer.json()["problem"]["detail"] == "NaN in w"


def test_rejected_checkpoint_says_why_where_a_job_wants_it(
    client: httpx.Client, caller: Caller, database: Database, body: dict[str, Any]
) -> None:
    checkpoint_id = client.post("/checkpoints", content=safetensors(), headers=BINARY).json()["id"]
    with database.transaction() as session:
        checkpoints.reject(session, caller.tenant_id, checkpoint_id, {"title": "t", "detail": "NaN in w"})

    answer = client.post("/jobs/forget", json=body | {"checkpoint": checkpoint_id})

    assert (answer.status_code, answer.json()["state"]) == (409, "rejected")
    assert "NaN in w" in answer.json()["detail"]


def test_unchanged_checkpoint_is_304(client: httpx.Client) -> None:
    made = client.post("/checkpoints", content=safetensors(), headers=BINARY)

    answer = client.get(made.headers["location"], headers={"If-None-Match": made.headers["etag"]})

    assert answer.status_code == 304


def test_pages_hold_every_checkpoint_once_newest_first(
    client: httpx.Client, ready_checkpoint: Callable[[Caller], str], caller: Caller, database: Database
) -> None:
    made = [ready_checkpoint(caller) for _ in range(3)]

    first = client.get("/checkpoints?limit=2").json()
    second = client.get(f"/checkpoints?limit=2&after={first['next_cursor']}").json()

    assert [item["id"] for item in first["items"] + second["items"]] == made[::-1]
    assert (first["has_more"], second["has_more"], second["next_cursor"]) == (True, False, None)


def test_no_row_remains_of_a_refused_upload(client: httpx.Client, database: Database, caller: Caller) -> None:
    client.post("/checkpoints", content=b"hello", headers=BINARY)

    with database.transaction() as session:
        assert session.scalars(select(Checkpoint).where(Checkpoint.tenant_id == caller.tenant_id)).all() == []
