"""Jobs that debias through the door: what is accepted, what is stored, and every refusal's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.leases import Claim
from tests.api.answers import NO_CLASSIFIER, NO_SET, accepted, refused


def test_debias_spells_its_defaults_out_and_is_read_like_every_job(
    client: httpx.Client, debias: Callable[..., httpx.Response], claim: Callable[[str], Claim]
) -> None:
    answer = debias(seed=7, metadata={"ticket": "R-1"})

    job = accepted(answer)
    path = f"/jobs/{job['id']}"
    assert (job["kind"], job["status"], job["seed"], job["metadata"]) == ("debias", "queued", 7, {"ticket": "R-1"})
    assert (job["request"]["tolerance"], job["request"]["confidence"]) == (0.03, 0.95)
    assert job["request"]["remember"] == {"generated": 1024}
    assert answer.headers["location"] == path
    assert client.get(path).json() == job
    assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert [item["id"] for item in client.get("/jobs").json()["items"]] == [job["id"]]
    claim(job["id"])
    assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).json()["status"] == "running"


def test_debias_is_done_once_a_key(debias: Callable[..., httpx.Response], client: httpx.Client) -> None:
    first = debias({"Idempotency-Key": "k"})

    again = debias({"Idempotency-Key": "k"}, method="steering", tolerance=0.03)
    other = debias({"Idempotency-Key": "k"}, tolerance=0.05)

    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert other.json()["type"] == "urn:forgetd:problem:idempotency-key-reused"
    assert len(client.get("/jobs").json()["items"]) == 1


def test_debias_by_labelled_sets_is_accepted(
    debias: Callable[..., httpx.Response], new_image_set: Callable[..., str]
) -> None:
    sets = {"smiling": new_image_set(), "other": new_image_set()}

    assert accepted(debias(attribute={"sets": sets}))["request"]["attribute"] == {"sets": sets}


def test_classes_of_the_checkpoint_itself_are_named_by_their_labels(
    debias: Callable[..., httpx.Response], of_classes: str
) -> None:
    shares = {"0": 0.5, "1": 0.5, "2": 0}

    job = accepted(debias(checkpoint=of_classes, attribute={"classes": True}, target_distribution=shares))

    assert job["request"]["method"] == "class-removal"
    refused(
        debias(checkpoint=of_classes, attribute={"classes": True}, target_distribution={"0": 0.5, "1": 0.5}),
        "/target_distribution",
        "2 is left out",
    )


def test_checkpoint_without_class_priors_has_none_to_weight(debias: Callable[..., httpx.Response]) -> None:
    refused(debias(attribute={"classes": True}), "/attribute/classes", "name a classifier or sets")


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"smiling": 0.5, "laughing": 0.5}, ["laughing is no class", "other is left out", "Give 0 to a class"]),
        ({"smiling": 0.5, "other": 0.4}, ["sum to 0.9; they must sum to 1"]),
        ({"smiling": 0.5, "other": 0.500002}, ["must sum to 1"]),
        ({"smiling": 0.5, "other": 0.5, "third": 0}, ["third is no class"]),
        ({"a": 0.5, "b": 0.5}, ["a, b are no classes", "smiling, other are left out"]),
    ],
)
def test_distribution_over_other_classes_or_of_another_sum_is_refused(
    debias: Callable[..., httpx.Response], shares: dict[str, float], words: list[str]
) -> None:
    refused(debias(target_distribution=shares), "/target_distribution", *words)


def test_sum_may_miss_one_by_what_people_round(debias: Callable[..., httpx.Response]) -> None:
    accepted(debias(target_distribution={"smiling": 0.3333333, "other": 0.6666666}))


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"target_distribution": {"smiling": 1.5, "other": -0.5}}, "/target_distribution/smiling"),
        ({"target_distribution": {"smiling": 1}}, "/target_distribution"),
        ({"tolerance": 0}, "/tolerance"),
        ({"tolerance": 0.6}, "/tolerance"),
        ({"confidence": 1}, "/confidence"),
        ({"confidence": 0.1}, "/confidence"),
        ({"attribute": {}}, "/attribute"),
        ({"attribute": {"classes": False}}, "/attribute"),
        ({"attribute": {"classes": True, "classifier": NO_CLASSIFIER}}, "/attribute"),
        ({"target": {"images": NO_SET}}, "/target"),
        ({"evaluation": {"same_identity": {"images": NO_SET}}}, "/evaluation/same_identity"),
    ],
)
def test_odd_member_is_refused_in_its_place(
    debias: Callable[..., httpx.Response], changes: dict[str, Any], pointer: str
) -> None:
    refused(debias(**changes), pointer)
