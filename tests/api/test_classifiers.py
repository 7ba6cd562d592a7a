"""Classifiers through the door: streamed, tried in the sandbox, listed, and erased unless a job needs them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from api.app import create_app
from services import object_keys
from services.settings import Settings
from services.storage import ObjectStorage
from services.tenancy import Caller, NewKey
from tests.onnx_files import classifier, outside, unlike

BINARY = {"Content-Type": "application/octet-stream"}
SMILES = {"name": "smiles", "classes": "smiling,other"}


def upload(client: httpx.Client, data: bytes, headers: dict[str, str] | None = None, **query: Any) -> httpx.Response:
    return client.post("/classifiers", params=SMILES | query, content=data, headers=BINARY | (headers or {}))


def kept(storage: ObjectStorage, caller: Caller) -> list[str]:
    return storage.keys(f"{object_keys.tenant_prefix(caller.tenant_id)}classifiers/")


def test_uploaded_classifier_says_what_it_is(client: httpx.Client, storage: ObjectStorage, caller: Caller) -> None:
    data = classifier(shape=("n", 3, 32, 32))

    answer = upload(client, data, mean="0.5,0.4,0.3", std="0.2,0.2,0.2", threshold=0.7)

    made = answer.json()
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/classifiers/{made['id']}"
    assert (
        made.items()
        >= {
            "name": "smiles",
            "classes": ["smiling", "other"],
            "output": "logits",
            "threshold": 0.7,
            "scale": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
            "channels": 3,
            "size": 32,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "erased_at": None,
        }.items()
    )
    assert storage.read(object_keys.classifier(caller.tenant_id, made["id"])) == data
    assert client.get(answer.headers["location"]).json() == made


@pytest.mark.parametrize(
    ("data", "query", "said"),
    [
        (classifier(), {}, {"scale": "unit", "threshold": 0.5, "channels": 1, "size": 8}),
        (classifier(shape=("n", 3, "h", "w")), {}, {"channels": 3, "size": None}),
        (classifier(1), {"output": "score"}, {"output": "score", "threshold": 0.0}),
        (classifier(1), {"output": "score", "threshold": -3.5}, {"threshold": -3.5}),
        (classifier(3), {"classes": ["a", "b,c"]}, {"classes": ["a", "b", "c"]}),
        (classifier(shape=("n", 3, 8, 8)), {"mean": 0.5, "std": 0.5}, {"scale": {"mean": [0.5] * 3, "std": [0.5] * 3}}),
    ],
)
def test_what_is_left_out_is_assumed_and_said(
    client: httpx.Client, data: bytes, query: dict[str, Any], said: dict[str, Any]
) -> None:
    answer = upload(client, data, **query)

    assert answer.status_code == 201, answer.text
    assert answer.json().items() >= said.items()


@pytest.mark.parametrize(
    ("data", "slug", "reason"),
    [
        (b"", "empty-upload", None),
        (b"PK\x03\x04 no model", "not-a-classifier", None),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "not-a-classifier", None),
        (b"\x08\x09 no model", "classifier-refused", "not_onnx"),
        (outside("weights.bin"), "classifier-refused", "external_data"),
        (unlike("Bogus"), "classifier-refused", "unknown_operator"),
        (unlike(shape=("n", 64)), "classifier-refused", "input_shape"),
        (classifier(3), "classifier-refused", "output_classes"),
    ],
)
def test_file_that_is_no_classifier_is_refused_and_not_kept(
    client: httpx.Client, storage: ObjectStorage, caller: Caller, data: bytes, slug: str, reason: str | None
) -> None:
    answer = upload(client, data)

    assert (answer.status_code, answer.json()["type"]) == (422, f"urn:forgetd:problem:{slug}")
    assert answer.json().get("reason") == reason
    assert kept(storage, caller) == []
    assert client.get("/classifiers").json()["items"] == []


@pytest.mark.parametrize(
    ("query", "parameter", "words"),
    [
        ({"classes": "smiling"}, "classes", "at least 2"),
        ({"classes": "smiling,smiling"}, "classes", "same name"),
        ({"classes": "smiling,"}, "classes.1", "at least 1"),
        ({"output": "sigmoid"}, "output", "logits"),
        ({"output": "score", "classes": "a,b,c"}, "output", "two classes"),
        ({"threshold": 0}, "threshold", "between 0 and 1"),
        ({"threshold": "nan"}, "threshold", "finite"),
        ({"threshold": 0.5, "classes": "a,b,c"}, "threshold", "two classes"),
        ({"mean": "0.5"}, "mean", "mean and std go together"),
        ({"mean": "0.5,0.5", "std": "1,1"}, "mean", "mean and std go together"),
        ({"mean": "0.5", "std": "0"}, "std", "greater than 0"),
        ({"mean": "black", "std": "1"}, "mean.0", "number"),
        ({"colour": "red"}, "colour", "not permitted"),
    ],
)
def test_odd_query_is_refused_by_name(client: httpx.Client, query: dict[str, Any], parameter: str, words: str) -> None:
    answer = upload(client, classifier(), **query)

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:forgetd:problem:invalid-request")
    (error,) = answer.json()["errors"]
    assert error["parameter"] == parameter
    assert words in error["detail"]


def test_scale_of_other_channels_than_the_classifiers_is_refused(
    client: httpx.Client, storage: ObjectStorage, caller: Caller
) -> None:
    answer = upload(client, classifier(), mean="0.5,0.5,0.5", std="1,1,1")

    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "mean")
    assert kept(storage, caller) == []


def test_classes_are_required(client: httpx.Client) -> None:
    answer = client.post("/classifiers", content=classifier(), headers=BINARY)

    assert answer.json()["errors"][0]["parameter"] == "classes"


def test_announced_digest_is_checked(client: httpx.Client, storage: ObjectStorage, caller: Caller) -> None:
    other = base64.b64encode(hashlib.sha256(b"other").digest()).decode()

    answer = upload(client, classifier(), {"Content-Digest": f"sha-256=:{other}:"})

    assert answer.json()["type"] == "urn:forgetd:problem:digest-mismatch"
    assert kept(storage, caller) == []


def test_other_media_type_is_refused(client: httpx.Client) -> None:
    answer = client.post("/classifiers", params=SMILES, json={})

    assert answer.status_code == 415


def test_file_over_the_limit_is_refused(
    settings: Settings, api_key: NewKey, serve: Callable[..., httpx.Client]
) -> None:
    small = settings.model_copy(update={"max_classifier_bytes": 100})

    answer = upload(serve(create_app(small), api_key), classifier())

    assert (answer.status_code, answer.json()["limit"]) == (413, 100)


def test_repeat_with_the_same_key_is_the_same_classifier(
    client: httpx.Client, storage: ObjectStorage, caller: Caller
) -> None:
    first = upload(client, classifier(), {"Idempotency-Key": "k"})

    again = upload(client, classifier(), {"Idempotency-Key": "k"})
    other = upload(client, classifier(), {"Idempotency-Key": "k"}, classes="other,smiling")

    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert other.json()["type"] == "urn:forgetd:problem:idempotency-key-reused"
    assert kept(storage, caller) == [object_keys.classifier(caller.tenant_id, first.json()["id"])]


def test_pages_hold_every_classifier_once_newest_first(
    client: httpx.Client, new_classifier: Callable[..., str]
) -> None:
    made = [new_classifier() for _ in range(3)]

    first = client.get("/classifiers", params={"limit": 2}).json()
    second = client.get("/classifiers", params={"limit": 2, "after": first["next_cursor"]}).json()

    assert [item["id"] for item in first["items"] + second["items"]] == made[::-1]
    assert (first["has_more"], second["has_more"], second["next_cursor"]) == (True, False, None)


def test_unchanged_classifier_is_304(client: httpx.Client, new_classifier: Callable[..., str]) -> None:
    path = f"/classifiers/{new_classifier()}"
    tag = client.get(path).headers["etag"]

    assert client.get(path, headers={"If-None-Match": tag}).status_code == 304


@pytest.mark.parametrize("name", ["clf_" + "0" * 32, "nonsense"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_unknown_classifier_is_not_found(client: httpx.Client, method: str, name: str) -> None:
    answer = client.request(method, f"/classifiers/{name}")

    assert (answer.status_code, answer.json()["type"]) == (404, "urn:forgetd:problem:not-found")


def test_classifiers_are_the_tenants_own(
    connect: Callable[[NewKey], httpx.Client],
    new_key: Callable[[], NewKey],
    new_classifier: Callable[..., str],
    storage: ObjectStorage,
    caller: Caller,
) -> None:
    made, stranger = new_classifier(), connect(new_key())

    assert stranger.get(f"/classifiers/{made}").status_code == 404
    assert stranger.delete(f"/classifiers/{made}").status_code == 404
    assert stranger.get("/classifiers").json()["items"] == []
    assert len(kept(storage, caller)) == 1


# Erasing.


def test_erased_classifier_is_gone_from_store_and_list_and_twice_is_as_once(
    client: httpx.Client, storage: ObjectStorage, caller: Caller, new_classifier: Callable[..., str]
) -> None:
    made = new_classifier()

    first = client.delete(f"/classifiers/{made}")
    again = client.delete(f"/classifiers/{made}")

    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json() == again.json() == client.get(f"/classifiers/{made}").json()
    assert first.json()["erased_at"] is not None
    assert kept(storage, caller) == []
    assert client.get("/classifiers").json()["items"] == []


@pytest.mark.parametrize("kind", ["forget", "debias"])
def test_classifier_that_an_open_job_needs_stays_until_its_end(
    client: httpx.Client, body: dict[str, Any], new_classifier: Callable[..., str], kind: str
) -> None:
    made, spare = new_classifier(), new_classifier()
    wanted = {"classifier": made, "class": "smiling", "at_most": 0.1}
    asked = (
        {"target": {"attributes": [{"classifier": spare, "class": "other", "at_least": 0.5}, wanted]}}
        if kind == "forget"
        else {"attribute": {"classifier": made}, "target_distribution": {"smiling": 0.5, "other": 0.5}}
    )
    job = client.post(f"/jobs/{kind}", json={"checkpoint": body["checkpoint"]} | asked)

    refused = client.delete(f"/classifiers/{made}")
    client.post(f"/jobs/{job.json()['id']}/cancel")
    gone = client.delete(f"/classifiers/{made}")

    assert job.status_code == 202, job.text
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:forgetd:problem:classifier-in-use")
    assert gone.status_code == 200


def test_erased_classifier_cannot_judge(
    client: httpx.Client, body: dict[str, Any], new_classifier: Callable[..., str]
) -> None:
    made = new_classifier()
    client.delete(f"/classifiers/{made}")
    target = {"attributes": [{"classifier": made, "class": "smiling", "at_most": 0.1}]}

    answer = client.post("/jobs/forget", json=body | {"target": target})

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:forgetd:problem:classifier-erased")
    assert answer.json()["errors"][0]["pointer"] == "/target/attributes/0/classifier"
