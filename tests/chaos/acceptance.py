"""``python -m tests.chaos.acceptance``: what a 202 is worth when the gateway dies at once, and one key sent by many.

A gateway is killed as the first bytes of its 202 arrive, a thousand times: every job must be there. A thousand calls
with one Idempotency-Key at the same moment: one job, one answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from services import tenancy
from services.database import Database
from services.ids import new_id
from services.local.stack import LocalStack
from services.migrations import upgrade
from services.tables import Checkpoint, Job
from services.tenancy import NewKey
from tests.chaos.processes import ROOT

__all__ = ["Gateway", "killed_after_accepting", "one_key_by_many", "serving"]

HERE = Path(__file__).parent
SECONDS = 60.0
MANIFEST = {"family": "class-prior", "channels": 1, "image_size": 8, "n_bits": 5, "architecture": {"n_classes": 3}}


class Gateway:
    """The gateway of a database with one ready checkpoint."""

    def __init__(self, address: tuple[str, int], pids: Iterator[str], database: Database, key: NewKey, body: bytes):
        self.address, self.database = address, database
        self._pids, self._key, self._body = pids, key, body

    def next_pid(self) -> int:
        """Of the child that serves now."""
        return int(next(self._pids))

    def request(self, idempotency_key: str | None = None) -> bytes:
        """The bytes of a ``POST /jobs/forget``."""
        more = f"Idempotency-Key: {idempotency_key}\r\n" if idempotency_key else ""
        head = (
            f"POST /jobs/forget HTTP/1.1\r\nHost: forgetd\r\nAuthorization: Bearer {self._key.secret}\r\n{more}"
            f"Content-Type: application/json\r\nContent-Length: {len(self._body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + self._body

    def job_ids(self) -> set[str]:
        """Every job that there is."""
        with self.database.transaction() as session:
            return set(session.scalars(select(Job.id)))

    def count(self) -> int:
        """How many jobs there are."""
        with self.database.transaction() as session:
            return session.scalar(select(func.count()).select_from(Job)) or 0


def killed_after_accepting(gateway: Gateway, times: int) -> tuple[int, int]:
    """Kill the gateway as its 202 arrives, so many times. Returns how many were accepted, and how many are there."""
    accepted: set[str] = set()
    for _ in range(times):
        pid = gateway.next_pid()
        answer = b""
        with socket.create_connection(gateway.address, SECONDS) as caller:
            caller.sendall(gateway.request())
            # The status line and the headers, Location among them, are written at once.
            while b"\r\n\r\n" not in answer and (piece := caller.recv(65536)):
                answer += piece
            os.kill(pid, signal.SIGKILL)
        head = answer.decode(errors="replace")
        if not head.startswith("HTTP/1.1 202"):
            raise RuntimeError(f"not accepted: {head[:500]}")
        accepted.add(head.lower().partition("location: /jobs/")[2].partition("\r\n")[0])
    return len(accepted), len(accepted & gateway.job_ids())


def one_key_by_many(gateway: Gateway, callers: int) -> tuple[int, int, int]:
    """So many calls with one key at once. Returns how many were accepted, distinct answers, and new jobs."""
    gateway.next_pid()
    before = gateway.count()
    answers = asyncio.run(_together(gateway, gateway.request(new_id("job")), callers))
    accepted = [answer for answer in answers if answer.startswith(b"HTTP/1.1 202")]
    bodies = {answer.partition(b"\r\n\r\n")[2] for answer in accepted}
    return len(accepted), len(bodies), gateway.count() - before


async def _together(gateway: Gateway, request: bytes, callers: int) -> list[bytes]:
    connections = await asyncio.gather(*(asyncio.open_connection(*gateway.address) for _ in range(callers)))

    async def call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), SECONDS)
        writer.close()
        return answer

    return await asyncio.gather(*(call(*connection) for connection in connections))


@contextmanager
def serving(folder: Path) -> Iterator[Gateway]:
    """Servers and a gateway that comes back at once; nobody works on its jobs."""
    with (
        LocalStack(folder / "servers", durable=False) as urls,
        socket.create_server(("127.0.0.1", 0), backlog=4096) as door,
    ):
        upgrade(urls.database_url)
        database = Database(urls.database_url, pool_size=2)
        key, body = _tenant(database)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FORGETD_DATABASE_URL": urls.database_url,
            "FORGETD_BROKER_URL": urls.broker_url,
            "FORGETD_S3_ENDPOINT_URL": urls.s3_endpoint_url,
            "FORGETD_S3_ACCESS_KEY": urls.s3_access_key,
            "FORGETD_S3_SECRET_KEY": urls.s3_secret_key,
            "FORGETD_TENANT_OPEN_JOBS": "1000000",
        }
        process = subprocess.Popen(
            [sys.executable, str(HERE / "forking_gateway.py"), str(door.fileno())],
            env=environment,
            stdout=subprocess.PIPE,
            pass_fds=[door.fileno()],
            start_new_session=True,
            text=True,
        )
        try:
            yield Gateway(door.getsockname(), iter(process.stdout or []), database, key, body)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            database.close()


def _tenant(database: Database) -> tuple[NewKey, bytes]:
    checkpoint_id = new_id("ckpt")
    facts: dict[str, Any] = {"source_bytes": 1, "source_sha256": "", "weights_key": "w", "weights_bytes": 1}
    with database.transaction() as session:
        key = tenancy.create_key(session, tenant="caller", name="caller")
        session.add(
            Checkpoint(
                id=checkpoint_id,
                tenant_id=key.tenant_id,
                name="base",
                status="ready",
                declared={},
                manifest=MANIFEST,
                weights_sha256="",
                **facts,
            )
        )
    return key, json.dumps({"checkpoint": checkpoint_id, "target": {"class_label": 0}}).encode()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.acceptance", description=__doc__)
    parser.add_argument("--times", type=int, default=1000)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="forgetd-chaos-") as folder, serving(Path(folder)) as gateway:
        accepted, present = killed_after_accepting(gateway, given.times)
        answered, answers, jobs = one_key_by_many(gateway, given.times)
    kept = accepted == present == given.times == answered and answers == jobs == 1
    print(  # noqa: T201 the result
        json.dumps(
            {
                "killed_after_202": given.times,
                "present": present,
                "posts_with_one_key": given.times,
                "accepted": answered,
                "distinct_answers": answers,
                "jobs": jobs,
                "kept": kept,
            }
        )
    )
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
