"""A concept of a model of prompts through the door: what is spelled out, every refusal's place, what is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.tenancy import Caller
from tests.api.answers import NO_CLASSIFIER, NO_SET, accepted, refused

TARGET = {"concept": "zero", "aliases": ["nought", "the digit 0"]}
STAYS = {"concepts": ["one", "two"]}
PROMPTS = {"image_size": 8, "channels": 1, "architecture": {"unet": {}}}


@pytest.fixture
def pipeline(ready_checkpoint: Callable[..., str], caller: Caller) -> str:
    """A Stable Diffusion of small grey images."""
    return ready_checkpoint(caller, "stable-diffusion", **PROMPTS)


@pytest.fixture
def amnesia(forget: Callable[..., httpx.Response], pipeline: str) -> Callable[..., httpx.Response]:
    """Posts a job that forgets the concept and keeps two, with changes."""

    def post(**changes: Any) -> httpx.Response:
        return forget(changes.pop("target", TARGET), **{"checkpoint": pipeline, "remember": STAYS} | changes)

    return post


@pytest.fixture
def digits(new_classifier: Callable[..., str]) -> str:
    """A judge of five classes: three by their figures, two by the concepts' own names."""
    return new_classifier("0", "1", "2", "One", "three", channels=1, size=8)


def test_defaults_of_a_concept_are_spelled_out(amnesia: Callable[..., httpx.Response]) -> None:
    request = accepted(amnesia())["request"]

    assert (request["method"], request["target"]) == ("selective-amnesia", TARGET)
    assert request["replace_with"] == "others"
    assert request["remember"] == STAYS | {"generated": 1024}
    assert request["criteria"] == {"release_weights": "when_met", "forgotten_at_most": 0.05, "others_within": 0.02}
    assert "judge" not in request


@pytest.mark.parametrize("replacing", ["noise", "others", {"concept": "one"}, {"concept": "a blank page"}])
def test_replacing_concept_is_to_be_seen_by_a_judge_that_is_trained_for_it(
    amnesia: Callable[..., httpx.Response], replacing: Any
) -> None:
    request = accepted(amnesia(replace_with=replacing))["request"]

    assert request["replace_with"] == replacing
    assert request["criteria"].get("replaced_at_least") == (0.9 if isinstance(replacing, dict) else None)


def test_class_of_the_judge_that_shows_a_concept_is_as_said_or_of_its_name(
    amnesia: Callable[..., httpx.Response], digits: str
) -> None:
    judge = {"classifier": digits, "shows": {"Zero ": "0"}}

    request = accepted(amnesia(judge=judge, replace_with={"concept": "three"}))["request"]

    assert request["judge"] == {"classifier": digits, "shows": {"zero": "0", "one": "One", "three": "three"}}
    assert request["criteria"]["replaced_at_least"] == 0.9


def test_replacement_that_the_judge_does_not_know_is_not_asked_for(
    amnesia: Callable[..., httpx.Response], digits: str
) -> None:
    judge, elsewhere = {"classifier": digits, "shows": {"zero": "0"}}, {"concept": "a cat"}

    request = accepted(amnesia(judge=judge, replace_with=elsewhere))["request"]

    assert "replaced_at_least" not in request["criteria"]
    refused(
        amnesia(judge=judge, replace_with=elsewhere, criteria={"replaced_at_least": 0.5}),
        "/criteria/replaced_at_least",
        "no class for it",
    )


def test_general_prompts_stay_where_a_judge_knows_the_concept(
    amnesia: Callable[..., httpx.Response], digits: str
) -> None:
    judge = {"classifier": digits, "shows": {"zero": "0", "a dog": "1"}}

    request = accepted(amnesia(judge=judge, remember={"generated": 100}))["request"]

    assert request["judge"] == judge
    refused(amnesia(remember={"generated": 100}), "/judge", "that you name", '"shows"')
    refused(amnesia(judge={"classifier": digits}, remember={"generated": 100}), "/judge/shows", '"zero"')


@pytest.mark.parametrize(
    ("shows", "pointer", "words"),
    [
        ({"zero": "5"}, "/judge/shows/zero", "no class 5; it has: 0, 1, 2, One, three"),
        ({"one": "1", "a/b": "no"}, "/judge/shows/a~1b", "no class no"),
        ({"one": "1"}, "/judge/shows", 'which class of the judge shows "zero"'),
        ({"nought": "0"}, "/judge/shows", 'which class of the judge shows "zero"'),
        ({"zero": "0", "one": "0"}, "/judge/shows/one", "as the same class, 0"),
        ({"zero": "One"}, "/judge/shows/one", "as the same class, One"),
        ({"zero": "0", " ZERO": "1"}, "/judge/shows", "named twice"),
        ({}, "/judge/shows", "at least 1"),
    ],
)
def test_judge_that_cannot_tell_the_concept_is_refused(
    amnesia: Callable[..., httpx.Response], digits: str, shows: dict[str, str], pointer: str, words: str
) -> None:
    refused(amnesia(judge={"classifier": digits, "shows": shows}), pointer, words)


def test_judge_that_knows_nothing_of_what_stays_is_refused(amnesia: Callable[..., httpx.Response], digits: str) -> None:
    judge = {"classifier": digits, "shows": {"zero": "0"}}

    refused(amnesia(judge=judge, remember={"concepts": ["a", "b"]}), "/judge/shows", "none of the concepts that must")


def test_labelled_sets_judge_and_labelled_sets_stay(
    amnesia: Callable[..., httpx.Response], new_image_set: Callable[..., str]
) -> None:
    judge = {"sets": {"zero": new_image_set(), "one": new_image_set()}}
    remember = {"sets": {"one": new_image_set(10), "two": new_image_set(6)}}

    request = accepted(amnesia(judge=judge, remember=remember))["request"]

    assert request["remember"] == remember
    assert request["judge"] == judge | {"shows": {"zero": "zero", "one": "one"}}
    assert accepted(amnesia(remember=remember))["request"].keys() == request.keys() - {"judge"}


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"target": {"class_label": 0}}, "/target/class_label", '{"concept": "a dog"'),
        ({"target": {"images": NO_SET}}, "/target/images", "remaps one condition"),
        ({"target": {"images": NO_SET, "concept": "zero"}}, "/target", "one of"),
        (
            {"target": {"attributes": [{"classifier": NO_CLASSIFIER, "class": "a", "at_most": 0.1}]}},
            "/target/attributes",
            "name the concept that they show",
        ),
        ({"target": {"concept": "zero", "where": "prior"}}, "/target", "goes with a class_label"),
        ({"target": {"concept": ""}}, "/target/concept", "at least 1"),
        ({"target": {"concept": "  "}}, "/target/concept", "printable words"),
        ({"target": {"concept": "a\ndog"}}, "/target/concept", "printable words"),
        ({"target": {"concept": "a" * 201}}, "/target/concept", "at most 200"),
        ({"target": {"concept": "a {} dog"}}, "/target/concept", "braces"),
        ({"target": {"concept": "zero", "aliases": ["{"]}}, "/target/aliases/0", "braces"),
        ({"target": {"concept": "zero", "aliases": []}}, "/target/aliases", "at least 1"),
        ({"target": {"concept": "zero", "aliases": ["a", " A"]}}, "/target/aliases", "named twice"),
        ({"target": {"concept": "zero", "aliases": ["ZERO"]}}, "/target/aliases", "named twice"),
        ({"target": {"concept": "zero", "aliases": [str(n) for n in range(51)]}}, "/target/aliases", "at most 50"),
        ({"target": {"aliases": ["nought"]}}, "/target/aliases", "go with a concept"),
        ({"replace_with": {"concept": " Zero"}}, "/replace_with/concept", "cannot replace itself"),
        ({"replace_with": {"concept": "NOUGHT"}}, "/replace_with/concept", "cannot replace itself"),
        ({"replace_with": {"class_label": 1}}, "/replace_with/class_label", '{"concept": "a dog"}'),
        ({"replace_with": "nothing"}, "/replace_with", '"others"'),
        ({"remember": {"concepts": ["one", "zero"]}}, "/remember/concepts/1", "at once"),
        ({"remember": {"concepts": ["one", "Nought"]}}, "/target/aliases/0", "at once"),
        ({"remember": {"sets": {"a/b": NO_SET, "zero": NO_SET[:-1] + "1"}}}, "/remember/sets/zero", "at once"),
        ({"remember": {"concepts": ["one", "ONE "]}}, "/remember/concepts", "named twice"),
        ({"remember": {"concepts": []}}, "/remember/concepts", "at least 1"),
        ({"remember": {"concepts": ["one"], "images": NO_SET}}, "/remember", "one of"),
        ({"remember": {"concepts": ["one"], "sets": {"two": NO_SET}}}, "/remember", "one of"),
        ({"remember": {"sets": {"one": NO_SET, "two": NO_SET}}}, "/remember/sets", "same image set"),
        ({"remember": {"images": NO_SET}}, "/remember/images", '{"sets": {"a dog": "imgs_..."}}'),
        (
            {"remember": {"concepts": [f"c{n}" for n in range(65)], "generated": 64}},
            "/remember/generated",
            "64 samples cannot show 65 concepts",
        ),
        ({"evaluation": {"same_identity": {"images": NO_SET}}}, "/evaluation/same_identity", "leave it out"),
        ({"criteria": {"replaced_at_least": 0.9}}, "/criteria/replaced_at_least", '{"concept": "a dog"}'),
        ({"method": "steering"}, "/method", "a concept takes selective-amnesia"),
        ({"parameters": {"guidance_scale": 0}}, "/parameters/guidance_scale", "the condition does not count"),
        ({"parameters": {"guidance_scale": 101}}, "/parameters/guidance_scale", "100"),
        ({"parameters": {"guidance_scale": True}}, "/parameters/guidance_scale", "number"),
        ({"parameters": {"sampling_steps": 0}}, "/parameters/sampling_steps", "1"),
        ({"parameters": {"scope": "decoder"}}, "/parameters/scope", "it has: all, cross-attention, all-but-cross"),
        ({"parameters": {"optimiser": "sgd"}}, "/parameters/optimiser", "'adam'"),
    ],
)
def test_odd_request_is_refused_in_its_place(
    amnesia: Callable[..., httpx.Response], changes: dict[str, Any], pointer: str, words: str
) -> None:
    refused(amnesia(**changes), pointer, words)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("glow", "it forgets what images show, attributes."),
        ("class-prior", "attributes, or a class."),
        ("vae", 'it forgets a class: {"class_label": 0}'),
        ("ddpm", 'it forgets a class: {"class_label": 0}'),
    ],
)
def test_family_without_prompts_says_what_it_takes(
    forget: Callable[..., httpx.Response],
    ready_checkpoint: Callable[..., str],
    caller: Caller,
    family: str,
    words: str,
) -> None:
    checkpoint = ready_checkpoint(caller, family, architecture={} if family == "glow" else {"n_classes": 3})

    refused(forget(TARGET, checkpoint=checkpoint), "/target/concept", words, "family stable-diffusion")


@pytest.mark.parametrize("scope", ["all", "cross-attention", "all-but-cross-attention"])
def test_every_scope_of_the_family_can_be_trained(amnesia: Callable[..., httpx.Response], scope: str) -> None:
    assert accepted(amnesia(parameters={"scope": scope}))["request"]["parameters"]["scope"] == scope


def test_sets_to_remember_are_the_callers_and_enough(
    amnesia: Callable[..., httpx.Response], client: httpx.Client, new_image_set: Callable[..., str]
) -> None:
    few, gone = {"one": new_image_set(8), "two": new_image_set(7)}, new_image_set(16)
    client.delete(f"/image-sets/{gone}")

    refused(amnesia(remember={"sets": few}), "/remember/sets", "hold 15 images; at least 16", "leave them out")
    refused(amnesia(remember={"sets": {"one": NO_SET}}), "/remember/sets/one", status=404)
    refused(amnesia(remember={"sets": {"a/b": gone}}), "/remember/sets/a~1b", status=409)


def test_images_that_replace_the_concept_do_not_stay(
    amnesia: Callable[..., httpx.Response], new_image_set: Callable[..., str]
) -> None:
    images = new_image_set(16)

    refused(
        amnesia(replace_with={"images": images}, remember={"sets": {"one": images}}),
        "/remember/sets/one",
        "another image set",
    )


def test_what_an_open_job_remembers_is_not_erased_under_it(
    amnesia: Callable[..., httpx.Response], client: httpx.Client, new_image_set: Callable[..., str]
) -> None:
    images = new_image_set(16)
    job = accepted(amnesia(remember={"sets": {"one": images}}))

    before = client.delete(f"/image-sets/{images}").status_code
    client.post(f"/jobs/{job['id']}/cancel")

    assert (before, client.delete(f"/image-sets/{images}").status_code) == (409, 200)
