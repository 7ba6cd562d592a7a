"""One scrape of any gateway: the figures of all, nothing of anybody, and an answer without a database too."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from api.app import create_app
from services.metrics import METHODS
from services.settings import Settings
from services.tenancy import NewKey
from tests.api.conftest import ROOT, variables
from tests.worker.helpers import eventually

NOBODY = SecretStr("postgresql+psycopg://nobody:x@127.0.0.1:9/none")  # the discard port: nobody listens
CANARY = "Ada-Lovelace-51.5074N"
OWN_ID = "Grace-Hopper-1906"  # which the log has, and no figure
Serve = Callable[..., httpx.Client]


def figures(client: httpx.Client, **headers: str) -> dict[str, dict[tuple[str, ...], float]]:
    """What a scrape shows: by sample's name, then by its labels' values."""
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def settled(client: httpx.Client) -> None:
    """Waits until all that this gateway has counted is pushed.

    Twice: the first push that shows a request more may have been on its way with one of an earlier test.
    """
    last = ("GET", "none", "404")

    def counted() -> float:
        return figures(client).get("forgetd_http_requests_total", {}).get(last, 0.0)

    for _ in range(2):
        known = counted()
        client.get("/nothing")
        eventually(lambda known=known: counted() > known, what="the figures are pushed")


def test_a_job_accepted_by_one_gateway_is_seen_at_another(
    client: httpx.Client, body: dict[str, Any], settings: Settings, serve: Serve
) -> None:
    other = serve(create_app(settings))

    def accepted() -> float:
        settled(client)  # tests before this one had jobs accepted too
        return figures(other).get("forgetd_jobs_accepted_total", {}).get(("forget",), 0.0)

    before = accepted()

    headers = {"Idempotency-Key": "once"}
    answers = [client.post("/jobs/forget", json=body, headers=headers) for _ in range(2)]
    refused = client.post("/jobs/forget", json=body | {"seed": "x"})

    assert accepted() == before + 1  # the replay is none, and neither is what was refused
    assert [answer.status_code for answer in answers] == [202, 202]
    assert refused.status_code == 422


def test_a_scrape_names_no_tenant_no_job_and_no_word_of_a_caller(
    client: httpx.Client, gateway: Any, api_key: NewKey, body: dict[str, Any]
) -> None:
    asked = body | {"metadata": {"subject": CANARY}}
    job = client.post("/jobs/forget", json=asked, headers={"Idempotency-Key": CANARY, "X-Request-Id": OWN_ID}).json()
    client.get(f"/jobs/{job['id']}?x={CANARY}")
    client.post(f"/jobs/{job['id']}/cancel")
    client.get(f"/{CANARY}")
    client.request(CANARY, f"/{CANARY}")
    ended = ("forget", "", "cancelled")  # kind, reason, status
    eventually(lambda: ended in figures(client).get("forgetd_jobs_ended_total", {}))
    settled(client)  # what is asserted to be absent had its chance to be told

    scrape = client.get("/metrics").text

    assert 'forgetd_http_requests_total{method="GET",route="/jobs/{job_id}",status="200"}' in scrape
    told = (CANARY, OWN_ID, job["id"], api_key.tenant_id, api_key.id, body["checkpoint"], body["target"]["images"])
    assert [word for word in told if word in scrape] == []


def test_labels_are_few_whatever_callers_send(client: httpx.Client) -> None:
    def asked() -> dict[tuple[str, ...], float]:
        return figures(client).get("forgetd_http_requests_total", {})

    own = [("GET", "none", "404"), ("other", "/healthz", "405")]
    before = asked()
    for number in range(20):
        client.get(f"/nothing/{number}")
        client.request(f"BREW{number}", "/healthz")

    def counted() -> dict[tuple[str, ...], float]:
        now = asked()
        return now if all(now.get(labels, 0.0) >= before.get(labels, 0.0) + 20 for labels in own) else {}

    requests = eventually(counted, what="these requests are counted")

    assert {method for method, _, _ in requests} <= METHODS | {"other"}
    assert all(route == "none" or route.startswith("/") for _, route, _ in requests)
    assert not any("nothing" in route for _, route, _ in requests)


def test_a_database_that_does_not_answer_is_all_that_is_told(settings: Settings, serve: Serve) -> None:
    client = serve(create_app(settings.model_copy(update={"database_url": NOBODY})))
    began = time.monotonic()

    shown = figures(client)

    assert shown == {"forgetd_database_up": {(): 0.0}}
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer", 401),
        ("Basic c2NyYXBl", 401),
        ("Bearer wrong", 401),
        ("Bearer scrapé", 401),
        ("Bearer scrape-me", 200),
        ("bearer scrape-me", 200),
    ],
)
def test_with_a_token_only_its_bearer_scrapes(
    settings: Settings, serve: Serve, header: str | None, status: int
) -> None:
    client = serve(create_app(settings.model_copy(update={"metrics_token": SecretStr("scrape-me")})))

    answer = client.get("/metrics", headers={} if header is None else {"Authorization": header.encode()})

    assert answer.status_code == status
    assert (b"forgetd_database_up" in answer.content) == (status == 200)


def test_every_figure_is_explained(client: httpx.Client) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()

    shown = set(re.findall(r"^# TYPE (\w+) ", client.get("/metrics").text, re.MULTILINE))

    assert set(re.findall(r"^\| `(forgetd_\w+)` ", page, re.MULTILINE)) == shown


def test_an_empty_token_is_none(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORGETD_METRICS_TOKEN", "")

    assert Settings().metrics_token is None
