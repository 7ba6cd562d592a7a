"""A base class of models says what a new one has to define: without all of it, none can be made."""

from __future__ import annotations

from typing import Any

import pytest

from models.autoregressive import _Autoregressive
from models.guided_diffusion import GuidedDiffusion

ARGUMENTS: dict[type, tuple[Any, ...]] = {GuidedDiffusion: (), _Autoregressive: ((4,), 8)}
"""What each base is made with."""
WANTED = [(base, name) for base in ARGUMENTS for name in sorted(vars(base)["__abstractmethods__"])]


def derived(base: type, *names: str) -> Any:
    """A class with these defined."""
    return type("Derived", (base,), dict.fromkeys(names, lambda *_: None))


@pytest.mark.parametrize(("base", "missing"), WANTED)
def test_a_model_that_lacks_a_part_cannot_be_made_and_is_told_which(base: type, missing: str) -> None:
    others = [name for one, name in WANTED if one is base and name != missing]

    with pytest.raises(TypeError, match=missing):
        derived(base, *others)(*ARGUMENTS[base])


@pytest.mark.parametrize("base", ARGUMENTS)
def test_a_model_that_has_every_part_can(base: type) -> None:
    model = derived(base, *(name for one, name in WANTED if one is base))(*ARGUMENTS[base])

    assert isinstance(model, base)


def test_the_parts_are_what_no_two_architectures_share() -> None:
    assert {name for base, name in WANTED if base is GuidedDiffusion} == {"x_shape", "_told", "_joined"}
    assert {name for base, name in WANTED if base is _Autoregressive} == {"forward", "inverse"}
