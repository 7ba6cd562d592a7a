"""The embedded servers keep their data, start after any crash and never outlive forgetd."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from services.local import LocalServerError, LocalStack, LocalUrls
from services.local.server import ProcessIdentity
from tests.local.helpers import CONTENT, s3_client, wait_until

HOLD = """
import json, sys, time
from pathlib import Path
from services.local import LocalStack
stack = LocalStack(Path(sys.argv[1]), durable=False)
urls = stack.start()
print(json.dumps([urls.__dict__, stack.pids]), flush=True)
time.sleep(600)
"""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[LocalStack]:
    """A stack that a test may break."""
    stack = LocalStack(tmp_path / "data", durable=False)
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A stack with something in each server, which tests leave as it was."""
    stack = LocalStack(tmp_path_factory.mktemp("written"), durable=False)
    _write(stack.start())
    yield stack
    stack.stop()


@pytest.fixture
def database_only(tmp_path: Path) -> Iterator[LocalStack]:
    """The same with PostgreSQL alone."""
    stack = LocalStack(tmp_path / "data", start_broker=False, start_storage=False, durable=False)
    yield stack
    stack.stop()


def _write_row(urls: LocalUrls) -> None:
    with psycopg.connect(urls.database_url.replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE kept (body bytea)")
        connection.execute("INSERT INTO kept VALUES (%s)", [CONTENT])


def _read_row(urls: LocalUrls) -> object:
    with psycopg.connect(urls.database_url.replace("+psycopg", "")) as connection:
        row = connection.execute("SELECT body FROM kept").fetchone()
    return row and row[0]


def _write(urls: LocalUrls) -> None:
    _write_row(urls)
    with redis.Redis.from_url(urls.broker_url) as broker:
        broker.set("kept", CONTENT)
    client = s3_client(urls)
    client.put_object(Bucket=urls.s3_bucket, Key="kept", Body=CONTENT)
    client.close()


def _read(urls: LocalUrls) -> list[object]:
    with redis.Redis.from_url(urls.broker_url) as broker:
        message = broker.get("kept")
    client = s3_client(urls)
    body = client.get_object(Bucket=urls.s3_bucket, Key="kept")["Body"].read()
    client.close()
    return [_read_row(urls), message, body]


def _hold(data_dir: Path) -> tuple[subprocess.Popen[str], LocalUrls, dict[str, int]]:
    """Another process that runs the stack; what it started is running when this returns."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(data_dir)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert holder.stdout is not None
    with holder.stdout as pipe:
        urls, pids = json.loads(pipe.readline())
    return holder, LocalUrls(**urls), pids


def _identities(pids: dict[str, int]) -> list[ProcessIdentity]:
    found = [ProcessIdentity.of(pid) for pid in pids.values()]
    assert None not in found
    return [identity for identity in found if identity is not None]


@pytest.mark.parametrize("durable", [True, False])
def test_data_and_urls_survive_a_stop(tmp_path: Path, durable: bool) -> None:
    stack = LocalStack(tmp_path / "data", durable=durable)
    before = stack.start()
    _write(before)
    stack.stop()

    with stack as after:
        assert after == before
        assert _read(after) == [CONTENT] * 3


def test_stop_leaves_no_process(stack: LocalStack) -> None:
    stack.start()
    identities = _identities(stack.pids)

    stack.stop()
    stack.stop()

    assert not [identity for identity in identities if identity.alive()]
    assert stack.pids == {}
    assert not [path for port in stack.ports.values() for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


def test_only_sockets_that_nobody_listens_on_are_cleared(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "data", start_database=False, start_broker=False, durable=False)
    stack.start()
    stack.stop()
    path = Path("/tmp") / f"seaweedfs-another-{stack.ports['seaweedfs_volume_grpc']}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as another:
        another.bind(str(path))
        another.listen()

        with stack:
            pass
        kept = path.exists()

    with stack:
        pass
    assert kept
    assert not path.exists()


def test_start_after_everything_was_killed(tmp_path: Path, stack: LocalStack) -> None:
    holder, urls, pids = _hold(tmp_path / "data")
    _write(urls)
    everything = [psutil.Process(holder.pid), *psutil.Process(holder.pid).children(recursive=True)]
    for process in everything:
        process.suspend()  # nobody reacts to another's death before its own
    for process in everything:
        process.kill()
    holder.wait()

    after = stack.start()

    assert after == urls
    assert not set(stack.pids.values()) & set(pids.values())
    assert _read(after) == [CONTENT] * 3


def test_servers_end_when_forgetd_is_killed(tmp_path: Path) -> None:
    holder, _, pids = _hold(tmp_path / "data")
    identities = _identities(pids)

    holder.kill()
    holder.wait()

    wait_until(lambda: not any(identity.alive() for identity in identities))


def test_start_while_servers_of_a_killed_run_still_stop(tmp_path: Path, stack: LocalStack) -> None:
    holder, urls, _ = _hold(tmp_path / "data")
    _write(urls)
    holder.kill()
    holder.wait()

    after = stack.start()

    assert after == urls
    assert _read(after)[0] == CONTENT


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no death signal")
def test_servers_end_when_their_guardians_are_killed(stack: LocalStack) -> None:
    stack.start()
    identities = _identities(stack.pids)

    for identity in identities:
        psutil.Process(identity.pid).parent().kill()  # type: ignore[union-attr]  # a living process has a parent

    wait_until(lambda: not any(identity.alive() for identity in identities))


def test_a_stranger_with_the_recorded_process_id_is_left_alone(database_only: LocalStack) -> None:
    database_only.start()
    database_only.stop()
    state = database_only.data_dir / "state.json"
    recorded = json.loads(state.read_text())
    recorded["processes"] = {"postgres": {"pid": os.getpid(), "mark": "another boot:1"}}
    state.write_text(json.dumps(recorded))
    lock = database_only.data_dir / "postgres" / "data" / "postmaster.pid"
    lock.write_text(f"{os.getpid()}\n{lock.parent}\n0\n{database_only.ports['postgres']}\n\n127.0.0.1\n")

    database_only.start()

    assert set(database_only.pids) == {"postgres"}


@pytest.mark.parametrize("name", ["postgres", "valkey", "seaweedfs"])
def test_a_killed_server_comes_back_at_its_url_with_its_data(written: LocalStack, name: str) -> None:
    urls, before = written.urls, written.pids[name]

    written.kill_server(name)
    assert name not in written.pids
    written.start_server(name)

    assert written.pids[name] != before
    assert written.urls == urls
    assert _read(urls)[0] == CONTENT
    assert _read(urls)[2] == CONTENT


def test_a_server_that_crashed_by_itself_restarts(database_only: LocalStack) -> None:
    urls = database_only.start()
    _write_row(urls)
    os.kill(database_only.pids["postgres"], signal.SIGKILL)

    database_only.restart_postgres()

    assert _read_row(urls) == CONTENT


def test_orderly_restarts_keep_everything(written: LocalStack) -> None:
    with redis.Redis.from_url(written.urls.broker_url) as broker:
        broker.set("kept", CONTENT)  # which a kill may have cost it

    written.restart_seaweedfs()
    written.restart_valkey()
    written.restart_postgres()

    assert _read(written.urls) == [CONTENT] * 3


def test_two_stacks_beside_each_other(stack: LocalStack, tmp_path: Path) -> None:
    # Long, and with the characters that configuration files and option lists stumble over.
    odd = tmp_path / ("deep folder, with 'quotes' and \"more\" " + "x" * 60) / "é" / ("y" * 40)
    with LocalStack(odd, durable=False) as other_urls:
        urls = stack.start()
        _write(urls)
        _write(other_urls)

        assert not set(vars(urls).values()) & set(vars(other_urls).values()) - {urls.s3_bucket}
        assert _read(other_urls) == [CONTENT] * 3


def test_one_folder_holds_one_stack(written: LocalStack) -> None:
    with pytest.raises(LocalServerError, match="Another forgetd"):
        LocalStack(written.data_dir).start()

    assert set(written.pids) == {"postgres", "valkey", "seaweedfs"}


def test_a_port_that_somebody_took_is_replaced(stack: LocalStack) -> None:
    before = stack.start()
    _write(before)
    ports = stack.ports
    stack.stop()
    taken = [ports["postgres"], ports["valkey"], ports["seaweedfs_s3"]]
    strangers = [socket.create_server(("127.0.0.1", port)) for port in taken]

    after = stack.start()

    assert not set(taken) & set(stack.ports.values())
    assert _read(after) == [CONTENT] * 3
    for stranger in strangers:
        stranger.close()


def test_only_wanted_servers_are_started(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "data", start_database=False, start_storage=False, durable=False)
    with stack as urls:
        assert set(stack.pids) == {"valkey"}
        assert urls.database_url == ""
        assert urls.s3_endpoint_url == ""
        assert redis.Redis.from_url(urls.broker_url).ping()


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(database_only: LocalStack) -> None:
    database_only.start()
    database_only.stop()
    (database_only.data_dir / "postgres" / "data" / "global" / "pg_control").unlink()

    with pytest.raises(LocalServerError, match="postgres ended while starting"):
        database_only.start()

    assert database_only.pids == {}


def test_initialisation_that_was_interrupted_is_done_again(database_only: LocalStack) -> None:
    half = database_only.data_dir / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")

    assert database_only.start().database_url
