"""Whatever goes wrong is an RFC 9457 problem, documented, and says nothing that it should not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from api.app import create_app
from services.errors import ForgetdError
from services.settings import Settings
from services.tenancy import NewKey
from tests.relays import DatabaseRelay, relaying

ROOT = Path(__file__).resolve().parents[2]
DEAD = "127.0.0.1:9"  # the discard port: nobody listens
CANARY = "Ada-Lovelace-51.5074N"
Serve = Callable[..., httpx.Client]
OPEN_PATHS = {"/healthz", "/readyz", "/metrics"}


def leaves(error: type[ForgetdError] = ForgetdError) -> Iterator[type[ForgetdError]]:
    """Every kind of problem."""
    for kind in error.__subclasses__():
        yield kind
        yield from leaves(kind)


def is_problem(answer: Any) -> bool:
    body = answer.json()
    return (
        answer.headers["content-type"] == "application/problem+json"
        and {"type", "title", "status", "detail"} <= body.keys()
        and body["status"] == answer.status_code
        and body["type"].startswith("urn:forgetd:problem:")
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/jobs/", 404),
        ("GET", "/docs/assets/nothing.js", 404),
        ("POST", "/jobs", 405),
        ("DELETE", "/jobs/job_00000000000000000000000000000000", 405),
        ("PUT", "/checkpoints", 405),
    ],
)
def test_framework_errors_are_problems_too(client: httpx.Client, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)

    assert answer.status_code == status
    assert is_problem(answer)


def test_method_not_allowed_names_the_methods(client: httpx.Client) -> None:
    assert "GET" in client.delete("/jobs").headers["allow"]


def test_silent_database_is_503_and_the_process_lives(settings: Settings, api_key: NewKey, serve: Serve) -> None:
    dead = SecretStr(f"postgresql+psycopg://user:{CANARY}@{DEAD}/forgetd")
    app = create_app(settings.model_copy(update={"database_url": dead}))

    client = serve(app, api_key)
    answers = [client.get("/jobs"), client.get("/readyz"), client.post("/image-sets", files={"images": b"x"})]
    alive = client.get("/healthz")

    assert alive.status_code == 200
    for answer in answers:
        assert is_problem(answer)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert DEAD not in answer.text
        assert CANARY not in answer.text


def test_silent_store_is_503_and_nothing_is_kept(
    settings: Settings, api_key: NewKey, client: httpx.Client, serve: Serve
) -> None:
    app = create_app(settings.model_copy(update={"s3_endpoint_url": f"http://{DEAD}"}))
    file = b"\x02\0\0\0\0\0\0\0{}"

    impaired = serve(app, api_key)
    answer = impaired.post("/checkpoints", content=file, headers={"Content-Type": "application/octet-stream"})

    assert is_problem(answer)
    assert (answer.status_code, answer.json()["server"]) == (503, "storage")
    assert client.get("/checkpoints").json()["items"] == []


@pytest.mark.parametrize(
    "dead",
    [
        {"database_url": SecretStr(f"postgresql+psycopg://user:word@{DEAD}/forgetd")},
        {"s3_endpoint_url": f"http://{DEAD}"},
    ],
    ids=["database", "store"],
)
def test_only_a_read_is_told_that_nothing_was_changed(
    settings: Settings,
    api_key: NewKey,
    serve: Serve,
    client: httpx.Client,
    new_image_set: Callable[[], str],
    dead: dict[str, Any],
) -> None:
    impaired = serve(create_app(settings.model_copy(update=dead)), api_key)
    upload = client.post("/checkpoints/uploads", json={"bytes": 5}).headers["location"]

    answers = [impaired.get(upload), impaired.delete(f"/image-sets/{new_image_set()}")]

    assert [answer.status_code for answer in answers] == [503, 503]
    assert ["nothing was changed" in answer.json()["detail"] for answer in answers] == [True, False]
    assert "it is not known whether this was done" in answers[1].json()["detail"]


def test_a_post_that_counted_and_lost_its_reply_is_not_told_that_nothing_was_changed(
    settings: Settings, api_key: NewKey, serve: Serve, client: httpx.Client, body: dict[str, Any]
) -> None:
    url = settings.database_url.get_secret_value()
    with relaying(DatabaseRelay, url) as relay:
        app = create_app(settings.model_copy(update={"database_url": SecretStr(relay.instead_of(url))}))
        impaired = serve(app, api_key)
        relay.trap("reply lost", after=b"INSERT INTO jobs")
        answer = impaired.post("/jobs/forget", json=body)

    assert (answer.status_code, answer.json()["server"]) == (503, "database")
    assert len(client.get("/jobs").json()["items"]) == 1
    assert "it is not known whether this was done" in answer.json()["detail"]


def test_silent_broker_is_reported_and_accepts_jobs(
    settings: Settings, api_key: NewKey, body: dict[str, Any], serve: Serve
) -> None:
    dead = SecretStr(f"redis://{DEAD}/0")
    app = create_app(settings.model_copy(update={"broker_url": dead}))

    client = serve(app, api_key)
    ready = client.get("/readyz")
    accepted = client.post("/jobs/forget", json=body)

    assert (ready.status_code, ready.json()["broker"]) == (200, "silent")
    assert accepted.status_code == 202


def test_defect_is_500_with_a_reference_and_no_leak(
    settings: Settings, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(settings)

    @app.get("/defect")
    def defect() -> None:
        raise RuntimeError(CANARY)

    with caplog.at_level(logging.DEBUG, "forgetd"):
        answer = serve(app).get(f"/defect?name={CANARY}-query")

    assert is_problem(answer)
    assert answer.status_code == 500
    assert answer.json()["reference"] in caplog.text
    assert "RuntimeError in GET /defect" in caplog.text
    assert CANARY not in answer.text
    assert CANARY not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("forgetd"))


def test_every_kind_of_problem_has_its_section() -> None:
    page = (ROOT / "docs" / "problems.md").read_text()
    documented = dict(re.findall(r"^### `([a-z-]+)` \((\d{3})\)$", page, re.MULTILINE))

    kinds = {kind.slug: str(kind.status) for kind in leaves() if not kind.__subclasses__() or kind.slug == "not-found"}
    assert documented == kinds


def test_every_kind_of_problem_has_its_own_slug_and_a_title() -> None:
    kinds = list(leaves())

    assert len({kind.slug for kind in kinds}) == len(kinds)
    assert all((kind.__doc__ or "").strip().endswith(".") for kind in kinds)


def test_every_operation_documents_its_problems(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()

    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            wanted = {"401", "422", "500", "503"} if path not in OPEN_PATHS else {"503"}
            if "{" in path:
                wanted.add("404")
            if method == "post" and "{" not in path:
                wanted |= {"413", "415"}
            assert wanted <= responses.keys(), (method, path)
            assert all(
                list(response["content"]) == ["application/problem+json"]
                for status, response in responses.items()
                if status >= "400"
            ), (method, path)
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)


def test_documentation_page_works_offline(client: httpx.Client) -> None:
    page = client.get("/docs").text

    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(assets) >= 3
    assert all(asset.startswith("/docs/assets/") for asset in assets)
    assert all(client.get(asset).status_code == 200 for asset in assets)
