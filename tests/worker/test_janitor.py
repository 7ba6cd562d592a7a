"""What must be gone: states, lost attempts, the images of people, uploads that nobody finished."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import uuid_utils
from botocore.exceptions import ClientError
from sqlalchemy import func, make_url, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from services import image_sets, object_keys, tenancy
from services.database import Database
from services.errors import ImageSetErased
from services.ids import new_id
from services.storage import ObjectStorage
from services.tables import AuditEvent, Checkpoint, IdempotencyRecord, ImageSet, Job
from tests.worker.helpers import PATIENCE_SECONDS, Jobs, eventually
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
        object_keys.own(jobs.tenant_id, job_id, "partial-fisher"),
        object_keys.attempt_prefix(jobs.tenant_id, job_id, 999_999) + "tamed.safetensors",
    ):
        jobs.storage.put(key, b"of a zombie", media_type="application/octet-stream")


def end(jobs: Jobs, *job_ids: str, ago: timedelta = timedelta()) -> None:
    """End jobs without a runner; what was swept is swept right after."""
    ended = {"status": "failed", "finished_at": func.clock_timestamp() - ago}
    with jobs.database.transaction() as session:
        session.execute(update(Job).where(Job.id.in_(job_ids)).values(**ended))
        session.execute(
            update(Job).where(Job.id.in_(job_ids), Job.swept_at.is_not(None)).values(swept_at=Job.finished_at)
        )


def test_what_a_stale_attempt_writes_behind_the_sweep_goes_after_two_days(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=1)
    assert supervisor.run(job_id) == "succeeded"
    janitor.sweep(jobs.database, jobs.storage)
    published = jobs.keys(job_id)
    late_state(jobs, job_id)
    with jobs.database.transaction() as session:
        past = {name: getattr(Job, name) - timedelta(days=2) for name in ("finished_at", "swept_at")}
        session.execute(update(Job).where(Job.id == job_id).values(**past))

    janitor.tidy(jobs.database, jobs.storage)

    assert jobs.keys(job_id) == published


def test_a_job_is_swept_at_its_end_and_two_days_later_and_never_else(jobs: Jobs) -> None:
    store = Store(jobs)
    job_id = jobs.queue()

    swept = []
    for days in (0, 1.9, 2):
        end(jobs, job_id, ago=timedelta(days=days))
        janitor.sweep(jobs.database, store)
        janitor.tidy(jobs.database, store)
        janitor.tidy(jobs.database, store)
        swept.append(len([prefix for prefix in store.erased if job_id in prefix]))

    assert swept == [1, 1, 2]


def test_an_import_s_checkpoint_changes_no_more_once_its_source_is_gone(jobs: Jobs) -> None:
    end(jobs, jobs.queue(kind="import", queue="cpu"))
    with jobs.database.transaction() as session:
        session.get_one(Checkpoint, jobs.checkpoint_id).source_key = "source"

    versions = []
    for _ in range(3):
        janitor.sweep(jobs.database, jobs.storage)
        janitor.tidy(jobs.database, jobs.storage, stale=timedelta())
        with jobs.database.transaction() as session:
            versions.append(session.get_one(Checkpoint, jobs.checkpoint_id).version)

    assert versions == [2, 2, 2]


# A store that refuses, or hangs, keeps nobody else waiting.


class Store(ObjectStorage):
    """Notes what is erased; refuses what names one of ``refused``; waits where it has a gate."""

    def __init__(self, jobs: Jobs, *refused: str, gate: threading.Event | None = None) -> None:
        super().__init__(jobs.storage._settings)
        self.refused, self.gate, self.erased, self.begun = refused, gate, list[str](), threading.Event()

    def erase(self, prefix: str) -> int:
        self.erased.append(prefix)
        if any(name in prefix for name in self.refused):
            raise RuntimeError("refused")
        self.begun.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_SECONDS)
        return super().erase(prefix)


def test_sets_whose_erasure_is_refused_hold_up_no_other(jobs: Jobs) -> None:
    refused = [jobs.image_set(hours=-1) for _ in range(janitor.SETS_AT_ONCE)]
    others = [jobs.image_set(hours=-1) for _ in range(2)]

    janitor.sweep(jobs.database, Store(jobs, *refused))

    with jobs.database.transaction() as session:
        left = set(session.scalars(select(ImageSet.id).where(ImageSet.erased_at.is_(None))))
    assert left == set(refused)
    assert not set(others) & left


def test_jobs_whose_sweep_is_refused_hold_up_no_other(jobs: Jobs) -> None:
    refused = [jobs.queue() for _ in range(janitor.SWEEP_AT_ONCE)]
    end(jobs, *refused)
    other = jobs.queue()
    end(jobs, other)

    janitor.sweep(jobs.database, Store(jobs, *refused))

    assert jobs.row(other).swept_at is not None
    assert all(jobs.row(job_id).swept_at is None for job_id in refused)


def test_people_s_images_wait_for_no_job_that_is_refused(jobs: Jobs) -> None:
    refused = [jobs.queue() for _ in range(2)]
    end(jobs, *refused)
    due = jobs.image_set(hours=-1)
    store = Store(jobs, *refused)

    janitor.sweep(jobs.database, store)

    assert due in store.erased[0]
    assert all(sum(name in prefix for prefix in store.erased) == 1 for name in (due, *refused))


@pytest.mark.parametrize("kind", ["job", "set"])
def test_a_row_that_the_database_refuses_holds_up_no_other(
    kind: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_ids, sets = [jobs.queue() for _ in range(2)], [jobs.image_set(hours=-1) for _ in range(2)]
    for job_id in job_ids:
        end(jobs, job_id)
    bad = {"job": job_ids, "set": sets}[kind][0]

    def refusing(work: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(session: Session, *given: Any, **more: Any) -> Any:
            if any(getattr(it, "id", it) == bad for it in given):
                session.execute(text("SELECT 1 / 0"))
            return work(session, *given, **more)

        return refuse

    monkeypatch.setattr(image_sets, "condemn", refusing(image_sets.condemn))
    monkeypatch.setattr(image_sets, "erase", refusing(image_sets.erase))

    janitor.sweep(jobs.database, jobs.storage)

    with jobs.database.transaction() as session:
        erased = set(session.scalars(select(ImageSet.id).where(ImageSet.erased_at.is_not(None))))
    done = {job_id for job_id in job_ids if jobs.row(job_id).swept_at is not None} | (erased & set(sets))
    assert done == {*job_ids, *sets} - {bad}


def test_a_database_that_is_away_ends_the_turn(jobs: Jobs, database_url: str) -> None:
    away = Database(make_url(database_url).set(port=9).render_as_string(hide_password=False))

    with pytest.raises(OperationalError):
        janitor.sweep(away, jobs.storage)


def test_uploads_whose_removal_is_refused_hold_up_no_other(jobs: Jobs) -> None:
    with jobs.database.transaction() as session:
        tenants = [jobs.tenant_id, tenancy.create_key(session, tenant="another", name="test").tenant_id]
    refused, *others = keys = [object_keys.image(tenant, new_id("imgs"), 0) for tenant in tenants for _ in range(2)]
    for key in keys:
        jobs.storage.put(key, b"x", media_type="image/png")

    janitor.tidy(jobs.database, Store(jobs, refused.rsplit("/", 1)[0]), unfinished=timedelta(days=-1))

    assert [key for key in keys if jobs.storage.keys(key)] == [refused]
    assert len(others) == 3


def test_a_write_that_another_control_loop_drops_first_is_none(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.multipart.begin("tenants/a/b")
    drop = storage._client.abort_multipart_upload

    def second(**asked: str) -> object:
        drop(**asked)
        raise ClientError({"Error": {"Code": "NoSuchUpload"}}, "AbortMultipartUpload")  # as stores answer, but not all

    monkeypatch.setattr(storage._client, "abort_multipart_upload", second)

    assert storage.abort_unfinished("tenants/a/", older_than=timedelta(days=-1)) == 0
    assert storage.unfinished("tenants/a/") == []


def test_a_write_that_may_not_be_dropped_holds_up_nothing_else(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [object_keys.checkpoint_source(jobs.tenant_id, new_id("ckpt")) for _ in range(3)]
    for key in keys:
        jobs.storage.multipart.begin(key)
    orphan = object_keys.image(jobs.tenant_id, new_id("imgs"), 0)
    jobs.storage.put(orphan, b"x", media_type="image/png")
    drop = jobs.storage._client.abort_multipart_upload

    def refuse(**asked: str) -> object:
        if asked["Key"] == keys[0]:
            raise ClientError({"Error": {"Code": "AccessDenied"}}, "AbortMultipartUpload")
        return drop(**asked)

    monkeypatch.setattr(jobs.storage._client, "abort_multipart_upload", refuse)
    janitor.tidy(jobs.database, jobs.storage, unfinished=timedelta(days=-1))

    assert [key for key, _ in jobs.storage.unfinished("tenants/")] == [keys[0]]
    assert jobs.storage.keys(orphan) == []


@pytest.fixture
def hanging(jobs: Jobs) -> Iterator[Callable[[], Callable[[], None]]]:
    """Starts a sweep that waits for the store, until what this gives is called or the test is over."""
    gate = threading.Event()
    store = Store(jobs, gate=gate)
    sweeps = threading.Thread(target=lambda: janitor.sweep(jobs.database, store))

    def finish() -> None:
        gate.set()
        sweeps.join(PATIENCE_SECONDS)

    def start() -> Callable[[], None]:
        sweeps.start()
        assert store.begun.wait(PATIENCE_SECONDS)
        return finish

    yield start
    finish()


def test_no_row_is_locked_while_the_store_deletes_and_no_row_is_done_twice(
    jobs: Jobs, hanging: Callable[[], Callable[[], None]]
) -> None:
    first, second = jobs.queue(asked={"target": {}}), jobs.queue(asked={"target": {}})
    end(jobs, first)
    end(jobs, second)
    hanging()

    other = Store(jobs)
    janitor.sweep(jobs.database, other)

    assert {prefix for prefix in other.erased if first in prefix} == set()
    assert jobs.row(second).swept_at is not None
    with jobs.database.transaction() as session:
        session.execute(select(Job.id).where(Job.id == first).with_for_update(nowait=True))


def test_a_set_that_is_being_erased_is_its_owner_s_to_erase_and_no_new_job_s(
    jobs: Jobs, hanging: Callable[[], Callable[[], None]]
) -> None:
    image_set_id = jobs.image_set()
    end(jobs, jobs.queue(image_set=image_set_id))
    finish = hanging()

    with jobs.database.transaction() as session:
        session.execute(text("SET LOCAL lock_timeout = '1s'"))
        with pytest.raises(ImageSetErased):
            image_sets.live(session, jobs.tenant_id, image_set_id, pointer="/target")
        row = image_sets.erase_now(session, jobs.storage, jobs.caller, image_set_id)
    finish()

    assert row.erased_at is not None
    assert erasures(jobs) == [(image_set_id, "asked by its owner")]


def erasures(jobs: Jobs) -> list[tuple[str, str]]:
    """What the audit trail says of sets, and why they went."""
    erased = select(AuditEvent).where(AuditEvent.action == "image_set.erased")
    with jobs.database.transaction() as session:
        return sorted((event.subject, event.data["why"]) for event in session.scalars(erased))


def test_an_erasure_is_recorded_once_and_says_why(jobs: Jobs) -> None:
    used, expired = jobs.image_set(), jobs.image_set(hours=-1)
    end(jobs, jobs.queue(image_set=used))

    janitor.sweep(jobs.database, Store(jobs, used, expired))  # refused at first
    janitor.sweep(jobs.database, jobs.storage)
    janitor.sweep(jobs.database, jobs.storage)

    assert erasures(jobs) == sorted([(used, "job ended"), (expired, "expired")])


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
                queue="cpu",
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


def test_jobs_that_ended_at_the_same_moment_are_all_swept(jobs: Jobs) -> None:
    ids = [jobs.queue() for _ in range(3)]
    with jobs.database.transaction() as session:
        ended = {"status": "failed", "finished_at": datetime.now(UTC)}
        session.execute(update(Job).where(Job.id.in_(ids)).values(**ended))

    janitor.sweep(jobs.database, jobs.storage)

    assert all(jobs.row(job_id).swept_at is not None for job_id in ids)
