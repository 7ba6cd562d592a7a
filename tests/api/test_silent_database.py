"""A database that is talked to and does not answer any more: whoever waits for it is told, and it is found again."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.dependencies import Lookups
from services.database import CONNECT_SECONDS, Database
from services.settings import Settings
from services.tenancy import NewKey
from tests.relays import LosingRelay, relaying
from tests.worker.helpers import eventually

ANSWER_SECONDS = 1.0
SLACK_SECONDS = 10.0  # of a loaded machine


@pytest.fixture
def relay(settings: Settings) -> Iterator[LosingRelay]:
    """What stands between the gateway and the database."""
    with relaying(LosingRelay, settings.database_url.get_secret_value()) as relay:
        yield relay


def behind(relay: LosingRelay, settings: Settings, answer_seconds: float) -> FastAPI:
    """A gateway that waits so long for an answer."""
    app: FastAPI = create_app(settings)
    url = relay.instead_of(settings.database_url.get_secret_value())
    app.state.database = Database(url, answer_seconds=answer_seconds)
    app.state.lookups = Lookups(app.state.database)
    return app


@pytest.fixture
def client(settings: Settings, relay: LosingRelay, serve: Callable[..., httpx.Client], api_key: NewKey) -> httpx.Client:
    """A caller of a gateway that waits a second for an answer."""
    client = serve(behind(relay, settings, ANSWER_SECONDS), api_key)
    assert client.get("/checkpoints").status_code == 200  # by connections that are kept
    return client


def test_connections_that_lost_their_server_are_replaced(client: httpx.Client, relay: LosingRelay) -> None:
    relay.lose()

    answer = client.get("/checkpoints", timeout=2 * ANSWER_SECONDS + SLACK_SECONDS)

    assert answer.status_code == 200


def test_who_waits_for_a_database_that_never_answers_is_told(client: httpx.Client, relay: LosingRelay) -> None:
    relay.silent = True
    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: client.get("/checkpoints", timeout=60), range(3)))
    took = time.monotonic() - began
    relay.silent = False

    assert {(answer.status_code, answer.json()["server"]) for answer in answers} == {(503, "database")}
    assert took < ANSWER_SECONDS + 3 * CONNECT_SECONDS + SLACK_SECONDS
    assert client.get("/checkpoints").status_code == 200


def test_who_still_waits_when_the_gateway_has_to_end_is_told(
    settings: Settings, relay: LosingRelay, api_key: NewKey
) -> None:
    app = behind(relay, settings, SLACK_SECONDS)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    line = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
    thread.start()
    key = {"Authorization": f"Bearer {api_key.secret}"}
    url = f"http://127.0.0.1:{line.getsockname()[1]}"
    with httpx.Client(base_url=url, headers=key, timeout=60, trust_env=False) as client, ThreadPoolExecutor(2) as pool:
        relay.silent = True
        asked = [pool.submit(client.get, "/checkpoints"), pool.submit(client.post, "/jobs/forget", json={})]
        eventually(lambda: len(server.server_state.tasks) == 2, what="both are under way")
        server.should_exit = True
        read, written = (it.result().json() for it in asked)
    thread.join(30)

    assert (read["status"], read["server"], "nothing was changed" in read["detail"]) == (503, "gateway", True)
    assert (written["status"], written["server"], "it is not known" in written["detail"]) == (503, "gateway", True)
