"""A runner of ours is told to leave in the middle of its Fisher information; the next one goes on from there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from services import classifiers, object_keys
from services import jobs as job_rows
from services.ids import new_id
from services.storage import file_sha256
from services.tables import Checkpoint, Job
from tests.worker.helpers import HERE, PATIENCE_SECONDS, Jobs, eventually
from tests.worker.judges import write_bands
from worker import janitor
from worker.supervisor import Supervisor

SLOW_COMMAND = (sys.executable, str(HERE / "slow_runner.py"))


def vae(jobs: Jobs, path: Path) -> None:
    """Put a model of three classes in the place of the checkpoint that is none."""
    with jobs.database.transaction() as session:
        row = session.get_one(Checkpoint, jobs.checkpoint_id)
        assert row.weights_key is not None
        jobs.storage.put_file(row.weights_key, path)
        row.weights_sha256, row.manifest = file_sha256(path), {"family": "vae", "channels": 1, "image_size": 6}


def judge(jobs: Jobs, path: Path) -> str:
    """A classifier that tells them apart."""
    told = write_bands(path)
    classifier_id = new_id("clf")
    source = jobs.storage.put_file(object_keys.classifier(jobs.tenant_id, classifier_id), path)
    facts = classifiers.Facts("bands", told["classes"], told["output"], told.get("threshold", 0.5), None)
    with jobs.database.transaction() as session:
        classifiers.register(
            session, jobs.caller, classifier_id, facts=facts, takes={"channels": None, "size": None}, source=source
        )
    return classifier_id


def test_a_drain_in_the_middle_of_the_fisher_information_loses_nothing(
    make_supervisor: Callable[..., Supervisor],
    jobs: Jobs,
    in_background: Callable[..., Future[str]],
    vae_file: Path,
    tmp_path: Path,
) -> None:
    vae(jobs, vae_file)
    asked = {
        "method": "selective-amnesia",
        "target": {"class_label": 0},
        "replace_with": {"class_label": 1},
        "judge": {"classifier": judge(jobs, tmp_path / "0.onnx")},
    }
    job_id = jobs.queue(asked=asked, remember={"generated": 100})
    with jobs.database.transaction() as session:
        row = session.get_one(Job, job_id)
        row.request = {**row.request, "parameters": {"micro_batch": 5}}  # without the stub's
    first, second = (make_supervisor(runner_command=(*SLOW_COMMAND, phase)) for phase in ("fisher", "unlearning"))
    leaves = in_background(first, job_id)
    eventually(lambda: jobs.row(job_id).phase == "fisher" or leaves.done(), what="it computes")
    assert jobs.row(job_id).problem is None

    first.start_draining()
    left = leaves.result(PATIENCE_SECONDS)
    kept = jobs.keys(job_id)
    goes_on = in_background(second, job_id)
    eventually(lambda: jobs.row(job_id).phase == "unlearning" or goes_on.done(), what="the next one trains")
    with jobs.database.transaction() as session:
        job_rows.cancel(session, jobs.caller, job_id)
    ended = goes_on.result(PATIENCE_SECONDS)
    janitor.sweep(jobs.database, jobs.storage)

    assert (left, ended) == ("queued", "cancelled")
    assert "state/own/partial-fisher.safetensors" in kept
    phases = [data["phase"] for kind, data in jobs.events(job_id) if kind == "phase"]
    assert phases == ["fisher", "fisher", "unlearning"]
    assert jobs.keys(job_id) == []
