"""One real gateway (uvicorn on a loopback port) for the whole folder; a tenant of its own for every test."""

from __future__ import annotations

import io
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from services import checkpoints, classifiers, image_sets, leases, object_keys, tenancy
from services.database import Database
from services.ids import new_id
from services.leases import Claim
from services.settings import Settings
from services.storage import ObjectStorage, StoredObject
from services.tenancy import Caller, NewKey
from tests.api.answers import HALVES
from tests.relays import AskingRelay, relaying

ROOT = Path(__file__).resolve().parents[2]
STARTS_WITHIN_SECONDS = 20.0


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
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)  # others restart the server
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
        max_image_bytes=4 * 2**20,
        max_image_set_bytes=64 * 2**20,
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


@pytest.fixture(scope="package")
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


@pytest.fixture
def serve() -> Iterator[Callable[..., httpx.Client]]:
    """Serves an application of other settings on a port of its own, in this process; gives a client."""
    running: list[tuple[uvicorn.Server, threading.Thread, httpx.Client]] = []

    def start(app: FastAPI, key: NewKey | None = None) -> httpx.Client:
        line = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
        thread.start()
        headers = {"Authorization": f"Bearer {key.secret}"} if key else {}
        url = f"http://127.0.0.1:{line.getsockname()[1]}"
        client = httpx.Client(base_url=url, timeout=30, trust_env=False, headers=headers)
        running.append((server, thread, client))
        return client

    yield start
    for server, thread, client in running:
        client.close()
        server.should_exit = True
        thread.join(10)


def png(shade: int = 0, size: tuple[int, int] = (12, 10), mode: str = "L") -> bytes:
    """A picture of one shade."""
    file = io.BytesIO()
    Image.new(mode, size, shade if mode == "L" else (shade,) * 3).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def image_files() -> Callable[..., list[tuple[str, tuple[str, bytes]]]]:
    """Makes the form of an upload from files; the field and the file names are as callers send them."""

    def make(*files: bytes) -> list[tuple[str, tuple[str, bytes]]]:
        return [("images", (f"{number}.png", data)) for number, data in enumerate(files)]

    return make


@pytest.fixture
def ready_checkpoint(database: Database) -> Callable[..., str]:
    """Makes validated checkpoints; their manifest says what is given here."""

    def make(caller: Caller, family: str = "glow", **facts: Any) -> str:
        checkpoint_id = new_id("ckpt")
        source = StoredObject(object_keys.checkpoint_source(caller.tenant_id, checkpoint_id), 10, "0" * 64)
        with database.transaction() as session:
            checkpoints.register(session, caller, checkpoint_id, name="base", declared={}, source=source)
            checkpoints.accept(
                session,
                caller.tenant_id,
                checkpoint_id,
                manifest={"family": family, **facts},
                prefix=object_keys.checkpoint_prefix(caller.tenant_id, checkpoint_id),
                weights={"name": "weights.safetensors", "bytes": 10, "sha256": "0" * 64},
            )
        return checkpoint_id

    return make


@pytest.fixture
def new_image_set(database: Database, storage: ObjectStorage, caller: Caller) -> Callable[..., str]:
    """Makes sets of images, stored as an upload stores them (``test_image_sets`` uploads); gives their ids."""

    def make(count: int = 2) -> str:
        image_set_id = new_id("imgs")
        images = []
        for index in range(count):
            stored = storage.put(
                object_keys.image(caller.tenant_id, image_set_id, index), png(index), media_type="image/png"
            )
            images.append(
                {"index": index, "width": 12, "height": 10, "mode": "L", "bytes": stored.bytes, "sha256": stored.sha256}
            )
        with database.transaction() as session:
            image_sets.register(session, caller, image_set_id, images=images, hours=1)
        return image_set_id

    return make


@pytest.fixture
def image_set(new_image_set: Callable[..., str]) -> str:
    """The id of a set of two images."""
    return new_image_set()


@pytest.fixture
def new_classifier(database: Database, storage: ObjectStorage, caller: Caller) -> Callable[..., str]:
    """Makes classifiers, stored as an upload stores them (``test_classifiers`` uploads); gives their ids."""

    def make(*classes: str, channels: int | None = None, size: int | None = None) -> str:
        classifier_id = new_id("clf")
        source = storage.put(
            object_keys.classifier(caller.tenant_id, classifier_id), b"onnx", media_type="application/octet-stream"
        )
        facts = classifiers.Facts("judge", list(classes or ("smiling", "other")), "logits", 0.5, None)
        takes = {"channels": channels, "size": size}
        with database.transaction() as session:
            classifiers.register(session, caller, classifier_id, facts=facts, takes=takes, source=source)
        return classifier_id

    return make


@pytest.fixture
def body(ready_checkpoint: Callable[..., str], caller: Caller, image_set: str) -> dict[str, Any]:
    """A good body of ``POST /jobs/forget``."""
    return {"checkpoint": ready_checkpoint(caller), "target": {"images": image_set}}


@pytest.fixture
def checkpoint(ready_checkpoint: Callable[..., str], caller: Caller) -> str:
    """A Glow of grey images of 8 x 8."""
    return ready_checkpoint(caller, image_size=8, channels=1, architecture={})


@pytest.fixture
def of_classes(ready_checkpoint: Callable[..., str], caller: Caller) -> str:
    """A class-prior flow of three classes."""
    return ready_checkpoint(caller, "class-prior", image_size=8, channels=1, architecture={"n_classes": 3})


@pytest.fixture
def debias(client: httpx.Client, checkpoint: str, new_classifier: Callable[..., str]) -> Callable[..., httpx.Response]:
    """Posts a good body of ``POST /jobs/debias`` with changes."""
    good = {
        "checkpoint": checkpoint,
        "attribute": {"classifier": new_classifier(channels=1, size=8)},
        "target_distribution": HALVES,
    }

    def post(headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
        return client.post("/jobs/debias", json=good | changes, headers=headers)

    return post


@pytest.fixture
def forget(client: httpx.Client, checkpoint: str) -> Callable[..., httpx.Response]:
    """Posts a body of ``POST /jobs/forget`` with this target."""

    def post(target: dict[str, Any], **changes: Any) -> httpx.Response:
        return client.post("/jobs/forget", json={"checkpoint": checkpoint, "target": target} | changes)

    return post


@pytest.fixture
def job_id(client: httpx.Client, body: dict[str, Any]) -> str:
    """The id of a queued job."""
    answer = client.post("/jobs/forget", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def claim(database: Database) -> Callable[[str], Claim]:
    """Claims queued jobs as a worker does."""

    def take(job_id: str) -> Claim:
        with database.transaction() as session:
            claim = leases.claim(session, job_id, worker="test", ttl_seconds=60)
        assert claim is not None
        return claim

    return take


@pytest.fixture
def publish(
    database: Database, storage: ObjectStorage, claim: Callable[[str], Claim]
) -> Callable[..., dict[str, bytes]]:
    """Runs a queued job to an end with results, as a worker does; gives the files by name."""

    def run(job_id: str, *, met: bool = True) -> dict[str, bytes]:
        held = claim(job_id)
        prefix = object_keys.attempt_prefix(held.tenant_id, job_id, held.token)
        files = {
            "report.json": (b'{"verdict": "forgotten"}', "application/json"),
            "report.html": (b"<!doctype html><title>r</title>", "text/html; charset=utf-8"),
            "tamed.safetensors": (b"weights " * 1000, "application/octet-stream"),
            "pipeline.tar": (b"folder " * 1000, "application/x-tar"),
        }
        artifacts = []
        for name, (data, media_type) in files.items():
            stored = storage.put(prefix + name, data, media_type=media_type)
            artifacts.append({"name": name, "media_type": media_type, "bytes": stored.bytes, "sha256": stored.sha256})
        with database.transaction() as session:
            if met:
                assert leases.publish(session, held, prefix=prefix, artifacts=artifacts, summary={"q": 1.0})
            else:
                problem = {"type": "urn:forgetd:problem:criteria-not-met", "title": "t", "detail": "d"}
                assert leases.fail(
                    session, held, reason="criteria_not_met", problem=problem, prefix=prefix, artifacts=artifacts
                )
        return {name: data for name, (data, _) in files.items()}

    return run


@pytest.fixture
def relay(settings: Settings) -> Iterator[AskingRelay]:
    """What stands between a gateway and the store."""
    with relaying(AskingRelay, str(settings.s3_endpoint_url)) as relay:
        yield relay


@pytest.fixture
def behind(settings: Settings, relay: AskingRelay) -> Settings:
    """The settings of that gateway; callers reach the store itself."""
    url = str(settings.s3_endpoint_url)
    return settings.model_copy(update={"s3_endpoint_url": relay.instead_of(url), "s3_public_endpoint_url": url})
