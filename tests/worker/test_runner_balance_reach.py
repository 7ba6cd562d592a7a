"""How much of the tolerance a mixture may use up: what would take a multitude of samples is refused early."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from evidence.balance_report import Ingredient, Recipe
from tests.worker.judges import write_bands
from tests.worker.runs import Bench
from worker.runner.amnesia_judge import CHEAP, DEAR, Effort
from worker.runner.balance import MORE, MOST_MISSED, STEP, _Looks, _portions
from worker.runner.samples import samples_around

Balance = Callable[..., Bench]


@pytest.fixture
def short_of_top(vae_file: Path) -> Balance:
    """A job of one step that asks for some of a class that no replacement shows."""

    def job(folder: Path, top: float, tolerance: float) -> Bench:
        bench = Bench(folder, vae_file)
        del bench.job["target"]
        bench.job.update(
            kind="debias",
            method="selective-amnesia",
            condition={"class_label": 0},
            replacements={name: {"class_label": label} for name, label in {"top": 1, "middle": 1, "bottom": 2}.items()},
            attribute=write_bands(folder / "inputs" / "classifiers" / "0.onnx", nothing=False),
            target_distribution={"top": top, "middle": 0.5 - top / 2, "bottom": 0.5 - top / 2},
            tolerance=tolerance,
            confidence=0.95,
            criteria={"others_within": 0.05},
            parameters={"max_steps": 1, "batch": 64},
            remember={"generated": 600},
        )
        bench.job["inputs"].update(surrogate=[], fisher={}, remember_sets={})
        return bench

    return job


def test_a_mixture_that_leaves_too_little_of_the_tolerance_is_refused_before_it_trains(
    short_of_top: Balance, tmp_path: Path
) -> None:
    ended = short_of_top(tmp_path, top=0.03, tolerance=0.05).run_here()

    problem = ended.problem
    assert problem["type"] == "urn:forgetd:problem:insufficient-evidence"
    assert [one["pointer"] for one in problem["errors"]] == ["/tolerance"]
    assert problem["needed"] > problem["given"] == CHEAP.plenty
    assert "“top” comes to" in problem["detail"]
    assert "3.0% is asked for" in problem["detail"]
    assert f"{problem['needed']:,} samples" in problem["detail"]
    assert not any(message["type"] == "phase" for message in ended.messages)


def test_the_tolerance_that_the_refusal_names_is_not_refused(short_of_top: Balance, tmp_path: Path) -> None:
    problem = short_of_top(tmp_path / "narrow", top=0.03, tolerance=0.05).run_here().problem
    named = float(problem["detail"].split("a tolerance of ")[1].split(" ")[0])

    ended = short_of_top(tmp_path / "wider", top=0.03, tolerance=named).run_here()

    assert ended.result["outcome"] == "criteria_not_met"  # after its one step


def test_few_samples_are_drawn_however_little_the_mixture_leaves(short_of_top: Balance, tmp_path: Path) -> None:
    ended = short_of_top(tmp_path, top=0.06, tolerance=0.1).run_here()

    assert ended.result["outcome"] == "criteria_not_met"


def test_what_is_out_of_reach_names_the_tolerance_that_is_within_it(short_of_top: Balance, tmp_path: Path) -> None:
    problem = short_of_top(tmp_path, top=0.06, tolerance=0.05).run_here().problem

    assert problem["type"] == "urn:forgetd:problem:target-unreachable"
    assert problem["errors"][0]["pointer"] == "/replacements/top"
    assert "a tolerance of 0." in problem["detail"]


def looks(missed: float, tolerance: float, effort: Effort, classes: int = 2) -> _Looks:
    """Of two replacements that together miss each half by so much."""
    target = {"a": 0.5, "b": 0.5, **{f"rest {number}": 0.0 for number in range(classes - 2)}}
    shows = {**target, "a": 0.5 - missed, "b": 0.5 + missed}
    return _Looks(Recipe(target, tolerance, [Ingredient("both", 1.0, shows)]), effort, confidence=0.95)


def refused(of: _Looks, tolerance: float) -> bool:
    """Whether a job would be, at this tolerance."""
    if of.missed > MOST_MISSED * tolerance:
        return True
    return of.dear(tolerance, samples_at(of, tolerance))


def samples_at(of: _Looks, tolerance: float) -> int:
    """A look takes."""
    return samples_around(of.recipe.target.values(), tolerance, of.confidence, slack=of.slack(tolerance))


@pytest.mark.parametrize("effort", [CHEAP, DEAR], ids=["cheap", "dear"])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("tolerance", [0.03, 0.1])
def test_a_mixture_that_misses_nothing_is_never_refused(effort: Effort, classes: int, tolerance: float) -> None:
    exact = looks(0.0, tolerance, effort, classes)

    assert not refused(exact, tolerance)
    assert exact.slack(tolerance) == effort.slack


@pytest.mark.parametrize("effort", [CHEAP, DEAR], ids=["cheap", "dear"])
@pytest.mark.parametrize("missed", [0.012, 0.0225, 0.06, 0.15])
def test_the_tolerance_that_would_do_is_the_least_in_steps(effort: Effort, missed: float) -> None:
    of = looks(missed, 0.015, effort, classes=10)

    enough = of.enough()

    assert enough is not None
    tolerance, samples = enough
    assert samples == samples_at(of, tolerance)
    assert not refused(of, tolerance)
    assert refused(of, tolerance - STEP)


@pytest.mark.parametrize("missed", [0.0, 0.004, 0.012])
def test_what_a_mixture_misses_multiplies_the_samples_as_stated(missed: float) -> None:
    tolerance = 0.03

    more = samples_at(looks(missed, tolerance, CHEAP), tolerance) / samples_at(looks(0.0, tolerance, CHEAP), tolerance)

    assert more == pytest.approx(1 / (1 - missed / tolerance) ** 2, rel=0.03)


def test_what_no_tolerance_lets_pass_names_none() -> None:
    assert looks(0.45, 0.03, DEAR).enough() is None


@pytest.mark.parametrize(("first", "last"), [(50, 1704), (100, 100), (100, 50), (50, 200), (50, 201), (1, 1)])
def test_a_look_grows_from_few_samples_to_all(first: int, last: int) -> None:
    seen = _portions(first, last)

    assert (seen[0], seen[-1]) == (min(first, last), last)
    assert all(before < after <= MORE * before for before, after in pairwise(seen))


def test_a_look_at_what_is_far_from_the_target_stays_at_its_first_samples(
    short_of_top: Balance, tmp_path: Path
) -> None:
    bench = short_of_top(tmp_path, top=0.06, tolerance=0.1)
    bench.job["parameters"] = {"max_steps": 2, "batch": 64, "check_every": 1}

    ended = bench.run_here()

    looks = [one["metrics"]["n"] for one in ended.messages if one["type"] == "progress" and "n" in one["metrics"]]
    assert looks == [CHEAP.first_look] * 2
    assert ended.result["summary"]["samples"] > CHEAP.first_look
