"""What the tests of the worker share: jobs for the stub runner, processes, and waiting for conditions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import select

from services import classifiers, object_keys
from services.database import Database
from services.ids import new_id
from services.storage import ObjectStorage
from services.tables import Checkpoint, ImageSet, Job, JobEvent
from services.tenancy import Caller
from tests.worker.processes import HERE, PATIENCE_SECONDS, ROOT, Process

__all__ = [
    "HERE", "LONG", "PATIENCE_SECONDS", "QUEUE", "ROOT", "TERMINAL", "Jobs", "Process", "alive", "control_command",
    "eventually", "short_lease", "worker_command",
]  # fmt: skip

T = TypeVar("T")

# For tests that wait for a lease to end. It is renewed four times in it: a stall of some seconds does not cost it.
short_lease = pytest.mark.parametrize("lease_ttl_seconds", [6.0])

QUEUE = "gpu.flow"
LONG = {"steps": 100_000, "step_seconds": 0.02, "state_every": 5}  # until it is stopped
TERMINAL = ("succeeded", "failed", "cancelled")


def eventually(question: Callable[[], T], *, within: float = PATIENCE_SECONDS, what: str = "") -> T:
    """Ask until the answer is true. The one place that sleeps."""
    limit = time.monotonic() + within
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > limit:
            raise AssertionError(f"still not after {within:.0f} s: {what or question}")
        time.sleep(0.02)


class Jobs:
    """Jobs of one tenant whose runner is the stub."""

    def __init__(self, database: Database, storage: ObjectStorage, caller: Caller, trace: Path) -> None:
        self.database, self.storage, self.caller, self.trace_path = database, storage, caller, trace
        self.tenant_id = caller.tenant_id
        self.checkpoint_id = new_id("ckpt")
        weights = storage.put(
            object_keys.checkpoint_prefix(self.tenant_id, self.checkpoint_id) + "weights.safetensors",
            b"weights",
            media_type="application/octet-stream",
        )
        with database.transaction() as session:
            session.add(
                Checkpoint(
                    id=self.checkpoint_id,
                    tenant_id=self.tenant_id,
                    name="base",
                    status="ready",
                    declared={},
                    manifest={"family": "glow", "channels": 3, "image_size": 8},
                    source_bytes=weights.bytes,
                    source_sha256=weights.sha256,
                    weights_key=weights.key,
                    weights_bytes=weights.bytes,
                    weights_sha256=weights.sha256,
                )
            )

    def image_set(self, *, hours: float = 1.0) -> str:
        """A set of two images that are no images."""
        from datetime import UTC, datetime, timedelta

        image_set_id = new_id("imgs")
        images = []
        for index in range(2):
            key = object_keys.image(self.tenant_id, image_set_id, index)
            stored = self.storage.put(key, b"image %d" % index, media_type="image/png")
            images.append({"index": index, "sha256": stored.sha256, "bytes": stored.bytes})
        with self.database.transaction() as session:
            session.add(
                ImageSet(
                    id=image_set_id,
                    tenant_id=self.tenant_id,
                    count=2,
                    total_bytes=14,
                    images=images,
                    expires_at=datetime.now(UTC) + timedelta(hours=hours),
                )
            )
        return image_set_id

    def classifier(self, *, scale: dict[str, list[float]] | None = None) -> str:
        """A classifier that is none."""
        classifier_id = new_id("clf")
        key = object_keys.classifier(self.tenant_id, classifier_id)
        source = self.storage.put(key, b"onnx of " + classifier_id.encode(), media_type="application/octet-stream")
        facts = classifiers.Facts("smiles", ["smiling", "other"], "logits", 0.5, scale)
        takes = {"channels": None, "size": None}
        with self.database.transaction() as session:
            classifiers.register(session, self.caller, classifier_id, facts=facts, takes=takes, source=source)
        return classifier_id

    def queue(self, *, priority: int = 0, queue: str = QUEUE, kind: str = "forget", **parameters: Any) -> str:
        """A queued job; the parameters are the stub's. ``asked`` is the request, where it is not a person's images."""
        job_id = new_id("job")
        asked = parameters.pop("asked", None)
        image_set_id = parameters.pop("image_set", None)
        criteria = parameters.pop("criteria", {})
        remember = parameters.pop("remember", {"generated": 64})
        deadline_at = parameters.pop("deadline_at", None)
        request = {
            **(asked or {"method": "flow-taming", "target": {"images": image_set_id or self.image_set()}}),
            "remember": remember,
            "parameters": {"trace": str(self.trace_path), **parameters},
            "criteria": criteria,
        }
        with self.database.transaction() as session:
            session.add(
                Job(
                    id=job_id,
                    tenant_id=self.tenant_id,
                    kind=kind,
                    queue=queue,
                    priority=priority,
                    deadline_at=deadline_at,
                    checkpoint_id=self.checkpoint_id,
                    request=request,
                    seed=7,
                )
            )
        return job_id

    def row(self, job_id: str) -> Job:
        """The job's row as it is now."""
        with self.database.transaction() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def events(self, job_id: str) -> list[tuple[str, dict[str, Any]]]:
        """What happened to the job, in order."""
        with self.database.transaction() as session:
            rows = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.id))
            return [(row.type, row.data) for row in rows]

    def trace(self, job_id: str) -> list[dict[str, Any]]:
        """The ticks of the job's runners."""
        if not self.trace_path.exists():
            return []
        lines = [json.loads(line) for line in self.trace_path.read_text().splitlines()]
        return [line for line in lines if line["job"] == job_id]

    def starts(self, job_id: str) -> list[dict[str, Any]]:
        """The runners that were started."""
        return [line for line in self.trace(job_id) if line["what"] == "start"]

    def at_step(self, job_id: str, step: int) -> Callable[[], bool]:
        """Whether a runner has reached the step."""
        return lambda: any(line["step"] >= step and line["what"] == "step" for line in self.trace(job_id))

    def has_state(self, job_id: str) -> Callable[[], bool]:
        """Whether a state is in the store and named by the row."""
        return lambda: self.row(job_id).resume is not None

    def status(self, job_id: str, *wanted: str) -> Callable[[], bool]:
        """Whether the job has one of these statuses."""
        return lambda: self.row(job_id).status in wanted

    def end(self, job_id: str) -> Job:
        """The row once the job has ended."""
        eventually(self.status(job_id, *TERMINAL), what=f"{job_id} has ended")
        return self.row(job_id)

    def keys(self, job_id: str) -> list[str]:
        """What the job has in the store, below its own prefix."""
        prefix = object_keys.job_prefix(self.tenant_id, job_id)
        return sorted(key.removeprefix(prefix) for key in self.storage.keys(prefix))


def control_command() -> list[str]:
    return [sys.executable, "-m", "worker.control"]


def worker_command(queues: str = QUEUE) -> list[str]:
    return [sys.executable, str(HERE / "worker_process.py"), queues]


def alive(pid: int) -> bool:
    """Whether the process still computes: a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")
