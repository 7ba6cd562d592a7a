"""One real gateway (uvicorn on a loopback port) for the whole folder; a tenant of its own for every test."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, make_url, text

from services import tenancy
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tenancy import Caller, NewKey

ROOT = Path(__file__).resolve().parents[2]
STARTS_WITHIN_SECONDS = 20.0
MAX_CHECKPOINT_BYTES = 400 * 2**20


@dataclass(frozen=True)
class Gateway:
    """A running gateway process."""

    url: str
    pid: int
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@pytest.fixture(scope="session")
def database_url(servers: Any, template: str) -> Iterator[str]:
    """A migrated database for the folder."""
    url = make_url(servers.urls.database_url)
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE test_api TEMPLATE {template}"))
    yield url.set(database="test_api").render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text("DROP DATABASE test_api WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(scope="session")
def settings(servers: Any, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    urls = servers.urls
    return Settings(
        database_url=database_url,
        broker_url=urls.broker_url,
        s3_endpoint_url=urls.s3_endpoint_url,
        s3_access_key=urls.s3_access_key,
        s3_secret_key=urls.s3_secret_key,
        s3_bucket=urls.s3_bucket,
        scratch_dir=tmp_path_factory.mktemp("scratch"),
        max_checkpoint_bytes=MAX_CHECKPOINT_BYTES,
        max_image_bytes=4 * 2**20,
        max_image_set_bytes=16 * 2**20,
        max_image_set_count=50,
    )


@pytest.fixture(scope="session")
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database_url.get_secret_value())
    yield database
    database.close()


@pytest.fixture(scope="session")
def storage(settings: Settings) -> ObjectStorage:
    return ObjectStorage(settings)


def variables(settings: Settings) -> dict[str, str]:
    """The settings as a process takes them."""
    values = settings.model_dump(exclude_none=True)
    return {
        f"FORGETD_{name.upper()}": value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
        for name, value in values.items()
    }


@pytest.fixture(scope="session")
def gateway(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway as operators run it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("gateway") / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORGETD_")}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "api.app:app", "--port", str(port), "--timeout-graceful-shutdown", "1"],
            cwd=ROOT,
            env=environment | variables(settings),
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while True:
        try:
            httpx.get(f"{url}/healthz", trust_env=False)
            break
        except httpx.TransportError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"the gateway did not start:\n{log.read_text()}")
            time.sleep(0.05)
    yield Gateway(url, process.pid, log)
    process.terminate()
    process.wait(10)


_tenants = itertools.count()


@pytest.fixture
def new_key(database: Database) -> Callable[[], NewKey]:
    """Makes keys of tenants that did not exist before."""

    def make() -> NewKey:
        with database.transaction() as session:
            return tenancy.create_key(session, tenant=f"tenant {next(_tenants)}", name="test")

    return make


@pytest.fixture
def api_key(new_key: Callable[[], NewKey]) -> NewKey:
    return new_key()


@pytest.fixture
def caller(api_key: NewKey) -> Caller:
    return Caller(api_key.tenant_id, api_key.id)


@pytest.fixture
def anonymous(gateway: Gateway) -> Iterator[httpx.Client]:
    """A caller without a key."""
    with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def connect(gateway: Gateway) -> Iterator[Callable[[NewKey], httpx.Client]]:
    """Makes clients for keys."""
    clients: list[httpx.Client] = []

    def make(key: NewKey) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key.secret}"}
        clients.append(httpx.Client(base_url=gateway.url, timeout=30, trust_env=False, headers=headers))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Callable[[NewKey], httpx.Client], api_key: NewKey) -> httpx.Client:
    """A caller with a key."""
    return connect(api_key)
