"""A gateway that benchmarks can ask: a uvicorn process over embedded servers, a tenant and its base."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from services import checkpoints, object_keys, tenancy
from services.database import Database
from services.ids import new_id
from services.local import LocalUrls
from services.storage import StoredObject
from services.tenancy import Caller

__all__ = ["GATEWAY", "Server", "checkpoint", "server", "settings_of", "tenant"]

GATEWAY = "api.app:process_app"  # as it is run (``cli.gateway``): a line of its log for every request
STARTS_WITHIN_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """A running server process."""

    url: str
    process: psutil.Process

    @property
    def resident_mb(self) -> float:
        """Its resident memory."""
        return float(self.process.memory_info().rss) / 1e6


def settings_of(urls: LocalUrls) -> dict[str, str]:
    """The environment of a gateway over these servers."""
    named = {
        "database_url": urls.database_url,
        "broker_url": urls.broker_url,
        "s3_endpoint_url": urls.s3_endpoint_url,
        "s3_access_key": urls.s3_access_key,
        "s3_secret_key": urls.s3_secret_key,
        "s3_bucket": urls.s3_bucket,
    }
    return {f"FORGETD_{name.upper()}": value for name, value in named.items()}


@contextmanager
def server(app: str, variables: Mapping[str, str]) -> Iterator[Server]:
    """A process of uvicorn on a free port, until the block ends; what it says goes to a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--factory", "--port", str(port), "--no-access-log", "--no-server-header", "--log-level", "warning"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FORGETD_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 our own interpreter and fixed words
            [sys.executable, "-m", "uvicorn", app, *flags],
            env=inherited | dict(variables),
            cwd=Path(__file__).resolve().parent.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _await(port, process, log)
            yield Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(10)


def _await(port: int, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise SystemExit(f"a server did not start: {log.read().decode(errors='replace')[-2000:]}") from error
            time.sleep(0.05)
        else:
            return


def tenant(database: Database, name: str) -> tuple[Caller, str]:
    """A tenant and its key."""
    with database.transaction() as session:
        key = tenancy.create_key(session, tenant=name, name="benchmark")
    return Caller(key.tenant_id, key.id), key.secret


def checkpoint(database: Database, caller: Caller) -> str:
    """A validated flow of classes, which no file is behind: no job of it runs."""
    checkpoint_id = new_id("ckpt")
    source = StoredObject(object_keys.checkpoint_source(caller.tenant_id, checkpoint_id), 10, "0" * 64)
    prefix = object_keys.checkpoint_prefix(caller.tenant_id, checkpoint_id)
    manifest = {"family": "class-prior", "image_size": 8, "channels": 1, "architecture": {"n_classes": 3}}
    weights = {"name": "weights.safetensors", "bytes": 10, "sha256": "0" * 64}
    with database.transaction() as session:
        checkpoints.register(session, caller, checkpoint_id, name="base", declared={}, source=source)
        checkpoints.accept(session, caller.tenant_id, checkpoint_id, manifest=manifest, prefix=prefix, weights=weights)
    return checkpoint_id
