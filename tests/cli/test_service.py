"""``LocalService`` as a context manager: what the demo and the end-to-end tests stand on."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from cli import Client
from cli.service import LocalService
from tests.cli.processes import eventually


def test_it_runs_inside_a_process_and_leaves_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    threads = set(threading.enumerate())
    settings = {"FORGETD_LEASE_TTL_SECONDS": "3", "FORGETD_MAX_JSON_BYTES": "2048"}

    with LocalService(tmp_path / "data", settings=settings, tell=told.append, durable=False) as service:
        first = service.pids
        with Client(service.url, service.key) as client:
            assert client.ready()
            assert list(client.jobs()) == []
        os.kill(first["worker-gpu"], signal.SIGKILL)
        again = eventually(lambda: service.pids.get("worker-gpu", first["worker-gpu"]) != first["worker-gpu"])

    assert again
    assert set(first) == {"gateway", "control", "worker-gpu", "worker-cpu"}
    assert len(told) == 1
    assert "worker-gpu ended unexpectedly" in told[0]
    assert service.environment["FORGETD_LEASE_TTL_SECONDS"] == "3"
    assert service.pids == {}
    assert set(threading.enumerate()) <= threads  # of which one of an earlier test may have ended meanwhile
