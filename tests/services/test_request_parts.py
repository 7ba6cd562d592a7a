"""The parts of bodies that name one of several things: none of them is refused, and so is more than one."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from pydantic import ValidationError

from services.condition_parts import Remember, Replacement, Shown
from services.request_names import Part
from services.request_parts import Attribute, Judge, OwnClassesJudge, Target, exactly_one


def an_id(prefix: str, number: int = 0) -> str:
    """An id of this kind."""
    return f"{prefix}_{number:032x}"


CLASSIFIER, IMAGES = an_id("clf"), an_id("imgs")
SETS = {"a": an_id("imgs", 1), "b": an_id("imgs", 2)}
CHOICES: list[tuple[type[Part], dict[str, Any], dict[str, Any]]] = [
    (Judge, {"classifier": CLASSIFIER, "sets": SETS}, {}),
    (OwnClassesJudge, {"classifier": CLASSIFIER, "sets": SETS, "classes": True}, {}),
    (Attribute, {"at_most": 0.1, "at_least": 0.5}, {"classifier": CLASSIFIER, "class": "a"}),
    (Shown, {"class_label": 0, "concept": "zero"}, {}),
    (Replacement, {"class_label": 0, "concept": "zero", "images": IMAGES}, {}),
    (Remember, {"images": IMAGES, "sets": SETS, "generated": 64}, {}),
    (
        Target,
        {"images": IMAGES, "concept": "zero", "attributes": [{"classifier": CLASSIFIER, "class": "a", "at_most": 0.1}]},
        {},
    ),
]
"""A part, what excludes each other in it, and what else it needs."""
SOME = [
    pytest.param(part, {name: choices[name] for name in names}, rest, id=f"{part.__name__}-{'-'.join(names) or 'none'}")
    for part, choices, rest in CHOICES
    for number in range(len(choices) + 1)
    for names in combinations(choices, number)
]


@pytest.mark.parametrize(("part", "given", "rest"), SOME)
def test_exactly_one_of_what_excludes_each_other_is_taken(
    part: type[Part], given: dict[str, Any], rest: dict[str, Any]
) -> None:
    if len(given) == 1:
        assert part(**given, **rest).model_dump(by_alias=True, exclude_none=True).keys() >= given.keys()
        return

    with pytest.raises(ValidationError, match=r"give (one of|either)"):
        part(**given, **rest)


def test_own_classes_that_are_declined_are_no_judge() -> None:
    with pytest.raises(ValidationError, match='"classes": true'):
        OwnClassesJudge(classes=False)

    assert OwnClassesJudge(classifier=CLASSIFIER, classes=False).classifier == CLASSIFIER


@pytest.mark.parametrize(
    "given", [{"concept": "zero"}, {"attributes": [{"classifier": CLASSIFIER, "class": "a", "at_most": 0.1}]}]
)
def test_a_class_label_stands_beside_nothing_but_images_of_it(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="stands alone"):
        Target(class_label=0, **given)
    with pytest.raises(ValidationError, match="stands alone"):
        Target(class_label=0, images=IMAGES, **given)

    assert Target(class_label=0, images=IMAGES).images == IMAGES


def test_nothing_is_not_one_of_them_but_zero_is() -> None:
    exactly_one("give one", 0, None)
    with pytest.raises(ValueError, match="give one"):
        exactly_one("give one", None, None)
