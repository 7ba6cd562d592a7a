"""Selective Amnesia through the runner: a class of a small VAE forgotten, replaced, refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from evidence.amnesia_schema import AmnesiaReport
from models.checkpoints import load_conditional, read_manifest, save_checkpoint
from models.vae import ConditionalVAE
from tests.unlearning.tiny_conditional import stripes, trained_vae
from tests.worker.amnesia_runs import QUICK, assets_of, changed, given, phases_of
from tests.worker.judges import write_bands
from tests.worker.runs import Bench, Ended, one_thread, tiny

FORGOTTEN, OTHER = 0, 1
CRITERIA = {"forgotten_at_most": 0.1, "others_within": 0.05}


Amnesia = Callable[..., Bench]


@pytest.fixture(scope="module")
def amnesia(vae_file: Path) -> Amnesia:
    """A job on it, judged by a file from the store unless a test changes that."""

    def amnesia(folder: Path, base: Any = None, **job: Any) -> Bench:
        bench = Bench(folder, base or vae_file)
        bench.job.update(
            method="selective-amnesia",
            target={"class_label": FORGOTTEN},
            replace_with={"noise": True},
            judge=write_bands(folder / "inputs" / "classifiers" / "0.onnx"),
            criteria=CRITERIA,
            parameters=QUICK,
            remember={"generated": 600},
        )
        bench.job.update(job)
        bench.job["inputs"].update(surrogate=[], fisher={})
        return bench

    return amnesia


def _criteria(bench: Bench) -> dict[str, bool]:
    return {one["name"]: one["met"] for one in bench.report()["verdict"]["criteria"]}


@pytest.fixture(scope="module")
def forgotten(amnesia: Amnesia, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Ended]:
    """A run that several tests look at: noise took the place of a class."""
    bench = amnesia(tmp_path_factory.mktemp("forgotten"), evaluation={"sample_grid": True})
    return bench, bench.run_here()


def test_a_class_is_forgotten_and_the_report_shows_it_with_intervals(forgotten: tuple[Bench, Ended]) -> None:
    bench, ended = forgotten

    report, summary = bench.report(), ended.result["summary"]
    rows = {row["label"]: row for row in report["shares"]}
    assert ended.result["outcome"] == "succeeded"
    assert phases_of(ended) == ["fisher", "unlearning", "evaluating"]
    assert rows["top"]["before"]["low"] > 0.9
    assert rows["top"]["after"]["high"] <= CRITERIA["forgotten_at_most"]
    assert report["before"]["probability"]["low"] > 0.9 > 0.1 > report["after"]["probability"]["high"]
    assert _criteria(bench) == {"forgotten": True, "others_stayed": True}
    assert report["drop"]["upper"] <= CRITERIA["others_within"]
    assert summary["forgotten_after"] == pytest.approx(rows["top"]["after"]["value"], abs=1e-5)
    assert {one["name"] for one in ended.result["artifacts"]} == {
        "tamed.safetensors", "report.json", "report.html", "samples.png",
    }  # fmt: skip
    page = (bench.folder / "outputs" / "report.html").read_text()
    assert report["verdict"]["sentence"] in page


def test_the_tamed_checkpoint_loads_and_names_its_base(forgotten: tuple[Bench, Ended], vae_file: Path) -> None:
    path = forgotten[0].folder / "outputs" / "tamed.safetensors"

    tamed = read_manifest(path).extra["tamed"]

    assert isinstance(load_conditional(path), ConditionalVAE)
    assert tamed["method"] == "selective-amnesia"
    assert tamed["base_tensor_digest"] == read_manifest(vae_file).tensor_digest


def test_the_report_fits_its_schema(forgotten: tuple[Bench, Ended]) -> None:
    text = json.dumps(forgotten[0].report())

    assert AmnesiaReport.from_json(text).forgotten == "top"


def test_a_class_becomes_another(amnesia: Amnesia, tmp_path: Path) -> None:
    bench = amnesia(tmp_path, replace_with={"class_label": OTHER}, criteria={**CRITERIA, "replaced_at_least": 0.9})

    ended = bench.run_here()

    rows = {row["label"]: row for row in bench.report()["shares"]}
    assert ended.result["outcome"] == "succeeded"
    assert rows["middle"]["after"]["low"] >= 0.9
    assert ended.result["summary"]["replaced_after"] == pytest.approx(rows["middle"]["after"]["value"], abs=1e-5)
    assert [curve["label"] for curve in bench.report()["curves"]] == ["top", "middle"]


def test_a_class_becomes_the_images_that_were_sent(amnesia: Amnesia, tmp_path: Path) -> None:
    images, labels = stripes(120, 5)
    bench = amnesia(tmp_path, replace_with={"images": True})
    bench.job["inputs"]["surrogate"] = bench.images("surrogate", images[labels == 2])

    result = bench.run_here().result

    rows = {row["label"]: row for row in bench.report()["shares"]}
    assert result["outcome"] == "succeeded"
    assert rows["bottom"]["after"]["value"] > 0.9
    assert bench.report()["replacement"] == "images of the caller's"


def test_a_judge_trained_on_the_bases_samples_says_so(amnesia: Amnesia, tmp_path: Path) -> None:
    bench = amnesia(tmp_path, judge=None, replace_with={"class_label": OTHER})

    result = bench.run_here().result

    judge = bench.report()["judge"]
    assert result["outcome"] == "succeeded"
    assert judge["independent"] is False
    assert judge["accuracy"]["low"] > 0.9
    assert judge["classes"] == ["0", "1", "2"]
    assert "not independent" in " ".join(bench.report()["notes"])


def test_where_noise_replaces_a_class_nothing_is_recognised_any_more(amnesia: Amnesia, tmp_path: Path) -> None:
    bench = amnesia(tmp_path, judge=None)

    result = bench.run_here().result

    after = bench.report()["after"]
    assert result["outcome"] == "succeeded"
    assert after["unrecognisable"]["value"] > 0.8
    assert after["entropy"]["value"] > 0.8 * math.log(3)
    assert not any("faint" in note for note in bench.report()["notes"])


def test_of_noise_judged_by_a_file_the_report_says_what_that_may_miss(
    forgotten: tuple[Bench, Ended], amnesia: Amnesia, tmp_path: Path
) -> None:
    replaced = amnesia(tmp_path, replace_with={"class_label": OTHER}, parameters={**QUICK, "max_steps": 2})
    replaced.run_here()

    notes = [any("faint" in note for note in bench.report()["notes"]) for bench in (forgotten[0], replaced)]

    assert notes == [True, False]


def test_what_one_job_computed_spares_the_next(amnesia: Amnesia, tmp_path: Path) -> None:
    first = amnesia(tmp_path / "first")
    first.job["parameters"] = {**QUICK, "max_steps": 5}
    again = amnesia(tmp_path / "again", target={"class_label": 1}, seed=8)
    again.job["parameters"] = {**QUICK, "max_steps": 5}

    began = first.run_here()
    assets = assets_of(first, began)
    ended = given(again, assets).run_here()

    assert len(assets) == 3
    assert [one.result["summary"]["fisher_parts_computed"] for one in (began, ended)] == [3, 0]
    assert "fisher" not in phases_of(ended)
    assert assets_of(again, ended) == {}
    digests = [bench.report()["provenance"]["digests"] for bench in (first, again)]
    of_class = [digests[0][f"fisher/{label}"] for label in range(3)]
    assert len(set(of_class)) == 3
    assert of_class == [digests[1][f"fisher/{label}"] for label in range(3)]


def test_reused_information_gives_the_same_bits(amnesia: Amnesia, tmp_path: Path) -> None:
    benches = [amnesia(tmp_path / name, seed=4) for name in ("computed", "given")]
    for bench in benches:
        bench.job["parameters"] = {**QUICK, "max_steps": 20}

    with one_thread():
        given(benches[1], assets_of(benches[0], benches[0].run_here())).run_here()

    assert benches[0].digest() == benches[1].digest()


def test_information_of_another_model_or_class_is_computed_anew(
    amnesia: Amnesia, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_checkpoint(foreign, trained_vae(steps=400))
    other, first, bench = (amnesia(tmp_path / name) for name in ("other", "first", "bench"))
    shutil.copy(foreign, other.folder / "inputs" / "checkpoint.safetensors")
    for one in (other, first, bench):
        one.job["parameters"] = {**QUICK, "max_steps": 2}
    theirs, ours = assets_of(other, other.run_here()), assets_of(first, first.run_here())
    names = list(ours)
    swapped = {names[0]: next(iter(theirs.values())), names[1]: ours[names[2]], names[2]: tmp_path / "none"}
    (tmp_path / "none").write_bytes(b"no tensors")

    ended = given(bench, swapped).run_here()

    assert set(names).isdisjoint(theirs)
    assert set(assets_of(bench, ended)) == set(names)
    assert bench.digest() == first.digest()
    assert capfd.readouterr().err.count("is made anew") == 3


def test_information_that_holds_no_numbers_is_computed_anew(amnesia: Amnesia, tmp_path: Path) -> None:
    first, bench = amnesia(tmp_path / "first"), amnesia(tmp_path / "bench")
    for one in (first, bench):
        one.job["parameters"] = {**QUICK, "max_steps": 2}
    ours = assets_of(first, first.run_here())
    name, path = next(iter(ours.items()))
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 no dict
    save_file({key: torch.full_like(value, torch.nan) for key, value in tensors.items()}, tmp_path / "nan", metadata)

    ended = given(bench, {**ours, name: tmp_path / "nan"}).run_here()

    assert set(assets_of(bench, ended)) == {name}
    assert bench.digest() == first.digest()


def test_without_steps_enough_the_criteria_are_missed_and_the_sentence_says_by_how_much(
    amnesia: Amnesia, tmp_path: Path
) -> None:
    bench = amnesia(tmp_path)
    bench.job["parameters"] = {**QUICK, "max_steps": 3}

    result = bench.run_here().result

    assert result["outcome"] == "criteria_not_met"
    assert result["summary"]["verdict"].startswith("The criteria were not met (forgotten)")
    assert result["summary"]["forgotten_after"] > 0.9
    assert _criteria(bench)["forgotten"] is False


def test_without_replay_and_penalty_it_is_the_others_that_are_missed(amnesia: Amnesia, tmp_path: Path) -> None:
    bench = amnesia(tmp_path, replace_with={"class_label": OTHER})
    bench.job["parameters"] = {
        "max_steps": 300, "check_every": 300, "batch": 64, "learning_rate": 2e-2, "clip": 1000.0,
        "without": ["replay", "penalty"],
    }  # fmt: skip

    result = bench.run_here().result

    assert result["outcome"] == "criteria_not_met"
    assert _criteria(bench)["others_stayed"] is False
    assert result["summary"]["others_drop"] > CRITERIA["others_within"]


@pytest.mark.parametrize(
    ("change", "problem", "pointer"),
    [
        (changed(target={"class_label": 3}), "invalid-request", "/target/class_label"),
        (changed(target={"class_label": -1}), "invalid-request", "/target/class_label"),
        (changed(replace_with={"class_label": FORGOTTEN}), "invalid-request", "/replace_with/class_label"),
        (changed(replace_with={"class_label": 7}), "invalid-request", "/replace_with/class_label"),
        (changed(parameters={"scope": "cross-attention"}), "invalid-parameter", "/parameters/scope"),
        (changed(parameters={"strength": -1}), "invalid-parameter", "/parameters/strength"),
        (changed(criteria={"replaced_at_least": 0.9}), "invalid-request", "/criteria/replaced_at_least"),
        (changed(criteria={"forgotten_at_most": 0.0}), "invalid-request", "/criteria"),
        (changed(criteria={"forgotten_at_most": 1e-7}), "insufficient-evidence", None),
        (changed(remember={"generated": 3}), "remember-set-too-small", "/remember/generated"),
    ],
)
def test_what_makes_no_sense_is_refused_at_its_place(
    change: Callable[[Bench], None], problem: str, pointer: str | None, amnesia: Amnesia, tmp_path: Path
) -> None:
    bench = amnesia(tmp_path)
    change(bench)

    ended = bench.run_here()

    assert ended.problem["type"] == f"urn:forgetd:problem:{problem}"
    assert [one["pointer"] for one in ended.problem.get("errors", [])] == ([] if pointer is None else [pointer])
    assert phases_of(ended) == []


def test_a_flow_is_refused(amnesia: Amnesia, tmp_path: Path) -> None:
    problem = amnesia(tmp_path, tiny("glow")).run_here().problem

    assert problem["type"] == "urn:forgetd:problem:checkpoint-refused"
    assert "'glow'" in problem["detail"]
    assert "vae" in problem["detail"]


def test_a_judge_of_fewer_classes_than_the_model_is_refused(amnesia: Amnesia, tmp_path: Path) -> None:
    images, labels = stripes(120, 5)
    bench = amnesia(tmp_path)
    sets = {name: bench.images(f"sets/{name}", images[labels == label]) for label, name in enumerate(("a", "b"))}
    bench.job["judge"] = {"sets": sets}

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:invalid-request"
    assert problem["errors"][0]["pointer"] == "/judge"


def test_a_judge_that_does_not_see_what_is_to_be_forgotten_is_refused_with_the_figures(
    amnesia: Amnesia, tmp_path: Path
) -> None:
    images, labels = stripes(240, 5)
    bench = amnesia(tmp_path)
    order = ("bottom", 2), ("middle", 1), ("top", 0)  # not that of the labels
    bench.job["judge"] = {
        "sets": {name: bench.images(f"sets/{name}", images[labels == label]) for name, label in order}
    }

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:insufficient-evidence"
    assert (problem["given"], problem["measured"]) == (400, 0.0)
    assert "“bottom”" in problem["detail"]


def test_a_replacement_that_the_judge_hardly_sees_is_out_of_reach(amnesia: Amnesia, tmp_path: Path) -> None:
    bench = amnesia(tmp_path, replace_with={"class_label": OTHER}, criteria={**CRITERIA, "replaced_at_least": 0.9})
    bench.job["judge"] = write_bands(tmp_path / "inputs" / "classifiers" / "0.onnx", blind=OTHER)

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:target-unreachable"
    assert (problem["class"], problem["measured"], problem["samples"]) == ("middle", 0.0, 400)
    assert problem["errors"][0]["pointer"] == "/criteria/replaced_at_least"


def test_a_model_whose_loss_is_no_number_is_refused(amnesia: Amnesia, tmp_path: Path) -> None:
    model = trained_vae(steps=1)
    with torch.no_grad():
        cast(torch.nn.Linear, model.encoder[0]).weight.fill_(1e38)

    problem = amnesia(tmp_path, model).run_here().problem

    assert problem["type"] == "urn:forgetd:problem:checkpoint-refused"
    assert "not finite" in problem["detail"] or "NaN" in problem["detail"]


def test_the_papers_mode_uses_the_information_of_all_classes(amnesia: Amnesia, tmp_path: Path) -> None:
    bench = amnesia(tmp_path)
    bench.job["parameters"] = {"mode": "paper", "max_steps": 3, "scope": "decoder"}

    bench.run_here()

    parameters = {one["name"]: one["value"] for one in bench.report()["provenance"]["parameters"]}
    assert (parameters["mode"], parameters["strength"], parameters["scope"]) == ("paper", 100.0, "decoder")
    files = ("inputs/checkpoint.safetensors", "outputs/tamed.safetensors")
    base, tamed = (load_conditional(tmp_path / name) for name in files)
    before, after = (cast(ConditionalVAE, one).state_dict() for one in (base, tamed))
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"decoder"}
