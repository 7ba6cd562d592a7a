"""Classes of a flow through the runner: taken away at the prior, weighted, and forgotten in the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from evidence.fractions import samples_for
from models.checkpoints import load_checkpoint
from models.class_prior import ClassPriorFlow
from models.families import FAMILIES
from models.protocol import CheckpointedFlow
from tests.worker.runs import N_BITS, SIDE, TINY, Bench, Ended, blobs, generator, one_thread, tiny
from unlearning.classes import CLASS_TAMING, remove_class
from worker.runner.base import load_base
from worker.runner.own_classes import OwnClasses

FORGOTTEN = 1


def _job(folder: Path, **job: Any) -> Bench:
    bench = Bench(folder, tiny("class-prior"))
    bench.job.update(job)
    return bench


def _at_the_prior(folder: Path, label: int = FORGOTTEN) -> Bench:
    return _job(folder, method="class-removal", target={"class_label": label, "where": "prior"})


def _in_the_weights(folder: Path, **parameters: Any) -> Bench:
    values = {"delta": 1.0, "max_steps": 4, **parameters}
    target = {"class_label": FORGOTTEN, "where": "weights"}
    return _job(folder, method="class-taming", target=target, parameters=values)


def _distribution(folder: Path, target: dict[str, float]) -> Bench:
    wanted = {"target_distribution": target, "tolerance": 0.05, "confidence": 0.95}
    bench = _job(folder, kind="debias", method="class-removal", attribute={"classes": True}, **wanted)
    del bench.job["target"]
    return bench


def _flows(bench: Bench) -> tuple[ClassPriorFlow, ClassPriorFlow]:
    """The base and the changed flow."""
    paths = bench.folder / "inputs" / "checkpoint.safetensors", bench.folder / "outputs" / "tamed.safetensors"
    base, changed = (cast(ClassPriorFlow, load_checkpoint(path)) for path in paths)
    return base, changed


@pytest.fixture(scope="module")
def removed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Ended]:
    """A class taken away at the prior."""
    bench = _at_the_prior(tmp_path_factory.mktemp("removed"))
    return bench, bench.run_here()


def test_a_class_taken_away_at_the_prior_is_reported_as_access_removal(removed: tuple[Bench, Ended]) -> None:
    bench, ended = removed

    report = bench.report()
    assert ended.result["outcome"] == "succeeded"
    assert ended.result["summary"]["kind"] == report["kind"] == "access removal"
    assert ended.result["summary"][f"after/class/{FORGOTTEN}"] == 0
    assert any("no unlearning" in note for note in report["notes"])


def test_what_a_few_images_bring_back_stands_in_the_report(removed: tuple[Bench, Ended]) -> None:
    bench, _ = removed

    relearn = bench.report()["relearn"]
    assert relearn["label"] == str(FORGOTTEN)
    assert (relearn["images"], relearn["before"]) == (5, 0)
    assert relearn["after"] > 0.5  # the weights still hold the class


def test_the_report_says_who_judges_what_that_misses_and_who_else_could(removed: tuple[Bench, Ended]) -> None:
    bench, _ = removed

    (note,) = [note for note in bench.report()["notes"] if note.startswith("The judge of samples")]
    assert "the base flow's own classification, held against its own misreadings" in note
    assert "ONNX classifier" in note
    assert "decides nothing" not in note  # this base shows the class more often than it is misread


def test_the_other_classes_are_drawn_to_the_bit_as_before(removed: tuple[Bench, Ended]) -> None:
    base, changed = _flows(removed[0])

    def drawn(flow: ClassPriorFlow, label: int) -> Tensor:
        return flow.sample(4, generator=generator(8), label=label)

    others = [label for label in range(base.n_classes) if label != FORGOTTEN]
    assert changed.classes() == others
    assert all(torch.equal(drawn(base, label), drawn(changed, label)) for label in others)


def test_a_distribution_over_the_flows_own_classes_is_exact(tmp_path: Path) -> None:
    bench = _distribution(tmp_path, {"0": 0.7, "1": 0.2, "2": 0.1})

    ended = bench.run_here()

    base, changed = _flows(bench)
    assert ended.result["outcome"] == "succeeded"
    assert changed.class_weights.tolist() == pytest.approx([0.7, 0.2, 0.1], abs=1e-6)
    assert torch.equal(base.prior_mean, changed.prior_mean)


def test_a_distribution_is_judged_by_the_classes_drawn_and_what_is_read_of_them_decides_nothing(tmp_path: Path) -> None:
    target = {"0": 0.7, "1": 0.2, "2": 0.1}
    bench = _distribution(tmp_path, target)

    ended = bench.run_here()

    report, tolerance = bench.report(), bench.job["tolerance"]
    rows = {(row["judge"], row["label"]): row for row in report["fractions"]}
    for label, share in target.items():
        drawn, read = rows["drawn class", label], rows["class", label]
        assert (drawn["low"], drawn["high"]) == (pytest.approx(share - tolerance), pytest.approx(share + tolerance))
        assert drawn["told"] == "inside"
        assert (read["told"], read["low"], read["high"]) == (None, None, None)
    criteria = {one["name"]: one["statement"] for one in report["verdict"]["criteria"]}
    assert list(criteria) == ["drawn class/0", "drawn class/1", "drawn class/2", "samples_sound"]
    assert "samples that were drawn of class 0 lies between 65 % and 75 %" in criteria["drawn class/0"]
    assert [one["name"] for one in report["judges"]] == ["class"]
    assert any("decides nothing" in note for note in report["notes"])
    assert ended.result["summary"]["samples"] >= samples_for(target.values(), 0.8 * tolerance, 0.95)


@pytest.mark.parametrize("target", [{"0": 0.5, "7": 0.5}, {"0": 0.5, "1": 0.4}])
def test_a_distribution_that_is_none_over_the_flows_classes_is_refused(
    target: dict[str, float], tmp_path: Path
) -> None:
    problem = _distribution(tmp_path, target).run_here().problem

    assert problem["type"] == "urn:forgetd:problem:invalid-request"
    assert problem["errors"][0]["pointer"] == "/target_distribution"


@pytest.mark.parametrize("label", [3, 100])
def test_a_class_that_the_flow_does_not_have_is_refused(label: int, tmp_path: Path) -> None:
    problem = _at_the_prior(tmp_path, label).run_here().problem

    assert problem["type"] == "urn:forgetd:problem:invalid-request"
    assert problem["errors"][0]["pointer"] == "/target/class_label"
    assert str(label) in problem["detail"]


def test_a_flow_without_classes_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny("tarflow"))
    bench.job.update(method="class-taming", target={"class_label": 0, "where": "weights"})

    problem = bench.run_here().problem

    assert "has no classes of its own" in problem["detail"]


@pytest.mark.parametrize("sent", [False, True])
def test_class_taming_that_falls_short_says_so_and_does_not_call_itself_unlearning(sent: bool, tmp_path: Path) -> None:
    bench = _in_the_weights(tmp_path)
    if sent:
        bench.job["inputs"]["forget"] = bench.images("forget", blobs(6, seed=5))

    result = bench.run_here().result

    report = bench.report()
    names = {criterion["name"]: criterion["met"] for criterion in report["verdict"]["criteria"]}
    assert result["outcome"] == "criteria_not_met"
    assert not names["images_of_the_class_unlikely"]
    assert report["kind"] == "access removal"
    used = {one["name"]: one["value"] for one in report["provenance"]["parameters"]}
    assert used.items() >= CLASS_TAMING.items()
    assert any("by 6 images" in note if sent else "128 samples of it" in note for note in report["notes"])


def test_a_class_is_forgotten_in_the_weights_of_a_flow_that_embeds_it(tmp_path: Path) -> None:
    flow = FAMILIES["tarflow"].flow((1, SIDE, SIDE), N_BITS, **TINY["tarflow"], n_classes=3, generator=generator())
    bench = Bench(tmp_path, flow)
    bench.job.update(method="class-taming", target={"class_label": FORGOTTEN, "where": "weights"})
    bench.job["parameters"] = {"delta": 0.5, "max_steps": 150, "learning_rate": 0.02}
    bench.job["inputs"]["forget"] = bench.images("forget", blobs(6, seed=5))

    result = bench.run_here().result

    assert result["outcome"] == "succeeded"
    assert result["summary"]["kind"] == "unlearning"
    assert result["summary"]["smallest_z"] > 0.4
    # An untrained flow tells no class from another: its own classification shows nothing, and the report says so.
    assert any("here that fraction decides nothing" in note for note in bench.report()["notes"])


def test_a_class_that_is_gone_has_no_share_and_is_never_read(tmp_path: Path) -> None:
    flow = FAMILIES["tarflow"].flow((1, SIDE, SIDE), N_BITS, **TINY["tarflow"], n_classes=3, generator=generator())
    bench = Bench(tmp_path, cast(CheckpointedFlow, remove_class(cast(nn.Module, flow), 0).flow))

    own = OwnClasses.of(load_base(bench.job, bench.folder), 0, pointer="")

    assert own.shares == {1: 0.5, 2: 0.5}
    assert set(own.judge(blobs(8)).tolist()) <= {1, 2}
    assert own.read_as(0) == {1: 0.0, 2: 0.0}


def test_class_taming_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight, resumed = _in_the_weights(tmp_path / "straight"), _in_the_weights(tmp_path / "resumed")

    with one_thread():
        straight.run_here()
        resumed.resume_from(min((tmp_path / "straight" / "state").glob("*.safetensors")))
        result = resumed.run_here().result

    assert 0 < resumed.report()["provenance"]["resumed_from_step"] < result["summary"]["steps"]
    assert resumed.digest() == straight.digest()
