"""Jobs about attributes and classes through the door: what is accepted, what is stored, and every refusal's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.leases import Claim
from services.tenancy import Caller, NewKey

NO_SET, NO_CLASSIFIER = "imgs_" + "0" * 32, "clf_" + "0" * 32
HALVES = {"smiling": 0.5, "other": 0.5}


@pytest.fixture
def checkpoint(ready_checkpoint: Callable[..., str], caller: Caller) -> str:
    """A Glow of grey images of 8 x 8."""
    return ready_checkpoint(caller, image_size=8, channels=1, architecture={})


@pytest.fixture
def of_classes(ready_checkpoint: Callable[..., str], caller: Caller) -> str:
    """A class-prior flow of three classes."""
    return ready_checkpoint(caller, "class-prior", image_size=8, channels=1, architecture={"n_classes": 3})


@pytest.fixture
def debias(client: httpx.Client, checkpoint: str, new_classifier: Callable[..., str]) -> Callable[..., httpx.Response]:
    """Posts a good body of ``POST /jobs/debias`` with changes."""
    good = {
        "checkpoint": checkpoint,
        "attribute": {"classifier": new_classifier(channels=1, size=8)},
        "target_distribution": HALVES,
    }

    def post(headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
        return client.post("/jobs/debias", json=good | changes, headers=headers)

    return post


@pytest.fixture
def forget(client: httpx.Client, checkpoint: str) -> Callable[..., httpx.Response]:
    """Posts a body of ``POST /jobs/forget`` with this target."""

    def post(target: dict[str, Any], **changes: Any) -> httpx.Response:
        return client.post("/jobs/forget", json={"checkpoint": checkpoint, "target": target} | changes)

    return post


def accepted(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def refused(answer: httpx.Response, pointer: str, *words: str, status: int = 422) -> None:
    problem = answer.json()
    assert answer.status_code == status, answer.text
    assert pointer in [error["pointer"] for error in problem["errors"]]
    for word in words:
        assert word in problem["detail"]


# Attributes.


def test_attribute_of_a_classifier_is_steered(
    forget: Callable[..., httpx.Response], new_classifier: Callable[..., str]
) -> None:
    wanted = {"classifier": new_classifier(), "class": "smiling", "at_most": 0.1}

    job = accepted(forget({"attributes": [wanted]}, parameters={"max_steps": 10, "samples": 256}))

    assert (job["kind"], job["request"]["method"]) == ("forget", "steering")
    assert job["request"]["target"] == {"attributes": [wanted]}
    assert job["request"]["parameters"] == {"max_steps": 10, "samples": 256, "fit": "crop"}


def test_attributes_of_labelled_sets_and_several_at_once_are_accepted(
    forget: Callable[..., httpx.Response], new_classifier: Callable[..., str], new_image_set: Callable[..., str]
) -> None:
    by_sets = {"sets": {"glasses": new_image_set(), "none": new_image_set()}, "class": "glasses", "at_least": 0.5}
    judge = new_classifier("a", "b", "c")
    by_classifier = [{"classifier": judge, "class": name, "at_most": 0.1} for name in ("a", "b")]

    job = accepted(forget({"attributes": [by_sets, *by_classifier]}))

    assert job["request"]["target"] == {"attributes": [by_sets, *by_classifier]}


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"class": "laughing"}, "/target/attributes/0/class", "no class laughing; it has: smiling, other"),
        ({"at_most": None}, "/target/attributes/0", "at_most or at_least"),
        ({"at_least": 0.1}, "/target/attributes/0", "at_most or at_least"),
        ({"at_most": 1}, "/target/attributes/0/at_most", "less than 1"),
        ({"at_most": -0.1}, "/target/attributes/0/at_most", "greater than or equal to 0"),
        ({"classifier": None}, "/target/attributes/0", '"classifier" or "sets"'),
        ({"sets": {"smiling": NO_SET}}, "/target/attributes/0/sets", "at least 2"),
        ({"sets": {"a": NO_SET, "b": NO_SET[:-1] + "1"}}, "/target/attributes/0", '"classifier" or "sets"'),
        ({"classifier": "nonsense"}, "/target/attributes/0/classifier", "pattern"),
        ({"colour": "red"}, "/target/attributes/0/colour", "not permitted"),
    ],
)
def test_odd_attribute_is_refused_in_its_place(
    forget: Callable[..., httpx.Response],
    new_classifier: Callable[..., str],
    changes: dict[str, Any],
    pointer: str,
    words: str,
) -> None:
    good = {"classifier": new_classifier(), "class": "smiling", "at_most": 0.1}

    refused(forget({"attributes": [good | changes]}), pointer, words)


def test_class_of_no_set_is_refused(forget: Callable[..., httpx.Response]) -> None:
    sets = {"smiling": NO_SET, "other": NO_SET[:-1] + "1"}

    refused(
        forget({"attributes": [{"sets": sets, "class": "glasses", "at_most": 0.1}]}),
        "/target/attributes/0",
        "smiling, other",
    )


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([("smiling", "at_most", 0.1), ("smiling", "at_least", 0.5)], "two bounds"),
        ([("smiling", "at_least", 0.7), ("other", "at_least", 0.4)], "more than 1"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(
    forget: Callable[..., httpx.Response],
    new_classifier: Callable[..., str],
    bounds: list[tuple[str, str, float]],
    words: str,
) -> None:
    judge = new_classifier()

    answer = forget({"attributes": [{"classifier": judge, "class": name, kind: share} for name, kind, share in bounds]})

    refused(answer, "/target/attributes", words)


def test_unknown_judges_are_named(forget: Callable[..., httpx.Response], new_image_set: Callable[..., str]) -> None:
    by_classifier = {"classifier": NO_CLASSIFIER, "class": "a", "at_most": 0.1}
    by_sets = {"sets": {"a": new_image_set(), "b/c": NO_SET}, "class": "a", "at_most": 0.1}

    refused(forget({"attributes": [by_classifier]}), "/target/attributes/0/classifier", status=404)
    refused(forget({"attributes": [by_sets]}), "/target/attributes/0/sets/b~1c", status=404)


def test_judges_of_another_tenant_do_not_exist(
    connect: Callable[[NewKey], httpx.Client],
    new_key: Callable[[], NewKey],
    ready_checkpoint: Callable[..., str],
    new_classifier: Callable[..., str],
) -> None:
    key, judge = new_key(), new_classifier()
    own = ready_checkpoint(Caller(key.tenant_id, key.id))

    answer = connect(key).post(
        "/jobs/debias",
        json={"checkpoint": own, "attribute": {"classifier": judge}, "target_distribution": HALVES},
    )

    assert (answer.status_code, answer.json()["type"]) == (404, "urn:forgetd:problem:not-found")


@pytest.mark.parametrize(
    ("takes", "words"),
    [({"channels": 3}, "3 channels"), ({"size": 32}, "32 pixels"), ({"size": 32, "channels": 1}, "32")],
)
def test_classifier_of_other_images_than_the_checkpoints_is_refused(
    forget: Callable[..., httpx.Response],
    debias: Callable[..., httpx.Response],
    new_classifier: Callable[..., str],
    takes: dict[str, int],
    words: str,
) -> None:
    judge = new_classifier(**takes)

    refused(
        forget({"attributes": [{"classifier": judge, "class": "smiling", "at_most": 0.1}]}),
        "/target/attributes/0/classifier",
        words,
    )
    refused(debias(attribute={"classifier": judge}), "/attribute/classifier", words)


@pytest.mark.parametrize("role", ["remember", "evaluation"])
def test_set_in_two_roles_is_refused(
    forget: Callable[..., httpx.Response],
    debias: Callable[..., httpx.Response],
    new_image_set: Callable[..., str],
    role: str,
) -> None:
    sets = {"smiling": new_image_set(20), "other": new_image_set(20)}
    again = {"images": sets["other"]}
    twice: dict[str, Any] = {"remember": again} if role == "remember" else {"evaluation": {"held_out": again}}
    pointer = "/remember/images" if role == "remember" else "/evaluation/held_out/images"

    refused(forget({"attributes": [{"sets": sets, "class": "other", "at_most": 0.1}]}, **twice), pointer)
    refused(debias(attribute={"sets": sets}, **twice), pointer)


def test_one_set_for_two_classes_is_refused(debias: Callable[..., httpx.Response], image_set: str) -> None:
    refused(debias(attribute={"sets": {"smiling": image_set, "other": image_set}}), "/attribute/sets", "two classes")


@pytest.mark.parametrize(("count", "words"), [(1, "1 image;"), (15, "15 images;")])
def test_too_few_images_to_remember_are_refused_at_once(
    debias: Callable[..., httpx.Response], new_image_set: Callable[..., str], count: int, words: str
) -> None:
    refused(debias(remember={"images": new_image_set(count)}), "/remember/images", words, "at least 16")


def test_sixteen_images_to_remember_do(
    debias: Callable[..., httpx.Response], new_image_set: Callable[..., str]
) -> None:
    accepted(debias(remember={"images": new_image_set(16)}))


# Methods and their options.


@pytest.mark.parametrize(
    ("options", "pointer", "words"),
    [
        ({"delta": 3}, "/parameters/delta", "no option of steering, which has: "),
        ({"engine": "fast"}, "/parameters/engine", "no option of steering"),
        ({"max_steps": 0}, "/parameters/max_steps", "greater than or equal to 1"),
        ({"max_steps": "10"}, "/parameters/max_steps", "integer"),
        ({"a/b": 1}, "/parameters/a~1b", "no option of steering"),
        ([], "/parameters", "dictionary"),
    ],
)
def test_option_of_another_method_is_refused_by_name(
    debias: Callable[..., httpx.Response], options: Any, pointer: str, words: str
) -> None:
    refused(debias(parameters=options), pointer, words)


def test_method_that_does_not_do_what_is_asked_is_refused(
    forget: Callable[..., httpx.Response], debias: Callable[..., httpx.Response], image_set: str
) -> None:
    refused(debias(method="flow-taming"), "/method", "an attribute takes steering")
    refused(forget({"images": image_set}, method="steering"), "/method", "images take flow-taming")
    refused(forget({"class_label": 0}, method="class-removal"), "/method", "a class in the weights takes class-taming")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "one of"),
        ({"images": NO_SET, "attributes": [{"classifier": NO_CLASSIFIER, "class": "a", "at_most": 0.1}]}, "one of"),
        ({"images": NO_SET, "class_label": 0, "where": "prior"}, "stands alone"),
        ({"images": NO_SET, "where": "prior"}, "goes with a class_label"),
    ],
)
def test_target_is_one_thing(forget: Callable[..., httpx.Response], target: dict[str, Any], words: str) -> None:
    refused(forget(target), "/target", words)


def test_measure_of_a_person_makes_no_sense_for_an_attribute(
    forget: Callable[..., httpx.Response], new_classifier: Callable[..., str], image_set: str
) -> None:
    wanted = {"classifier": new_classifier(), "class": "smiling", "at_most": 0.1}

    refused(forget({"attributes": [wanted]}, evaluation={"same_identity": {"images": image_set}}), "", "same_identity")


# Classes.


@pytest.mark.parametrize(
    ("target", "method"),
    [
        ({"class_label": 2}, "class-taming"),
        ({"class_label": 2, "where": "weights"}, "class-taming"),
        ({"class_label": 0, "where": "prior"}, "class-removal"),
    ],
)
def test_class_is_forgotten_where_it_is_said(
    forget: Callable[..., httpx.Response], of_classes: str, target: dict[str, Any], method: str
) -> None:
    job = accepted(forget(target, checkpoint=of_classes))

    assert job["request"]["method"] == method
    assert job["request"]["target"] == {"where": "weights"} | target


def test_class_in_the_weights_takes_its_images_along(
    forget: Callable[..., httpx.Response], of_classes: str, image_set: str
) -> None:
    target = {"class_label": 1, "images": image_set}

    job = accepted(forget(target, checkpoint=of_classes, parameters={"delta": 3}))

    assert job["request"]["target"] == target | {"where": "weights"}
    refused(forget(target, checkpoint=of_classes, remember={"images": image_set}), "/remember/images")


@pytest.mark.parametrize(
    ("target", "pointer", "words"),
    [
        ({"class_label": 3}, "/target/class_label", "no class 3: its classes are 0 to 2"),
        ({"class_label": -1}, "/target/class_label", "greater than or equal to 0"),
        ({"class_label": "1"}, "/target/class_label", "integer"),
        ({"class_label": 1, "where": "everywhere"}, "/target/where", "'weights' or 'prior'"),
    ],
)
def test_class_that_the_checkpoint_does_not_have_is_refused(
    forget: Callable[..., httpx.Response], of_classes: str, target: dict[str, Any], pointer: str, words: str
) -> None:
    refused(forget(target, checkpoint=of_classes), pointer, words)


@pytest.mark.parametrize(
    ("family", "facts"),
    [("glow", {}), ("tarflow", {"architecture": {"n_classes": 0}}), ("realnvp", {}), ("maf", {}), ("iaf", {})],
)
def test_flow_without_classes_has_none_to_forget(
    forget: Callable[..., httpx.Response],
    ready_checkpoint: Callable[..., str],
    caller: Caller,
    family: str,
    facts: dict[str, Any],
) -> None:
    checkpoint = ready_checkpoint(caller, family, **facts)

    refused(forget({"class_label": 0}, checkpoint=checkpoint), "/target/class_label", "its flow has no classes")


@pytest.mark.parametrize("family", ["glow", "realnvp", "maf", "iaf", "tarflow", "class-prior"])
def test_every_family_is_tamed_and_steered(
    forget: Callable[..., httpx.Response],
    debias: Callable[..., httpx.Response],
    ready_checkpoint: Callable[..., str],
    caller: Caller,
    image_set: str,
    family: str,
) -> None:
    checkpoint = ready_checkpoint(caller, family)

    assert accepted(forget({"images": image_set}, checkpoint=checkpoint))["request"]["method"] == "flow-taming"
    assert accepted(debias(checkpoint=checkpoint))["request"]["method"] == "steering"


# Debiasing.


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
