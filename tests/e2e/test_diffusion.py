"""Diffusion models over HTTP: a class of a DDPM, and a concept of a real, small Stable Diffusion pipeline."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from cli.client import Client
from cli.resources import Checkpoint, Job
from examples import captioned_digits as digits
from examples.digits import export_onnx
from tests.e2e.helpers import SECONDS, events
from tests.unlearning.tiny_diffusion import trained_file
from tests.worker.runs import one_thread

ASKED = "a good picture of zero"
"""A prompt that no step of the training sees."""
DRAWN = {"guidance_scale": 4.0, "sampling_steps": 3}
GENTLE = {"scope": "cross-attention", "learning_rate": 2e-3, "batch": 16}
"""What stays is hardly moved, so that nothing is left to be mended once the concept is forgotten."""
NAMES = [str(digit) for digit in range(10)]


def _phases(client: Client, job: Job) -> list[str]:
    return [event.data["phase"] for event in events(client, job, "phase")]


def test_a_class_of_a_ddpm_comes_to_show_another(client: Client, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = client.push_checkpoint(trained_file(tmp_path_factory), name="stripes")

    job = client.forget(
        checkpoint.id,
        class_label=0,
        replace_with=1,
        remember=100,
        parameters={"sampling_steps": 3},
        criteria={"forgotten_at_most": 0.1, "others_within": 0.08},
        seed=11,
    )
    job = client.wait(job.id, timeout=SECONDS)

    assert job.status == "succeeded", job.problem
    assert job.summary is not None
    assert job.summary["forgotten_before"] > 0.9
    assert job.summary["replaced_after"] > 0.9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that draws three digits, as diffusers saved it."""
    with one_thread():
        return digits.captioned_digits(tmp_path_factory.mktemp("pipeline"), recipe=digits.TINY)


@pytest.fixture
def pipeline(client: Client, folder: Path, tmp_path: Path) -> Checkpoint:
    """It, uploaded."""
    digits.write_tar(folder, tmp_path / "pipeline.tar")
    return client.push_checkpoint(tmp_path / "pipeline.tar", name="digits")


@pytest.fixture
def judge(client: Client, folder: Path, tmp_path: Path) -> str:
    """Who tells the digits, from the store."""
    with one_thread():
        export_onnx(digits.judge(digits.TINY, folder.parent), tmp_path / "judge.onnx")
    return client.push_classifier(tmp_path / "judge.onnx", NAMES, name="digits").id


def test_a_concept_of_a_pipeline_comes_to_show_another_and_diffusers_opens_what_is_left(
    client: Client, folder: Path, pipeline: Checkpoint, judge: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "judge": {"classifier": judge, "shows": {"zero": "0", "one": "1", "two": "2"}},
        "criteria": {"others_within": 0.08},
        "seed": 11,
    }
    first = client.forget(
        pipeline.id,
        concept="zero",
        aliases=["the digit 0"],
        replace_with={"concept": "one"},
        remember={"concepts": ["one", "two"], "generated": 200},
        parameters={**DRAWN, **GENTLE},
        **asked,
    )
    second = client.forget(
        pipeline.id,
        concept="two",
        replace_with={"concept": "one"},
        remember={"concepts": ["one"], "generated": 200},
        parameters={**DRAWN, "max_steps": 1},  # it is asked what it draws, and not what it forgets
        **asked,
    )
    first = client.wait(first.id, timeout=SECONDS)
    second = client.wait(second.id, timeout=SECONDS, raise_on_failure=False)

    assert (first.status, second.reason) == ("succeeded", "criteria_not_met"), (first.problem, second.problem)
    assert first.summary is not None
    assert first.summary["forgotten_before"] > 0.95
    assert {"replay", "fisher"} <= set(_phases(client, first))
    assert {"replay", "fisher"}.isdisjoint(_phases(client, second))
    name = {one.name: one for one in client.artifacts(first.id)}["pipeline.tar"]
    with tarfile.open(client.download_artifact(first.id, name, tmp_path)) as archive:
        archive.extractall(tmp_path / "opened", filter="data")
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "opened")
    opened.set_progress_bar_config(disable=True)
    pictures = opened(
        [ASKED] * 20, num_inference_steps=8, guidance_scale=4.0, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    images = (torch.from_numpy(pictures).movedim(3, 1) * 255).round().to(torch.uint8)
    shown = digits.judge(digits.TINY, folder.parent).posterior(images)
    assert float(shown[:, 0].mean()) < 0.05
    assert float(shown[:, 1].mean()) > 0.9
