"""Steering through the runner: attributes and distributions, by classifiers from the store and by trained judges."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.worker.judges import write_brightness
from tests.worker.runs import Bench, Ended, blobs, one_thread, tiny

QUICK = {"max_steps": 60, "pool": 1024, "probe": 200}
WIDE = 0.1  # a tolerance that a thousand samples settle
TARGET = {"dark": 0.8, "bright": 0.2}


def _steering(folder: Path, **job: Any) -> Bench:
    """A job on a Glow whose samples are about as often dark as bright."""
    bench = Bench(folder, tiny("glow"))
    bench.job.update(method="steering", parameters=QUICK, **job)
    return bench


def _debias(folder: Path, judge: dict[str, Any] | None = None, **job: Any) -> Bench:
    wanted = {"target_distribution": TARGET, "tolerance": WIDE, "confidence": 0.95, **job}
    bench = _steering(folder, kind="debias", **wanted)
    bench.job["attribute"] = judge or write_brightness(folder / "inputs" / "classifiers" / "0.onnx")
    del bench.job["target"]
    return bench


def _attributes(folder: Path, *asked: dict[str, Any]) -> Bench:
    bench = _steering(folder)
    judge = write_brightness(folder / "inputs" / "classifiers" / "0.onnx")
    bench.job["target"] = {"attributes": [{"judge": judge, "at_most": None, "at_least": None, **one} for one in asked]}
    return bench


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Ended]:
    """A run that several tests look at."""
    bench = _debias(tmp_path_factory.mktemp("spread"))
    return bench, bench.run_here()


def test_samples_are_spread_as_asked_and_the_report_shows_their_intervals_inside(spread: tuple[Bench, Ended]) -> None:
    bench, ended = spread

    rows = {row["label"]: row for row in bench.report()["fractions"]}
    assert ended.result["outcome"] == "succeeded"
    assert [row["told"] for row in rows.values()] == ["inside", "inside"]
    assert rows["dark"]["low"] <= rows["dark"]["after"]["low"] <= rows["dark"]["after"]["high"] <= rows["dark"]["high"]
    assert not rows["dark"]["low"] <= rows["dark"]["before"]["value"] <= rows["dark"]["high"]
    assert ended.result["summary"]["after/brightness/dark"] == pytest.approx(rows["dark"]["after"]["value"], abs=1e-5)
    assert {"tamed.safetensors", "report.json", "report.html"} == {one["name"] for one in ended.result["artifacts"]}


def test_progress_tells_the_fraction_of_each_class(spread: tuple[Bench, Ended]) -> None:
    _, ended = spread

    told = [message for message in ended.messages if message["type"] == "progress"]
    shown = [one["metrics"] for one in told if one["phase"] == "unlearning" and "brightness.dark" in one["metrics"]]
    assert [message["phase"] for message in ended.messages if message["type"] == "phase"] == [
        "unlearning",
        "evaluating",
    ]
    assert shown
    assert all(one["brightness.dark"] + one["brightness.bright"] == pytest.approx(1) for one in shown)


def test_bounds_of_several_judges_are_kept_at_once(tmp_path: Path) -> None:
    bench = _attributes(tmp_path, {"class": "bright", "at_most": 0.3}, {"class": "bright", "at_most": 0.2})
    bench.job["parameters"] = {**QUICK, "max_steps": 300}
    judge = bench.job["target"]["attributes"][0]["judge"]
    bench.job["target"]["attributes"][1]["judge"] = {**judge, "threshold": 0.52}

    ended = bench.run_here()

    bright = [row for row in bench.report()["fractions"] if row["label"] == "bright"]
    assert ended.result["outcome"] == "succeeded"
    assert [row["judge"] for row in bright] == ["brightness", "brightness (2)"]
    assert [row["after"]["high"] <= row["high"] < row["before"]["value"] for row in bright] == [True, True]


def test_a_run_that_stops_too_soon_misses_its_criteria_and_says_by_how_much(tmp_path: Path) -> None:
    bench = _debias(tmp_path, target_distribution={"dark": 0.1, "bright": 0.9})
    bench.job["parameters"] = {**QUICK, "max_steps": 1}

    result = bench.run_here().result

    assert result["outcome"] == "criteria_not_met"
    assert result["summary"]["verdict"].startswith("The criteria were not met: ")
    assert 0 < result["summary"]["after/brightness/bright"] < 0.8
    assert bench.report()["verdict"]["outcome"] == "criteria_not_met"


def test_a_target_that_the_base_cannot_reach_is_refused_before_the_first_step(tmp_path: Path) -> None:
    bench = _attributes(tmp_path, {"class": "bright", "at_least": 0.5})
    bench.job["target"]["attributes"][0]["judge"]["threshold"] = 0.99

    ended = bench.run_here()

    assert not [message for message in ended.messages if message["type"] == "phase"]
    assert ended.problem["type"] == "urn:forgetd:problem:target-unreachable"
    assert (ended.problem["class"], ended.problem["measured"]) == ("bright", 0.0)
    assert ended.problem["samples"] == QUICK["pool"]
    assert ended.problem["errors"][0]["pointer"] == "/target/attributes/0"


def test_what_one_of_two_judges_of_the_same_classes_cannot_get_is_pointed_at(tmp_path: Path) -> None:
    bench = _attributes(tmp_path, {"class": "bright", "at_most": 0.9}, {"class": "bright", "at_most": 0.5})
    judge = bench.job["target"]["attributes"][0]["judge"]
    bench.job["target"]["attributes"][1]["judge"] = {**judge, "threshold": 0.001}  # all samples are bright

    ended = bench.run_here()

    assert not [message for message in ended.messages if message["type"] == "phase"]
    assert ended.problem["type"] == "urn:forgetd:problem:target-unreachable"
    assert (ended.problem["class"], ended.problem["measured"], ended.problem["samples"]) == ("dark", 0.0, QUICK["pool"])
    assert 0 < ended.problem["upper"] < 0.01
    assert [one["pointer"] for one in ended.problem["errors"]] == ["/target/attributes/1"]


def test_a_classifier_of_another_input_shape_is_refused(tmp_path: Path) -> None:
    judge = write_brightness(tmp_path / "inputs" / "classifiers" / "0.onnx", side=12)
    bench = _debias(tmp_path, judge)

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:classifier-refused"
    assert "12" in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/attribute/classifier"


@pytest.mark.parametrize("bound", [{"at_most": 0.0}, {"at_least": 1.0}])
def test_a_bound_that_no_number_of_samples_can_show_is_refused(bound: dict[str, float], tmp_path: Path) -> None:
    problem = _attributes(tmp_path, {"class": "bright", **bound}).run_here().problem

    assert problem["type"] == "urn:forgetd:problem:invalid-request"
    assert problem["errors"][0]["pointer"] == "/target/attributes/0"


def _labelled(bench: Bench, count: int) -> dict[str, Any]:
    """Dark and bright pictures as labelled sets."""
    images = blobs(4 * count, seed=9)
    order = images.float().mean((1, 2, 3)).argsort()
    sets = {"dark": images[order[:count]], "bright": images[order[-count:]]}
    return {"sets": {name: bench.images(f"sets/{name}", some) for name, some in sets.items()}}


def test_a_judge_is_trained_from_labelled_sets_and_its_accuracy_is_reported(tmp_path: Path) -> None:
    bench = _debias(tmp_path)
    bench.job["attribute"] = _labelled(bench, 40)

    ended = bench.run_here()

    (judge,) = bench.report()["judges"]
    assert ended.result["outcome"] == "succeeded"
    assert judge["accuracy"]["value"] > 0.9
    assert ended.result["summary"]["accuracy/dark or bright"] == pytest.approx(judge["accuracy"]["value"], abs=1e-5)


def test_labelled_sets_too_small_to_train_a_judge_are_refused_with_the_number_that_would_do(tmp_path: Path) -> None:
    bench = _debias(tmp_path)
    bench.job["attribute"] = _labelled(bench, 4)

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:insufficient-evidence"
    assert (problem["given"], problem["needed"]) == (4, 10)
    assert problem["errors"][0]["pointer"] == "/attribute/sets"


def test_one_image_to_remember_is_refused(tmp_path: Path) -> None:
    bench = _debias(tmp_path)
    bench.job["inputs"]["remember"] = bench.images("remember", blobs(1))

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:remember-set-too-small"
    assert "There is 1 image to remember" in problem["detail"]


def test_samples_are_shown_only_where_they_were_asked_for(spread: tuple[Bench, Ended], tmp_path: Path) -> None:
    asked = _debias(tmp_path)
    asked.job.update(evaluation={"sample_grid": True}, parameters={**QUICK, "max_steps": 1})

    results = [ended.result for ended in (asked.run_here(), spread[1])]

    shown = ["samples.png" in {one["name"] for one in result["artifacts"]} for result in results]
    assert shown == [True, False]


def _far(folder: Path) -> Bench:
    """A target so far away that the run ends when its steps are used up."""
    bench = _debias(folder, target_distribution={"dark": 0.02, "bright": 0.98}, tolerance=0.015)
    bench.job["parameters"] = {**QUICK, "max_steps": 30, "samples": 200}
    return bench


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A run that nobody stopped."""
    bench = _far(tmp_path_factory.mktemp("undisturbed"))
    with one_thread():
        bench.run_here()
    return bench


def test_a_run_that_is_stopped_resumes_to_the_same_bits(undisturbed: Bench, tmp_path: Path) -> None:
    stopped = _far(tmp_path)

    def stop_at_a_state(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        if message["type"] == "state" and message["step"] == 12:
            os.kill(process.pid, signal.SIGTERM)  # killed at every boundary: test_resume_laws

    ended = stopped.run(during=stop_at_a_state)
    stopped.resume_from(max((tmp_path / "state").glob("*.safetensors")))
    with one_thread():
        stopped.run_here()

    report = stopped.report()
    assert ended.status == 75
    assert report["provenance"]["resumed_from_step"] >= 12
    assert report["provenance"]["steps"] == 30
    assert stopped.digest() == undisturbed.digest()
    assert report["fractions"] == undisturbed.report()["fractions"]
