"""``forgetd worker``: one worker a GPU, which sees that GPU alone, is kept alive, and drains with its keeper."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from cli.exits import ExitCode
from services.database import Database
from services.tables import WorkerSlot
from tests.cli.gpus import torch_that_sees
from tests.cli.here import forgetd_here
from tests.cli.processes import COMMAND, environment, eventually
from tests.worker.helpers import alive

SECONDS = 60.0


class Started:
    """A ``forgetd worker`` that runs."""

    def __init__(self, arguments: tuple[str, ...], folder: Path, env: dict[str, str]) -> None:
        self.log = folder / f"{'-'.join(arguments)}.log".replace("/", "_")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "worker", *arguments],
                cwd=folder,
                env=environment(env),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def ends(self, number: signal.Signals | None = None) -> int:
        """Its exit code, after that signal."""
        if number is not None:
            self._process.send_signal(number)
        return self._process.wait(SECONDS)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children()

    def close(self) -> None:
        if self._process.poll() is None:
            for one in [*self.children(), psutil.Process(self.pid)]:
                one.kill()
            self._process.wait(SECONDS)


@pytest.fixture
def gpus(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The variables of the test's service on a host with three GPUs."""
    return environment | torch_that_sees(tmp_path, ["first", "second", "third"])


@pytest.fixture
def start(gpus: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts workers; none survives the test."""
    started: list[Started] = []

    def start(*arguments: str, **more: str) -> Started:
        started.append(Started(arguments, tmp_path, gpus | more))
        return started[-1]

    yield start
    for one in started:
        one.close()
        sys.stdout.write(f"--- {one.log.name}\n{one.log.read_text()}\n")  # shown when the test fails


def listening(database: Database) -> dict[str, set[str]]:
    """The queues of each worker that says it lives."""
    found: dict[str, set[str]] = {}
    with database.transaction() as session:
        for row in session.execute(select(WorkerSlot.id, WorkerSlot.queue)):
            found.setdefault(row.id, set()).add(row.queue)
    return found


def variable(pid: int, name: str) -> str | None:
    """Of another process's environment."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs if pair).get(name)


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether the signal waits for a process that is stopped."""
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(fields["ShdPnd"], 16) >> (number - 1) & 1)


def test_a_worker_sees_its_gpu_alone(start: Callable[..., Started], database: Database) -> None:
    keeper = start("--gpu", "1")
    eventually(lambda: listening(database), within=SECONDS)

    ((name, queues),) = listening(database).items()
    (worker,) = keeper.children()
    assert name.startswith(f"{socket.gethostname()}-gpu1-{worker.pid}-")
    assert queues == {"gpu.flow", "gpu.diffusion"}
    assert variable(worker.pid, "CUDA_VISIBLE_DEVICES") == "1"
    assert variable(worker.pid, "CUDA_DEVICE_ORDER") == "PCI_BUS_ID"


@pytest.mark.parametrize("gpu", ["0", "all"])
def test_the_worker_of_the_only_gpu_is_started_again_and_drains(
    start: Callable[..., Started], database: Database, gpu: str
) -> None:
    keeper = start("--gpu", gpu, CUDA_VISIBLE_DEVICES="2")
    eventually(lambda: listening(database), within=SECONDS)
    (first,) = keeper.children()

    first.kill()  # as one that waits in vain ends itself

    eventually(lambda: any(f"-{first.pid}-" not in name for name in listening(database)), within=SECONDS)
    (second,) = keeper.children()
    assert variable(second.pid, "CUDA_VISIBLE_DEVICES") == "2"
    assert keeper.ends(signal.SIGTERM) == 0
    assert not alive(second.pid)
    assert not any(f"-{second.pid}-" in name for name in listening(database))  # it said goodbye


def test_a_second_worker_on_a_gpu_is_refused_while_the_first_lives(
    start: Callable[..., Started], gpus: dict[str, str], database: Database, tmp_path: Path
) -> None:
    first = start("--gpu", "0")
    eventually(lambda: listening(database), within=SECONDS)
    (worker,) = first.children()

    refused = forgetd_here("worker", "--gpu", "0", cwd=tmp_path, env=gpus)

    assert refused.code == ExitCode.FAILURE
    assert f"GPU 0 has a worker already (process {first.pid})" in refused.err
    first.ends(signal.SIGKILL)
    eventually(lambda: not alive(worker.pid), within=SECONDS)  # it drains, and has the GPU until then
    start("--gpu", "0", "--name", "again")
    eventually(lambda: any(name.startswith("again-gpu0-") for name in listening(database)), within=SECONDS)


def test_numbers_count_in_what_the_environment_shows(start: Callable[..., Started], database: Database) -> None:
    keeper = start("--gpu", "1", "--queues", "gpu.flow", CUDA_VISIBLE_DEVICES="0,2")
    eventually(lambda: listening(database), within=SECONDS)

    (worker,) = keeper.children()
    assert variable(worker.pid, "CUDA_VISIBLE_DEVICES") == "2"
    assert list(listening(database).values()) == [{"gpu.flow"}]


def test_without_a_gpu_it_takes_what_needs_none(start: Callable[..., Started], database: Database) -> None:
    worker = start("--cpu", "--slots", "2", "--name", "converter")
    eventually(lambda: listening(database), within=SECONDS)

    with database.transaction() as session:
        rows = [(row.queue, row.slots) for row in session.scalars(select(WorkerSlot))]
    assert rows == [("cpu", 2)]
    assert f"converter-{worker.pid}-" in next(iter(listening(database)))  # the very process that was started
    assert variable(worker.pid, "CUDA_VISIBLE_DEVICES") == ""
    assert worker.ends(signal.SIGTERM) == 0
    assert listening(database) == {}


def test_all_gpus_have_workers_that_are_kept_and_end_in_order(
    start: Callable[..., Started], database: Database
) -> None:
    keeper = start("--gpu", "all", FORGETD_GPUS_PER_JOB="2")
    eventually(lambda: len(listening(database)) == 2, within=SECONDS)
    first, second = sorted(keeper.children(), key=lambda one: variable(one.pid, "CUDA_VISIBLE_DEVICES") or "")
    assert [variable(one.pid, "CUDA_VISIBLE_DEVICES") for one in (first, second)] == ["0,1", "2"]

    first.kill()

    eventually(lambda: any("gpu0+1" in name and f"-{first.pid}-" not in name for name in listening(database)), SECONDS)
    assert alive(second.pid)
    children = keeper.children()
    assert keeper.ends(signal.SIGTERM) == 0
    assert [one for one in children if alive(one.pid)] == []
    assert not any(f"-{one.pid}-" in name for one in children for name in listening(database))  # each said goodbye


def worker_of(keeper: Started, *, after: psutil.Process | None = None) -> psutil.Process:
    """The worker of a keeper of one, once it runs its own code; another one than that."""

    def found() -> psutil.Process | None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            for one in keeper.children():
                if one != after and "worker.main" in one.cmdline():
                    return one
        return None

    worker: psutil.Process = eventually(found, within=SECONDS)
    return worker


def test_a_worker_that_keeps_dying_is_started_after_a_longer_pause(start: Callable[..., Started]) -> None:
    keeper = start("--gpu", "0")
    first = worker_of(keeper)

    first.kill()
    second = worker_of(keeper, after=first)
    second.kill()
    third = worker_of(keeper, after=second)

    assert second.create_time() - first.create_time() >= 1
    assert third.create_time() - second.create_time() >= 2
    said = keeper.log.read_text()
    assert [line.split("again in ")[1] for line in said.splitlines() if "again in" in line] == ["1 s.", "2 s."]


def test_a_second_signal_kills_a_worker_that_does_not_drain(start: Callable[..., Started]) -> None:
    keeper = start("--gpu", "0", FORGETD_DRAIN_GRACE_SECONDS="3600")  # nothing but the signal ends the wait
    worker = worker_of(keeper)
    worker.suspend()  # it hears no SIGTERM
    eventually(lambda: worker.status() == psutil.STATUS_STOPPED, within=SECONDS)
    os.kill(keeper.pid, signal.SIGTERM)
    eventually(lambda: pending(worker.pid, signal.SIGTERM), within=SECONDS)  # the keeper handed the first one on

    assert keeper.ends(signal.SIGTERM) == ExitCode.FAILURE

    assert not alive(worker.pid)


def test_workers_whose_keeper_is_killed_drain(start: Callable[..., Started], database: Database) -> None:
    keeper = start("--gpu", "all")
    eventually(lambda: len(listening(database)) == 3, within=SECONDS)
    children = keeper.children()

    os.kill(keeper.pid, signal.SIGKILL)

    assert len(children) == 3
    eventually(lambda: listening(database) == {}, within=SECONDS)
    eventually(lambda: not [one for one in children if alive(one.pid)], within=SECONDS)


@pytest.mark.parametrize(
    ("arguments", "more", "says"),
    [
        (("--gpu", "3"), {}, "There is no GPU 3 here. There are: 0 (first), 1 (second), 2 (third)."),
        (("--gpu", "0,1"), {}, "Set FORGETD_GPUS_PER_JOB=2"),
        (("--gpu", "0"), {"CUDA_VISIBLE_DEVICES": ""}, "torch sees no GPU here (CUDA_VISIBLE_DEVICES=)"),
        (("--gpu", "0"), {"FORGETD_DATABASE_URL": "postgresql://a:hush@b/c"}, "FORGETD_DATABASE_URL: it begins with"),
        (("--cpu",), {"FORGETD_RING_SECONDS": "0"}, "FORGETD_RING_SECONDS: Input should be greater than 0"),
    ],
)
def test_what_this_host_cannot_do_is_said(
    gpus: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], more: dict[str, str], says: str
) -> None:
    done = forgetd_here("worker", *arguments, cwd=tmp_path, env=gpus | more)

    assert done.code == ExitCode.FAILURE
    assert says in done.err
    assert "hush" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--gpu", "0", "--cpu"),
        ("--gpu", "0", "--slots", "2"),
        ("--gpu", "first"),
        ("--gpu", "1,1"),
        ("--cpu", "--queues", "cpu,"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(gpus: dict[str, str], tmp_path: Path, arguments: tuple[str, ...]) -> None:
    more = {"FORGETD_GPUS_PER_JOB": "2"}

    assert forgetd_here("worker", *arguments, cwd=tmp_path, env=gpus | more).code == ExitCode.USAGE


def test_a_host_without_torch_is_told_what_to_install(gpus: dict[str, str], tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from cli.main import main; main()"  # as if it were not installed

    done = subprocess.run(
        [COMMAND[0], "-c", code, "worker", "--cpu"],
        cwd=tmp_path,
        env=environment(gpus),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == ExitCode.FAILURE
    assert 'pip install "forgetd[worker]"' in done.stderr
