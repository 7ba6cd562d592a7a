"""What a job leaves behind: the tamed checkpoint with its provenance, the report, and the facts that it states."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from evidence.likelihood import derive_seed
from evidence.pictures import sample_grid
from evidence.report import RunFacts
from models.checkpoints import read_manifest, save_checkpoint
from models.families import PIPELINES
from models.protocol import Flow
from worker.runner.base import Base, Origin

__all__ = ["PIPELINE", "TAMED", "Work", "run_facts", "sample_picture", "save_tamed", "write_artifacts"]

TAMED = "tamed.safetensors"
PIPELINE = "pipeline.tar"
"""The same weights as diffusers opens them, of a model that it can open: a folder, packed."""
GRID_SAMPLES = 8


@dataclass(frozen=True)
class Work:
    """What a method did, as far as the report states it for any method."""

    engine: str
    """The method's name for how it worked; stands behind the method's own."""
    parameters: Mapping[str, Any]
    defaults: Mapping[str, Any]
    steps: int = 0
    history: Sequence[Mapping[str, float]] = ()
    """Losses and metrics of each step, with its number under "step"."""
    resumed_from: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of sets beside the two checkpoints. None of what is to be forgotten: whoever holds a photo could tell from it
    that it was among them."""


def save_tamed(model: nn.Module, work: Work, job: Mapping[str, Any], base: Origin, folder: Path) -> str:
    """Write the tamed checkpoint, which names its base and the job, and a pipeline of it; the checkpoint's SHA-256."""
    path = folder / "outputs" / TAMED
    manifest = read_manifest(base.path)
    tamed = {
        "job": job["job_id"],
        "method": job["method"],
        "engine": work.engine,
        "base_tensor_digest": manifest.tensor_digest,
    }
    save_checkpoint(path, model, extra={**manifest.extra, "tamed": tamed})
    if manifest.family in PIPELINES:
        from models.diffusers_folder import write_folder_tar  # loads diffusers, which this model has loaded already

        write_folder_tar(cast(Any, model), path.with_name(PIPELINE))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def run_facts(
    job: Mapping[str, Any], base: Origin, work: Work, *, tamed_sha256: str, seconds: Mapping[str, float], **more: Any
) -> RunFacts:
    """What the measures cannot know; `more` goes into `RunFacts` as it is."""
    losses: dict[str, list[tuple[int, float]]] = {}
    for row in work.history:
        for name, value in row.items():
            if name != "step":
                losses.setdefault(name, []).append((int(row["step"]), value))
    digests = {"base_checkpoint": job["digests"]["checkpoint"], "tamed_checkpoint": tamed_sha256, **work.digests}
    return RunFacts(
        job=job["job_id"],
        method=f"{job['method']}, engine {work.engine}",
        attempt=job["attempt"],
        resumed_from_step=work.resumed_from,
        steps=work.steps,
        parameters=work.parameters,
        defaults=work.defaults,
        seeds={"job": job["seed"]},
        digests=digests,
        device=str(torch.cuda.get_device_name(base.device)) if base.device.type == "cuda" else "cpu",
        seconds=seconds,
        losses=losses,
        **more,
    )


def sample_picture(base: Base, tamed: Flow, job: Mapping[str, Any]) -> bytes | None:
    """Samples of both models, only when the job asked: they may show faces."""
    if not job["evaluation"].get("sample_grid"):
        return None
    return sample_grid(base.flow, tamed, n=GRID_SAMPLES, seed=derive_seed(job["seed"], "grid"), n_bits=base.n_bits)


def write_artifacts(folder: Path, *, report_json: str, report_html: str, grid: bytes | None) -> list[dict[str, str]]:
    """Write the report beside the tamed checkpoint; all artifacts, as the result message lists them."""
    outputs = folder / "outputs"
    (outputs / "report.json").write_text(report_json)
    (outputs / "report.html").write_text(report_html)
    artifacts = [
        _artifact(TAMED, "application/octet-stream"),
        *([_artifact(PIPELINE, "application/x-tar")] if (outputs / PIPELINE).exists() else []),
        _artifact("report.json", "application/json"),
        _artifact("report.html", "text/html; charset=utf-8"),
    ]
    if grid is not None:
        (outputs / "samples.png").write_bytes(grid)
        artifacts.append(_artifact("samples.png", "image/png"))
    return artifacts


def _artifact(name: str, media_type: str) -> dict[str, str]:
    return {"name": name, "path": f"outputs/{name}", "media_type": media_type}
