"""``forgetd tenants`` and ``--deadline``: who may have how much, and until when."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cli import Client
from cli.exits import ExitCode
from services import tenancy
from services.database import Database
from tests.cli.here import forgetd_here
from tests.cli.processes import UNKNOWN_JOB, Result
from tests.cli.scripted import Answer, ScriptedServer

QUEUED = Answer(202, json.dumps({"id": UNKNOWN_JOB, "status": "queued"}).encode())


@pytest.fixture
def tenants(database: Database, database_url: str, tmp_path: Path) -> Callable[..., Result]:
    """Runs a command of ``forgetd tenants`` where there are two of them, acme and beta."""
    for name in ("beta", "acme"):
        with database.transaction() as session:
            tenancy.create_key(session, tenant=name, name="test")

    def run(*words: str) -> Result:
        return forgetd_here("tenants", *words, cwd=tmp_path, env={"FORGETD_DATABASE_URL": database_url})

    return run


def limits(tenants: Callable[..., Result]) -> dict[str, tuple[int | None, int | None]]:
    rows = [json.loads(line) for line in tenants("list", "--json").out.splitlines()]
    return {row["name"]: (row["max_open_jobs"], row["max_running_jobs"]) for row in rows}


def test_limits_are_given_one_by_one_and_taken_back(tenants: Callable[..., Result]) -> None:
    assert limits(tenants) == {"acme": (None, None), "beta": (None, None)}

    assert tenants("limit", "acme", "--open-jobs", "20", "--running-jobs", "0").code == ExitCode.OK
    assert limits(tenants)["acme"] == (20, 0)
    assert tenants("limit", "acme", "--open-jobs", "none").code == ExitCode.OK
    assert limits(tenants) == {"acme": (None, 0), "beta": (None, None)}


def test_the_list_is_lines_for_scripts(tenants: Callable[..., Result]) -> None:
    tenants("limit", "acme", "--open-jobs", "20")

    lines = [line.split("\t")[1:] for line in tenants("list").out.splitlines()]

    assert lines == [["acme", "0", "20", "0", "-"], ["beta", "0", "-", "0", "-"]]


@pytest.mark.parametrize("words", [[], ["--open-jobs", "many"], ["--running-jobs", "-1"], ["--open-jobs", "9" * 12]])
def test_a_limit_that_is_none_is_wrong_usage(tenants: Callable[..., Result], words: list[str]) -> None:
    assert tenants("limit", "acme", *words).code == ExitCode.USAGE
    assert limits(tenants)["acme"] == (None, None)


def test_a_tenant_that_is_not_there_is_named(tenants: Callable[..., Result]) -> None:
    done = tenants("limit", "nobody", "--open-jobs", "1")

    assert done.code == ExitCode.REFUSED
    assert "no tenant nobody" in done.err


@pytest.mark.parametrize(
    ("text", "length"),
    [("90m", timedelta(minutes=90)), ("2h", timedelta(hours=2)), ("3d", timedelta(days=3))],
)
@pytest.mark.parametrize(
    "words",
    [["forget", "ckpt_1", "imgs_1"], ["debias", "ckpt_1", "own-classes", "--target", "0=.5", "--target", "1=.5"]],
)
def test_a_deadline_may_be_a_while_from_now(
    make_server: Callable[..., ScriptedServer], tmp_path: Path, words: list[str], text: str, length: timedelta
) -> None:
    server = make_server(QUEUED)
    before = datetime.now(UTC)

    done = forgetd_here("jobs", *words, "--deadline", text, "--url", server.url, "--key", "k", cwd=tmp_path)

    assert done.code == ExitCode.OK, done.err
    sent = datetime.fromisoformat(json.loads(server.received[0].body)["deadline"])
    assert before + length <= sent <= datetime.now(UTC) + length


def test_a_deadline_may_be_a_time_sent_as_written(make_server: Callable[..., ScriptedServer], tmp_path: Path) -> None:
    server = make_server(QUEUED)

    forgetd_here(
        *("jobs", "forget", "ckpt_1", "imgs_1", "--deadline", "2099-12-31T18:00:00+01:00"),
        *("--url", server.url, "--key", "k"),
        cwd=tmp_path,
    )

    assert json.loads(server.received[0].body)["deadline"] == "2099-12-31T18:00:00+01:00"


@pytest.mark.parametrize("text", ["soon", "2", "h", "-2h", "2w", "1.5h", "9" * 12 + "d"])
def test_a_deadline_that_is_none_is_wrong_usage(tmp_path: Path, text: str) -> None:
    done = forgetd_here("jobs", "forget", "ckpt_1", "imgs_1", f"--deadline={text}", cwd=tmp_path)

    assert done.code == ExitCode.USAGE
    assert "2026-12-31T18:00:00Z" in " ".join(done.err.split())


def test_the_client_takes_every_form_of_a_deadline(
    make_server: Callable[..., ScriptedServer], connect: Callable[..., Client]
) -> None:
    moment = datetime(2099, 1, 1, tzinfo=UTC)
    server = make_server(QUEUED, QUEUED, QUEUED)
    client = connect(server.url)

    client.forget("ckpt_1", "imgs_1", deadline=moment)
    client.forget("ckpt_1", "imgs_1", deadline="2099-01-01T00:00:00Z")
    client.forget("ckpt_1", "imgs_1")

    sent = [json.loads(received.body).get("deadline") for received in server.received]
    assert sent == ["2099-01-01T00:00:00+00:00", "2099-01-01T00:00:00Z", None]
