"""Jobs about what a flow draws, over HTTP: attributes, distributions and classes, by a judge that a caller uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.client import Client
from cli.errors import JobFailed
from cli.resources import Checkpoint, Classifier, Job
from models.checkpoints import load_checkpoint, read_manifest, save_checkpoint
from models.class_prior import ClassPriorFlow
from tests.e2e.conftest import write_images
from tests.e2e.helpers import SECONDS
from tests.worker.judges import write_brightness
from tests.worker.runs import blobs, tiny

SEED = 11
WIDE = 0.1  # a tolerance that a thousand samples settle
QUICK = {"max_steps": 60, "pool": 1024}


def _pushed(client: Client, family: str, folder: Path) -> Checkpoint:
    """A small flow of the family, as the service imported it."""
    path = folder / f"{family}.safetensors"
    save_checkpoint(path, tiny(family))  # type: ignore[arg-type]  # a module too
    return client.push_checkpoint(path, name=family)


@pytest.fixture
def glow(client: Client, tmp_path: Path) -> Checkpoint:
    """A Glow whose samples are about as often dark as bright."""
    return _pushed(client, "glow", tmp_path)


@pytest.fixture
def judge(client: Client, tmp_path: Path) -> Classifier:
    """Tells bright samples from dark ones."""
    told = write_brightness(tmp_path / "classifiers" / "brightness.onnx")
    path = tmp_path / "classifiers" / "brightness.onnx"
    return client.push_classifier(path, told["classes"], output="score", threshold=told["threshold"])


def _rows(client: Client, job: Job) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in client.report(job.id)["fractions"]}


def test_an_attribute_is_lowered_to_its_bound(client: Client, glow: Checkpoint, judge: Classifier) -> None:
    bound = {"classifier": judge.id, "class": "bright", "at_most": 0.3}

    job = client.wait(client.forget(glow.id, attributes=[bound], parameters=QUICK, seed=SEED).id, timeout=SECONDS)

    bright = _rows(client, job)["bright"]
    assert job.status == "succeeded"
    assert bright["before"]["value"] > 0.3 > bright["after"]["high"]
    assert "<html" in client.report_html(job.id)


def test_samples_are_debiased_to_the_stated_distribution(
    client: Client, glow: Checkpoint, judge: Classifier, tmp_path: Path
) -> None:
    target = {"dark": 0.8, "bright": 0.2}

    job = client.debias(glow.id, {"classifier": judge.id}, target, tolerance=WIDE, parameters=QUICK, seed=SEED)
    done = client.wait(job.id, timeout=SECONDS)

    assert done.status == "succeeded"
    assert {row["told"] for row in _rows(client, job).values()} == {"inside"}
    assert read_manifest(client.download(job.id, tmp_path)).extra["tamed"]["method"] == "steering"


def test_a_judge_is_trained_from_uploaded_sets(client: Client, glow: Checkpoint, tmp_path: Path) -> None:
    images = blobs(120, seed=9)
    order = images.float().mean((1, 2, 3)).argsort()
    sets = {"dark": images[order[:40]], "bright": images[order[-40:]]}
    uploaded = {name: client.push_images(write_images(some, tmp_path / name)).id for name, some in sets.items()}

    target = {"dark": 0.8, "bright": 0.2}
    job = client.debias(glow.id, {"sets": uploaded}, target, tolerance=WIDE, parameters=QUICK, seed=SEED)
    client.wait(job.id, timeout=SECONDS)

    (judge,) = client.report(job.id)["judges"]
    assert judge["accuracy"]["value"] > 0.9


def test_a_target_that_the_base_cannot_reach_is_refused_with_the_measured_fraction(
    client: Client, glow: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "brightness.onnx"
    write_brightness(path)
    strict = client.push_classifier(path, ["dark", "bright"], output="score", threshold=0.99)

    job = client.forget(glow.id, attributes=[{"classifier": strict.id, "class": "bright", "at_least": 0.5}])
    with pytest.raises(JobFailed):
        client.wait(job.id, timeout=SECONDS)

    problem = client.job(job.id).problem or {}
    assert problem["type"] == "urn:forgetd:problem:target-unreachable"
    assert problem["measured"] == 0
    assert client.artifacts(job.id) == []


def test_a_class_is_taken_away_at_the_prior(client: Client, tmp_path: Path) -> None:
    checkpoint = _pushed(client, "class-prior", tmp_path)

    job = client.wait(client.forget(checkpoint.id, class_label=1, where="prior").id, timeout=SECONDS)

    changed = load_checkpoint(client.download(job.id, tmp_path / "changed"))
    assert isinstance(changed, ClassPriorFlow)
    assert changed.classes() == [0, 2]
    assert client.report(job.id)["kind"] == "access removal"
