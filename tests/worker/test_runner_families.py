"""The identity job on every family of flows, from the import to the report, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from models.checkpoints import load_checkpoint, read_manifest, save_checkpoint
from models.families import FLOWS
from models.protocol import CheckpointedFlow
from models.vae import ConditionalVAE
from tests.worker.helpers import PATIENCE_SECONDS
from tests.worker.runs import SIDE, TINY, Bench, blobs, tiny

PHASES = ["validating", "unlearning", "evaluating"]
# Untrained, a flow cannot tell these pictures apart: little holds it back here.
SHORT = {"delta": 4.0, "max_steps": 25, "learning_rate": 3e-3, "keep_weight": 1.0}


def test_every_family_has_a_flow_to_be_run() -> None:
    assert TINY.keys() == FLOWS.keys()


def _import(base: CheckpointedFlow | Path, family: str, folder: Path) -> Path:
    """A model as the service has it: read and probed by a process behind its walls."""
    bench = Bench(folder, base)
    bench.job = {
        "kind": "import",
        "job_id": "job_1",
        "attempt": 1,
        "lease_ttl_seconds": PATIENCE_SECONDS,
        "inputs": {"source": "inputs/checkpoint.safetensors"},
        "declared": {},
        "limits": {"memory_bytes": 8 * 2**30, "cpu_seconds": 300},
    }
    assert bench.run().result["summary"]["manifest"]["family"] == family
    return folder / "outputs" / "weights.safetensors"


def _forgetting(folder: Path, weights: Path) -> Bench:
    bench = Bench(folder, weights)
    bench.job["parameters"] = SHORT
    bench.job["inputs"]["forget"] = bench.images("forget", blobs(2, seed=5))
    bench.job["inputs"]["remember"] = bench.images("remember", blobs(24, seed=6))
    bench.job["remember"] = None
    return bench


@pytest.mark.parametrize("family", sorted(FLOWS))
def test_every_family_is_imported_and_forgets_images(family: str, tmp_path: Path) -> None:
    bench = _forgetting(tmp_path / "forget", _import(tiny(family), family, tmp_path / "import"))

    result = bench.run_here().result

    verdicts = bench.report()["forget_images"]
    tamed = bench.folder / "outputs" / "tamed.safetensors"
    assert result["summary"]["steps"] > 0
    assert [one["z_after"] > one["z_before"] + 0.05 for one in verdicts] == [True, True]
    assert read_manifest(tamed).family == family
    assert read_manifest(tamed).extra["tamed"]["job"] == "job_0"
    assert all(bool(value.isfinite().all()) for value in load_checkpoint(tamed).state_dict().values())


def test_a_vae_is_imported_and_refused_by_jobs_on_flows(tmp_path: Path) -> None:
    vae = ConditionalVAE((1, SIDE, SIDE), n_classes=3, hidden=(16, 8), latent=2, generator=torch.Generator())
    save_checkpoint(tmp_path / "vae.safetensors", vae)
    bench = _forgetting(tmp_path / "forget", _import(tmp_path / "vae.safetensors", "vae", tmp_path / "import"))

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:checkpoint-refused"
    assert "a model of family 'vae'" in problem["detail"]
    assert "glow" in problem["detail"]


def test_a_flow_with_gaussian_noise_forgets_images_in_a_process_of_its_own(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base.safetensors", cast(nn.Module, tiny("tarflow")))
    bench = _forgetting(tmp_path / "forget", tmp_path / "base.safetensors")

    ended = bench.run()

    assert (ended.status, ended.result["summary"]["forget_images"]) == (0, 2)
    assert [message["phase"] for message in ended.messages if message["type"] == "phase"] == PHASES


def _no_scale(state: dict[str, torch.Tensor]) -> None:
    state["blocks.0.flows.1.actnorm.scale"].zero_()


def _no_number(state: dict[str, torch.Tensor]) -> None:
    state["blocks.0.flows.0.actnorm.loc"].fill_(1e38)
    state["blocks.0.flows.0.actnorm.scale"].fill_(1e38)


@pytest.mark.parametrize(("damage", "said"), [(_no_scale, "infinite log-likelihood for all"), (_no_number, "NaN")])
def test_a_flow_whose_log_determinant_is_no_number_is_refused(damage: Any, said: str, tmp_path: Path) -> None:
    flow = tiny("glow")
    damage(flow.state_dict())  # type: ignore[attr-defined]  # a module too
    bench = Bench(tmp_path, flow)
    bench.job["inputs"]["forget"] = bench.images("forget", blobs(2, seed=5))
    bench.job["inputs"]["remember"] = bench.images("remember", blobs(24, seed=6))

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:checkpoint-refused"
    assert said in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/checkpoint"


def test_an_image_size_that_the_flow_does_not_have_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny("glow"))
    bench.job["parameters"] = {"fit": "exact"}
    larger = torch.nn.functional.interpolate(blobs(2), size=(SIDE + 2, SIDE + 2))
    bench.job["inputs"]["forget"] = bench.images("forget", larger)

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:image-refused"
    assert f"{SIDE + 2} x {SIDE + 2}" in problem["detail"]
    assert f"the model takes {SIDE} x {SIDE}" in problem["detail"]


@pytest.mark.parametrize(("sent", "left"), [(1, 1), (15, 15)])
def test_too_few_images_to_remember_are_refused_with_the_number_that_would_do(
    sent: int, left: int, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, tiny("glow"))
    bench.job["inputs"]["forget"] = bench.images("forget", blobs(2, seed=5))
    bench.job["inputs"]["remember"] = bench.images("remember", blobs(sent, seed=6))

    problem = bench.run_here().problem

    assert problem["type"] == "urn:forgetd:problem:remember-set-too-small"
    assert (problem["left"], problem["needed"]) == (left, 16)
    assert f"Send {16 - left} more" in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/remember/images"
