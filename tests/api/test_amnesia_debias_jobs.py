"""A conditional model debiased through the door: its condition, what shows each class, every refusal's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.tenancy import Caller
from tests.api.answers import HALVES, NO_SET, accepted, refused

DOCTOR = {"concept": "a doctor", "aliases": ["a physician"]}
EACH = {"smiling": {"concept": "a smiling doctor"}, "other": {"concept": "a stern doctor"}}
LABELS = {"smiling": {"class_label": 1}, "other": {"class_label": 2}}


@pytest.fixture
def pipeline(ready_checkpoint: Callable[..., str], caller: Caller) -> str:
    """A Stable Diffusion of small grey images."""
    return ready_checkpoint(caller, "stable-diffusion", image_size=8, channels=1, architecture={"unet": {}})


@pytest.fixture
def vae(ready_checkpoint: Callable[..., str], caller: Caller) -> str:
    """A conditional VAE of three classes."""
    return ready_checkpoint(caller, "vae", image_size=8, channels=1, architecture={"n_classes": 3})


@pytest.fixture
def of_prompts(debias: Callable[..., httpx.Response], pipeline: str) -> Callable[..., httpx.Response]:
    """Posts a job that debiases a concept, with changes."""
    good = {"checkpoint": pipeline, "condition": DOCTOR, "replacements": EACH}
    return lambda **changes: debias(**good | changes)


@pytest.fixture
def of_labels(debias: Callable[..., httpx.Response], vae: str) -> Callable[..., httpx.Response]:
    """Posts a job that debiases class 0 of a VAE, with changes."""
    good = {"checkpoint": vae, "condition": {"class_label": 0}, "replacements": LABELS}
    return lambda **changes: debias(**good | changes)


def test_debias_of_a_concept_spells_its_defaults_out(of_prompts: Callable[..., httpx.Response]) -> None:
    request = accepted(of_prompts(parameters={"guidance_scale": 3, "scope": "cross-attention"}))["request"]

    assert request["method"] == "selective-amnesia"
    assert (request["condition"], request["replacements"]) == (DOCTOR, EACH)
    assert request["criteria"] == {"release_weights": "when_met", "others_within": 0.02}
    assert request["parameters"] == {"guidance_scale": 3, "scope": "cross-attention", "fit": "crop"}
    assert (request["tolerance"], request["remember"]) == (0.03, {"generated": 1024})


@pytest.mark.parametrize("family", ["vae", "ddpm"])
def test_debias_of_a_class_is_accepted(
    of_labels: Callable[..., httpx.Response], ready_checkpoint: Callable[..., str], caller: Caller, family: str
) -> None:
    checkpoint = ready_checkpoint(caller, family, architecture={"n_classes": 3})

    request = accepted(of_labels(checkpoint=checkpoint, method="selective-amnesia"))["request"]

    assert request["condition"] == {"class_label": 0}
    assert request["replacements"] == LABELS


def test_concepts_and_sets_stay(of_prompts: Callable[..., httpx.Response], new_image_set: Callable[..., str]) -> None:
    by_name, by_images = {"concepts": ["a nurse", "a smiling doctor"]}, {"sets": {"a nurse": new_image_set(16)}}

    for remember, stored in ((by_name, by_name | {"generated": 1024}), (by_images, by_images)):
        assert accepted(of_prompts(remember=remember))["request"]["remember"] == stored


def test_class_that_is_to_be_seen_never_needs_no_replacement(of_prompts: Callable[..., httpx.Response]) -> None:
    only = {"smiling": {"concept": "a smiling doctor"}}

    accepted(of_prompts(replacements=only, target_distribution={"smiling": 1, "other": 0}))
    refused(of_prompts(replacements=only), "/replacements", "Samples are to show other", "ask for a fraction of 0")


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"condition": None, "replacements": None}, "/condition", '"condition": {"concept": "a doctor"}'),
        ({"condition": None}, "/replacements", "go together"),
        ({"replacements": None}, "/replacements", "go together"),
        ({"replacements": {}}, "/replacements", "at least 1"),
        ({"condition": {}}, "/condition", "either class_label or concept"),
        ({"condition": {"class_label": 0}}, "/condition/class_label", "no classes, it takes prompts"),
        ({"condition": {"concept": "a {} doctor"}}, "/condition/concept", "braces"),
        ({"condition": {"concept": "a doctor", "aliases": ["A doctor"]}}, "/condition", "named twice"),
        ({"replacements": EACH | {"third": {"concept": "x"}}}, "/replacements/third", "it has: smiling, other"),
        ({"replacements": EACH | {"other": {"concept": "A Doctor "}}}, "/replacements/other", "the condition itself"),
        ({"replacements": EACH | {"other": {"concept": "a Physician"}}}, "/replacements/other", "condition itself"),
        ({"replacements": EACH | {"other": EACH["smiling"]}}, "/replacements/other", "the same replacement"),
        ({"replacements": EACH | {"other": {"class_label": 1}}}, "/replacements/other/class_label", "takes prompts"),
        ({"replacements": EACH | {"other": {"images": NO_SET}}}, "/replacements/other/images", "not permitted"),
        ({"remember": {"concepts": ["A  doctor"]}}, "/remember/concepts/0", "at once"),
        ({"remember": {"concepts": ["a physician"]}}, "/condition/aliases/0", "at once"),
        ({"remember": {"images": NO_SET}}, "/remember/images", "Send sets by the concept"),
        ({"attribute": {"classes": True}}, "/attribute/classes", "name a classifier or sets."),
        ({"method": "steering"}, "/method", "a condition takes selective-amnesia"),
        ({"criteria": {"others_within": 0}}, "/criteria/others_within", "0.001"),
        ({"criteria": {"forgotten_at_most": 0.1}}, "/criteria/forgotten_at_most", "not permitted"),
        ({"parameters": {"pool": 100}}, "/parameters/pool", "no option of selective-amnesia"),
        ({"parameters": {"guidance_scale": 0}}, "/parameters/guidance_scale", "the condition does not count"),
        ({"target_distribution": {"smiling": 0.5, "female": 0.5}}, "/target_distribution", "female is no class"),
    ],
)
def test_odd_request_about_a_concept_is_refused_in_its_place(
    of_prompts: Callable[..., httpx.Response], changes: dict[str, Any], pointer: str, words: str
) -> None:
    refused(of_prompts(**changes), pointer, words)


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"condition": None, "replacements": None}, "/condition", '"condition": {"class_label": 0}'),
        ({"condition": None, "replacements": None, "attribute": {"classes": True}}, "/condition", "is debiased"),
        ({"condition": {"class_label": 3}}, "/condition/class_label", "no class 3"),
        ({"condition": {"concept": "a doctor"}}, "/condition/concept", "name a class in place of the concept"),
        ({"condition": {"class_label": 0, "aliases": ["x"]}}, "/condition", "aliases go with a concept"),
        ({"condition": {"class_label": 1}}, "/replacements/smiling", "the condition itself"),
        ({"replacements": LABELS | {"other": {"class_label": 9}}}, "/replacements/other/class_label", "no class 9"),
        ({"replacements": LABELS | {"other": {"concept": "x"}}}, "/replacements/other/concept", "takes no prompts"),
        ({"remember": {"concepts": ["one"]}}, "/remember/concepts", "takes no prompts"),
        ({"parameters": {"sampling_steps": 9}}, "/parameters/sampling_steps", "family vae"),
        ({"attribute": {"classes": True}}, "/attribute/classes", "no priors"),
    ],
)
def test_odd_request_about_a_class_is_refused_in_its_place(
    of_labels: Callable[..., httpx.Response], changes: dict[str, Any], pointer: str, words: str
) -> None:
    refused(of_labels(**changes), pointer, words)


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"condition": DOCTOR, "replacements": EACH}, "/condition", "as a whole"),
        ({"replacements": EACH}, "/replacements", "go together"),
        ({"method": "selective-amnesia"}, "/method", "selective-amnesia takes a condition"),
        ({"remember": {"concepts": ["a nurse"]}}, "/remember/concepts", "steering does not know this member"),
        ({"criteria": {"others_within": 0.1}}, "/criteria/others_within", "leave it out"),
    ],
)
def test_flow_is_debiased_as_a_whole(
    debias: Callable[..., httpx.Response], changes: dict[str, Any], pointer: str, words: str
) -> None:
    refused(debias(**changes), pointer, words)


def test_condition_is_part_of_what_is_done_once_a_key(debias: Callable[..., httpx.Response], pipeline: str) -> None:
    body: dict[str, Any] = {"checkpoint": pipeline, "condition": DOCTOR, "replacements": EACH}
    body["target_distribution"] = HALVES

    first, again = debias({"Idempotency-Key": "k"}, **body), debias({"Idempotency-Key": "k"}, **body)
    other = debias({"Idempotency-Key": "k"}, **body | {"condition": {"concept": "a doctor"}})

    assert again.content == first.content
    assert other.json()["type"] == "urn:forgetd:problem:idempotency-key-reused"
