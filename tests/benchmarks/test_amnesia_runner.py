"""The benchmark's jobs on the runner: what is timed, what its last lines say, and who is asked about what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import amnesia_classes, amnesia_prompts
from benchmarks.amnesia_classes import CRITERIA, Bench, Judged, Request
from benchmarks.amnesia_jobs import JobFailed, Jobs, Ran
from benchmarks.amnesia_prompts import Drawn, forgot
from evidence.kid import Kid
from examples.digits import DigitClassifier, export_onnx
from models.checkpoints import read_manifest, save_checkpoint
from models.ddpm import ClassDDPM
from tests.unlearning.tiny_diffusion import trained_ddpm
from tests.worker.judges import write_bands

MARKS = {"validating": 2.0, "replay": 5.0, "fisher": 65.0, "unlearning": 95.0, "evaluating": 130.0}


def ran(*, steps: int = 50, met: bool = True, made: int = 0) -> Ran:
    return Ran(Path("tamed.safetensors"), MARKS, steps, met, made)


def drawn(forgotten: float, replacement: float, others: float) -> Drawn:
    """A model that is asked for digit 0 closely, and is as right about all others."""
    shown = [forgotten, replacement] + [0.0] * 8
    return Drawn([forgotten] + [others] * 9, [forgotten] + [others] * 9, [forgotten] + [others] * 9, shown)


def tiny_ddpm() -> ClassDDPM:
    return ClassDDPM(
        (1, 8, 8), 8, channels=[8], layers=1, attention=[False], n_classes=10,
        sampling={"steps": 2, "guidance_scale": 1.0}, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def answering(label: int) -> DigitClassifier:
    """A judge that sees one digit in everything."""
    judge = DigitClassifier(8, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        judge.linear2.weight.zero_()
        judge.linear2.bias.zero_()
        judge.linear2.bias[label] = 20.0
    return judge


def test_seconds_of_a_run_are_those_between_its_phases() -> None:
    one = ran()

    assert (one.until_training, one.training) == (95.0, 35.0)
    assert one.seconds == {"starting": 2.0, "validating": 3.0, "replay": 60.0, "fisher": 30.0, "unlearning": 35.0}


def test_drops_are_of_the_other_digits_alone() -> None:
    found = forgot("request", 0, 1, 0, ran(), drawn(0.99, 0.0, 0.98), drawn(0.01, 0.97, 0.95))

    assert (found.p_forgotten, found.p_replacement) == (0.01, 0.97)
    assert found.others_drop == pytest.approx(0.03)
    assert found.worst_digit_drop == pytest.approx(0.03)


def test_the_last_line_has_the_worst_of_all_requests() -> None:
    before = drawn(0.99, 0.0, 0.98)
    runs = [
        forgot("request", 0, 1, 0, ran(made=30), before, drawn(0.01, 0.99, 0.98)),
        forgot("request", 0, 1, 1, ran(), before, drawn(0.04, 0.91, 0.95)),
    ]
    control = forgot("neither (fine-tuning)", 0, 1, 0, ran(), before, drawn(0.0, 1.0, 0.2))

    figures = amnesia_prompts.summary(runs, [control], {"accuracy": 0.98})

    assert (figures["sd_p_forgotten_worst"], figures["sd_p_replacement_worst"]) == (0.04, 0.91)
    assert figures["sd_others_drop_worst"] == pytest.approx(0.03)
    assert figures["sd_finetune_others"] == pytest.approx(0.78)
    assert (figures["second_request_seconds"], figures["second_requests_that_found_all"]) == (95.0, 1)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def judged(p: float, distance: float) -> Judged:
    return Judged(p, p, 2.0, 0.1, 0.0, 0.99, Kid(distance, 0.01, 0.02, 900, 900, "features"), distance)


def test_the_distance_of_the_rest_is_in_units_of_the_bases() -> None:
    requests = [Request("for noise", ran(), judged(0.1, 0.3)), Request("for another", ran(), judged(0.2, 0.5))]

    figures = amnesia_classes.summary(judged(0.98, 0.25), requests)

    assert (figures["ddpm_p_before"], figures["ddpm_p"], figures["ddpm_p_worst"]) == (0.98, 0.1, 0.2)
    assert figures["ddpm_kid_ratio"] == pytest.approx(1.2)
    assert figures["ddpm_kid_ratio_worst"] == pytest.approx(2.0)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_a_base_is_as_far_from_real_digits_as_itself() -> None:
    model = tiny_ddpm()
    bench = Bench(model, answering(3), answering(0))

    first, again = (bench.judged(model, own=20, each=4) for _ in range(2))

    assert first == again
    assert first.p == pytest.approx(0.0, abs=1e-6)
    assert first.p_sceptic == pytest.approx(1.0, abs=1e-6)
    assert first.others == pytest.approx(1 / 9)


def test_a_job_ends_with_the_changed_model_and_leaves_its_assets_to_the_next(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base.safetensors", trained_ddpm(steps=80))
    judge = write_bands(tmp_path / "bands.onnx")
    jobs = Jobs(tmp_path / "base.safetensors", tmp_path / "bands.onnx", tmp_path / "work")
    asked = amnesia_classes.request({"class_label": 1}, {"forgotten_at_most": 0.1, "others_within": 0.08})
    asked |= {
        "judge": {name: value for name, value in judge.items() if name not in ("onnx", "sha256")},
        "remember": {"generated": 100},
        "parameters": {"max_steps": 3, "batch": 32, "replay_batch": 32, "sampling_steps": 2},
    }  # fmt: skip

    first, again = jobs.run("first", asked), jobs.run("again", {**asked, "seed": 1})

    base = read_manifest(tmp_path / "base.safetensors")
    assert read_manifest(first.checkpoint).tensor_digest != base.tensor_digest
    assert (first.steps, first.met) == (3, False)
    assert list(first.marks) == ["validating", "replay", "fisher", "unlearning", "evaluating"]
    assert first.made > 0
    assert (again.made, list(again.marks)) == (0, ["validating", "unlearning", "evaluating"])


def test_a_refusal_is_said(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base.safetensors", tiny_ddpm())
    export_onnx(answering(0), tmp_path / "judge.onnx")
    jobs = Jobs(tmp_path / "base.safetensors", tmp_path / "judge.onnx", tmp_path / "work")

    with pytest.raises(JobFailed, match="invalid-request"):
        jobs.run("refused", amnesia_classes.request({"class_label": 0}, CRITERIA))  # by itself
