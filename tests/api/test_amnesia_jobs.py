"""A class of a conditional model through the door: the method that is meant, its defaults, every refusal's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.tenancy import Caller
from tests.api.answers import NO_CLASSIFIER, NO_SET, accepted, refused

TARGET = {"class_label": 0}
REPLAY = {"generated": 5000}


@pytest.fixture
def vae(ready_checkpoint: Callable[..., str], caller: Caller) -> str:
    """A conditional VAE of three classes."""
    return ready_checkpoint(caller, "vae", image_size=8, channels=1, architecture={"n_classes": 3})


@pytest.fixture
def amnesia(forget: Callable[..., httpx.Response], vae: str) -> Callable[..., httpx.Response]:
    """Posts a job that forgets class 0 of the VAE, with changes."""

    def post(**changes: Any) -> httpx.Response:
        return forget(changes.pop("target", TARGET), **{"checkpoint": vae} | changes)

    return post


def test_class_of_a_vae_is_forgotten_and_the_defaults_are_spelled_out(amnesia: Callable[..., httpx.Response]) -> None:
    request = accepted(amnesia(remember=REPLAY))["request"]

    assert request["method"] == "selective-amnesia"
    assert request["target"] == {"class_label": 0, "where": "weights"}
    assert (request["replace_with"], request["remember"]) == ("noise", REPLAY)
    assert request["criteria"] == {"release_weights": "when_met", "forgotten_at_most": 0.05, "others_within": 0.02}
    assert "judge" not in request


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("class-prior", "class-taming"),
        ("tarflow", "class-taming"),
        ("vae", "selective-amnesia"),
        ("ddpm", "selective-amnesia"),
    ],
)
@pytest.mark.parametrize("said", [True, False])
def test_auto_is_what_the_family_of_the_checkpoint_has(
    forget: Callable[..., httpx.Response],
    ready_checkpoint: Callable[..., str],
    caller: Caller,
    family: str,
    method: str,
    said: bool,
) -> None:
    checkpoint = ready_checkpoint(caller, family, architecture={"n_classes": 3})
    words = {"method": method} if said else {}

    request = accepted(forget(TARGET, checkpoint=checkpoint, parameters={"max_steps": 7}, **words))["request"]

    assert request["method"] == method
    assert request["parameters"] == {"max_steps": 7, "fit": "crop"}


def test_everything_that_can_be_said_is_kept(
    amnesia: Callable[..., httpx.Response], new_classifier: Callable[..., str]
) -> None:
    said = {
        "replace_with": {"class_label": 2},
        "judge": {"classifier": new_classifier("zero", "one", "two", channels=1, size=8)},
        "criteria": {"forgotten_at_most": 0.1, "replaced_at_least": 0.8, "others_within": 0.1},
        "parameters": {"mode": "paper", "strength": 3, "scope": "decoder", "without": ["replay"], "micro_batch": 8},
    }

    request = accepted(amnesia(**said))["request"]

    assert request["criteria"] == said["criteria"] | {"release_weights": "when_met"}
    assert request["parameters"] == said["parameters"] | {"fit": "crop"}
    assert (request["replace_with"], request["judge"]) == (said["replace_with"], said["judge"])


def test_images_can_replace_the_class_and_labelled_ones_can_judge(
    amnesia: Callable[..., httpx.Response], new_image_set: Callable[..., str]
) -> None:
    said = {
        "replace_with": {"images": new_image_set()},
        "judge": {"sets": {str(label): new_image_set() for label in range(3)}},
    }

    request = accepted(amnesia(**said))["request"]

    assert {name: request[name] for name in said} == said


def test_class_of_a_diffusion_model_is_drawn_as_it_is_said(
    forget: Callable[..., httpx.Response], ready_checkpoint: Callable[..., str], caller: Caller
) -> None:
    ddpm = ready_checkpoint(caller, "ddpm", architecture={"n_classes": 3})
    parameters = {"guidance_scale": 2.5, "sampling_steps": 20, "null_share": 0, "optimiser": "adam-8bit"}
    parameters |= {"gradient_checkpointing": True, "scope": "all"}

    request = accepted(forget(TARGET, checkpoint=ddpm, replace_with="others", parameters=parameters))["request"]

    assert request["parameters"] == parameters | {"fit": "crop"}
    assert request["replace_with"] == "others"
    assert "replaced_at_least" not in request["criteria"]
    for name, value in {"guidance_scale": 0, "sampling_steps": 1001, "scope": "decoder", "null_share": 1}.items():
        refused(forget(TARGET, checkpoint=ddpm, parameters={name: value}), f"/parameters/{name}")


def test_replacing_class_is_to_be_seen_unless_said_otherwise(amnesia: Callable[..., httpx.Response]) -> None:
    request = accepted(amnesia(replace_with={"class_label": 1}))["request"]

    assert request["criteria"]["replaced_at_least"] == 0.9


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"target": {"class_label": 3}}, "/target/class_label", "no class 3: its classes are 0 to 2"),
        ({"target": {"class_label": 0, "where": "prior"}}, "/target/where", "unlearned in the weights"),
        ({"target": {"images": NO_SET}}, "/target/images", '{"class_label": 0}'),
        ({"target": {"images": NO_SET, "class_label": 0}}, "/target/images", '"replace_with"'),
        (
            {"target": {"attributes": [{"classifier": NO_CLASSIFIER, "class": "a", "at_most": 0.1}]}},
            "/target/attributes",
            '{"class_label": 0}',
        ),
        ({"method": "class-taming"}, "/method", "family vae, which has: selective-amnesia"),
        ({"method": "steering"}, "/method", "class-taming or selective-amnesia"),
        ({"target": {"images": NO_SET}, "method": "selective-amnesia"}, "/method", "takes a class_label"),
        ({"remember": {"images": NO_SET}}, "/remember/images", '{"generated": 5000}'),
        ({"evaluation": {"same_identity": {"images": NO_SET}}}, "/evaluation/same_identity", "leave it out"),
        ({"replace_with": {"class_label": 0}}, "/replace_with/class_label", "cannot replace itself"),
        ({"replace_with": {"class_label": 3}}, "/replace_with/class_label", "no class 3: its classes are 0 to 2"),
        ({"replace_with": {"class_label": "1"}}, "/replace_with/class_label", "integer"),
        ({"replace_with": {"class_label": 1, "images": NO_SET}}, "/replace_with", "one of class_label, concept and"),
        ({"replace_with": {}}, "/replace_with", "one of class_label, concept and images"),
        ({"replace_with": "nothing"}, "/replace_with", 'give "noise"'),
        ({"replace_with": {"concept": "one"}}, "/replace_with/concept", "name a class in place of the concept"),
        ({"target": {"concept": "zero"}}, "/target/concept", 'it forgets a class: {"class_label": 0}'),
        ({"target": {"class_label": 0, "aliases": ["nought"]}}, "/target/aliases", "go with a concept"),
        ({"target": {"class_label": 0, "concept": "zero"}}, "/target", "stands alone"),
        ({"remember": {"concepts": ["one"]}}, "/remember/concepts", "samples of all its other classes"),
        ({"remember": {"sets": {"one": NO_SET}}}, "/remember/sets", "takes no prompts"),
        ({"judge": {"classifier": NO_CLASSIFIER, "shows": {"0": "0"}}}, "/judge/shows", "judged by its label"),
        ({"parameters": {"guidance_scale": 0}}, "/parameters/guidance_scale", "the condition does not count"),
        ({"parameters": {"guidance_scale": 2}}, "/parameters/guidance_scale", "family vae"),
        ({"parameters": {"sampling_steps": 20}}, "/parameters/sampling_steps", "Leave it out"),
        ({"parameters": {"null_share": 0.1}}, "/parameters/null_share", "without guidance"),
        ({"parameters": {"gradient_checkpointing": True}}, "/parameters/gradient_checkpointing", "family vae"),
        ({"parameters": {"scope": "cross-attention"}}, "/parameters/scope", "it has: all, decoder"),
        ({"criteria": {"replaced_at_least": 0.9}}, "/criteria/replaced_at_least", '"replace_with": {"class_label": 1}'),
        ({"criteria": {"forgotten_at_most": 0}}, "/criteria/forgotten_at_most", "0.001"),
        ({"criteria": {"forgotten_at_most": 1}}, "/criteria/forgotten_at_most", "0.999"),
        ({"criteria": {"others_within": 1.1}}, "/criteria/others_within", "1"),
        ({"parameters": {"delta": 3}}, "/parameters/delta", "no option of selective-amnesia, which has: "),
        ({"parameters": {"a/b": 3}}, "/parameters/a~1b", "no option of selective-amnesia"),
        ({"parameters": {"max_steps": 0}}, "/parameters/max_steps", "greater than or equal to 1"),
        ({"parameters": {"scope": "encoder"}}, "/parameters/scope", "'decoder'"),
        ({"parameters": {"without": ["penalty", "penalty"]}}, "/parameters", "names a term twice"),
        ({"parameters": []}, "/parameters", "dictionary"),
        ({"judge": {}}, "/judge", '"classifier" or "sets"'),
        ({"judge": {"classes": True}}, "/judge/classes", "not permitted"),
    ],
)
def test_odd_request_is_refused_in_its_place(
    amnesia: Callable[..., httpx.Response], changes: dict[str, Any], pointer: str, words: str
) -> None:
    refused(amnesia(**changes), pointer, words)


@pytest.mark.parametrize("method", ["auto", "selective-amnesia"])
@pytest.mark.parametrize("options", [{"delta": 3}, {"max_steps": "10"}])
def test_parameters_are_judged_alike_whoever_picks_the_method(
    amnesia: Callable[..., httpx.Response], method: str, options: dict[str, Any]
) -> None:
    told = amnesia(method=method, parameters=options).json()

    assert told["errors"] == amnesia(method="auto", parameters=options).json()["errors"]
    assert told["detail"].startswith("/parameters/")


@pytest.mark.parametrize("asked", [{"class_label": 1}, {"class_label": 1, "where": "prior"}, "images", "attributes"])
@pytest.mark.parametrize(
    ("member", "pointer"),
    [
        ({"replace_with": "noise"}, "/replace_with"),
        ({"replace_with": {"class_label": 2}}, "/replace_with"),
        ({"judge": {"classifier": NO_CLASSIFIER}}, "/judge"),
        ({"criteria": {"forgotten_at_most": 0.1}}, "/criteria/forgotten_at_most"),
        ({"criteria": {"replaced_at_least": 0.9}}, "/criteria/replaced_at_least"),
        ({"criteria": {"others_within": 0.1}}, "/criteria/others_within"),
        ({"remember": {"concepts": ["a dog"]}}, "/remember/concepts"),
        ({"remember": {"sets": {"a dog": NO_SET}}}, "/remember/sets"),
    ],
)
def test_methods_of_flows_refuse_what_they_do_not_know(
    forget: Callable[..., httpx.Response], of_classes: str, asked: Any, member: dict[str, Any], pointer: str
) -> None:
    named: dict[str, Any] = {
        "images": {"images": NO_SET},
        "attributes": {"attributes": [{"classifier": NO_CLASSIFIER, "class": "a", "at_most": 0.1}]},
    }
    target = named[asked] if isinstance(asked, str) else asked

    refused(forget(target, checkpoint=of_classes, **member), pointer, "leave it out", "family vae")


def test_flow_of_classes_is_not_changed_by_selective_amnesia(
    forget: Callable[..., httpx.Response], of_classes: str
) -> None:
    answer = forget(TARGET, checkpoint=of_classes, method="selective-amnesia")

    refused(answer, "/method", "family class-prior, which has: flow-taming, steering, class-taming, class-removal")


def test_criteria_of_a_class_are_none_of_debias(debias: Callable[..., httpx.Response]) -> None:
    refused(debias(criteria={"forgotten_at_most": 0.1}), "/criteria/forgotten_at_most", "not permitted")


# Judges and image sets.


def test_judge_of_another_number_of_classes_is_refused_with_both(
    amnesia: Callable[..., httpx.Response], new_classifier: Callable[..., str], new_image_set: Callable[..., str]
) -> None:
    two = {"0": new_image_set(), "1": new_image_set()}

    refused(amnesia(judge={"classifier": new_classifier()}), "/judge/classifier", "2 classes", "has 3")
    refused(amnesia(judge={"sets": two}), "/judge/sets", "2 classes", "has 3")


def test_sets_of_a_judge_are_named_by_labels(
    amnesia: Callable[..., httpx.Response], new_image_set: Callable[..., str]
) -> None:
    sets = {name: new_image_set() for name in ("zero", "one", "two")}

    refused(amnesia(judge={"sets": sets}), "/judge/sets", "0 to 2", "no order")


def test_judge_of_other_images_than_the_models_is_refused(
    amnesia: Callable[..., httpx.Response], new_classifier: Callable[..., str]
) -> None:
    refused(amnesia(judge={"classifier": new_classifier("a", "b", "c", size=32)}), "/judge/classifier", "32 pixels")


def test_unknown_and_erased_references_are_named(
    amnesia: Callable[..., httpx.Response], client: httpx.Client, image_set: str
) -> None:
    assert client.delete(f"/image-sets/{image_set}").status_code == 200

    refused(amnesia(replace_with={"images": NO_SET}), "/replace_with/images", status=404)
    refused(amnesia(replace_with={"images": image_set}), "/replace_with/images", status=409)
    refused(amnesia(judge={"classifier": NO_CLASSIFIER}), "/judge/classifier", status=404)


def test_what_replaces_the_class_is_not_what_measures_it(
    amnesia: Callable[..., httpx.Response], image_set: str
) -> None:
    images = {"images": image_set}

    refused(
        amnesia(replace_with=images, evaluation={"held_out": images}),
        "/evaluation/held_out/images",
        "another image set",
    )


def test_what_an_open_job_needs_is_not_erased_under_it(
    amnesia: Callable[..., httpx.Response],
    client: httpx.Client,
    image_set: str,
    new_classifier: Callable[..., str],
    new_image_set: Callable[..., str],
) -> None:
    judge, labelled = new_classifier("a", "b", "c"), [new_image_set() for _ in range(3)]
    first = accepted(amnesia(replace_with={"images": image_set}, judge={"classifier": judge}))
    second = accepted(amnesia(judge={"sets": {str(label): it for label, it in enumerate(labelled)}}))
    needed = [f"/image-sets/{image_set}", f"/classifiers/{judge}", f"/image-sets/{labelled[1]}"]

    assert [client.delete(path).status_code for path in needed] == [409, 409, 409]

    for job in (first, second):
        client.post(f"/jobs/{job['id']}/cancel")
    assert [client.delete(path).status_code for path in needed] == [200, 200, 200]


def test_request_is_the_same_however_often_it_is_sent(client: httpx.Client, vae: str) -> None:
    body = {"checkpoint": vae, "target": TARGET, "parameters": {"max_steps": 5}}
    headers = {"Idempotency-Key": "k"}

    first, again, other = (
        client.post("/jobs/forget", json=it, headers=headers)
        for it in (body, body, body | {"parameters": {"max_steps": 6}})
    )

    assert again.content == first.content
    assert other.json()["type"] == "urn:forgetd:problem:idempotency-key-reused"
