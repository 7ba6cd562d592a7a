"""Workers and control loops as processes, a supervisor in this one, and a model for the runner."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from models.checkpoints import save_checkpoint
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tenancy import Caller
from tests.unlearning.tiny_conditional import trained_vae
from tests.worker import processes as children
from tests.worker.helpers import HERE, QUEUE, Jobs
from tests.worker.processes import Forked, Process
from tests.worker.runs import one_thread
from worker.scratch import Scratch
from worker.supervisor import Supervisor

STUB_COMMAND = (sys.executable, str(HERE / "stub_runner.py"))


@pytest.fixture
def jobs(database: Database, storage: ObjectStorage, caller: Caller, tmp_path: Path) -> Jobs:
    """A tenant with a ready checkpoint, who queues jobs for the stub runner."""
    return Jobs(database, storage, caller, tmp_path / "trace")


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[[Callable[[Path], Process]], Process]]:
    """Gives what starts a process a file for its output; none survives the test."""
    processes: list[Process] = []

    def keep(begin: Callable[[Path], Process]) -> Process:
        processes.append(begin(tmp_path / f"process-{len(processes)}.log"))
        return processes[-1]

    yield keep
    for process in processes:
        process.close()
        sys.stdout.write(f"--- {process.log.name}\n{process.log.read_text()}\n")  # shown when the test fails


@pytest.fixture
def start(keep: Callable[..., Process], environment: dict[str, str]) -> Callable[..., Process]:
    """Starts command lines on the test's settings, or on others."""

    def start(command: list[str], other: dict[str, str] | None = None) -> Process:
        return keep(lambda log: Process(command, other or environment, log))

    return start


@pytest.fixture
def fork(keep: Callable[..., Process], environment: dict[str, str]) -> Callable[..., Process]:
    """Forks one of `tests.worker.processes` on the test's settings, or on others."""

    def fork(what: Callable[..., int], *arguments: object, other: dict[str, str] | None = None) -> Process:
        return keep(lambda log: Forked(what, *arguments, environment=other or environment, log=log))

    return fork


@pytest.fixture
def start_worker(fork: Callable[..., Process]) -> Callable[[], Process]:
    """Starts a worker with the stub runner."""
    return lambda: fork(children.worker, QUEUE)


@pytest.fixture
def start_control(fork: Callable[..., Process]) -> Callable[[], Process]:
    """Starts a control loop."""
    return lambda: fork(children.control_loop)


@pytest.fixture
def make_supervisor(
    settings: Settings, database: Database, storage: ObjectStorage
) -> Iterator[Callable[..., Supervisor]]:
    """Supervisors in this process, each as if it were a worker of its own."""
    scratches: list[Scratch] = []

    def make(**changes: object) -> Supervisor:
        scratch = Scratch(settings.scratch_dir)
        scratches.append(scratch)
        arguments: dict[str, object] = {
            "worker": f"worker-{len(scratches)}",
            "runner_command": STUB_COMMAND,
            "settings": settings,
            "database": database,
            "storage": storage,
            "scratch": scratch,
        }
        return Supervisor(**{**arguments, **changes})  # type: ignore[arg-type]  # a dict of arguments of many types

    yield make
    for scratch in scratches:
        scratch.close()


@pytest.fixture
def supervisor(make_supervisor: Callable[..., Supervisor]) -> Supervisor:
    """One supervisor with the stub runner."""
    return make_supervisor()


@pytest.fixture
def in_background() -> Iterator[Callable[[Supervisor, str], Future[str]]]:
    """Runs a job in a thread; what is still at work when the test ends is handed back."""
    used: list[Supervisor] = []

    def run(supervisor: Supervisor, job_id: str) -> Future[str]:
        used.append(supervisor)
        return pool.submit(supervisor.run, job_id)

    with ThreadPoolExecutor(4) as pool:
        yield run
        for supervisor in used:
            supervisor.start_draining()


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE that draws three classes of stripes."""
    path = tmp_path_factory.mktemp("vae") / "base.safetensors"
    with one_thread():
        save_checkpoint(path, trained_vae())
    return path
