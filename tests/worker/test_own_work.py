"""What a job works out and keeps for itself: there for its next attempt, the newest alone, and gone with the job."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from services import jobs as job_rows
from services import object_keys
from services.leases import Claim
from services.settings import Settings
from services.storage import ObjectStorage, StoredObject
from services.tenancy import Caller
from tests.worker.helpers import LONG, PATIENCE_SECONDS, Jobs, eventually
from worker import assets, janitor
from worker.assets import Asset, AssetKeeper
from worker.process import Malformed
from worker.supervisor import Supervisor

ASKED = {
    "method": "selective-amnesia",
    "target": {"class_label": 0, "where": "weights"},
    "replace_with": "noise",
}
PARTIAL = "partial-fisher"
GONE_SECONDS = 2.0  # a worker that does not wait has left by then


class Held(ObjectStorage):
    """A store that takes in what a job keeps for itself once it is let."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asked, self.let = threading.Event(), threading.Event()

    def put_file(self, key: str, path: Path, *, media_type: str = "application/octet-stream") -> StoredObject:
        """Wait with it."""
        if "/work/" in key:
            self.asked.set()
            assert self.let.wait(PATIENCE_SECONDS)
        return super().put_file(key, path, media_type=media_type)


@pytest.fixture
def held(settings: Settings) -> Iterator[Held]:
    """Such a store."""
    storage = Held(settings)
    yield storage
    storage.let.set()


@pytest.fixture
def told(jobs: Jobs, tmp_path: Path) -> Callable[[], dict[str, str]]:
    """The assets that the newest attempt was told of, as it could read them, by name."""

    def told() -> dict[str, str]:
        job: dict[str, Any] = json.loads((tmp_path / "job.json").read_text())
        return {name: job["_files"][path] for name, path in job["inputs"]["fisher"].items()}

    return told


@pytest.fixture
def queue(jobs: Jobs, tmp_path: Path) -> Callable[..., str]:
    """Queues a job that keeps these files for itself."""
    return lambda **asked: jobs.queue(asked=ASKED, keep_job=str(tmp_path / "job.json"), **asked)


def kept(jobs: Jobs, job_id: str) -> dict[str, bytes]:
    """What is in the store of a job's own, by name."""
    prefix = object_keys.work_prefix(jobs.tenant_id, job_id)
    return {key.removeprefix(prefix): jobs.storage.read(key) for key in jobs.storage.keys(prefix)}


def test_the_next_attempt_finds_the_newest_of_each_name(
    supervisor: Supervisor, jobs: Jobs, queue: Callable[..., str], told: Callable[[], dict[str, str]]
) -> None:
    job_id = queue(work={PARTIAL: ["little", "more", "most"], "examples-1": ["private"]}, die_at=2)

    outcomes = supervisor.run(job_id), supervisor.run(job_id)

    assert outcomes == ("queued", "succeeded")
    assert told() == {PARTIAL: "most", "examples-1": "private"}


def test_no_other_job_finds_it(
    supervisor: Supervisor, jobs: Jobs, queue: Callable[..., str], told: Callable[[], dict[str, str]]
) -> None:
    first = queue(work={"examples-1": ["private"]}, assets={"examples-2": "public"}, steps=1)
    supervisor.run(first)

    supervisor.run(queue(steps=1))

    assert kept(jobs, first) == {"examples-1.safetensors": b"private"}
    assert told() == {"examples-2": "public"}


def test_nothing_of_it_outlives_the_job(supervisor: Supervisor, jobs: Jobs, queue: Callable[..., str]) -> None:
    job_id = queue(work={PARTIAL: ["some"], "examples-1": ["private"]}, die_at=2)
    supervisor.run(job_id)
    between = kept(jobs, job_id)
    supervisor.run(job_id)

    janitor.sweep(jobs.database, jobs.storage)

    assert between.keys() == {f"{PARTIAL}.safetensors", "examples-1.safetensors"}
    assert kept(jobs, job_id) == {}
    assert all(key.startswith("attempts/") for key in jobs.keys(job_id))


def test_a_damaged_one_is_left_out(
    supervisor: Supervisor, jobs: Jobs, queue: Callable[..., str], told: Callable[[], dict[str, str]]
) -> None:
    job_id = queue(work={PARTIAL: ["some"], "examples-1": ["private"]}, die_at=2)
    supervisor.run(job_id)
    key = object_keys.work(jobs.tenant_id, job_id, PARTIAL)
    jobs.storage.put(key, b"sOme", media_type="application/octet-stream")

    supervisor.run(job_id)

    assert told() == {"examples-1": "private"}


def test_a_jobs_own_goes_before_what_others_left(
    supervisor: Supervisor,
    jobs: Jobs,
    queue: Callable[..., str],
    told: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = queue(work={PARTIAL: ["some"], "examples-1": ["private"]}, die_at=2)
    supervisor.run(job_id)
    supervisor.run(queue(assets={"examples-1": "public!", "examples-2": "public"}, steps=1))
    monkeypatch.setattr(assets, "FETCHED_BYTES", len("some") + len("private") + 1)

    supervisor.run(job_id)

    assert told() == {PARTIAL: "some", "examples-1": "private"}


# Leaving.


def test_a_draining_worker_waits_for_it(
    make_supervisor: Callable[..., Supervisor],
    jobs: Jobs,
    queue: Callable[..., str],
    held: Held,
    in_background: Callable[..., Future[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assets, "LEAVE_SECONDS", 0.0)
    job_id = queue(work_at_stop={PARTIAL: ["some"]}, **LONG)
    supervisor = make_supervisor(storage=held)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    supervisor.start_draining()
    assert held.asked.wait(PATIENCE_SECONDS)
    left, _ = wait([done], timeout=GONE_SECONDS)
    held.let.set()

    assert left == set()
    assert done.result(PATIENCE_SECONDS) == "queued"
    assert kept(jobs, job_id) == {f"{PARTIAL}.safetensors": b"some"}


def test_a_cancelled_job_waits_for_none(
    make_supervisor: Callable[..., Supervisor],
    jobs: Jobs,
    caller: Caller,
    queue: Callable[..., str],
    held: Held,
    in_background: Callable[..., Future[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assets, "LEAVE_SECONDS", 0.0)
    job_id = queue(work={PARTIAL: ["some"]}, **LONG)
    done = in_background(make_supervisor(storage=held), job_id)
    assert held.asked.wait(PATIENCE_SECONDS)

    with jobs.database.transaction() as session:
        job_rows.cancel(session, caller, job_id)

    assert done.result(PATIENCE_SECONDS) == "cancelled"


# On their way.


def test_one_that_is_overtaken_before_its_turn_is_skipped_and_each_file_is_taken_over(
    held: Held, jobs: Jobs, tmp_path: Path
) -> None:
    claim = Claim(
        job_id=jobs.queue(asked=ASKED), tenant_id=jobs.tenant_id, kind="forget", token=1, attempt=1,
        checkpoint_id=jobs.checkpoint_id, request={}, seed=0, resume=None, out_of_memory_losses=0,
    )  # fmt: skip
    files = [Asset(tmp_path / f"{number}", PARTIAL, own=True) for number in range(3)]
    written: list[str] = []
    for file in files:
        file.path.write_text(file.path.name)

    class Watching(Held):
        def put_file(self, key: str, path: Path, *, media_type: str = "application/octet-stream") -> StoredObject:
            written.append(path.name)
            return held.put_file(key, path, media_type=media_type)

    with AssetKeeper(Watching(held._settings), claim, going_on=lambda: True) as keeper:
        keeper.add(files[0])
        assert held.asked.wait(PATIENCE_SECONDS)
        keeper.add(files[1])
        keeper.add(files[2])
        waiting = not keeper.wait(0.0)
        held.let.set()
        assert keeper.wait(PATIENCE_SECONDS)

    assert waiting
    assert written == ["0", "2"]
    assert kept(jobs, claim.job_id) == {f"{PARTIAL}.safetensors": b"2"}
    assert not any(file.path.exists() for file in files)


@pytest.mark.parametrize(
    ("name", "path", "scope"),
    [
        ("fisher-1", "assets/fisher-1.safetensors", "job"),  # it would be written again while it is read
        ("fisher-1", "assets/fisher-1.1.safetensors", "checkpoint"),
        ("fisher-1", "assets/fisher-2.1.safetensors", "job"),
        ("fisher-1", "assets/fisher-1.x.safetensors", "job"),
        ("fisher-1", "assets/fisher-1.1234567890.safetensors", "job"),
        ("fisher-1", "assets/../assets/fisher-1.1.safetensors", "job"),
        ("fisher-1", "assets/fisher-1.1.safetensors\n", "job"),
        ("../fisher", "assets/../fisher.1.safetensors", "job"),
        ("fisher-1", "assets/fisher-1.safetensors", None),
        ("fisher-1", "assets/fisher-1.safetensors", "tenant"),
        ("fisher-1", "assets/fisher-1.9.safetensors", "job"),  # is not there
        ("fisher-1", None, "job"),
    ],
)
def test_an_odd_offer_is_refused(name: str, path: str | None, scope: str | None, tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    for there in ("fisher-1", "fisher-1.1", "fisher-2.1", "fisher-1.x", "fisher-1.1234567890"):
        (tmp_path / "assets" / f"{there}.safetensors").touch()

    with pytest.raises(Malformed):
        assets.offered({"type": "asset", "name": name, "path": path, "scope": scope}, tmp_path)


def test_an_offer_of_either_scope_is_taken(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    public, own = (tmp_path / "assets" / f"fisher-1{number}.safetensors" for number in ("", ".1"))
    public.touch()
    own.touch()

    taken = [
        assets.offered({"name": "fisher-1", "path": str(path.relative_to(tmp_path)), "scope": scope}, tmp_path)
        for path, scope in ((public, "checkpoint"), (own, "job"))
    ]

    assert taken == [Asset(public, "fisher-1", own=False), Asset(own, "fisher-1", own=True)]
