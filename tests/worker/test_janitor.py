"""What must be gone: states, lost attempts, the images of people, uploads that nobody finished."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import uuid_utils
from sqlalchemy import func, select, text

from services import object_keys
from services.storage import ObjectStorage
from services.tables import Checkpoint, IdempotencyRecord, ImageSet, Job
from tests.worker.helpers import Jobs, eventually
from worker import janitor
from worker.supervisor import Supervisor


def test_an_ended_job_keeps_its_publication_alone(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=5, state_every=5)
    assert supervisor.run(job_id) == "succeeded"
    stale = object_keys.attempt_prefix(jobs.tenant_id, job_id, 999_999)
    jobs.storage.put(stale + "tamed.safetensors", b"of a zombie", media_type="application/octet-stream")
    eventually(lambda: any(key.startswith("state/") for key in jobs.keys(job_id)))

    janitor.sweep(jobs.database, jobs.storage)

    row = jobs.row(job_id)
    published = f"attempts/{row.fencing_token}/"
    assert row.swept_at is not None
    assert jobs.keys(job_id) == [published + name for name in ("manifest.json", "report.json", "tamed.safetensors")]


def late_state(jobs: Jobs, job_id: str) -> None:
    """What an attempt writes that does not know yet that it lost its lease."""
    for key in (
        object_keys.state(jobs.tenant_id, job_id, 999_999, 5),
        object_keys.work(jobs.tenant_id, job_id, "partial-fisher"),
        object_keys.attempt_prefix(jobs.tenant_id, job_id, 999_999) + "tamed.safetensors",
    ):
        jobs.storage.put(key, b"of a zombie", media_type="application/octet-stream")


def test_what_a_stale_attempt_writes_behind_the_sweep_is_found_again(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=1)
    assert supervisor.run(job_id) == "succeeded"
    janitor.sweep(jobs.database, jobs.storage)
    published = jobs.keys(job_id)
    late_state(jobs, job_id)

    janitor.tidy(jobs.database, jobs.storage)
    janitor.tidy(jobs.database, jobs.storage)

    assert jobs.keys(job_id) == published


def test_a_sweep_two_days_after_the_end_is_the_last(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=1)
    assert supervisor.run(job_id) == "succeeded"
    janitor.sweep(jobs.database, jobs.storage)
    with jobs.database.transaction() as session:
        session.get_one(Job, job_id).finished_at = datetime.now(UTC) - timedelta(days=3)
    late_state(jobs, job_id)

    janitor.tidy(jobs.database, jobs.storage)

    assert any(key.endswith("00000005.safetensors") for key in jobs.keys(job_id))


def test_what_was_swept_early_is_found_by_its_index(jobs: Jobs) -> None:
    question = select(Job.id).where(janitor.swept_early()).compile(jobs.database.engine)

    with jobs.database.transaction() as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))  # an empty table is read whole, however it is indexed
        plan = session.connection().exec_driver_sql(f"EXPLAIN {question}", question.params).scalars().all()

    assert "ix_jobs_swept_early" in "\n".join(plan)


def test_the_forgotten_images_are_erased_once_the_job_ended(supervisor: Supervisor, jobs: Jobs) -> None:
    image_set_id = jobs.image_set()
    job_id = jobs.queue(steps=1, image_set=image_set_id)
    prefix = object_keys.image_set_prefix(jobs.tenant_id, image_set_id)
    janitor.sweep(jobs.database, jobs.storage)
    assert jobs.storage.keys(prefix)

    assert supervisor.run(job_id) == "succeeded"
    janitor.sweep(jobs.database, jobs.storage)

    assert jobs.storage.keys(prefix) == []
    with jobs.database.transaction() as session:
        row = session.get_one(ImageSet, image_set_id)
        assert row.erased_at is not None
        assert row.images == []


def test_images_past_their_hours_are_erased_whatever_waits_for_them(jobs: Jobs) -> None:
    image_set_id = jobs.image_set(hours=-1)
    jobs.queue(image_set=image_set_id)

    janitor.sweep(jobs.database, jobs.storage)

    assert jobs.storage.keys(object_keys.image_set_prefix(jobs.tenant_id, image_set_id)) == []


def test_the_source_of_an_import_is_deleted(jobs: Jobs) -> None:
    key = object_keys.checkpoint_source(jobs.tenant_id, jobs.checkpoint_id)
    jobs.storage.put(key, b"as uploaded", media_type="application/octet-stream")
    with jobs.database.transaction() as session:
        session.get_one(Checkpoint, jobs.checkpoint_id).source_key = key
        session.add(
            Job(
                id="job_" + "0" * 32,
                tenant_id=jobs.tenant_id,
                kind="import",
                queue="cpu.convert",
                checkpoint_id=jobs.checkpoint_id,
                request={},
                seed=0,
                status="failed",
                finished_at=datetime.now(UTC),
            )
        )

    janitor.sweep(jobs.database, jobs.storage)

    assert key not in jobs.storage.keys(object_keys.checkpoint_prefix(jobs.tenant_id, jobs.checkpoint_id))
    with jobs.database.transaction() as session:
        assert session.get_one(Checkpoint, jobs.checkpoint_id).source_key is None


def test_uploads_without_a_row_go_after_a_day(jobs: Jobs, storage: ObjectStorage) -> None:
    milliseconds = int((datetime.now(UTC) - timedelta(hours=25)).timestamp() * 1000)
    day_old = f"{milliseconds:012x}{uuid_utils.uuid7().hex[12:]}"
    new = uuid_utils.uuid7().hex
    old = {
        object_keys.image(jobs.tenant_id, f"imgs_{day_old}", 0),
        object_keys.classifier(jobs.tenant_id, f"clf_{day_old}"),
    }
    fresh = {
        object_keys.image(jobs.tenant_id, f"imgs_{new}", 0),
        object_keys.classifier(jobs.tenant_id, f"clf_{new}"),
    }
    known = {
        object_keys.image(jobs.tenant_id, jobs.image_set(), 0),
        object_keys.classifier(jobs.tenant_id, jobs.classifier()),
    }
    for key in old | fresh:
        storage.put(key, b"bytes", media_type="application/octet-stream")

    janitor.tidy(jobs.database, storage)

    left = set(storage.keys(object_keys.tenant_prefix(jobs.tenant_id)))
    assert not old & left
    assert fresh | known <= left


def test_idempotency_records_go_after_a_day(jobs: Jobs, storage: ObjectStorage) -> None:
    with jobs.database.transaction() as session:
        for key, hours in (("old", 25), ("young", 1)):
            made = func.now() - timedelta(hours=hours)
            fields = {"fingerprint": "", "status": 202, "headers": {}, "body": {}}
            session.add(
                IdempotencyRecord(
                    tenant_id=jobs.tenant_id, route="POST /jobs/forget", key=key, created_at=made, **fields
                )
            )

    janitor.tidy(jobs.database, storage)

    with jobs.database.transaction() as session:
        assert list(session.scalars(select(IdempotencyRecord.key))) == ["young"]
