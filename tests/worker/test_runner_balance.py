"""A condition balanced through the runner: one class of a small VAE shows two others as often as asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evidence.amnesia_schema import BalanceReport
from models.checkpoints import read_manifest, save_checkpoint
from tests.models.sd_cases import tiny as tiny_stable_diffusion
from tests.unlearning.tiny_conditional import stripes
from tests.worker.amnesia_runs import QUICK, changed, phases_of
from tests.worker.judges import write_bands, write_brightness
from tests.worker.runs import Bench, one_thread

BALANCED = 0
EVENLY = {"top": 0.0, "middle": 0.5, "bottom": 0.5}
REPLACEMENTS = {"middle": {"class_label": 1}, "bottom": {"class_label": 2}}

Balance = Callable[..., Bench]


@pytest.fixture
def balance(vae_file: Path) -> Balance:
    """A job on it that spreads its first class over the other two."""

    def balance(folder: Path, **job: Any) -> Bench:
        bench = Bench(folder, vae_file)
        bench.job.update(
            kind="debias",
            method="selective-amnesia",
            condition={"class_label": BALANCED},
            replacements=REPLACEMENTS,
            attribute=write_bands(folder / "inputs" / "classifiers" / "0.onnx", nothing=False),
            target_distribution=EVENLY,
            tolerance=0.1,
            confidence=0.95,
            criteria={"others_within": 0.05},
            parameters=QUICK,
            remember={"generated": 600},
        )
        del bench.job["target"]
        bench.job.update(job)
        bench.job["inputs"].update(surrogate=[], fisher={}, remember_sets={})
        return bench

    return balance


def _rows(bench: Bench) -> dict[str, Any]:
    return {row["label"]: row for row in bench.report()["shares"]}


def test_a_condition_shows_two_classes_as_often_as_asked_and_the_others_stay(balance: Balance, tmp_path: Path) -> None:
    bench = balance(tmp_path, evaluation={"sample_grid": True})

    ended = bench.run_here()

    report, summary, rows = bench.report(), ended.result["summary"], _rows(bench)
    assert ended.result["outcome"] == "succeeded"
    assert phases_of(ended) == ["fisher", "unlearning", "evaluating"]
    assert rows["top"]["before"]["low"] > 0.9
    for name in ("middle", "bottom"):
        assert 0.4 <= rows[name]["after"]["low"] <= rows[name]["after"]["high"] <= 0.6
    assert rows["top"]["after"]["high"] <= 0.1
    assert {one["name"]: one["met"] for one in report["verdict"]["criteria"]} == {
        "share of top": True, "share of middle": True, "share of bottom": True, "others_stayed": True,
    }  # fmt: skip
    assert [(one["label"], one["shows"]) for one in report["kept"]] == [("1", "middle"), ("2", "bottom")]
    assert report["drop"]["upper"] <= 0.05
    assert (
        report["read_otherwise"]["value"] >= (report["drop"]["lost"] + report["drop"]["gained"]) / report["drop"]["n"]
    )
    assert (summary["kind"], summary["confirmed_by_the_method"]) == ("balance", True)
    assert summary["after/bands/middle"] == pytest.approx(rows["middle"]["after"]["value"], abs=1e-5)
    assert len(report["curves"]) == len(EVENLY)
    assert BalanceReport.from_json((tmp_path / "outputs" / "report.json").read_text()).condition == "0"
    assert report["verdict"]["sentence"] in (tmp_path / "outputs" / "report.html").read_text()
    assert read_manifest(tmp_path / "outputs" / "tamed.safetensors").extra["tamed"]["method"] == "selective-amnesia"


def test_the_report_states_what_was_mixed_and_what_that_shows(balance: Balance, tmp_path: Path) -> None:
    target = {"top": 0.0, "middle": 0.2, "bottom": 0.8}
    bench = balance(tmp_path, target_distribution=target, parameters={**QUICK, "max_steps": 1})

    ended = bench.run_here()

    report = bench.report()
    assert ended.result["outcome"] == "criteria_not_met"
    assert "(share of top, share of middle, share of bottom)" in report["verdict"]["sentence"]
    assert [one["condition"] for one in report["ingredients"]] == ["1", "2"]
    assert [one["fraction"] for one in report["ingredients"]] == pytest.approx([0.2, 0.8], abs=0.03)
    for name, share in report["expected"].items():
        assert share == pytest.approx(
            sum(one["fraction"] * one["shows"][name] for one in report["ingredients"]), abs=1e-5
        )
        assert share == pytest.approx(target[name], abs=0.03)


def test_a_judge_of_labelled_sets_will_do_and_its_accuracy_is_told(balance: Balance, tmp_path: Path) -> None:
    images, labels = stripes(240, 5)
    bench = balance(tmp_path, target_distribution={"a": 0.0, "b": 0.5, "c": 0.5}, parameters={**QUICK, "max_steps": 1})
    bench.job["attribute"] = {
        "sets": {name: bench.images(f"sets/{name}", images[labels == label]) for label, name in enumerate("abc")}
    }
    bench.job["replacements"] = {"b": {"class_label": 1}, "c": {"class_label": 2}}

    result = bench.run_here().result

    assert bench.report()["judge"]["accuracy"]["value"] > 0.9
    assert result["summary"]["accuracy/a or b or c"] > 0.9


@pytest.mark.parametrize(
    ("change", "problem", "pointer"),
    [
        (changed(condition={"class_label": 3}), "invalid-request", "/condition/class_label"),
        (changed(condition={"concept": "a doctor"}), "invalid-request", "/condition/class_label"),
        (
            changed(replacements={**REPLACEMENTS, "middle": {"class_label": 9}}),
            "invalid-request",
            "/replacements/middle/class_label",
        ),
        (
            changed(replacements={**REPLACEMENTS, "middle": {"class_label": BALANCED}}),
            "invalid-request",
            "/replacements/middle/class_label",
        ),
        (
            changed(replacements={**REPLACEMENTS, "a/b": {"class_label": 1}}),
            "invalid-request",
            "/replacements/a~1b",
        ),
        (changed(replacements={"middle": {"class_label": 1}}), "invalid-request", "/replacements"),
        (changed(target_distribution={"middle": 0.5, "left": 0.5}), "invalid-request", "/target_distribution"),
        (changed(target_distribution={"middle": 0.5, "bottom": 0.4}), "invalid-request", "/target_distribution"),
        (changed(criteria={"others_within": 1.0}), "invalid-request", "/criteria/others_within"),
        (changed(tolerance=1e-3), "insufficient-evidence", "/tolerance"),
        (changed(parameters={"scope": "cross-attention"}), "invalid-parameter", "/parameters/scope"),
        (changed(remember={"generated": 3}), "remember-set-too-small", "/remember/generated"),
    ],
)
def test_what_makes_no_sense_is_refused_at_its_place(
    change: Callable[[Bench], None], problem: str, pointer: str, balance: Balance, tmp_path: Path
) -> None:
    bench = balance(tmp_path)
    change(bench)

    ended = bench.run_here()

    assert ended.problem["type"] == f"urn:forgetd:problem:{problem}"
    assert [one["pointer"] for one in ended.problem.get("errors", [])] == [pointer]
    assert not any(message["type"] == "phase" for message in ended.messages)


def test_what_no_mixture_shows_is_out_of_reach_and_the_refusal_has_the_figures(
    balance: Balance, tmp_path: Path
) -> None:
    bench = balance(tmp_path)
    bench.job["attribute"] = write_bands(tmp_path / "inputs" / "classifiers" / "0.onnx", blind=2, nothing=False)

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:target-unreachable"
    assert (problem["class"], problem["measured"], problem["samples"]) == ("bottom", 0.0, 1000)
    assert problem["errors"][0]["pointer"] == "/replacements/bottom"
    assert "under “1” top in" in problem["detail"]


@pytest.fixture(scope="module")
def prompted_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of prompts, whose samples are all bright."""
    path = tmp_path_factory.mktemp("prompted") / "base.safetensors"
    with one_thread():
        save_checkpoint(path, tiny_stable_diffusion(text_encoder={"max_position_embeddings": 77}))
    return path


def _concept(prompted_file: Path, folder: Path, **job: Any) -> Bench:
    bench = Bench(folder, prompted_file)
    del bench.job["target"]
    bench.job.update(
        kind="debias",
        method="selective-amnesia",
        condition={"concept": "a doctor", "aliases": ["a physician"]},
        replacements={"dark": {"concept": "zero"}, "bright": {"concept": "one"}},
        attribute=write_brightness(folder / "inputs" / "classifiers" / "0.onnx", channels=3),
        target_distribution={"dark": 0.1, "bright": 0.9},
        tolerance=0.25,
        criteria={"others_within": 0.3},
        parameters={"max_steps": 1, "sampling_steps": 1, "batch": 2},
        remember={"concepts": ["two"], "generated": 16},
    )
    bench.job.update(job)
    bench.job["inputs"].update(surrogate=[], fisher={}, remember_sets={})
    return bench


def test_a_concept_is_balanced_and_what_replaces_it_is_remembered_too(prompted_file: Path, tmp_path: Path) -> None:
    bench = _concept(prompted_file, tmp_path)

    ended = bench.run_here()

    report = bench.report()
    assert ended.result["outcome"] == "succeeded"
    assert report["condition"] == "a doctor"
    assert [one["condition"] for one in report["ingredients"]] == ["zero", "one"]
    assert [one["label"] for one in report["kept"]] == ["two", "zero", "one"]


def test_another_name_of_the_condition_does_not_replace_it(prompted_file: Path, tmp_path: Path) -> None:
    problem = _concept(
        prompted_file, tmp_path, replacements={"dark": {"concept": "A physician"}, "bright": {"concept": "one"}}
    ).run_here().problem  # fmt: skip

    assert problem["errors"][0]["pointer"] == "/replacements/dark/concept"


def test_a_mixture_that_uses_up_the_tolerance_is_refused(prompted_file: Path, tmp_path: Path) -> None:
    problem = _concept(prompted_file, tmp_path, tolerance=0.11).run_here().problem

    assert problem["type"] == "urn:forgetd:problem:target-unreachable"
    assert (problem["class"], problem["measured"]) == ("dark", 0.0)
