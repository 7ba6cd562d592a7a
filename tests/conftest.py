"""The real servers, once a session; a migrated database of its own for every test that asks for one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from sqlalchemy import create_engine, make_url, text

from services import tenancy
from services.database import Database
from services.local.stack import LocalStack, LocalUrls
from services.migrations import upgrade
from services.settings import Settings
from services.storage import ObjectStorage
from services.tenancy import Caller, NewKey

TEMPLATE = "forgetd_template"


@dataclass(frozen=True)
class Servers:
    """The running embedded servers and how to reach them."""

    stack: LocalStack
    urls: LocalUrls


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """PostgreSQL, Valkey and SeaweedFS on loopback, without fsync."""
    stack = LocalStack(tmp_path_factory.mktemp("servers"), durable=False)
    urls = stack.start()
    try:
        yield Servers(stack, urls)
    finally:
        stack.stop()


def _server_sql(urls: LocalUrls, statement: str) -> None:
    engine = create_engine(urls.database_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _at(urls: LocalUrls, database: str) -> str:
    return make_url(urls.database_url).set(database=database).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def template(servers: Servers) -> str:
    """A database migrated by Alembic, copied for each test."""
    _server_sql(servers.urls, f"CREATE DATABASE {TEMPLATE}")
    upgrade(_at(servers.urls, TEMPLATE))
    return TEMPLATE


_numbers = itertools.count()


@pytest.fixture
def database_url(servers: Servers, template: str) -> Iterator[str]:
    """A fresh migrated database."""
    name = f"test_{next(_numbers)}"
    _server_sql(servers.urls, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _at(servers.urls, name)
    _server_sql(servers.urls, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def lease_ttl_seconds() -> float:
    """So long that no stall of a loaded machine costs a lease; tests that wait for its end ask for a shorter one."""
    return 30.0


@pytest.fixture
def settings(servers: Servers, database_url: str, tmp_path: Path, lease_ttl_seconds: float) -> Settings:
    """Settings of one service on its own database and an empty broker."""
    urls = servers.urls
    with redis.Redis.from_url(urls.broker_url) as broker:
        broker.flushdb()
    return Settings(
        database_url=database_url,
        broker_url=urls.broker_url,
        s3_endpoint_url=urls.s3_endpoint_url,
        s3_access_key=urls.s3_access_key,
        s3_secret_key=urls.s3_secret_key,
        s3_bucket=urls.s3_bucket,
        scratch_dir=tmp_path / "scratch",
        lease_ttl_seconds=lease_ttl_seconds,
        ring_seconds=1,
        control_interval_seconds=0.1,
        cancel_grace_seconds=2,
        drain_grace_seconds=30,
    )


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    """The same settings as ``FORGETD_*`` variables, for the processes that a test starts."""
    values = settings.model_dump(exclude_none=True)
    return {
        f"FORGETD_{name.upper()}": value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
        for name, value in values.items()
    }


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """Transactions on the test's database."""
    database = Database(settings.database_url.get_secret_value())
    yield database
    database.close()


@pytest.fixture
def storage(settings: Settings) -> ObjectStorage:
    """The object store."""
    return ObjectStorage(settings)


@pytest.fixture
def api_key(database: Database) -> NewKey:
    """A key of a tenant of its own."""
    with database.transaction() as session:
        return tenancy.create_key(session, tenant="tenant", name="test")


@pytest.fixture
def caller(api_key: NewKey) -> Caller:
    """The caller behind ``api_key``."""
    return Caller(api_key.tenant_id, api_key.id)
