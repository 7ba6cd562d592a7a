"""The whole service on this machine: servers, gateway, control loop and workers as one context manager.

    with LocalService(Path(".forgetd")) as service:
        with Client(service.url, service.key) as client:
            ...

Children load their libraries while the servers boot, and begin when those answer; that is most of a fast start.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self
from urllib.parse import urlsplit

from cli.children import Child
from cli.errors import ClientError
from cli.profile import LOCK, Profile, live_profile, read_profile, write_profile

if TYPE_CHECKING:
    from services.database import Database
    from services.local import LocalStack, LocalUrls

__all__ = ["LocalService", "StartFailed"]

HOST = "127.0.0.1"
PORTS_TRIED = 100
START_SECONDS = 60.0
READY_POLL_SECONDS = 0.05
ANSWER_SECONDS = 20.0  # the gateway's socket is open before the gateway is: an early question waits for it
LOCK_TRIES = 5
DRAIN_SECONDS = 50.0  # above Settings.drain_grace_seconds, after which the worker itself gives up
WATCH_SECONDS = 1.0  # between two looks at the embedded servers
TENANT = "local"
# The workers, by name, and what each listens to: training has the accelerator to itself, uploads never wait behind it.
WORKERS: Mapping[str, tuple[str, ...]] = {"worker-gpu": ("gpu.flow", "gpu.diffusion"), "worker-cpu": ("cpu",)}

# Variables that are ours to set for the servers we start.
DATABASE, BROKER, STORAGE = "FORGETD_DATABASE_URL", "FORGETD_BROKER_URL", "FORGETD_S3_ENDPOINT_URL"


class StartFailed(ClientError):
    """The service did not come up; nothing was left running."""


class LocalService:
    """Everything that ``forgetd up`` runs. A server whose URL is set in the environment is used, not started.

    Args:
        data_dir: Data, logs, credentials and profile; made with mode 0700.
        port: The gateway's port; the next free one if taken, any if 0.
        settings: Further ``FORGETD_*`` variables for the children, over those of the environment.
        tell: Called with a line when something happens that a person should know.
        durable: False for tests: the data need not survive a crash of the machine.
        workers: The queues that each worker listens to, by the worker's name.
        heal_servers: Whether an embedded server that crashed is started again; off for tests that crash them.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        settings: Mapping[str, str] | None = None,
        tell: Callable[[str], None] = lambda _line: None,
        durable: bool = True,
        workers: Mapping[str, tuple[str, ...]] = WORKERS,
        heal_servers: bool = True,
    ) -> None:
        self.data_dir = data_dir.expanduser().resolve()
        self.start_seconds = 0.0
        self.url = ""
        self.key = ""
        self.environment: dict[str, str] = {}
        self.children: dict[str, Child] = {}
        self.stack: LocalStack | None = None
        self._port = port
        self._settings = dict(settings or {})
        self._tell = tell
        self._durable = durable
        self._workers = dict(workers)
        self._heal_servers = heal_servers
        self._lock: IO[str] | None = None
        self._listener: socket.socket | None = None
        self._boot: Future[LocalUrls] | None = None
        self._stopped = threading.Event()
        self._hurry = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the children that run now: gateway, control and the workers."""
        return {name: pid for name, child in self.children.items() if (pid := child.pid) is not None}

    @property
    def database_url(self) -> str:
        """The database in use."""
        return self.environment[DATABASE]

    def start(self) -> None:
        """Start everything, and return when the gateway and every worker are ready.

        Raises:
            StartFailed: Something did not come up, or another service runs in this folder; nothing is left running.
        """
        began = time.monotonic()
        self._take_folder()
        try:
            self._listen()
            self._boot = self._boot_servers()
            self._start_children()
            self._load_libraries()
            self.environment = self._environment_with(self._servers())
            self._migrate()
            for child in self.children.values():
                child.begin(self.environment)
            self._make_key()
            self._wait_until_ready(deadline=began + START_SECONDS)
            profile = Profile(self.url, self.key, self.database_url, os.getpid(), self.environment)
            write_profile(self.data_dir, profile)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began
        if self._heal_servers:
            self._watcher = threading.Thread(target=self._watch_servers, name="watch-servers", daemon=True)
            self._watcher.start()

    def stop(self) -> None:
        """Stop everything in reverse: workers drain, then the servers go."""
        self._stopped.set()
        for child in reversed(self.children.values()):
            child.terminate()
        for child in reversed(self.children.values()):
            if not child.join(DRAIN_SECONDS, self._hurry):
                self._tell(f"{child.name} did not end in time and was killed. Its log: {child.log}")
        if self._listener is not None:
            self._listener.close()
        if self._watcher is not None:
            self._watcher.join()
        if self._boot is not None:
            with contextlib.suppress(Exception):  # told by start
                self._boot.result()
        if self.stack is not None:
            self.stack.stop()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stop_now(self) -> None:
        """Let a ``stop`` under way wait for nothing: what running jobs did since their last saved state is lost."""
        self._hurry.set()

    def dead_child(self) -> Child | None:
        """A child that has crashed since the start."""
        return next((child for child in self.children.values() if child.crashes), None)

    # Steps of the start.

    def _take_folder(self) -> None:
        """Hold the folder: the kernel lets go of this lock however we end."""
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.data_dir.chmod(0o700)
        lock = (self.data_dir / LOCK).open("a")
        if not _locked(lock):
            lock.close()
            running = live_profile(self.data_dir)
            where = f" at {running.url} (process {running.pid})" if running else ""
            raise StartFailed(
                f"forgetd is already running in {self.data_dir}{where}. Use it as it is, stop it with Ctrl-C in its "
                "terminal, or start another with --data-dir."
            )
        self._lock = lock

    def _listen(self) -> None:
        """Hold the gateway's port from now on."""
        for port in range(self._port, min(self._port + PORTS_TRIED, 65536)) if self._port else (0,):
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, port))
                listener.listen(128)
            except OSError:
                listener.close()
                continue
            if port != self._port:
                self._tell(f"Port {self._port} is taken; the gateway listens on {port}.")
            self._listener = listener
            self.url = f"http://{HOST}:{listener.getsockname()[1]}"
            return
        raise StartFailed(f"No free port from {self._port} on; name another with --port.")

    def _boot_servers(self) -> Future[LocalUrls]:
        """Start the embedded servers in the background."""
        from services.local import LocalStack

        self.stack = LocalStack(
            self.data_dir / "servers",
            start_database=not os.environ.get(DATABASE),
            start_broker=not os.environ.get(BROKER),
            start_storage=not os.environ.get(STORAGE),
            durable=self._durable,
        )
        pool = ThreadPoolExecutor(1, thread_name_prefix="servers")
        boot = pool.submit(self.stack.start)
        pool.shutdown(wait=False)
        return boot

    def _start_children(self) -> None:
        assert self._listener is not None  # noqa: S101 _listen came first
        descriptor = self._listener.fileno()
        logs = self.data_dir / "logs"

        def add(name: str, module: str, arguments: list[str], preload: list[str], fds: tuple[int, ...] = ()) -> None:
            log = logs / f"{name}.log"
            child = Child(name, module, arguments, preload=preload, log=log, tell=self._tell, pass_fds=fds)
            self.children[name] = child
            child.start()

        libraries = ["sqlalchemy.dialects.postgresql.psycopg", "psycopg_binary"]
        celery = ["kombu.transport.redis", "celery.apps.worker", "celery.concurrency.thread", "celery.fixups.django"]
        add("gateway", "cli.gateway", [str(descriptor)], ["api.app", *libraries], (descriptor,))
        add("control", "worker.control", [], [*libraries, *celery[:1]])
        for name, queues in self._workers.items():
            arguments = ["--queues", ",".join(queues), "--name", f"local-{name}"]
            add(name, "worker.main", arguments, [*libraries, *celery])

    def _load_libraries(self) -> None:
        """What this process needs once the database answers."""
        import alembic.script

        import services.migrations
        import services.tenancy

        _ = alembic.script, services.migrations, services.tenancy

    def _servers(self) -> LocalUrls:
        from services.local import LocalServerError

        assert self._boot is not None  # noqa: S101 _boot_servers came first
        try:
            return self._boot.result(START_SECONDS)
        except LocalServerError as error:
            raise StartFailed(str(error)) from error
        except TimeoutError as error:
            raise StartFailed(f"The embedded servers did not answer within {START_SECONDS:.0f} s.") from error

    def _environment_with(self, urls: LocalUrls) -> dict[str, str]:
        started = {
            DATABASE: urls.database_url,
            BROKER: urls.broker_url,
            STORAGE: urls.s3_endpoint_url,
        }
        if urls.s3_endpoint_url:
            started |= {
                "FORGETD_S3_ACCESS_KEY": urls.s3_access_key,
                "FORGETD_S3_SECRET_KEY": urls.s3_secret_key,
                "FORGETD_S3_BUCKET": urls.s3_bucket,
            }
        given = {name: value for name, value in os.environ.items() if name.startswith("FORGETD_")}
        scratch = {"FORGETD_SCRATCH_DIR": str(self.data_dir / "scratch")}
        return scratch | given | {name: value for name, value in started.items() if value} | self._settings

    def _database(self) -> Database:
        from services.database import Database

        return Database(self.database_url, pool_size=1)

    def _migrate(self) -> None:
        from sqlalchemy.exc import OperationalError

        from services.migrations import MigrationBlocked, at_head, upgrade

        database = self._database()
        try:
            with database.engine.connect() as connection:
                if at_head(connection):
                    return
            upgrade(self.database_url)
        except MigrationBlocked as error:
            raise StartFailed(str(error)) from error
        except OperationalError as error:
            raise StartFailed(f"The database does not answer: {str(error.orig).splitlines()[0]}.") from error
        finally:
            database.close()

    def _make_key(self) -> None:
        """The key of the last profile while the database still knows it, else a new one."""
        from services import tenancy
        from services.errors import WrongKey

        former = read_profile(self.data_dir)
        database = self._database()
        try:
            with database.transaction() as session:
                if former is not None:
                    with contextlib.suppress(WrongKey):
                        tenancy.authenticate(session, former.key)
                        self.key = former.key
                        return
                self.key = tenancy.create_key(session, tenant=TENANT, name="forgetd up").secret
        finally:
            database.close()

    def _wait_until_ready(self, deadline: float) -> None:
        """Until the gateway says that it is ready and each worker has said that it lives."""
        database = self._database()
        try:
            waiting = set(self._workers)
            while waiting:
                self._check_start(deadline, sorted(waiting)[0])
                waiting -= self._present(database)
                time.sleep(READY_POLL_SECONDS if waiting else 0)
        finally:
            database.close()
        while not self._gateway_ready():
            self._check_start(deadline, "gateway")
            time.sleep(READY_POLL_SECONDS)

    def _gateway_ready(self) -> bool:
        """Ask /readyz; with the standard library, for which a start need not load another one."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=ANSWER_SECONDS)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _check_start(self, deadline: float, what: str) -> None:
        if (child := self.dead_child()) is not None:
            raise StartFailed(f"{child.name} does not start. The end of {child.log}:\n{child.tail()}")
        if time.monotonic() > deadline:
            raise StartFailed(f"The {what} was not ready within {START_SECONDS:.0f} s. Logs: {self.data_dir / 'logs'}")

    def _present(self, database: Database) -> set[str]:
        """The workers of which the very process that we started has said that it lives."""
        from sqlalchemy import select

        from services.tables import WorkerSlot

        with database.transaction() as session:
            present = set(session.scalars(select(WorkerSlot.id)))
        pids = self.pids
        return {name for name in self._workers if any(f"-{pids.get(name)}-" in worker for worker in present)}

    def _watch_servers(self) -> None:
        """Start an embedded server again that has crashed; it comes back at the same URL."""
        from services.local import LocalServerError

        stack = self.stack
        if stack is None:
            return
        expected = set(stack.pids)
        while not self._stopped.wait(WATCH_SECONDS):
            for name in expected - set(stack.pids):
                self._tell(f"{name} ended unexpectedly; starting it again. Its log is under {stack.data_dir / name}")
                try:
                    stack.start_server(name)
                except (LocalServerError, OSError) as error:
                    self._tell(f"{name} did not start: {error}")


def _locked(file: IO[str]) -> bool:
    """Whether we hold the file now. Commands that look for a running service hold it for a moment, too."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(READY_POLL_SECONDS)
        else:
            return True
    return False
