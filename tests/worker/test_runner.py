"""The real runner under a supervisor: a small Glow is imported and made to forget, and what is bad is refused."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import Glow, load_checkpoint, save_checkpoint, save_png
from services import jobs as job_rows
from services import object_keys
from services.database import Database
from services.ids import new_id
from services.storage import ObjectStorage
from services.tables import Checkpoint, ImageSet, Job
from services.tenancy import Caller
from tests.worker.helpers import Jobs
from worker.process import RUNNER_COMMAND
from worker.supervisor import Supervisor

SIZE = 16


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Glow that has seen nothing but its initialisation batch."""
    generator = torch.Generator().manual_seed(0)
    flow = Glow((1, SIZE, SIZE), 5, n_block=2, n_flow=2, hidden=16, affine=True, lu=[True, True])
    flow.initialize(torch.rand(64, 1, SIZE, SIZE, generator=generator) - 0.5)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_checkpoint(path, flow)
    return path


class RealJobs:
    """Checkpoints, image sets and jobs for the real runner."""

    def __init__(self, database: Database, storage: ObjectStorage, caller: Caller, folder: Path) -> None:
        self.database, self.storage, self.caller, self.folder = database, storage, caller, folder

    def upload(self, body: bytes, **declared: Any) -> tuple[str, str]:
        """An uploaded checkpoint and its import job."""
        checkpoint_id = new_id("ckpt")
        stored = self.storage.put(
            object_keys.checkpoint_source(self.caller.tenant_id, checkpoint_id),
            body,
            media_type="application/octet-stream",
        )
        with self.database.transaction() as session:
            checkpoint = Checkpoint(
                id=checkpoint_id,
                tenant_id=self.caller.tenant_id,
                name="base",
                declared=declared,
                source_key=stored.key,
                source_bytes=stored.bytes,
                source_sha256=stored.sha256,
            )
            session.add(checkpoint)
            session.flush()
            job = job_rows.create_import(session, checkpoint, actor="test", open_jobs=10)
        return checkpoint_id, job.id

    def images(self, count: int, *, seed: int = 1) -> str:
        """A set of noise images."""
        from datetime import UTC, datetime, timedelta

        image_set_id = new_id("imgs")
        generator = torch.Generator().manual_seed(seed)
        entries = []
        for index in range(count):
            path = self.folder / "image.png"
            save_png((torch.rand(1, SIZE, SIZE, generator=generator) * 255).byte(), path)
            key = object_keys.image(self.caller.tenant_id, image_set_id, index)
            stored = self.storage.put(key, path.read_bytes(), media_type="image/png")
            entries.append({"index": index, "sha256": stored.sha256, "bytes": stored.bytes})
        with self.database.transaction() as session:
            session.add(
                ImageSet(
                    id=image_set_id,
                    tenant_id=self.caller.tenant_id,
                    count=count,
                    total_bytes=1,
                    images=entries,
                    expires_at=datetime.now(UTC) + timedelta(hours=1),
                )
            )
        return image_set_id

    def digests(self, image_set_id: str) -> list[str]:
        """SHA-256 of each image of a set, in hex: of its file and of its pixels."""
        prefix = object_keys.image_set_prefix(self.caller.tenant_id, image_set_id)
        files = [self.storage.read(key) for key in self.storage.keys(prefix)]
        pixels = [Image.open(io.BytesIO(file)).tobytes() for file in files]
        return [hashlib.sha256(data).hexdigest() for data in (*files, *pixels)]

    def forget(self, checkpoint_id: str, images: str, **request: Any) -> str:
        """A queued forget job."""
        job_id = new_id("job")
        with self.database.transaction() as session:
            session.add(
                Job(
                    id=job_id,
                    tenant_id=self.caller.tenant_id,
                    kind="forget",
                    queue="gpu.flow",
                    checkpoint_id=checkpoint_id,
                    request={
                        "method": "flow-taming",
                        "target": {"images": images},
                        "remember": {"generated": 64},
                        "parameters": {"fit": "crop", "max_steps": 3},
                        **request,
                    },
                    seed=3,
                )
            )
        return job_id


@pytest.fixture
def real(database: Database, storage: ObjectStorage, caller: Caller, tmp_path: Path) -> RealJobs:
    """A tenant whose jobs are for the real runner."""
    return RealJobs(database, storage, caller, tmp_path)


@pytest.fixture
def real_supervisor(make_supervisor: Callable[..., Supervisor]) -> Supervisor:
    """A supervisor with the real runner."""
    return make_supervisor(runner_command=RUNNER_COMMAND)


def test_a_checkpoint_is_imported_and_then_tamed(
    real: RealJobs, real_supervisor: Supervisor, jobs: Jobs, base_file: Path, tmp_path: Path
) -> None:
    checkpoint_id, import_id = real.upload(base_file.read_bytes())
    assert real_supervisor.run(import_id) == "succeeded"

    photos = real.images(3)
    digests = real.digests(photos)
    job_id = real.forget(
        checkpoint_id,
        photos,
        parameters={"fit": "crop", "delta": 0.1, "max_steps": 30},
        evaluation={"sample_grid": True},
    )
    outcome = real_supervisor.run(job_id)

    row = jobs.row(job_id)
    names = [artifact["name"] for artifact in row.artifacts or []]
    assert outcome == "succeeded", row.problem
    assert names == ["tamed.safetensors", "report.json", "report.html", "samples.png"]
    prefix = row.published_prefix or ""
    real.storage.fetch(prefix + "tamed.safetensors", tmp_path / "tamed.safetensors")
    assert isinstance(load_checkpoint(tmp_path / "tamed.safetensors"), Glow)
    report = json.loads(real.storage.read(prefix + "report.json"))
    assert report["verdict"]["outcome"] == "succeeded"
    assert (row.summary or {})["verdict"] == report["verdict"]["sentence"]
    # Whoever holds a photo could tell from its digest that it was among the forgotten.
    told = [real.storage.read(prefix + name).decode() for name in ("report.json", "report.html", "manifest.json")]
    assert (row.artifacts or [])[0]["sha256"] in told[2]
    assert not [digest for digest in digests for text in told if digest in text.lower()]


def test_a_refused_checkpoint_is_a_problem_of_its_owner(
    real: RealJobs, real_supervisor: Supervisor, jobs: Jobs
) -> None:
    checkpoint_id, import_id = real.upload(b"no checkpoint at all" * 100)

    outcome = real_supervisor.run(import_id)

    row = jobs.row(import_id)
    assert (outcome, row.reason) == ("failed", "user_error")
    with real.database.transaction() as session:
        checkpoint = session.get_one(Checkpoint, checkpoint_id)
        assert checkpoint.status == "rejected"
        assert (checkpoint.problem or {})["type"] == "urn:forgetd:problem:checkpoint-refused"


def test_code_in_a_pickle_is_not_run(real: RealJobs, real_supervisor: Supervisor, jobs: Jobs, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    buffer = io.BytesIO()
    torch.save({"blocks.0": Code()}, buffer)
    _, import_id = real.upload(buffer.getvalue(), image_size=SIZE, n_bits=5)

    outcome = real_supervisor.run(import_id)

    assert (outcome, jobs.row(import_id).reason) == ("failed", "user_error")
    assert not (tmp_path / "executed").exists()
