"""Jobs about attributes through the door: what is accepted, what is stored, and every refusal's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.tenancy import Caller, NewKey
from tests.api.answers import HALVES, NO_CLASSIFIER, NO_SET, accepted, refused


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
