"""``forgetd up``: what it starts it also stops, whoever ends it and however."""

from __future__ import annotations

import re
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cli.processes import Up, eventually, forgetd


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Up]]:
    """Starts the service in the test's folder; none survives the test."""
    started: list[Up] = []

    def start() -> Up:
        started.append(Up(tmp_path))
        return started[-1]

    yield start
    for one in started:
        one.close()


def listening(processes: list[psutil.Process]) -> set[int]:
    return {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def gone(processes: list[psutil.Process]) -> bool:
    return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_however_it_ends_nothing_is_left_and_it_starts_again(start: Callable[[], Up], tmp_path: Path) -> None:
    first = start()
    key, children = first.profile["key"], first.processes()[1:]

    first.send(signal.SIGKILL)
    first.wait()

    assert eventually(lambda: gone(children))
    assert forgetd("jobs", "list", cwd=tmp_path).code == 4  # its profile is stale: the key is sent nowhere

    second = start()
    processes, ports = second.processes(), listening(second.processes())

    assert second.profile["key"] == key
    assert stat.S_IMODE((tmp_path / ".forgetd" / "profile.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / ".forgetd").stat().st_mode) == 0o700

    second.send(signal.SIGINT)

    assert second.wait() == 0
    assert len(ports) >= 4  # the gateway and three servers at least: the look was not in vain
    assert gone(processes)
    assert [port for port in ports if taken(port)] == []


def test_a_second_service_in_the_folder_is_refused_and_harms_nothing(up: Up) -> None:
    refused = forgetd("up", cwd=up.folder)

    assert refused.code == 1
    assert "already running" in refused.err
    assert up.profile["url"] in refused.err
    assert httpx.get(f"{up.profile['url']}/readyz", timeout=20).status_code == 200


@pytest.mark.parametrize("module", ["cli.gateway", "worker.control"])
def test_a_crashed_child_is_started_again_and_reported(up: Up, module: str) -> None:
    child = up.child(module)

    child.kill()

    eventually(lambda: gone([child]) and up.child(module) is not None)
    assert eventually(lambda: up.says("ended unexpectedly (signal SIGKILL)"))
    assert httpx.get(f"{up.profile['url']}/readyz", timeout=20).status_code == 200  # it waits, it is not refused


def test_a_port_that_is_taken_is_stepped_over_and_said(up: Up) -> None:
    wanted, got = re.search(r"Port (\d+) is taken; the gateway listens on (\d+)", up.text).groups()  # type: ignore[union-attr]  # no match fails the test

    assert int(got) > int(wanted)
    assert up.profile["url"].endswith(f":{got}")


def test_everything_listens_on_loopback(up: Up) -> None:
    addresses = {
        connection.laddr.ip
        for process in up.processes()
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }

    assert addresses == {"127.0.0.1"}


def test_no_secret_is_on_a_command_line(up: Up) -> None:
    lines = " ".join(" ".join(process.cmdline()) for process in up.processes())

    assert up.profile["key"] not in lines
    assert up.profile["database_url"] not in lines
