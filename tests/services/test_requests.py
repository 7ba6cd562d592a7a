"""The options of a request and the parameters of the method: the same names, ranges and defaults, in two rooms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from models.images import FITS
from services.requests import FlowTamingOptions
from unlearning.errors import ParameterError
from unlearning.taming_parameters import Engine, TamingParameters
from worker.runner.forget import NOT_THE_METHODS

SCHEMA: dict[str, dict[str, Any]] = FlowTamingOptions.model_json_schema()["properties"]
SHARED = sorted(SCHEMA.keys() - set(NOT_THE_METHODS))
NUMBERS = sorted(set(SHARED) - {"engine"})
NO_NUMBERS: tuple[object, ...] = (True, False, "4", "", [1], {}, math.nan, math.inf, -math.inf)


def _edges(name: str) -> list[float]:
    """Both ends of the option's range and their neighbours, one inside and one outside.

    Two ranges that agree on all of these are the same, whichever of them is changed.
    """
    (kind,) = [entry for entry in SCHEMA[name]["anyOf"] if entry["type"] != "null"]
    low = kind.get("minimum", kind.get("exclusiveMinimum"))
    high = kind.get("maximum", kind.get("exclusiveMaximum"))
    if kind["type"] == "integer":
        return [low - 1, low, low + 1, high - 1, high, high + 1, low + 0.5, float(high)]
    return [math.nextafter(end, to) for end in (low, high) for to in (-math.inf, end, math.inf)] + [int(high)]


def _option_takes(name: str, value: object) -> bool:
    try:
        FlowTamingOptions.model_validate({name: value})
    except ValidationError:
        return False
    return True


def _method_takes(name: str, value: object) -> bool:
    try:
        TamingParameters.from_dict({name: value})
    except ParameterError:
        return False
    return True


def test_every_option_is_the_methods_or_known_not_to_be() -> None:
    method = {field.name for field in dataclasses.fields(TamingParameters)}

    assert set(SHARED) <= method
    assert set(NOT_THE_METHODS) == SCHEMA.keys() - method


@pytest.mark.parametrize("name", NUMBERS)
def test_both_take_and_refuse_the_same_values(name: str) -> None:
    values = [*_edges(name), *NO_NUMBERS]

    taken = [value for value in values if _option_takes(name, value)]

    assert taken == [value for value in values if _method_takes(name, value)]
    assert len(taken) >= 4


def test_both_know_the_same_engines_and_fits() -> None:
    engines = next(entry["enum"] for entry in SCHEMA["engine"]["anyOf"] if "enum" in entry)

    assert set(engines) == set(get_args(Engine))
    assert set(SCHEMA["fit"]["enum"]) == set(FITS)
    for value in (*engines, "slow", "", 1, True):
        assert _option_takes("engine", value) == _method_takes("engine", value)


def test_what_is_left_out_or_null_takes_the_methods_default() -> None:
    for options in (FlowTamingOptions(), FlowTamingOptions(**dict.fromkeys(SHARED))):
        sent = options.model_dump(mode="json", exclude_none=True)  # what is stored with a job

        assert sent == {"fit": "crop"}
        assert TamingParameters.from_dict({k: v for k, v in sent.items() if k in SHARED}) == TamingParameters()


@pytest.mark.parametrize("name", SHARED)
def test_the_default_that_the_documentation_names_is_the_methods(name: str) -> None:
    fast, paper = (TamingParameters(engine=engine).to_dict()[name] for engine in ("fast", "paper"))
    if name == "engine":
        said = f"default {TamingParameters().engine}"
    else:
        said = f"default {fast:g}" if fast == paper else f"default {fast:g}, paper {paper:g}"

    assert SCHEMA[name]["description"].endswith(said)
