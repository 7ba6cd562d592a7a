"""What a job learned of its checkpoint: kept once, fetched by the next job of it, and gone with the checkpoint."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uuid_utils
from sqlalchemy import delete

from services import object_keys
from services import storage as storage_module
from services.database import Database
from services.settings import Settings
from services.storage import PART_BYTES, ObjectStorage, Stopped, file_sha256
from services.tables import Checkpoint
from services.tenancy import Caller
from tests.worker.helpers import Jobs
from worker import assets, janitor
from worker.supervisor import Supervisor

ASKED = {
    "method": "selective-amnesia",
    "target": {"class_label": 0, "where": "weights"},
    "replace_with": "noise",
}
KNOWN = {"inputs/fisher/fisher-1.safetensors": "squares"}


@pytest.fixture
def learns(supervisor: Supervisor, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a job that sends these assets; gives its ``job.json``, with the files that it found."""

    def run(jobs: Jobs, asked: dict[str, Any] = ASKED, by: Supervisor = supervisor, **sent: str) -> dict[str, Any]:
        path = tmp_path / "job.json"
        job_id = jobs.queue(asked=asked, keep_job=str(path), steps=1, assets={**sent})
        assert by.run(job_id) == "succeeded", jobs.row(job_id).problem
        job: dict[str, Any] = json.loads(path.read_text())
        return job

    return run


def kept(jobs: Jobs) -> dict[str, bytes]:
    """What is in the store beside the checkpoint, by name."""
    prefix = object_keys.assets_prefix(jobs.tenant_id, jobs.checkpoint_id)
    return {key.removeprefix(prefix): jobs.storage.read(key) for key in jobs.storage.keys(prefix)}


def found(job: dict[str, Any]) -> dict[str, str]:
    """The assets that a job was told of, as it could read them."""
    files = {path: text for path, text in job["_files"].items() if path.startswith("inputs/fisher/")}
    assert set(job["inputs"]["fisher"].values()) == files.keys()
    assert all(path == f"inputs/fisher/{name}.safetensors" for name, path in job["inputs"]["fisher"].items())
    return files


def test_next_job_of_the_checkpoint_finds_it(learns: Callable[..., dict[str, Any]], jobs: Jobs) -> None:
    first = learns(jobs, **{"fisher-1": "squares"})

    second = learns(jobs)

    assert found(first) == {}
    assert kept(jobs) == {"fisher-1.safetensors": b"squares"}
    assert found(second) == KNOWN


def test_second_writer_of_a_name_changes_nothing(learns: Callable[..., dict[str, Any]], jobs: Jobs) -> None:
    learns(jobs, **{"fisher-1": "squares"})

    learns(jobs, **{"fisher-1": "other squares", "fisher-2": "more"})

    assert kept(jobs) == {"fisher-1.safetensors": b"squares", "fisher-2.safetensors": b"more"}


def test_another_checkpoint_has_none_of_it(
    learns: Callable[..., dict[str, Any]], jobs: Jobs, database: Database, storage: ObjectStorage, caller: Caller
) -> None:
    learns(jobs, **{"fisher-1": "squares"})
    other = Jobs(database, storage, caller, jobs.trace_path)

    assert found(learns(other)) == {}


def test_methods_that_know_nothing_of_assets_get_none(learns: Callable[..., dict[str, Any]], jobs: Jobs) -> None:
    learns(jobs, **{"fisher-1": "squares"})

    job = learns(jobs, {"method": "class-taming", "target": ASKED["target"]})

    assert "fisher" not in job["inputs"]


def test_damaged_one_is_left_out_and_written_anew(
    learns: Callable[..., dict[str, Any]], jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    learns(jobs, **{"fisher-1": "squares", "fisher-2": "more"})
    key = object_keys.asset(jobs.tenant_id, jobs.checkpoint_id, "fisher-2")
    jobs.storage.put(key, b"mOre", media_type="application/octet-stream")

    with caplog.at_level(logging.WARNING, "worker.assets"):
        job = learns(jobs, **{"fisher-2": "more"})

    assert found(job) == KNOWN
    assert "left out (damaged)" in caplog.text
    assert kept(jobs) == {"fisher-1.safetensors": b"squares", "fisher-2.safetensors": b"more"}


def test_foreign_object_beside_the_assets_is_not_fetched(learns: Callable[..., dict[str, Any]], jobs: Jobs) -> None:
    prefix = object_keys.assets_prefix(jobs.tenant_id, jobs.checkpoint_id)
    jobs.storage.put(prefix + "unmarked.safetensors", b"x", media_type="application/octet-stream")
    for name in ("odd name.safetensors", "folder/fisher-1.safetensors", "fisher-1.json"):
        jobs.storage.put(prefix + name, b"x", media_type="application/octet-stream")

    assert found(learns(jobs)) == {}


def test_one_that_goes_away_meanwhile_is_left_out(
    learns: Callable[..., dict[str, Any]],
    jobs: Jobs,
    settings: Settings,
    make_supervisor: Callable[..., Supervisor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    learns(jobs, **{"fisher-1": "squares"})

    class Forgetful(ObjectStorage):
        """A store that lists what somebody has just erased."""

        def newest(self, prefix: str) -> list[tuple[str, int]]:
            return [*super().newest(prefix), (f"{prefix}gone.safetensors", 7)]

    with caplog.at_level(logging.WARNING, "worker.assets"):
        job = learns(jobs, by=make_supervisor(storage=Forgetful(settings)))

    assert found(job) == KNOWN
    assert "left out (KeyError)" in caplog.text


def test_no_more_is_fetched_than_there_is_room_for(
    learns: Callable[..., dict[str, Any]], jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    learns(jobs, **{f"fisher-{number}": "squares" for number in range(12)})
    everything = found(learns(jobs))
    monkeypatch.setattr(assets, "FETCHED_BYTES", 3 * len("squares") + 1)

    newest = found(learns(jobs))

    assert len(everything) == 12
    assert newest.keys() <= everything.keys()
    assert len(newest) == 3


@pytest.mark.parametrize("name", ["Fisher", "a/b", "", "a" * 121, "other"])
def test_odd_asset_breaks_the_runners_contract(supervisor: Supervisor, jobs: Jobs, name: str) -> None:
    job_id = jobs.queue(asked=ASKED, steps=1, assets={"fisher-1": "squares"}, asset_name=name)

    assert supervisor.run(job_id) == "failed"

    assert "odd asset" in (jobs.row(job_id).problem or {})["detail"]
    assert kept(jobs) == {}


def test_upload_that_fails_costs_the_reuse_and_not_the_job(
    make_supervisor: Callable[..., Supervisor], jobs: Jobs, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(ObjectStorage):
        """A store that has no room for assets."""

        def put_file_once(self, key: str, path: Path, between: Callable[[], object] = lambda: None) -> Any:
            raise OSError(28, f"no room for {key} of {path}")

    job_id = jobs.queue(asked=ASKED, steps=1, assets={"fisher-1": "squares"})

    with caplog.at_level(logging.ERROR, "worker.assets"):
        outcome = make_supervisor(storage=Full(settings)).run(job_id)

    assert outcome == "succeeded"
    assert "an asset was not kept" in caplog.text
    assert kept(jobs) == {}


# The store.


@pytest.mark.parametrize("size", [0, 7, PART_BYTES - 1, PART_BYTES, 2 * PART_BYTES + 1])
def test_file_that_somebody_wants_is_there_whatever_its_size(storage: ObjectStorage, tmp_path: Path, size: int) -> None:
    key = f"tenants/while/{size}"
    (tmp_path / "file").write_bytes(b"a" * size)
    storage.put(key, b"what was there", media_type="text/plain")

    with pytest.raises(Stopped):
        storage.put_file(key, tmp_path / "file", going_on=lambda: False)
    before = storage.read(key)
    stored = storage.put_file(key, tmp_path / "file", going_on=lambda: True)

    assert before == b"what was there"
    assert stored.bytes == size
    assert storage.fetch(key, tmp_path / "copy") == stored.sha256 == file_sha256(tmp_path / "file")
    assert (tmp_path / "copy").read_bytes() == b"a" * size


@pytest.mark.parametrize("looks", [1, 2, 10])
def test_file_that_nobody_wants_any_more_leaves_nothing(storage: ObjectStorage, tmp_path: Path, looks: int) -> None:
    key = f"tenants/dropped/{looks}"
    (tmp_path / "file").write_bytes(bytes(3 * PART_BYTES))
    asked = itertools.count()

    with pytest.raises(Stopped):
        storage.put_file(key, tmp_path / "file", going_on=lambda: next(asked) < looks)

    assert storage.keys(key) == []
    assert storage.unfinished(key) == []


@pytest.mark.parametrize("size", [0, 7, PART_BYTES + 1])
def test_file_is_written_once_whatever_its_size(
    storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(storage_module, "PARALLEL_FROM_BYTES", PART_BYTES)
    key = f"tenants/once/{size}"
    for name, byte in (("first", b"a"), ("second", b"b")):
        (tmp_path / name).write_bytes(byte * size)

    stored = storage.put_file_once(key, tmp_path / "first")
    with pytest.raises(FileExistsError):
        storage.put_file_once(key, tmp_path / "second")

    assert stored.bytes == size
    assert storage.unfinished(key) == []
    assert storage.fetch(key, tmp_path / "copy") == stored.sha256 == file_sha256(tmp_path / "first")
    assert (tmp_path / "copy").read_bytes() == b"a" * size


# The janitor.


def test_janitor_leaves_them_as_long_as_their_checkpoint_is_there(jobs: Jobs, tmp_path: Path) -> None:
    milliseconds = int((datetime.now(UTC) - timedelta(days=9)).timestamp() * 1000)
    old = f"ckpt_{milliseconds:012x}{uuid_utils.uuid7().hex[12:]}"
    row = Checkpoint(id=old, tenant_id=jobs.tenant_id, name="", declared={}, source_bytes=1, source_sha256="")
    with jobs.database.transaction() as session:
        session.add(row)
    (tmp_path / "file").write_bytes(b"squares")
    key = object_keys.asset(jobs.tenant_id, old, "fisher-1")
    jobs.storage.put_file_once(key, tmp_path / "file")

    janitor.tidy(jobs.database, jobs.storage)
    before = jobs.storage.keys(key)
    with jobs.database.transaction() as session:
        session.execute(delete(Checkpoint).where(Checkpoint.id == old))
    janitor.tidy(jobs.database, jobs.storage)

    assert before == [key]
    assert jobs.storage.keys(key) == []


def test_jobs_of_the_checkpoint_end_without_them(learns: Callable[..., dict[str, Any]], jobs: Jobs) -> None:
    learns(jobs, **{"fisher-1": "squares"})

    janitor.sweep(jobs.database, jobs.storage)

    assert kept(jobs) == {"fisher-1.safetensors": b"squares"}
