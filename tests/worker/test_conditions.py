"""What a job's concepts become: rows of tokens that no two concepts share, and refusals at the name that is wrong."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from models.stable_diffusion import StableDiffusion
from tests.models.sd_cases import tiny
from tests.worker.prompt_jobs import untrained_pipeline
from tests.worker.runs import Bench
from worker.runner.amnesia_judge import CHEAP, DEAR, LEARNT_AT_LEAST, Effort
from worker.runner.conditions import Concepts, concepts_of
from worker.runner.problems import UserError

LONG = "0123456789" * 7
"""A name that leaves its phrasings no room: the tiny tokenizer knows few words, and reads the rest by the byte."""


@cache
def model() -> StableDiffusion:
    """Reads every phrasing of a short name; not to be changed."""
    return tiny(text_encoder={"max_position_embeddings": 77})


def of(**job: Any) -> Concepts:
    """The concepts of a job to forget "zero", but for what is said."""
    return concepts_of({"target": {"concept": "zero"}, "remember": {"concepts": ["one"]}} | job, model())


@pytest.mark.parametrize(
    ("job", "pointer"),
    [
        ({"target": {"concept": LONG}}, "/target/concept"),
        ({"target": {"concept": "zero", "aliases": ["nought", LONG]}}, "/target/aliases/1"),
        ({"target": {"concept": LONG, "aliases": [LONG]}}, "/target/concept"),
        ({"target": {"concept": "zero", "aliases": ["{}"]}}, "/target/aliases/0"),
        ({"remember": {"concepts": ["one", LONG]}}, "/remember/concepts/1"),
        ({"remember": {"sets": {f"a/b~{LONG}": []}}}, f"/remember/sets/a~1b~0{LONG}"),
        ({"replace_with": {"concept": LONG}}, "/replace_with/concept"),
        ({"replacements": {"a/b~": {"concept": LONG}}}, "/replacements/a~1b~0/concept"),
    ],
)
def test_a_name_that_cannot_be_read_is_refused_at_its_place(job: dict[str, Any], pointer: str) -> None:
    with pytest.raises(UserError) as refused:
        of(**job)

    assert [one["pointer"] for one in refused.value.problem["errors"]] == [pointer]


def test_a_refusal_counts_the_tokens() -> None:
    with pytest.raises(UserError) as refused:
        of(target={"concept": "zero " * 80})

    assert "80 tokens and the model reads 75" in refused.value.problem["detail"]


def test_a_job_about_a_name_that_cannot_be_read_ends_with_that_refusal(tmp_path: Path) -> None:
    bench = Bench(tmp_path, untrained_pipeline(tmp_path / "pipeline.safetensors"))
    bench.job.update(
        method="selective-amnesia",
        target={"concept": "zero " * 400},
        replace_with={"concept": "one"},
        remember={"concepts": ["one"], "generated": 64},
        judge=None,
    )
    bench.job["inputs"].update(surrogate=[], fisher={}, remember_sets={})

    problem = bench.run_here().problem

    assert problem["errors"][0]["pointer"] == "/target/concept"
    assert "tokens" in problem["detail"]


def test_an_alias_of_a_condition_that_cannot_be_read_is_refused_at_its_place() -> None:
    job = {"condition": {"concept": "zero", "aliases": [LONG]}, "remember": {"concepts": ["one"]}}

    with pytest.raises(UserError) as refused:
        concepts_of(job, model())

    assert refused.value.problem["errors"][0]["pointer"] == "/condition/aliases/0"


@pytest.mark.parametrize(
    ("job", "pointer"),
    [
        ({"target": {"concept": "dr. who"}, "remember": {"concepts": ["one", "dr . who"]}}, "/remember/concepts/1"),
        (
            {"target": {"concept": "zero", "aliases": ["dr. who"]}, "replace_with": {"concept": "dr . who"}},
            "/replace_with/concept",
        ),
        ({"remember": {"sets": {"o/ne": [], "o / ne": []}}}, "/remember/sets/o ~1 ne"),
    ],
)
def test_two_concepts_that_are_read_as_the_same_tokens_are_refused_at_the_second(
    job: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(UserError, match="same tokens") as refused:
        of(**job)

    assert refused.value.problem["type"] == "urn:forgetd:problem:invalid-request"
    assert [one["pointer"] for one in refused.value.problem["errors"]] == [pointer]


def test_names_of_one_concept_may_be_read_alike() -> None:
    found = of(target={"concept": "dr. who", "aliases": ["dr . who"]})

    assert found.names == ("dr. who", "one")


def test_one_concept_that_is_named_for_two_ends_is_one() -> None:
    found = of(replace_with={"concept": " ONE "}, remember={"concepts": ["one", "two"]})

    assert found.names == ("zero", "one", "two")


@pytest.mark.parametrize("effort", [CHEAP, DEAR])
def test_an_own_judge_learns_from_few_samples_of_many_labels_but_not_from_too_few(effort: Effort) -> None:
    each = {labels: effort.learnt_of_each(labels) for labels in range(1, 1001)}

    assert set(each.values()) <= set(range(LEARNT_AT_LEAST, effort.learnt + 1))
    assert list(each.values()) == sorted(each.values(), reverse=True)
    assert all(labels * n <= effort.learnt_at_most for labels, n in each.items() if n > LEARNT_AT_LEAST)
    assert each[1000] == LEARNT_AT_LEAST
