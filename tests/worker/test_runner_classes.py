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
from models.families import FLOWS
from models.protocol import CheckpointedFlow
from tests.worker.runs import N_BITS, SIDE, TINY, Bench, Ended, Recorder, blobs, generator, tiny
from unlearning.classes import CLASS_TAMING, remove_class
from worker.runner.base import load_base
from worker.runner.class_bounds import gone
from worker.runner.own_classes import OwnClasses, spread

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


@pytest.mark.parametrize(
    ("sent", "told", "probed"),
    [
        (0, "128 samples of it", "5 samples of the class by the base flow, drawn for this alone"),
        (6, "by 6 images", "5 samples of the class by the base flow, drawn for this alone"),
        (24, "by 19 images", "5 of the 24 images that the requester supplied, held out from taming"),
    ],
)
def test_class_taming_that_falls_short_says_so_and_probes_with_images_that_no_step_has_seen(
    sent: int, told: str, probed: str, tmp_path: Path
) -> None:
    bench = _in_the_weights(tmp_path)
    if sent:
        bench.job["inputs"]["forget"] = bench.images("forget", blobs(sent, seed=5))

    result = bench.run_here().result

    report = bench.report()
    names = {criterion["name"]: criterion["met"] for criterion in report["verdict"]["criteria"]}
    assert result["outcome"] == "criteria_not_met"
    assert not names["images_of_the_class_unlikely"]
    assert report["kind"] == "access removal"
    used = {one["name"]: one["value"] for one in report["provenance"]["parameters"]}
    assert used.items() >= CLASS_TAMING.items()
    assert any(told in note for note in report["notes"])
    assert f"The probe of relearning fitted a prior to {probed}." in report["notes"]
    assert report["relearn"]["images"] == 5


def test_a_class_is_forgotten_in_the_weights_of_a_flow_that_embeds_it(tmp_path: Path) -> None:
    flow = FLOWS["tarflow"].model((1, SIDE, SIDE), N_BITS, **TINY["tarflow"], n_classes=3, generator=generator())
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


def _with_classes(folder: Path, family: str, n_classes: int) -> Bench:
    """A job that takes class 1 of so many away at the prior."""
    architecture = {**TINY[family], "n_classes": n_classes}
    bench = Bench(folder, FLOWS[family].model((1, SIDE, SIDE), N_BITS, **architecture, generator=generator()))
    bench.job.update(method="class-removal", target={"class_label": FORGOTTEN, "where": "prior"})
    return bench


def _own(bench: Bench, recorder: Recorder | None = None) -> OwnClasses:
    return OwnClasses.of(load_base(bench.job, bench.folder), 0, recorder or Recorder(), pointer="")


def test_a_class_that_is_gone_has_no_share_and_is_never_read(tmp_path: Path) -> None:
    flow = FLOWS["tarflow"].model((1, SIDE, SIDE), N_BITS, **TINY["tarflow"], n_classes=3, generator=generator())
    bench = Bench(tmp_path, cast(CheckpointedFlow, remove_class(cast(nn.Module, flow), 0).flow))

    own = _own(bench)

    assert own.shares == {1: 0.5, 2: 0.5}
    assert set(own.judge(blobs(8)).tolist()) <= {1, 2}
    assert own.read_as(0, own.shares, 40, "here") == 0
    assert own.read_as(1, own.shares, 40, "here") + own.read_as(2, own.shares, 40, "here") == 40


@pytest.mark.parametrize("n", [7, 100, 1001])
@pytest.mark.parametrize("shares", [{0: 0.5, 3: 0.3, 4: 0.2}, dict.fromkeys(range(150), 1 / 150), {2: 1.0}])
def test_samples_are_spread_over_classes_by_their_shares(shares: dict[int, float], n: int) -> None:
    drawn = spread(shares, n, seed=4)

    assert len(drawn) == n
    assert all(abs(int((drawn == label).sum()) - share * n) < 1 for label, share in shares.items())
    assert set(drawn.tolist()) <= set(shares)


def test_where_there_are_more_classes_than_samples_each_is_drawn_as_often_as_another() -> None:
    shares = dict.fromkeys(range(40), 1 / 40)

    drawn = torch.stack([spread(shares, 10, seed=seed).bincount(minlength=40) for seed in range(400)])

    assert drawn.max() == 1
    assert (drawn.double().mean(0) - 0.25).abs().max() < 0.09  # 4 standard errors of 400 tries


def test_one_of_many_classes_must_become_rarer_than_it_is(tmp_path: Path) -> None:
    recorder = Recorder()
    own = _own(_with_classes(tmp_path, "class-prior", 120), recorder)

    asked = gone(own, FORGOTTEN)

    (bound,) = asked.constraints[0].bounds.values()
    assert 0 < bound.high < 0.2 * own.shares[FORGOTTEN]  # the base misses it, and so does half a removal
    assert asked.samples > 10_000
    drawn = [message["total"] for message in recorder.messages if message["type"] == "progress"]
    assert {2000, 200} <= set(drawn)
    assert max(drawn) < 120 * 200


@pytest.mark.parametrize(("family", "n_classes"), [("tarflow", 120), ("class-prior", 2000)])
def test_what_takes_too_long_to_show_is_refused_before_anything_is_drawn(
    family: str, n_classes: int, tmp_path: Path
) -> None:
    ended = _with_classes(tmp_path, family, n_classes).run_here()

    assert [message["type"] for message in ended.messages] == ["error"]
    assert ended.problem["type"] == "urn:forgetd:problem:insufficient-evidence"
    assert ended.problem["needed"] > ended.problem["given"]
    assert f"{ended.problem['needed']:,}" in ended.problem["detail"]
    assert "`attributes` instead of `class_label`, with an ONNX classifier" in ended.problem["detail"]
    assert ended.problem["errors"][0]["pointer"] == "/target/class_label"


def test_a_long_reading_says_how_far_it_is(tmp_path: Path) -> None:
    bench, recorder = _with_classes(tmp_path, "tarflow", 5), Recorder()
    own = OwnClasses.of(load_base(bench.job, bench.folder), 0, recorder, pointer="", quiet_seconds=0)

    own.judge(blobs(30))

    assert (recorder.messages[-1]["step"], recorder.messages[-1]["total"]) == (150, 150)
