"""What a concept is asked for by: what judges ask is never what training saw."""

from __future__ import annotations

import unicodedata

import pytest

from unlearning.errors import InputError
from unlearning.prompts import GENERAL, HELD_OUT, TRAINED, phrasings, plain


@pytest.mark.parametrize("concept", ["zero", "a red car", "this is zero"])
@pytest.mark.parametrize(
    "aliases", [(), ("nought", "the digit 0"), ("a close view of zero",), ("A Close View of Zero",)]
)
def test_no_prompt_that_judges_is_one_that_trains(concept: str, aliases: tuple[str, ...]) -> None:
    asked = phrasings(concept, aliases)

    assert {plain(one) for one in asked.trained} & {plain(one) for one in asked.held_out} == set()
    assert asked.held_out


def test_every_name_is_in_every_phrasing_of_training_and_the_concept_itself_comes_first() -> None:
    asked = phrasings("zero", ("nought", "zero"))

    assert asked.trained[0] == "zero"
    assert len(asked.trained) == len(set(asked.trained)) == 2 * len(TRAINED)
    assert len(asked.held_out) == 2 * len(HELD_OUT)
    assert all(any(name in prompt for prompt in asked.held_out) for name in ("zero", "nought"))


def test_spaces_make_no_other_prompts() -> None:
    assert phrasings("  a  red car ") == phrasings("a red car")


@pytest.mark.parametrize("name", ["Zoé", "각", "Ǻ"])
def test_normal_forms_make_no_other_concepts_and_no_other_prompts(name: str) -> None:
    composed, decomposed = unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)

    assert composed != decomposed
    assert plain(composed) == plain(decomposed)
    assert phrasings(decomposed) == phrasings(composed) == phrasings(composed, (decomposed,))


@pytest.mark.parametrize("name", ["", "   ", "a {} car", "}"])
def test_a_name_that_would_break_a_phrasing_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        phrasings(name)
    with pytest.raises(InputError):
        phrasings("zero", (name,))


def test_general_concepts_are_told_apart_by_more_than_spelling() -> None:
    assert len({plain(name) for name in GENERAL}) == len(GENERAL) >= 100
