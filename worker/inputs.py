"""From a claim to the runner's folder: what the job needs is fetched, and ``job.json`` says what to do with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from services import object_keys
from services.leases import Claim
from services.request_names import escaped
from services.requests import AMNESIA
from services.settings import Settings
from services.storage import ObjectStorage, file_sha256
from services.tables import Checkpoint, Classifier, ImageSet
from worker.judges import Judges
from worker.patience import Headway

__all__ = ["InputMissing", "Plan", "fetch", "fetch_state", "plan", "write_job"]

FETCHES_AT_ONCE = 8
WEIGHTS = "inputs/checkpoint.safetensors"
SOURCE = "inputs/source"
STATE = "resume/state.safetensors"
# What the request says about the images and not about the method: it reaches the runner beside its parameters.
# Each with its place in the request.
ROLES = {
    "forget": "/target/images",
    "surrogate": "/replace_with/images",
    "remember": "/remember/images",
    "same_identity": "/evaluation/same_identity/images",
    "held_out": "/evaluation/held_out/images",
}
CHECKPOINT = "/checkpoint"


class InputMissing(Exception):
    """Something that the job needs is gone for good; the message says what, and what to do.

    Args:
        pointer: the place in the request that named it, where there was one.
    """

    def __init__(self, message: str, *, pointer: str | None) -> None:
        super().__init__(message)
        self.pointer = pointer


@dataclass(frozen=True)
class Input:
    """An object in the store, and where in the runner's folder it belongs."""

    key: str
    path: str
    sha256: str
    pointer: str | None = None  # into the request; None: the service's own


@dataclass(frozen=True)
class Plan:
    """What to fetch, and the job description that refers to it."""

    files: list[Input] = field(default_factory=list)
    job: dict[str, Any] = field(default_factory=dict)
    resume: Input | None = None
    ahead: tuple[str, ...] = ()
    """The job's kind and method and its checkpoint's family, for who can load their libraries meanwhile: no import."""


def plan(session: Session, claim: Claim, settings: Settings) -> Plan:
    """Read what the job refers to.

    Raises:
        InputMissing: its images were erased, or its checkpoint is not there.
    """
    checkpoint = session.scalar(
        select(Checkpoint).where(Checkpoint.tenant_id == claim.tenant_id, Checkpoint.id == claim.checkpoint_id)
    )
    if checkpoint is None:
        raise InputMissing("The job's checkpoint is not there any more.", pointer=CHECKPOINT)
    if claim.kind == "import":
        return _plan_import(claim, checkpoint, settings)
    return _plan_work(session, claim, checkpoint, settings)


def _plan_import(claim: Claim, checkpoint: Checkpoint, settings: Settings) -> Plan:
    if checkpoint.source_key is None:
        raise InputMissing("The uploaded file is not there any more; upload the checkpoint again.", pointer=None)
    job = {
        **_header(claim, settings),
        "inputs": {"source": SOURCE},
        "declared": checkpoint.declared,
        "digests": {"source": checkpoint.source_sha256},
        "limits": {"memory_bytes": settings.import_memory_bytes, "cpu_seconds": settings.import_cpu_seconds},
    }
    return Plan([Input(checkpoint.source_key, SOURCE, checkpoint.source_sha256)], job)


def _plan_work(session: Session, claim: Claim, checkpoint: Checkpoint, settings: Settings) -> Plan:
    """A job that changes a model: ``forget`` or ``debias``."""
    if checkpoint.weights_key is None or checkpoint.weights_sha256 is None:
        raise InputMissing("The job's checkpoint has no weights; upload it again.", pointer=CHECKPOINT)
    request = claim.request
    amnesia = request["method"] == AMNESIA
    replacing = request.get("replace_with")
    gathered = _Gathered(session, claim)
    gathered.files.append(Input(checkpoint.weights_key, WEIGHTS, checkpoint.weights_sha256, CHECKPOINT))
    evaluation = dict(request.get("evaluation") or {})
    sets = {
        "forget": request.get("target", {}).get("images"),
        "surrogate": replacing.get("images") if isinstance(replacing, dict) else None,
        "remember": (request.get("remember") or {}).get("images"),
        "same_identity": (evaluation.pop("same_identity", None) or {}).get("images"),
        "held_out": (evaluation.pop("held_out", None) or {}).get("images"),
    }
    paths = {
        role: gathered.images(sets[role], f"inputs/{role}", pointer) if sets[role] else None
        for role, pointer in ROLES.items()
    }
    channels = (checkpoint.manifest or {}).get("channels")
    judges = Judges(gathered.images, gathered.classifier, channels=channels)
    remember = request.get("remember") or {}
    # The database keeps the members of an object in an order of its own: here it is that of their names.
    by_concept = {
        concept: gathered.images(
            remember["sets"][concept], f"inputs/remember_sets/{number}", f"/remember/sets/{escaped(concept)}"
        )
        for number, concept in enumerate(sorted(remember.get("sets") or {}))
    }
    if claim.kind == "debias":
        asked = _debias(request, judges)
    elif amnesia:
        asked = _amnesia(request, judges)
    else:
        asked = {"target": judges.target(request["target"])}
    job = {
        **_header(claim, settings),
        "method": request["method"],
        "seed": claim.seed,
        "parameters": request.get("parameters") or {},
        "criteria": request.get("criteria") or {},
        "evaluation": evaluation,
        "micro_batch_divisor": 2**claim.out_of_memory_losses,
        "gpus": settings.gpus_per_job,
        **asked,
        "inputs": {
            "checkpoint": WEIGHTS,
            **({"surrogate": paths["surrogate"] or [], "fisher": {}, "remember_sets": by_concept} if amnesia else {}),
            "forget": paths["forget"] or [],
            "remember": paths["remember"],
            "evaluation": {role: paths[role] or [] for role in ("same_identity", "held_out")},
        },
        "remember": _remember(remember),
        "digests": {"checkpoint": checkpoint.weights_sha256, **judges.digests()},
        "resume": None,
    }
    state = None if claim.resume is None else Input(claim.resume["key"], STATE, claim.resume["sha256"])
    family = (checkpoint.manifest or {}).get("family", "")
    return Plan(gathered.files, job, state, ahead=(claim.kind, request["method"], family))


def _remember(asked: dict[str, Any]) -> dict[str, Any] | None:
    """What must stay, where it is not an image set of no condition."""
    if asked.get("images"):
        return None
    if asked.get("sets"):
        return {"sets": sorted(asked["sets"])}
    concepts = {"concepts": asked["concepts"]} if asked.get("concepts") else {}
    return {**concepts, "generated": asked.get("generated")}


def _debias(request: dict[str, Any], judges: Judges) -> dict[str, Any]:
    wanted = {name: request[name] for name in ("target_distribution", "tolerance", "confidence")}
    if "condition" in request:
        replacements = request["replacements"]
        wanted["condition"] = request["condition"]
        wanted["replacements"] = {name: replacements[name] for name in sorted(replacements)}
    return {"attribute": judges.told(request["attribute"], "/attribute"), **wanted}


def _amnesia(request: dict[str, Any], judges: Judges) -> dict[str, Any]:
    replacing, target = request["replace_with"], request["target"]
    if isinstance(replacing, str):
        replacing = {replacing: True}  # noise, others
    elif "images" in replacing:
        replacing = {"images": True}
    if "concept" in target:
        told = {"concept": target["concept"], "aliases": target.get("aliases") or []}
        judge = judges.of_concepts(request.get("judge"), "/judge")
    else:
        told = {"class_label": target["class_label"]}
        judge = judges.of_labels(request.get("judge"), "/judge")
    return {"target": told, "replace_with": replacing, "judge": judge}


class _Gathered:
    """The files of one job, as its parts ask for them."""

    def __init__(self, session: Session, claim: Claim) -> None:
        self._session, self._claim = session, claim
        self.files: list[Input] = []

    def images(self, image_set_id: str, folder: str, pointer: str) -> list[str]:
        """Ask for the images of a set; the paths that they will have."""
        tenant_id = self._claim.tenant_id
        entries = [
            Input(
                object_keys.image(tenant_id, image_set_id, image["index"]),
                f"{folder}/{image['index']:06d}.png",
                image["sha256"],
                pointer,
            )
            for image in _images(self._session, self._claim, image_set_id, pointer)
        ]
        self.files += entries
        return [entry.path for entry in entries]

    def classifier(self, classifier_id: str, pointer: str, path: str) -> Classifier:
        """Ask for a classifier's file; what is known of it."""
        row = self._session.scalar(
            select(Classifier).where(Classifier.tenant_id == self._claim.tenant_id, Classifier.id == classifier_id)
        )
        if row is None or row.key is None:
            raise InputMissing(
                f"Classifier {classifier_id} was erased before the job could read it; upload it again.", pointer=pointer
            )
        self.files.append(Input(row.key, path, row.sha256, pointer))
        return row


def _header(claim: Claim, settings: Settings) -> dict[str, Any]:
    return {
        "kind": claim.kind,
        "job_id": claim.job_id,
        "attempt": claim.attempt,
        "lease_ttl_seconds": settings.lease_ttl_seconds,
    }


def _images(session: Session, claim: Claim, image_set_id: str, pointer: str) -> list[dict[str, Any]]:
    row = session.scalar(select(ImageSet).where(ImageSet.tenant_id == claim.tenant_id, ImageSet.id == image_set_id))
    if row is None or row.erased_at is not None:
        raise InputMissing(
            f"The images of the set {image_set_id} were erased before the job could read them (they are kept for a day "
            "at most). Upload them again and send the job again.",
            pointer=pointer,
        )
    return row.images


def fetch(
    storage: ObjectStorage,
    plan: Plan,
    folder: Path,
    *,
    going_on: Callable[[], bool] = lambda: True,
    headway: Headway | None = None,
) -> None:
    """Fetch what the job cannot do without, several files at once, each checked against its digest.

    Of the same `headway` in each try, whoever repeats this learns whether it got any further. Once `going_on` says no,
    nothing more is asked for, and what is on its way stops; the first file that fails ends the others' waiting too.

    Safe to repeat: files that are there and right are kept.

    Raises:
        InputMissing: an object is gone, or is not what was uploaded.
        Stopped: `going_on` said no in the middle of a file.
        ConnectionError: an answer of the store broke off, and did not say so.
    """
    headway = headway or Headway()

    def fetch_one(wanted: Input) -> None:
        _fetch_one(storage, wanted, folder, going_on, headway)

    with ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch") as pool:
        try:
            for done in as_completed([pool.submit(fetch_one, wanted) for wanted in plan.files]):
                done.result()
                if not going_on():
                    return
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def fetch_state(
    storage: ObjectStorage, state: Input, folder: Path, *, going_on: Callable[[], bool], headway: Headway
) -> bool:
    """Fetch what an earlier attempt saved, as ``fetch`` does. False: it is gone or damaged."""
    try:
        _fetch_one(storage, state, folder, going_on, headway)
    except InputMissing:
        return False
    return True


def _fetch_one(
    storage: ObjectStorage, wanted: Input, folder: Path, going_on: Callable[[], bool], headway: Headway
) -> None:
    path = folder / wanted.path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and file_sha256(path) == wanted.sha256:
        return
    try:
        storage.fetch(wanted.key, path, going_on=going_on, arrived=headway.along(wanted.path))
    except KeyError as error:
        told = "A file that the job reads is not in the store any more; upload it again."
        raise InputMissing(told, pointer=wanted.pointer) from error
    if file_sha256(path) != wanted.sha256:
        broke_off = path.stat().st_size != storage.size(wanted.key)
        path.unlink()
        if broke_off:  # no fault of the caller's
            raise ConnectionError("the store's answer broke off")
        told = "A file that the job reads is not what was uploaded: its SHA-256 differs; upload it again."
        raise InputMissing(told, pointer=wanted.pointer)


def write_job(folder: Path, job: dict[str, Any]) -> None:
    """Write ``job.json``, whole at once: a runner that was started ahead waits for it."""
    part = folder / "job.part"
    part.write_text(json.dumps(job, indent=1))
    part.replace(folder / "job.json")
