"""What the tests of the client and the command share."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.client import Client
from tests.cli.processes import Up
from tests.cli.scripted import Answer, ScriptedServer

KEY = "fgt_" + "0" * 32 + "_" + "k" * 43


@pytest.fixture
def make_server() -> Iterator[Callable[..., ScriptedServer]]:
    """Servers that play the given answers."""
    servers: list[ScriptedServer] = []

    def make(*answers: Answer) -> ScriptedServer:
        server = ScriptedServer()
        server.script = list(answers) or [Answer()]
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """Clients of a server, with the test's key."""
    clients: list[Client] = []

    def make(url: str, **options: Any) -> Client:
        clients.append(Client(url, KEY, **({"patience": 30.0} | options)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """A process that may hold far fewer files open than it is given to upload."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 50, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="package")  # its processes are not idle when they wait: no longer than it is needed
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The whole service, as ``forgetd up`` runs it on a port that is taken, for the folder's tests."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        service = Up(tmp_path_factory.mktemp("up"), "--port", str(other.getsockname()[1]))
    yield service
    service.close()
