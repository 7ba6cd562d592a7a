"""JSON bodies: too large, malformed, ambiguous, of the wrong form."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import psutil
import pytest

from services.tenancy import NewKey

GIB = 2**30
ALLOWED_GROWTH = 32 * 2**20  # the body's limit is 1 MiB; the rest is allocator noise

MALFORMED = {
    "not JSON": b"{",
    "empty": b"",
    "not UTF-8": b'{"checkpoint": "\xff"}',
    "NaN": b'{"metadata": {"a": NaN}}',
    "Infinity": b'{"metadata": {"a": -Infinity}}',
    "float that overflows": b'{"metadata": {"a": 1e999}}',
    "integer of 5,000 digits": b'{"metadata": {"a": ' + b"9" * 5000 + b"}}",
    "same key twice": b'{"checkpoint": "a", "checkpoint": "b"}',
    "deep nesting": b"[" * 100_000,
    "nesting past the limit": b'{"metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 41,
    "NUL": b'{"metadata": {"a": "\\u0000"}}',
    "half a surrogate pair": b'{"metadata": {"a": "\\ud800"}}',
    "a list": b"[]",
    "null": b"null",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_json_is_a_problem(client: httpx.Client, kind: str) -> None:
    answer = client.post("/jobs/forget", content=MALFORMED[kind], headers={"Content-Type": "application/json"})

    assert answer.status_code == 422, answer.text
    assert answer.json()["type"] == "urn:forgetd:problem:invalid-request"
    assert answer.json()["errors"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_media_types_are_refused(client: httpx.Client, kind: str) -> None:
    answer = client.post("/jobs/forget", content=b"{}", headers={"Content-Type": kind} if kind else {})

    assert answer.status_code == 415
    assert answer.json()["type"] == "urn:forgetd:problem:unsupported-media-type"


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"target": {"images": "nonsense"}}, "/target/images"),
        ({"target": {}}, "/target"),
        ({"surplus": 1}, "/surplus"),
        ({"a/b~c": 1}, "/a~1b~0c"),
        ({"parameters": {"delta": -1}}, "/parameters/delta"),
        ({"parameters": {"delta": "x" * 50}}, "/parameters/delta"),
        ({"remember": {"generated": 100, "images": "imgs_" + "0" * 32}}, "/remember"),
        ({"remember": {"generated": 1}}, "/remember/generated"),
        ({"seed": -1}, "/seed"),
        ({"seed": 2**53}, "/seed"),
        ({"priority": 10_000}, "/priority"),
        ({"method": "hope"}, "/method"),
        ({"metadata": {"a": "x" * 20_000}}, "/metadata"),
    ],
)
def test_invalid_member_is_named_by_json_pointer(
    client: httpx.Client, body: dict[str, Any], change: dict[str, Any], pointer: str
) -> None:
    answer = client.post("/jobs/forget", json=body | change)

    assert answer.status_code == 422
    assert pointer in [error["pointer"] for error in answer.json()["errors"]]
    assert "x" * 50 not in answer.text


def test_what_to_forget_cannot_be_what_to_remember(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post("/jobs/forget", json=body | {"remember": body["target"]})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/remember/images"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/jobs?limit=0", "limit"),
        ("/jobs?limit=101", "limit"),
        ("/jobs?after=%00", "after"),
        ("/jobs?status=dreaming", "status"),
        ("/checkpoints?after=job_1", "after"),
        ("/jobs/job_00000000000000000000000000000000?wait=31", "wait"),
        ("/jobs/job_00000000000000000000000000000000?wait=nan", "wait"),
    ],
)
def test_invalid_query_is_named(client: httpx.Client, path: str, name: str) -> None:
    answer = client.get(path)

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == name


@pytest.mark.parametrize("id", ["x", "%00", "job_%00", "ckpt_" + "0" * 32, "..%2f..", "job_" + "0" * 31 + "%0A", "é"])
def test_id_of_another_form_does_not_exist(client: httpx.Client, id: str) -> None:
    answer = client.get(f"/jobs/{id}")

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def _head(key: NewKey, length: str) -> bytes:
    return (
        f"POST /jobs/forget HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key.secret}\r\n"
        f"Content-Type: application/json\r\n{length}\r\n\r\n"
    ).encode()


def test_announced_gibibyte_of_json_is_refused_unread(gateway: Any, api_key: NewKey) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as line:
        line.sendall(_head(api_key, f"Content-Length: {GIB}"))

        answer = line.makefile("rb").read()  # to its end: the gateway hangs up

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"urn:forgetd:problem:too-large" in answer


def test_unannounced_gibibyte_of_json_is_cut_without_buffering(gateway: Any, api_key: NewKey) -> None:
    before = psutil.Process(gateway.pid).memory_info().rss
    piece = b"%x\r\n" % 65536 + b"[" * 65536 + b"\r\n"
    sent = 0
    answer = b""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as line:
        line.sendall(_head(api_key, "Transfer-Encoding: chunked"))
        try:
            while sent < GIB:
                line.sendall(piece)
                sent += 65536
        except OSError:
            pass  # the gateway hung up, as it should
        try:
            while more := line.recv(65536):
                answer += more
        except OSError:
            pass

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent < GIB // 16
    assert psutil.Process(gateway.pid).memory_info().rss - before < ALLOWED_GROWTH
