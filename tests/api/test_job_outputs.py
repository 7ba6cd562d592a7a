"""Report, artifacts and the tamed checkpoint."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Publish = Callable[..., dict[str, bytes]]
WEIGHTS = ("artifacts/tamed.safetensors", "artifacts/pipeline.tar")


def test_checkpoint_is_a_link_with_its_digest(client: httpx.Client, job_id: str, publish: Publish) -> None:
    weights = publish(job_id)["tamed.safetensors"]

    answer = client.get(f"/jobs/{job_id}/checkpoint")
    fetched = httpx.get(answer.headers["location"], trust_env=False)

    digest = hashlib.sha256(weights)
    assert answer.status_code == 307
    assert answer.json()["url"] == answer.headers["location"]
    assert (answer.json()["sha256"], answer.json()["bytes"]) == (digest.hexdigest(), len(weights))
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert fetched.content == weights
    assert fetched.headers["content-disposition"] == f'attachment; filename="{job_id}-tamed.safetensors"'


def test_following_the_link_with_an_http_client_works(client: httpx.Client, job_id: str, publish: Publish) -> None:
    weights = publish(job_id)["tamed.safetensors"]

    answer = client.get(f"/jobs/{job_id}/checkpoint", follow_redirects=True)

    assert answer.content == weights


@pytest.mark.parametrize("output", ["checkpoint", "report", "artifacts/report.json"])
def test_nothing_is_handed_out_before_the_end(client: httpx.Client, job_id: str, output: str) -> None:
    answer = client.get(f"/jobs/{job_id}/{output}")

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:forgetd:problem:result-not-available")


def test_cancelled_job_has_no_results(client: httpx.Client, job_id: str) -> None:
    client.post(f"/jobs/{job_id}/cancel")

    answer = client.get(f"/jobs/{job_id}/checkpoint")

    assert (answer.status_code, answer.json()["state"]) == (409, "cancelled")


def test_missed_criteria_withhold_the_weights_and_keep_the_report(
    client: httpx.Client, job_id: str, publish: Publish
) -> None:
    publish(job_id, met=False)

    job = client.get(f"/jobs/{job_id}").json()
    withheld = [client.get(f"/jobs/{job_id}/{part}") for part in ("checkpoint", *WEIGHTS)]
    listed = client.get(f"/jobs/{job_id}/artifacts").json()["items"]

    assert (job["status"], job["reason"]) == ("failed", "criteria_not_met")
    assert {answer.status_code for answer in withheld} == {409}
    assert {answer.json()["type"] for answer in withheld} == {"urn:forgetd:problem:result-withheld"}
    assert [item["name"] for item in listed] == ["report.json", "report.html"]
    assert [item["name"] for item in job["artifacts"]] == ["report.json", "report.html"]
    assert client.get(f"/jobs/{job_id}/report").status_code == 200


def test_weights_of_missed_criteria_are_released_where_the_job_said_so(
    client: httpx.Client, body: dict[str, Any], publish: Publish
) -> None:
    wish = {"criteria": {"release_weights": "always"}}
    job_id = client.post("/jobs/forget", json=body | wish).json()["id"]
    publish(job_id, met=False)

    answers = [client.get(f"/jobs/{job_id}/{part}") for part in ("checkpoint", *WEIGHTS)]

    assert [answer.status_code for answer in answers] == [307, 307, 307]


@pytest.mark.parametrize(
    ("accept", "query", "media_type"),
    [
        ("*/*", "", "application/json"),
        ("application/json", "", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "", "text/html; charset=utf-8"),
        ("application/json, text/html", "", "application/json"),
        ("application/json", "?format=html", "text/html; charset=utf-8"),
        ("text/html", "?format=json", "application/json"),
    ],
)
def test_report_comes_as_json_or_as_a_page(
    client: httpx.Client, job_id: str, publish: Publish, accept: str, query: str, media_type: str
) -> None:
    files = publish(job_id)

    answer = client.get(f"/jobs/{job_id}/report{query}", headers={"Accept": accept})

    assert answer.headers["content-type"] == media_type
    assert answer.content == files["report.json" if "json" in media_type else "report.html"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_report_page_can_run_no_script(client: httpx.Client, job_id: str, publish: Publish) -> None:
    publish(job_id)

    policy = client.get(f"/jobs/{job_id}/report?format=html").headers["content-security-policy"]

    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_unchanged_report_is_304(client: httpx.Client, job_id: str, publish: Publish) -> None:
    publish(job_id)
    tag = client.get(f"/jobs/{job_id}/report").headers["etag"]

    answer = client.get(f"/jobs/{job_id}/report", headers={"If-None-Match": tag})

    assert answer.status_code == 304


@pytest.mark.parametrize("name", ["nothing.bin", "..%2F..%2Fsecret", "manifest.json", "%00"])
def test_only_published_names_are_artifacts(client: httpx.Client, job_id: str, publish: Publish, name: str) -> None:
    publish(job_id)

    answer = client.get(f"/jobs/{job_id}/artifacts/{name}")

    assert answer.status_code == 404


def test_every_artifact_can_be_fetched(client: httpx.Client, job_id: str, publish: Publish) -> None:
    files = publish(job_id)

    fetched = {
        item["name"]: client.get(f"/jobs/{job_id}/artifacts/{item['name']}", follow_redirects=True).content
        for item in client.get(f"/jobs/{job_id}/artifacts").json()["items"]
    }

    assert fetched == files
