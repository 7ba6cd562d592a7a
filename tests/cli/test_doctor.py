"""``forgetd doctor``: each fault is found, told with what mends it, and nothing else is."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from alembic import command
from sqlalchemy import make_url, text, update
from sqlalchemy.dialects.postgresql import insert

from cli.exits import ExitCode
from services import dispatch
from services.database import Database
from services.migrations import alembic_config
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import ImageSet, Job, ProcessCounters, Tenant
from services.tenancy import Caller
from tests.cli.gpus import torch_that_sees
from tests.cli.here import forgetd_here
from tests.cli.processes import Up, forgetd
from tests.worker.helpers import Jobs
from worker import control
from worker.celery_app import make_app

AGO = datetime.now(UTC) - timedelta(hours=2)
HALF_A_MINUTE = 30.0  # seconds, as it promises; its own limits are 20 s, and then 5 s


@dataclass(frozen=True)
class Told:
    """What the doctor said."""

    code: int
    output: str
    findings: list[dict[str, str]]

    def of(self, check: str) -> tuple[str, str, str]:
        """State, line and remedy of a check: the worst, where it has several."""
        found = [one for one in self.findings if one["check"] == check]
        worst = max(found, key=lambda one: ("ok", "warning", "wrong").index(one["state"]))
        return worst["state"], worst["says"], worst["mend"]

    @property
    def amiss(self) -> dict[str, str]:
        """Every check that is not ok, with its state."""
        return {one["check"]: one["state"] for one in self.findings if one["state"] != "ok"}


@pytest.fixture
def torch(tmp_path: Path) -> dict[str, str]:
    """A torch without a GPU, quickly loaded."""
    return torch_that_sees(tmp_path, [])


@pytest.fixture
def jobs(database: Database, storage: ObjectStorage, caller: Caller, tmp_path: Path) -> Jobs:
    """A tenant with a ready checkpoint, who queues jobs."""
    return Jobs(database, storage, caller, tmp_path / "trace")


@pytest.fixture
def works(database: Database) -> Database:
    """A service at work: a control loop and workers on every queue have said so, some seconds ago."""
    with database.transaction() as session:
        session.execute(insert(ProcessCounters).values(process="control-1", kind="control", samples={}))
        for queue in ("gpu.flow", "gpu.diffusion", "cpu"):
            dispatch.see_worker(session, "elsewhere-1-abcdef", [queue], 1)
    return database


@pytest.fixture
def doctor(environment: dict[str, str], torch: dict[str, str], works: Database, tmp_path: Path) -> Callable[..., Told]:
    """Asks the doctor about a service at work, some of its variables changed or, with None, taken away."""

    def ask(**changes: str | None) -> Told:
        named = {f"FORGETD_{name.upper()}": value for name, value in changes.items()}
        env = {name: value for name, value in (environment | torch | named).items() if value is not None}
        done = forgetd_here("doctor", "--json", cwd=tmp_path, env=env)
        return Told(done.code, done.out + done.err, [json.loads(line) for line in done.out.splitlines()])

    return ask


def test_a_service_at_work_has_nothing_wrong_and_is_left_as_it_was(
    doctor: Callable[..., Told], works: Database, storage: ObjectStorage
) -> None:
    told = doctor()

    assert told.code == ExitCode.OK
    assert told.amiss == {"database autovacuum": "warning"}  # which the servers of tests are without
    assert {"store conditional writes", "store parts", "store links", "store deletion", "broker memory"} <= {
        one["check"] for one in told.findings
    }
    assert storage.keys("doctor/") == []
    assert storage.unfinished("doctor/") == []


def test_a_person_is_told_the_command_that_mends(
    environment: dict[str, str], torch: dict[str, str], tmp_path: Path
) -> None:
    done = forgetd("doctor", cwd=tmp_path, env=environment | torch)  # as a process

    assert done.code == ExitCode.FAILURE
    assert "wrong    control loop" in done.out
    assert "control loop: Start one: python -m worker.control" in done.out
    assert "1 wrong" in done.err


def test_everything_at_once_may_be_broken(torch: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir(mode=0o755)
    done = forgetd_here(
        *("doctor", "--json"),
        cwd=tmp_path,
        env=torch
        | {
            "FORGETD_DATABASE_URL": "postgresql+psycopg://someone:hush1@127.0.0.1:1/none",
            "FORGETD_BROKER_URL": "redis://:hush2@127.0.0.1:1/0",
            "FORGETD_S3_ENDPOINT_URL": "http://127.0.0.1:1",
            "FORGETD_S3_ACCESS_KEY": "hush3",
            "FORGETD_S3_SECRET_KEY": "hush4",
            "FORGETD_RING_SECONDS": "soon",
            "FORGETD_SCRATCH_DIR": str(tmp_path / "scratch"),
        },
    )

    told = Told(done.code, done.out, [json.loads(line) for line in done.out.splitlines()])
    assert told.code == ExitCode.FAILURE
    assert told.amiss == dict.fromkeys(("settings", "database", "broker", "store", "scratch"), "wrong")
    assert all(one["mend"] for one in told.findings if one["state"] != "ok")
    assert "hush" not in done.out + done.err


@contextmanager
def silent_server() -> Iterator[int]:
    """A port where connections are accepted and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        yield listener.getsockname()[1]


def test_servers_that_say_nothing_do_not_hold_it_up(torch: dict[str, str], tmp_path: Path) -> None:
    with silent_server() as port:
        began = time.monotonic()
        done = forgetd(
            *("doctor", "--json"),
            cwd=tmp_path,
            env=torch
            | {
                "FORGETD_DATABASE_URL": f"postgresql+psycopg://a:b@127.0.0.1:{port}/none",
                "FORGETD_BROKER_URL": f"redis://127.0.0.1:{port}/0",
                "FORGETD_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "FORGETD_S3_ACCESS_KEY": "a",
                "FORGETD_S3_SECRET_KEY": "b",
            },
        )
        took = time.monotonic() - began

    told = [json.loads(line) for line in done.out.splitlines()]
    assert {one["check"] for one in told if one["state"] == "wrong"} >= {"database", "broker", "store"}
    assert took < HALF_A_MINUTE


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"database_url": None}, "FORGETD_DATABASE_URL is not set"),
        ({"broker_url": None}, "FORGETD_BROKER_URL is not set"),
        ({"database_url": "postgresql://a:hush@b/c"}, "it begins with postgresql, not postgresql+psycopg"),
        ({"broker_url": "amqp://a:hush@b"}, "it begins with amqp, not redis or rediss"),
        ({"tenant_open_jobs": "many"}, "FORGETD_TENANT_OPEN_JOBS: Input should be a valid integer"),
        ({"control_interval_seconds": "60"}, "lease_ttl_seconds must be at least four control intervals"),
        ({"s3_secret_key": None}, "FORGETD_S3_SECRET_KEY is not set"),
        ({"s3_public_endpoint_url": "store.example"}, "FORGETD_S3_PUBLIC_ENDPOINT_URL: it is no address"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named(
    doctor: Callable[..., Told], changes: dict[str, str | None], says: str
) -> None:
    told = doctor(**changes)

    state, line, mend = told.of("settings")
    assert (told.code, state) == (ExitCode.FAILURE, "wrong")
    assert says in line
    assert "FORGETD_" in mend
    assert "hush" not in told.output


def test_a_misspelt_setting_is_told_with_the_right_one(doctor: Callable[..., Told]) -> None:
    assert doctor(s3_buckett="mine").of("settings") == (
        "warning",
        "FORGETD_S3_BUCKETT is no setting and is ignored",
        "Did you mean FORGETD_S3_BUCKET?",
    )


def test_a_wrong_password_is_told_and_not_shown(doctor: Callable[..., Told], settings: Settings) -> None:
    database = make_url(settings.database_url.get_secret_value()).set(password="hush5")
    broker = make_url(settings.broker_url.get_secret_value()).set(password="hush6")

    told = doctor(
        database_url=database.render_as_string(hide_password=False),
        broker_url=broker.render_as_string(hide_password=False),
        s3_secret_key="hush7",
    )

    for check in ("database", "broker", "store"):
        state, line, _ = told.of(check)
        assert (state, "it refuses the credentials" in line) == ("wrong", True), line
    assert "hush" not in told.output


def test_a_database_or_bucket_that_is_not_there_is_named(doctor: Callable[..., Told], settings: Settings) -> None:
    absent = make_url(settings.database_url.get_secret_value()).set(database="elsewhere")

    told = doctor(database_url=absent.render_as_string(hide_password=False), s3_bucket="no-such-bucket")

    assert 'database "elsewhere" does not exist' in told.of("database")[1]
    assert told.of("store")[1].startswith("there is no bucket no-such-bucket")


def test_a_schema_behind_ahead_or_absent_is_told(doctor: Callable[..., Told], database: Database) -> None:
    config = alembic_config(str(database.engine.url.render_as_string(hide_password=False)))
    command.downgrade(config, "-1")
    behind = doctor().of("database schema")
    command.upgrade(config, "head")
    with database.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    ahead = doctor().of("database schema")
    with database.transaction() as session:
        session.execute(text("DELETE FROM alembic_version"))
    absent = doctor().of("database schema")

    assert behind[0] == ahead[0] == absent[0] == "wrong"
    assert "is behind" in behind[1]
    assert "newer forgetd" in ahead[1]
    assert (absent[1], absent[2], behind[2]) == ("there is none", "Run: forgetd migrate", "Run: forgetd migrate")


def test_a_broker_that_may_drop_messages_is_told(doctor: Callable[..., Told], settings: Settings) -> None:
    with redis.Redis.from_url(settings.broker_url.get_secret_value()) as broker:
        broker.config_set("maxmemory-policy", "allkeys-lru")
        try:
            state, line, mend = doctor().of("broker memory")
        finally:
            broker.config_set("maxmemory-policy", "noeviction")

    assert state == "warning"
    assert "allkeys-lru" in line
    assert "CONFIG SET maxmemory-policy noeviction" in mend


def test_links_that_point_nowhere_are_told(doctor: Callable[..., Told], works: Database) -> None:
    state, line, mend = doctor(s3_public_endpoint_url="http://127.0.0.1:1").of("store links")

    assert state == "warning"  # callers may reach what this host does not
    assert "http://127.0.0.1:1" in line
    assert "FORGETD_S3_PUBLIC_ENDPOINT_URL" in mend


def test_a_scratch_folder_that_others_read_or_nobody_can_make_is_told(
    doctor: Callable[..., Told], tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").touch()

    assert doctor(scratch_dir=str(tmp_path / "open")).of("scratch")[2] == f"Run: chmod 700 {tmp_path / 'open'}"
    assert doctor(scratch_dir=str(tmp_path / "file" / "below")).of("scratch")[0] == "wrong"


def test_too_little_room_for_the_largest_model_is_told(
    doctor: Callable[..., Told], database: Database, jobs: Jobs
) -> None:
    with database.transaction() as session:
        session.execute(
            text("UPDATE checkpoints SET weights_bytes = 1::bigint << 50 WHERE id = :id"), {"id": jobs.checkpoint_id}
        )

    assert doctor().of("scratch space")[0] == "warning"


def test_a_control_loop_that_is_gone_shows_by_what_it_leaves_undone(
    doctor: Callable[..., Told], works: Database, jobs: Jobs
) -> None:
    held, unrung, fresh = jobs.queue(), jobs.queue(), jobs.queue()
    with works.transaction() as session:
        session.execute(
            update(Job).where(Job.id == held).values(status="running", lease_until=AGO, worker="w", fencing_token=1)
        )
        session.execute(update(Job).where(Job.id == unrung).values(created_at=AGO))
        session.execute(update(ProcessCounters).values(seen_at=AGO))

    told = doctor()

    lines = [one["says"] for one in told.findings if one["check"] == "control loop"]
    assert told.code == ExitCode.FAILURE
    assert [("past the lease" in line, unrung in line, "was seen for 2 hours" in line) for line in lines] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert fresh not in told.output
    assert jobs.row(unrung).dispatched_at is None  # the doctor rings no bell


def held_by(worker: str) -> dict[str, object]:
    """What the row of a job says that this worker computes."""
    until = datetime.now(UTC) + timedelta(hours=1)
    return {"status": "running", "worker": worker, "fencing_token": 1, "lease_until": until}


def test_bells_that_workers_do_not_hear_are_no_fault_of_the_control_loop(
    doctor: Callable[..., Told], works: Database, jobs: Jobs, settings: Settings
) -> None:
    due, held = [jobs.queue() for _ in range(2)], jobs.queue()
    with works.transaction() as session:
        dispatch.see_worker(session, "busy-1-abcdef", ["gpu.flow"], 1)
        session.execute(update(Job).where(Job.id == held).values(held_by("busy-1-abcdef")))
    control.dispatch(works, make_app(settings), ring_seconds=settings.ring_seconds)  # the worker asks another broker
    with works.transaction() as session:
        session.execute(update(Job).where(Job.id.in_(due)).values(created_at=AGO, dispatched_at=AGO))

    told = doctor()

    state, line, mend = told.of("doorbells")
    assert (told.code, state) == (ExitCode.FAILURE, "wrong")
    assert line == "1 lies unheard in queue gpu.flow, whose workers have a slot free (elsewhere-1-abcdef)"
    assert "the same FORGETD_BROKER_URL" in mend
    assert "a worker that the store does not answer takes no job" in mend
    assert told.of("control loop")[0] == "ok"


def test_a_bell_that_lies_where_no_slot_is_free_is_nothing_amiss(
    doctor: Callable[..., Told], works: Database, jobs: Jobs, settings: Settings
) -> None:
    held, waits = jobs.queue(), jobs.queue()
    control.dispatch(works, make_app(settings), ring_seconds=settings.ring_seconds)
    with works.transaction() as session:
        session.execute(update(Job).where(Job.id == held).values(held_by("elsewhere-1-abcdef")))
        session.execute(update(Job).where(Job.id == waits).values(created_at=AGO, dispatched_at=AGO))

    told = doctor()

    assert (told.of("doorbells")[0], told.of("control loop")[0]) == ("ok", "ok")


def test_a_queue_without_a_worker_is_named_with_the_command_that_starts_one(
    doctor: Callable[..., Told], works: Database, jobs: Jobs
) -> None:
    jobs.queue(queue="gpu.diffusion")
    with works.transaction() as session:
        session.execute(text("DELETE FROM worker_slots WHERE queue <> 'gpu.flow'"))

    state, line, mend = doctor().of("workers")

    assert (state, "1 job in queue gpu.diffusion" in line) == ("wrong", True)
    assert mend == "Start one: forgetd worker --gpu 0 --queues gpu.diffusion"


def test_what_piles_up_is_told(doctor: Callable[..., Told], works: Database, jobs: Jobs, caller: Caller) -> None:
    waits, ended = jobs.queue(queue="cpu"), jobs.queue()
    with works.transaction() as session:
        session.execute(
            update(Job).where(Job.id == waits).values(created_at=AGO, infrastructure_losses=3, dispatched_at=AGO)
        )
        session.execute(update(Job).where(Job.id == ended).values(status="cancelled", finished_at=AGO))
        session.execute(update(Tenant).where(Tenant.id == caller.tenant_id).values(max_open_jobs=1))
        session.execute(update(ImageSet).values(expires_at=AGO))

    told = doctor()

    expected = {"waiting jobs": "warning", "lost attempts": "warning", "tenants": "warning", "leftovers": "warning"}
    assert expected.items() <= told.amiss.items()
    assert told.amiss["image sets"] == "wrong"
    assert waits in told.of("lost attempts")[1]
    assert told.of("tenants")[2] == "To allow more: forgetd tenants limit tenant --open-jobs 2"


def test_a_gpu_worker_here_without_a_gpu_is_told(doctor: Callable[..., Told], works: Database) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with works.transaction() as session:
            dispatch.see_worker(session, f"{socket.gethostname()}-gpu0-{process.pid}-abcdef", ["gpu.flow"], 1)
        state, line, _ = doctor().of("gpu")
        process.communicate(b"\n")

    assert state == "warning"
    assert "its jobs run on the CPU" in line


def test_the_gpus_that_torch_sees_are_named(doctor: Callable[..., Told], torch: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    torch |= torch_that_sees(tmp_path / "two", ["A100", "H100"])

    assert doctor().of("gpu")[:2] == ("ok", "torch sees 2: A100, H100")


def test_it_finds_the_servers_of_the_service_that_runs_in_the_folder(up: Up) -> None:
    done = forgetd("doctor", "--json", cwd=up.folder)

    told = Told(done.code, done.out, [json.loads(line) for line in done.out.splitlines()])
    assert told.code == ExitCode.OK, done.out
    assert set(told.amiss) <= {"gpu"}  # a worker on gpu queues runs here, with a GPU or without
    assert told.of("workers")[1].startswith("2 listen")
    assert up.profile["key"] not in done.out
