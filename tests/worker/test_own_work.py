"""What a job works out and keeps for itself: there for its next attempt, the newest alone, and gone with the job."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services import jobs as job_rows
from services import object_keys
from services.leases import Claim
from services.settings import Settings
from services.storage import PART_BYTES, ObjectStorage, StoredObject
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
    """A store that takes in what a job keeps for itself once it is let, whatever has happened since it was sent."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asked, self.let, self.landed = threading.Event(), threading.Event(), threading.Event()

    def put_file(self, key: str, path: Path, **_: Any) -> StoredObject:
        """Wait with it, if it is the job's own."""
        if "/state/own/" not in key:
            return super().put_file(key, path)
        body = path.read_bytes()
        self.asked.set()
        assert self.let.wait(PATIENCE_SECONDS)
        stored = self.put(key, body, media_type="application/octet-stream")
        self.landed.set()
        return stored


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
    prefix = object_keys.own_prefix(jobs.tenant_id, job_id)
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
    key = object_keys.own(jobs.tenant_id, job_id, PARTIAL)
    jobs.storage.put(key, b"sOme", media_type="application/octet-stream")

    supervisor.run(job_id)

    assert told() == {"examples-1": "private"}


def test_a_jobs_own_goes_before_what_others_left_and_a_beginning_beside_both(
    supervisor: Supervisor,
    jobs: Jobs,
    queue: Callable[..., str],
    told: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = queue(work={"examples-1": ["private"], PARTIAL: ["some"], "partial-examples": ["of it"]}, die_at=2)
    supervisor.run(job_id)
    supervisor.run(queue(assets={"examples-1": "public!", "examples-2": "public", "examples-3": "public"}, steps=1))
    monkeypatch.setattr(assets, "FETCHED_BYTES", len("private") + len("public") + 1)
    monkeypatch.setattr(assets, "PARTIAL_BYTES", len("some") + len("of it"))

    supervisor.run(job_id)

    newest = told()
    assert newest.pop("examples-3", None) or newest.pop("examples-2") == "public"  # of one second
    assert newest == {PARTIAL: "some", "partial-examples": "of it", "examples-1": "private"}


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


def test_a_cancelled_job_waits_for_none_and_nothing_lands_behind_it(
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
    ended = done.result(PATIENCE_SECONDS)
    janitor.sweep(jobs.database, jobs.storage)
    held.let.set()

    assert ended == "cancelled"
    assert held.landed.wait(PATIENCE_SECONDS)
    eventually(lambda: jobs.keys(job_id) == [], what="it is erased")


# On their way.


@dataclass
class Sending:
    """A keeper of some files, and the store that they go to, of which each part is told."""

    jobs: Jobs
    storage: Watched
    folder: Path
    may_save: bool = True
    leaving: bool = False
    files: list[Asset] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.claim = Claim(
            job_id=self.jobs.queue(asked=ASKED), tenant_id=self.jobs.tenant_id, kind="forget", token=1, attempt=1,
            checkpoint_id=self.jobs.checkpoint_id, request={}, seed=0, resume=None, out_of_memory_losses=0,
        )  # fmt: skip

    def keeper(self) -> AssetKeeper:
        """One of them."""
        return AssetKeeper(
            self.jobs.database,
            self.storage,
            self.claim,
            going_on=lambda: self.may_save,
            leaving=lambda: self.leaving,
        )

    def file(self, name: str, *, own: bool = True, parts: int = 0) -> Asset:
        """One of a few bytes, or of so many parts and these."""
        number = len(self.files)
        path = self.folder / str(number)
        path.write_bytes(bytes(parts * PART_BYTES) + b"%d" % number)
        self.files.append(Asset(path, name, own=own))
        return self.files[-1]

    @property
    def kept(self) -> dict[str, str]:
        """What the store has of the job's own, by its last byte."""
        return {
            name.removesuffix(".safetensors"): body[-1:].decode()
            for name, body in kept(self.jobs, self.claim.job_id).items()
        }

    @property
    def unfinished(self) -> list[tuple[str, str]]:
        """What has been begun, and neither finished nor dropped."""
        return self.storage.unfinished(object_keys.job_prefix(self.jobs.tenant_id, self.claim.job_id))


class Watched(ObjectStorage):
    """A store that says what it is asked to take, and as the first file begins to arrive lets somebody act."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asked: list[str] = []
        self.taken: list[str] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def put_file(self, key: str, path: Path, *, going_on: Callable[[], bool], **facts: Any) -> StoredObject:  # type: ignore[override]  # all of them are asked
        """Tell."""
        self.asked.append(path.name)
        asked = itertools.count()

        def and_then() -> bool:
            if next(asked) == 1:  # the first time that bytes have left
                self._act()
            return going_on()

        stored = super().put_file(key, path, going_on=and_then, **facts)
        self.taken.append(path.name)
        return stored

    def put_file_once(self, key: str, path: Path, between: Callable[[], object] = lambda: None) -> StoredObject:
        """Tell."""
        self.asked.append(path.name)

        def act_and_then() -> None:
            self._act()
            between()

        stored = super().put_file_once(key, path, act_and_then)
        self.taken.append(path.name)
        return stored

    def _act(self) -> None:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()


@pytest.fixture
def sending(jobs: Jobs, settings: Settings, tmp_path: Path) -> Sending:
    """Files that are about to be sent."""
    return Sending(jobs, Watched(settings), tmp_path)


def test_one_that_is_overtaken_before_its_turn_is_skipped_and_each_file_is_taken_over(sending: Sending) -> None:
    first, second, third = (sending.file(PARTIAL, parts=2 - number) for number in range(3))

    with sending.keeper() as keeper:

        def twice() -> None:
            keeper.add(second)
            keeper.add(third)

        sending.storage.meanwhile = twice
        keeper.add(first)
        assert keeper.wait(PATIENCE_SECONDS)

    # The first was on its way: were it given up, one that takes longer than the next save would never arrive.
    assert sending.storage.taken == sending.storage.asked == ["0", "2"]
    assert sending.kept == {PARTIAL: "2"}
    assert not any(file.path.exists() for file in sending.files)


def test_a_leaving_worker_gives_up_what_is_overtaken(sending: Sending, caplog: pytest.LogCaptureFixture) -> None:
    sending.leaving = True
    first, second = sending.file(PARTIAL, parts=3), sending.file(PARTIAL, parts=1)

    with sending.keeper() as keeper, caplog.at_level(logging.INFO, "worker.assets"):
        sending.storage.meanwhile = lambda: keeper.add(second)
        keeper.add(first)
        assert keeper.wait(PATIENCE_SECONDS)

    assert (sending.storage.asked, sending.storage.taken) == (["0", "1"], ["1"])
    assert sending.kept == {PARTIAL: "1"}
    assert sending.unfinished == []
    assert [record.levelname for record in caplog.records] == ["INFO"]  # of the second, and nothing is lost


def test_a_leaving_workers_own_goes_before_the_rest_of_what_others_can_use(sending: Sending) -> None:
    big, other, own = (
        sending.file("fisher-1", own=False, parts=2),
        sending.file("fisher-2", own=False),
        sending.file(PARTIAL),
    )

    with sending.keeper() as keeper:

        def leave() -> None:
            keeper.add(other)
            keeper.add(own)
            sending.leaving = True

        sending.storage.meanwhile = leave
        keeper.add(big)
        assert keeper.wait(PATIENCE_SECONDS)

    assert sending.storage.asked == ["0", "2", "1"]
    assert sending.storage.taken == ["2", "0", "1"]
    assert sending.kept == {PARTIAL: "2"}
    prefix = object_keys.assets_prefix(sending.jobs.tenant_id, sending.jobs.checkpoint_id)
    assert [key.removeprefix(prefix) for key in sending.storage.keys(prefix)] == [
        "fisher-1.safetensors",
        "fisher-2.safetensors",
    ]


def test_what_may_no_longer_be_saved_is_dropped_between_two_parts(sending: Sending) -> None:
    def lose() -> None:
        sending.may_save = False

    sending.storage.meanwhile = lose

    with sending.keeper() as keeper:
        keeper.add(sending.file(PARTIAL, parts=3))
        assert keeper.wait(PATIENCE_SECONDS)

    assert sending.kept == {}
    assert sending.unfinished == []


def test_one_that_was_replaced_while_it_was_read_is_left_where_it_is(sending: Sending, tmp_path: Path) -> None:
    key = object_keys.own(sending.claim.tenant_id, sending.claim.job_id, PARTIAL)
    sending.storage.put(key, b"not what its digest says", media_type="application/octet-stream")

    fetched = assets.fetch(sending.storage, sending.claim, tmp_path, going_on=lambda: True)

    assert fetched == {}
    assert sending.storage.keys(key) == [key]


def test_what_a_stale_attempt_has_written_stays_while_the_job_lives(sending: Sending) -> None:
    """There may be something newer in its place."""

    class Late(Watched):
        def put_file_while(self, key: str, path: Path, going_on: Callable[[], bool]) -> StoredObject | None:
            sending.may_save = False  # the lease was lost
            return self.put(key, path.read_bytes(), media_type="application/octet-stream")

    sending.storage = Late(sending.storage._settings)
    with sending.keeper() as keeper:
        keeper.add(sending.file(PARTIAL))
        assert keeper.wait(PATIENCE_SECONDS)

    assert sending.kept == {PARTIAL: "0"}


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
