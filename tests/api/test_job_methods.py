"""Methods of jobs and their options through the door, for what is to be forgotten and for a flow's own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.tenancy import Caller
from tests.api.answers import NO_CLASSIFIER, NO_SET, accepted, refused


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
