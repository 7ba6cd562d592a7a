"""The whole service as chaos has it: servers, relays in front of them, gateways, control loops and workers."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis
from sqlalchemy import make_url

from services import tenancy
from services.database import Database
from services.local.stack import LocalStack
from services.migrations import upgrade
from services.settings import Settings
from services.storage import ObjectStorage
from services.tenancy import NewKey
from tests.chaos.processes import Clocks, Kept, on_small_disk
from tests.relays import DatabaseRelay, RelayThread, StoreRelay

__all__ = ["Fleet", "Shape", "running_fleet"]

HERE = Path(__file__).parent
QUEUES = "gpu.flow,gpu.diffusion,cpu"
SMALL_DISK_MEGABYTES = 48
READY_SECONDS = 60.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Shape:
    """How large, and how hurried."""

    gateways: int = 2
    controls: int = 2
    workers: int = 4
    lease_ttl_seconds: float = 6.0
    pace: float = 1.0
    infrastructure_budget: int = 25  # faults come faster here than in a year of a real host

    def settings(self) -> dict[str, str]:
        """What differs from the defaults."""
        return {
            "FORGETD_LEASE_TTL_SECONDS": str(self.lease_ttl_seconds),
            "FORGETD_RING_SECONDS": "1",
            "FORGETD_CANCEL_GRACE_SECONDS": "2",
            "FORGETD_DRAIN_GRACE_SECONDS": "15",
            "FORGETD_RUNNER_SILENCE_SECONDS": "20",
            "FORGETD_STORE_PATIENCE_SECONDS": "5",
            "FORGETD_INFRASTRUCTURE_BUDGET": str(self.infrastructure_budget),
            "FORGETD_TENANT_OPEN_JOBS": "1000000",
        }


@dataclass
class Fleet:
    """Everything that runs, with handles for what is to be broken."""

    shape: Shape
    folder: Path
    stack: LocalStack
    settings: Settings  # straight to the servers, past the relays: for the audit
    relayed: dict[str, str]  # what our processes are told
    database_relay: DatabaseRelay
    store_relay: StoreRelay
    clocks: Clocks
    key: NewKey
    gateways: list[Kept] = field(default_factory=list)
    controls: list[Kept] = field(default_factory=list)
    workers: list[Kept] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    small_disk: Path | None = None  # the scratch folder of the last worker, where it has a disk of its own

    @property
    def trace(self) -> Path:
        """Where runners write what they computed."""
        return self.folder / "trace"

    def kept(self) -> list[Kept]:
        """Every process of ours."""
        return [*self.gateways, *self.controls, *self.workers]

    def start(self) -> None:
        """Start our processes and return when gateways and workers answer."""
        for number in range(self.shape.gateways):
            port = _free_port()
            self.urls.append(f"http://127.0.0.1:{port}")
            command = [sys.executable, "-m", "uvicorn", "api.app:app", "--port", str(port), "--no-access-log"]
            self.gateways.append(self._keep(f"gateway-{number}", [*command, "--timeout-graceful-shutdown", "5"]))
        for number in range(self.shape.controls):
            self.controls.append(self._keep(f"control-{number}", [sys.executable, "-m", "worker.control"]))
        for number in range(self.shape.workers):
            self.workers.append(self._worker(number, last=number == self.shape.workers - 1))
        until(self._ready, READY_SECONDS, "gateways and workers are up")

    def stop(self) -> None:
        """Stop our processes, workers first, as they drain."""
        stopping = [threading.Thread(target=kept.stop, args=(STOP_SECONDS,)) for kept in reversed(self.kept())]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()

    def _ready(self) -> bool:
        with suppress(httpx.HTTPError), httpx.Client(timeout=2) as client:
            if all(client.get(f"{url}/readyz").status_code == httpx.codes.OK for url in self.urls):
                return all("started: queues" in worker.log.read_text() for worker in self.workers)
        return False

    def _worker(self, number: int, *, last: bool) -> Kept:
        name = f"worker-{number}"
        scratch = self.folder / f"scratch-{number}"
        scratch.mkdir(mode=0o700)
        runner = [sys.executable, "-S", "-P", str(HERE / "runner.py"), str(self.trace), str(self.shape.pace)]
        command = [sys.executable, str(HERE / "worker_process.py"), name, QUEUES, *runner]
        if last and (small := on_small_disk(command, scratch, SMALL_DISK_MEGABYTES)) is not None:
            self.small_disk, command = scratch, small
        return self._keep(name, command, {"FORGETD_SCRATCH_DIR": str(scratch)})

    def _keep(self, name: str, command: list[str], more: dict[str, str] | None = None) -> Kept:
        environment = {**self.relayed, **self.clocks.environment(name), **(more or {})}
        return Kept(name, command, environment, self.folder)


@contextmanager
def running_fleet(folder: Path, shape: Shape, seed: int) -> Iterator[Fleet]:
    """Servers, relays, a migrated database with one tenant, and our processes; all of it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace").mkdir()
    clocks = Clocks(folder)
    stack = LocalStack(folder / "servers", durable=False)
    urls = stack.start()
    try:
        with RelayThread() as thread:
            upgrade(urls.database_url)
            where = make_url(urls.database_url)
            database_relay = DatabaseRelay(thread, where.port or 5432)
            store_relay = StoreRelay(thread, int(urls.s3_endpoint_url.rpartition(":")[2]), seed)
            through = where.set(port=database_relay.port).render_as_string(hide_password=False)
            keys = {
                "FORGETD_S3_ACCESS_KEY": urls.s3_access_key,
                "FORGETD_S3_SECRET_KEY": urls.s3_secret_key,
                "FORGETD_S3_BUCKET": urls.s3_bucket,
                "FORGETD_BROKER_URL": urls.broker_url,
                **shape.settings(),
            }
            relayed = {
                **keys,
                "FORGETD_DATABASE_URL": through,
                "FORGETD_S3_ENDPOINT_URL": f"http://127.0.0.1:{store_relay.port}",
            }
            straight = {
                **keys,
                "FORGETD_DATABASE_URL": urls.database_url,
                "FORGETD_S3_ENDPOINT_URL": urls.s3_endpoint_url,
            }
            settings = Settings.model_validate(
                {name.removeprefix("FORGETD_").lower(): value for name, value in straight.items()}
            )
            with database_of(settings) as database, database.transaction() as session:
                key = tenancy.create_key(session, tenant="chaos", name="chaos")
            fleet = Fleet(shape, folder, stack, settings, relayed, database_relay, store_relay, clocks, key)
            try:
                fleet.start()
                yield fleet
            finally:
                fleet.stop()
                database_relay.close()
                store_relay.close()
    finally:
        stack.stop()


@contextmanager
def database_of(settings: Settings) -> Iterator[Database]:
    """Transactions past the relays."""
    database = Database(settings.database_url.get_secret_value(), pool_size=4)
    try:
        yield database
    finally:
        database.close()


def storage_of(settings: Settings) -> ObjectStorage:
    """The store past the relay."""
    return ObjectStorage(settings)


def broker_of(settings: Settings) -> redis.Redis:
    """The broker."""
    return redis.Redis.from_url(settings.broker_url.get_secret_value(), socket_timeout=5)


def until(question: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for it.

    Raises:
        TimeoutError: it did not come true in time.
    """
    limit = time.monotonic() + seconds
    while not question():
        if time.monotonic() > limit:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
