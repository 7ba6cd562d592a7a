"""From a claim to the runner's folder: what the job needs is fetched, and ``job.json`` says what to do with it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from services import object_keys
from services.leases import Claim
from services.settings import Settings
from services.storage import ObjectStorage, file_sha256
from services.tables import Checkpoint, ImageSet

__all__ = ["InputMissing", "Plan", "fetch", "plan", "write_job"]

FETCHES_AT_ONCE = 8
WEIGHTS = "inputs/checkpoint.safetensors"
SOURCE = "inputs/source"
STATE = "resume/state.safetensors"
# What the request says about the images and not about the method: it reaches the runner beside its parameters.
ROLES = ("forget", "remember", "same_identity", "held_out")


class InputMissing(Exception):
    """Something that the job needs is gone for good; the message says what, and what to do."""


@dataclass(frozen=True)
class Plan:
    """What to fetch, as (key, path, sha256 or None), and the job description that refers to it."""

    files: list[tuple[str, str, str | None]] = field(default_factory=list)
    job: dict[str, Any] = field(default_factory=dict)
    resume: tuple[str, str, str] | None = None


def plan(session: Session, claim: Claim, settings: Settings) -> Plan:
    """Read what the job refers to.

    Raises:
        InputMissing: its images were erased, or its checkpoint is not there.
    """
    checkpoint = session.scalar(
        select(Checkpoint).where(Checkpoint.tenant_id == claim.tenant_id, Checkpoint.id == claim.checkpoint_id)
    )
    if checkpoint is None:
        raise InputMissing("The job's checkpoint is not there any more.")
    if claim.kind == "import":
        return _plan_import(claim, checkpoint, settings)
    return _plan_forget(session, claim, checkpoint, settings)


def _plan_import(claim: Claim, checkpoint: Checkpoint, settings: Settings) -> Plan:
    if checkpoint.source_key is None:
        raise InputMissing("The uploaded file is not there any more; upload the checkpoint again.")
    job = {
        **_header(claim, settings),
        "inputs": {"source": SOURCE},
        "declared": checkpoint.declared,
        "digests": {"source": checkpoint.source_sha256},
        "limits": {"memory_bytes": settings.import_memory_bytes, "cpu_seconds": settings.import_cpu_seconds},
    }
    return Plan([(checkpoint.source_key, SOURCE, checkpoint.source_sha256)], job)


def _plan_forget(session: Session, claim: Claim, checkpoint: Checkpoint, settings: Settings) -> Plan:
    if checkpoint.weights_key is None or checkpoint.weights_sha256 is None:
        raise InputMissing("The job's checkpoint has no weights; upload it again.")
    request = claim.request
    evaluation = dict(request.get("evaluation") or {})
    sets = {
        "forget": request["target"].get("images"),
        "remember": (request.get("remember") or {}).get("images"),
        "same_identity": (evaluation.pop("same_identity", None) or {}).get("images"),
        "held_out": (evaluation.pop("held_out", None) or {}).get("images"),
    }
    files: list[tuple[str, str, str | None]] = [(checkpoint.weights_key, WEIGHTS, checkpoint.weights_sha256)]
    paths: dict[str, list[str] | None] = {}
    for role in ROLES:
        image_set_id = sets[role]
        if image_set_id is None:
            paths[role] = None
            continue
        entries = [
            (
                object_keys.image(claim.tenant_id, image_set_id, image["index"]),
                f"inputs/{role}/{image['index']:06d}.png",
                image["sha256"],
            )
            for image in _images(session, claim, image_set_id, role)
        ]
        files += entries
        paths[role] = [path for _, path, _ in entries]
    generated = (request.get("remember") or {}).get("generated")
    resume = claim.resume
    job = {
        **_header(claim, settings),
        "method": request["method"],
        "seed": claim.seed,
        "parameters": request.get("parameters") or {},
        "criteria": request.get("criteria") or {},
        "evaluation": evaluation,
        "micro_batch_divisor": 2**claim.out_of_memory_losses,
        "inputs": {
            "checkpoint": WEIGHTS,
            "forget": paths["forget"],
            "remember": paths["remember"],
            "evaluation": {role: paths[role] or [] for role in ("same_identity", "held_out")},
        },
        "remember": None if paths["remember"] is not None else {"generated": generated},
        "digests": {"checkpoint": checkpoint.weights_sha256},
        "resume": None,
    }
    state = None if resume is None else (resume["key"], STATE, resume["sha256"])
    return Plan(files, job, state)


def _header(claim: Claim, settings: Settings) -> dict[str, Any]:
    return {
        "kind": claim.kind,
        "job_id": claim.job_id,
        "attempt": claim.attempt,
        "lease_ttl_seconds": settings.lease_ttl_seconds,
    }


def _images(session: Session, claim: Claim, image_set_id: str, role: str) -> list[dict[str, Any]]:
    row = session.scalar(select(ImageSet).where(ImageSet.tenant_id == claim.tenant_id, ImageSet.id == image_set_id))
    if row is None or row.erased_at is not None:
        raise InputMissing(
            f"The images of the {role.replace('_', ' ')} set {image_set_id} were erased before the job could read them "
            "(they are kept for a day at most). Upload them again and send the job again."
        )
    return row.images


def fetch(storage: ObjectStorage, plan: Plan, folder: Path) -> bool:
    """Fetch everything, several files at once, each checked against its digest. Whether there is a state to resume.

    Safe to repeat: files that are there and right are kept. A state that is gone or damaged is left out, so that the
    attempt starts from the beginning; nothing else may be.

    Raises:
        InputMissing: an object is gone, or is not what was uploaded.
    """
    with ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch") as pool:
        for done in [pool.submit(_fetch_one, storage, key, folder / path, sha) for key, path, sha in plan.files]:
            done.result()
    if plan.resume is None:
        return False
    key, path, sha = plan.resume
    try:
        _fetch_one(storage, key, folder / path, sha)
    except InputMissing:
        return False
    return True


def _fetch_one(storage: ObjectStorage, key: str, path: Path, sha256: str | None) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.exists() and sha256 is not None and file_sha256(path) == sha256:
        return
    try:
        storage.fetch(key, path)
    except KeyError as error:
        raise InputMissing("A file that the job reads is not in the store any more; upload it again.") from error
    if sha256 is not None and file_sha256(path) != sha256:
        path.unlink()
        raise InputMissing("A file that the job reads is not what was uploaded: its SHA-256 differs; upload it again.")


def write_job(folder: Path, job: dict[str, Any]) -> None:
    """Write ``job.json``."""
    (folder / "job.json").write_text(json.dumps(job, indent=1))
