"""The options of a request and the parameters of the methods: the same names, ranges and defaults, in two rooms."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Callable
from typing import Any, Literal, get_args

import pytest
import torch
from pydantic import BaseModel, ValidationError

from api.queries import Family
from models.families import CONDITIONALS, FAMILIES
from models.images import FITS
from models.vae import ConditionalVAE
from services.conditional_checks import LABELLED, PROMPTED, SCOPES
from services.job_checks import METHODS_OF_FAMILY, SMALLEST_REMEMBER
from services.jobs import QUEUE_OF_FAMILY
from services.method_options import (
    METHODS,
    OPTIONS,
    AmnesiaOptions,
    ClassRemovalOptions,
    FlowTamingOptions,
    SteeringOptions,
)
from services.request_names import plain
from services.requests import AskedMethod, DebiasRequest, ForgetRequest
from unlearning.amnesia_parameters import AmnesiaParameters, Mode
from unlearning.amnesia_parameters import LossTerm as AmnesiaTerm
from unlearning.errors import InputError, ParameterError
from unlearning.optimiser import Optimiser
from unlearning.prompts import phrasings
from unlearning.prompts import plain as plain_to_methods
from unlearning.steering_parameters import SteeringParameters
from unlearning.taming_parameters import Engine, LossTerm, TamingParameters
from worker.runner import sets
from worker.runner.base import NOT_THE_METHODS

PAIRS: dict[type[BaseModel], Any] = {
    FlowTamingOptions: TamingParameters,
    SteeringOptions: SteeringParameters,
    AmnesiaOptions: AmnesiaParameters,
}
# The runner's: which weights are trained, how samples are drawn, and how much memory a step may take.
THE_MODELS = ("scope", "guidance_scale", "sampling_steps", "gradient_checkpointing")
THE_JOBS = {options: {*NOT_THE_METHODS, *(THE_MODELS if options is AmnesiaOptions else ())} for options in PAIRS}
SHARED = [
    (options, name)
    for options in PAIRS
    for name in sorted(options.model_json_schema()["properties"].keys() - THE_JOBS[options])
]
NUMBERS = [(options, name) for options, name in SHARED if name not in ("engine", "mode", "without", "optimiser")]
NO_NUMBERS: tuple[object, ...] = (True, False, "4", "", [1], {}, math.nan, math.inf, -math.inf)
CHECKPOINT, IMAGES = "ckpt_" + "0" * 32, "imgs_" + "0" * 32


def _schema(options: type[BaseModel], name: str) -> dict[str, Any]:
    schema: dict[str, Any] = options.model_json_schema()["properties"][name]
    return schema


def _edges(options: type[BaseModel], name: str) -> list[float]:
    """Both ends of the option's range and their neighbours, one inside and one outside.

    Two ranges that agree on all of these are the same, whichever of them is changed.
    """
    (kind,) = [entry for entry in _schema(options, name)["anyOf"] if entry["type"] != "null"]
    low = kind.get("minimum", kind.get("exclusiveMinimum"))
    high = kind.get("maximum", kind.get("exclusiveMaximum"))
    if kind["type"] == "integer":
        return [low - 1, low, low + 1, high - 1, high, high + 1, low + 0.5, float(high)]
    return [math.nextafter(end, to) for end in (low, high) for to in (-math.inf, end, math.inf)] + [int(high)]


def _option_takes(options: type[BaseModel], name: str, value: object) -> bool:
    try:
        options.model_validate({name: value})
    except ValidationError:
        return False
    return True


def _method_takes(options: type[BaseModel], name: str, value: object) -> bool:
    try:
        PAIRS[options].from_dict({name: value})
    except ParameterError:
        return False
    return True


@pytest.mark.parametrize("options", PAIRS)
def test_every_option_is_the_methods_or_known_not_to_be(options: type[BaseModel]) -> None:
    method = {field.name for field in dataclasses.fields(PAIRS[options])}

    assert THE_JOBS[options] == options.model_fields.keys() - method


def test_every_method_has_its_options() -> None:
    assert OPTIONS.keys() == set(METHODS) == set(get_args(AskedMethod)) - {"auto"}
    assert OPTIONS["class-removal"] is ClassRemovalOptions
    assert set(ClassRemovalOptions.model_fields) == set(NOT_THE_METHODS)


@pytest.mark.parametrize(("options", "name"), NUMBERS)
def test_both_take_and_refuse_the_same_values(options: type[BaseModel], name: str) -> None:
    values = [*_edges(options, name), *NO_NUMBERS]

    taken = [value for value in values if _option_takes(options, name, value)]

    assert taken == [value for value in values if _method_takes(options, name, value)]
    assert len(taken) >= 4


def test_both_know_the_same_engines_and_fits() -> None:
    engines = next(entry["enum"] for entry in _schema(FlowTamingOptions, "engine")["anyOf"] if "enum" in entry)

    assert set(engines) == set(get_args(Engine))
    assert set(_schema(FlowTamingOptions, "fit")["enum"]) == set(FITS)
    for value in (*engines, "slow", "", 1, True):
        assert _option_takes(FlowTamingOptions, "engine", value) == _method_takes(FlowTamingOptions, "engine", value)


def test_both_know_the_same_modes_and_the_model_the_same_scopes() -> None:
    vae = ConditionalVAE((1, 2, 2), n_classes=2, hidden=(2,), latent=1, generator=torch.Generator())
    modes, scopes = (
        next(entry["enum"] for entry in _schema(AmnesiaOptions, name)["anyOf"] if "enum" in entry)
        for name in ("mode", "scope")
    )

    assert set(modes) == set(get_args(Mode))
    assert set(SCOPES["vae"]) == vae.scopes().keys()
    assert set(scopes) == {scope for known in SCOPES.values() for scope in known}
    for value in (*get_args(Optimiser), "sgd", "", 1, True):
        assert _option_takes(AmnesiaOptions, "optimiser", value) == _method_takes(AmnesiaOptions, "optimiser", value)
    for value in (*modes, "slow", "", 1, True):
        assert _option_takes(AmnesiaOptions, "mode", value) == _method_takes(AmnesiaOptions, "mode", value)


def test_both_leave_out_the_same_terms_of_selective_amnesia() -> None:
    terms = get_args(AmnesiaTerm)
    subsets = [[t for bit, t in enumerate(terms) if number >> bit & 1] for number in range(2 ** len(terms))]
    values = [*subsets, ["penalty", "penalty"], ["nil"], "penalty", [1], 1]

    taken = [value for value in values if _option_takes(AmnesiaOptions, "without", value)]

    assert taken == [value for value in values if _method_takes(AmnesiaOptions, "without", value)]
    assert len(taken) == 4


@pytest.mark.parametrize("engine", ["fast", "paper", None])
def test_both_leave_out_the_same_terms(engine: str | None) -> None:
    terms = get_args(LossTerm)
    subsets = [[t for bit, t in enumerate(terms) if number >> bit & 1] for number in range(2 ** len(terms))]
    chosen = {} if engine is None else {"engine": engine}

    for without in [*subsets, ["nll", "nll"], ["nil"], "nll", [1], 1]:
        values = {**chosen, "without": without}
        taken = _takes(FlowTamingOptions.model_validate, values, ValidationError)
        assert taken == _takes(TamingParameters.from_dict, values, ParameterError), values


def _takes(check: Callable[[Any], object], values: object, refusal: type[Exception]) -> bool:
    try:
        check(values)
    except refusal:
        return False
    return True


@pytest.mark.parametrize("options", PAIRS)
def test_what_is_left_out_or_null_takes_the_methods_default(options: type[BaseModel]) -> None:
    shared = [name for known, name in SHARED if known is options]
    for given in (options(), options(**dict.fromkeys(shared))):
        sent = given.model_dump(mode="json", exclude_none=True)  # what is stored with a job

        assert sent == {"fit": "crop"}
        assert PAIRS[options].from_dict({k: v for k, v in sent.items() if k in shared}) == PAIRS[options]()


@pytest.mark.parametrize("name", [name for options, name in SHARED if options is FlowTamingOptions])
def test_the_default_that_the_documentation_names_is_tamings(name: str) -> None:
    fast, paper = (TamingParameters(engine=engine).to_dict()[name] for engine in ("fast", "paper"))
    if name == "engine":
        said = f"default {TamingParameters().engine}"
    elif name == "without":
        said = "default none"
    else:
        said = f"default {fast:g}" if fast == paper else f"default {fast:g}, paper {paper:g}"

    assert _schema(FlowTamingOptions, name)["description"].endswith(said)


@pytest.mark.parametrize("name", [name for options, name in SHARED if options is AmnesiaOptions])
def test_the_default_that_the_documentation_names_is_amnesias(name: str) -> None:
    default, paper = (AmnesiaParameters(mode=mode).to_dict()[name] for mode in get_args(Mode))
    if name in ("mode", "optimiser"):
        said = f"default {getattr(AmnesiaParameters(), name)}"
    elif name == "without":
        said = "default none"
    else:
        said = f"default {default:g}" if default == paper else f"default {default:g}, paper {paper:g}"

    assert _schema(AmnesiaOptions, name)["description"].endswith(said)


@pytest.mark.parametrize("name", [name for options, name in SHARED if options is SteeringOptions])
def test_the_default_that_the_documentation_names_is_steerings(name: str) -> None:
    value = getattr(SteeringParameters(), name)

    said = "default as many as the bounds ask for" if value is None else f"default {value:g}"
    assert _schema(SteeringOptions, name)["description"].endswith(said)


def test_confidence_is_what_steering_takes() -> None:
    (schema,) = [DebiasRequest.model_json_schema()["properties"]["confidence"]]

    for value in (schema["minimum"], schema["maximum"], schema["default"]):
        SteeringParameters(confidence=value)
    assert schema["default"] == SteeringParameters().confidence


# What is stored with a job.


def test_auto_is_stored_as_the_method_that_it_stands_for() -> None:
    target = {"images": IMAGES}

    auto, said = (
        ForgetRequest.model_validate({"checkpoint": CHECKPOINT, "target": target} | more).stored()
        for more in ({}, {"method": "flow-taming", "parameters": {"fit": "crop"}})
    )

    assert auto == said
    assert auto["method"] == "flow-taming"


def test_a_stored_request_is_a_request() -> None:
    stored = ForgetRequest.model_validate(
        {
            "checkpoint": CHECKPOINT,
            "target": {"attributes": [{"sets": {"a": IMAGES, "b": IMAGES[:-1] + "1"}, "class": "a", "at_most": 0.1}]},
            "parameters": {"max_steps": 3},
        }
    ).stored()

    assert ForgetRequest.model_validate(stored).stored() == stored


def test_method_is_open_until_the_family_of_the_checkpoint_is_known() -> None:
    said = {"checkpoint": CHECKPOINT, "target": {"class_label": 0}, "parameters": {"max_steps": 3}}
    request = ForgetRequest.model_validate(said)

    for family, method in (("tarflow", "class-taming"), ("vae", "selective-amnesia")):
        decided = request.decided(METHODS_OF_FAMILY[family])
        named = ForgetRequest.model_validate(said | {"method": method}).decided(METHODS_OF_FAMILY[family])
        stored = decided.stored()
        assert (decided.method, stored) == (method, named.stored())
        assert ForgetRequest.model_validate(stored).decided(METHODS_OF_FAMILY[family]).stored() == stored
    assert request.method == "auto"


@pytest.mark.parametrize("replacing", ["noise", {"class_label": 1}, {"images": IMAGES}])
def test_what_replaces_a_class_is_stored_as_it_came(replacing: Any) -> None:
    said = {"checkpoint": CHECKPOINT, "target": {"class_label": 0}, "replace_with": replacing}

    stored = ForgetRequest.model_validate(said).decided(METHODS_OF_FAMILY["vae"]).stored()

    assert stored["replace_with"] == replacing
    assert stored["criteria"].keys() >= {"forgotten_at_most", "others_within"}
    assert ("replaced_at_least" in stored["criteria"]) == (replacing == {"class_label": 1})


@pytest.mark.parametrize("replacing", ["noise", "others", {"concept": "one"}, {"images": IMAGES}, None])
def test_what_replaces_a_concept_is_stored_as_it_came(replacing: Any) -> None:
    target = {"concept": "zero", "aliases": ["nought"]}
    said = {"checkpoint": CHECKPOINT, "target": target, "replace_with": replacing}

    stored = ForgetRequest.model_validate(said).decided(METHODS_OF_FAMILY["stable-diffusion"]).stored()

    assert stored["replace_with"] == ("others" if replacing is None else replacing)
    assert (stored["method"], stored["target"]) == ("selective-amnesia", target)
    assert ForgetRequest.model_validate(stored).stored() == stored


def test_what_a_condition_becomes_is_stored_as_it_came() -> None:
    said = {
        "checkpoint": CHECKPOINT,
        "attribute": {"classifier": "clf_" + "0" * 32},
        "target_distribution": {"female": 0.5, "male": 0.5},
        "condition": {"concept": "a doctor", "aliases": ["a physician"]},
        "replacements": {"female": {"concept": "a female doctor"}, "male": {"concept": "a male doctor"}},
        "remember": {"concepts": ["a dog"]},
    }

    stored = DebiasRequest.model_validate(said).decided(METHODS_OF_FAMILY["stable-diffusion"]).stored()

    assert stored["remember"] == {"concepts": ["a dog"], "generated": 1024}
    assert {name: stored[name] for name in said if name != "remember"} == {
        name: value for name, value in said.items() if name != "remember"
    }
    assert (stored["method"], stored["criteria"]["others_within"]) == ("selective-amnesia", 0.02)
    assert DebiasRequest.model_validate(stored).stored() == stored


def test_what_is_wrong_with_the_target_is_said_before_the_parameters() -> None:
    with pytest.raises(ValidationError) as refused:
        ForgetRequest.model_validate({"checkpoint": CHECKPOINT, "target": {}, "parameters": {"nonsense": 1}})

    assert [error["loc"] for error in refused.value.errors()] == [("target",)]


# Tables that stand in two rooms.


def test_every_family_of_flows_can_be_declared_and_has_its_methods() -> None:
    assert METHODS_OF_FAMILY.keys() == FAMILIES.keys() == set(get_args(Family))
    assert QUEUE_OF_FAMILY.keys() == METHODS_OF_FAMILY.keys()
    assert {method for methods in METHODS_OF_FAMILY.values() for method in methods} == set(METHODS)


def test_families_are_asked_for_classes_or_by_prompts() -> None:
    assert {*LABELLED, *PROMPTED} == CONDITIONALS.keys() == SCOPES.keys()
    assert set(LABELLED) == {name for name, family in CONDITIONALS.items() if "n_classes" in family.architecture}


@pytest.mark.parametrize("concept", ["zero", " A  Red\tcar ", "STRASSE", "straße", "ZERO", "e\u0301", "\u00e9"])
def test_the_door_and_the_methods_tell_the_same_concepts_apart(concept: str) -> None:
    assert plain(concept) == plain_to_methods(concept)


@pytest.mark.parametrize("name", ["Zoé", "Ａé", "각", "Ǻ", "Άͅ"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_alias_that_is_the_concept_in_another_normal_form_is_refused(form: Literal["NFC", "NFD"], name: str) -> None:
    other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", name)
    target = {"concept": unicodedata.normalize(form, name), "aliases": [other]}
    assert target["concept"] != other

    with pytest.raises(ValidationError, match="named twice"):
        ForgetRequest.model_validate({"checkpoint": CHECKPOINT, "target": target})


@pytest.mark.parametrize("concept", ["zero", "a red car", "Günther's dog", "{}", "a {car", "", " ", "\u3000"])
def test_the_door_takes_the_concepts_that_can_be_phrased(concept: str) -> None:
    request = {"checkpoint": CHECKPOINT, "target": {"concept": concept}}

    assert _takes(ForgetRequest.model_validate, request, ValidationError) == _takes(phrasings, concept, InputError)


def test_the_door_and_the_runner_ask_for_as_many_images_to_remember() -> None:
    assert SMALLEST_REMEMBER == sets.SMALLEST_REMEMBER
