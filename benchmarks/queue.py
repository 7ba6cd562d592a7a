"""Does what a job costs the database stay the same, however many jobs there were before it and wait beside it?

    python -m benchmarks.queue [--quick]

An embedded PostgreSQL without fsync, so that no disk hides anything; a database for each size, filled by SQL and
vacuumed, since that server runs no autovacuum. In every round each size in turn goes through what the service does with
jobs, by the same functions and a transaction each: ``dispatch`` (look for what is due, stamp it; the doorbell's message
is left out), ``claim``, ``renew``, and a drain, which puts the job back so that all rounds are alike. Three shapes:

    history   so many ended jobs of 1,000 tenants, and a short queue
    backlog   so many queued jobs of one tenant
    tenants   so many queued jobs of 1,000 tenants; of 1,000 jobs each has one, so that a look has less to weigh there

A cost is the median over the rounds of the time on this side, transaction included; a growth that of the largest size
over that of the smallest, and the worst shape counts. Every answer is checked: bells for all free slots, each claimed,
renewed and given back. Then every statement of one round at the largest size, explained as it ran. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import create_engine, event, make_url, text

from services import dispatch, leases
from services.database import Database
from services.leases import Claim
from services.local import LocalStack
from services.migrations import upgrade

GOAL = 1.5
QUEUE = "gpu.flow"
TTL_SECONDS, RING_SECONDS = 30.0, 5.0
WORKERS, HELD = 16, 12  # a slot each; four are free
TENANTS = 1000
SHORT_QUEUE = 100
WARM_ROUNDS = 10  # past psycopg's threshold for prepared statements
SHAPES = ("history", "backlog", "tenants")
STEPS = ("claim", "renew", "dispatch")
TEMPLATE = "queue_template"

# As large as what a caller sends, so that pages hold as many rows as they would.
REQUEST = {
    "method": "flow-taming",
    "target": {"images": "imgs_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"},
    "remember": {"generated": 1024},
    "parameters": {"steps": 1000, "learning_rate": 1e-5, "fit": "crop"},
    "criteria": {"release_weights": "when_met"},
    "metadata": {"ticket": "R-1"},
}
NAMES = """
INSERT INTO tenants (id, name) SELECT 'ten_' || lpad(to_hex(i), 32, '0'), 'tenant ' || i
    FROM generate_series(0, :tenants - 1) AS i;
INSERT INTO checkpoints (id, tenant_id, name, declared, source_bytes, source_sha256)
    SELECT 'ckpt_' || lpad(to_hex(i), 32, '0'), 'ten_' || lpad(to_hex(i), 32, '0'), '', '{}', 1, ''
    FROM generate_series(0, :tenants - 1) AS i
"""
JOBS = """
INSERT INTO jobs (id, tenant_id, kind, queue, priority, checkpoint_id, request, seed, status, worker, lease_until,
        fencing_token, attempt, finished_at, swept_at, published_prefix)
    SELECT 'job_' || lpad(to_hex(:first + i), 32, '0'), 'ten_' || lpad(to_hex(i % :tenants), 32, '0'), 'forget', :queue,
        i % 3, 'ckpt_' || lpad(to_hex(i % :tenants), 32, '0'), cast(:request AS jsonb), 0, :status,
        CASE WHEN :status = 'running' THEN 'worker ' || i END,
        CASE WHEN :status = 'running' THEN now() + interval '1 day' END,
        CASE WHEN :status = 'running' THEN nextval('fencing_tokens') END,
        CASE WHEN :status = 'queued' THEN 0 ELSE 1 END,
        CASE WHEN :status = 'succeeded' THEN now() - interval '9 days' END,
        CASE WHEN :status = 'succeeded' THEN now() END,
        CASE WHEN :status = 'succeeded' THEN 'tenants/' END
    FROM generate_series(0, :number - 1) AS i
"""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sizes: tuple[int, ...]
    rounds: int


FULL, QUICK, TINY = Plan((1000, 100_000, 1_000_000), 200), Plan((1000, 100_000), 50), Plan((200, 2000), 3)


class Round:
    """One job's way after another through the database, each step timed."""

    def __init__(self, database: Database) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._database = database
        self._rounds: dict[str, str] = {}

    def go(self) -> None:
        """Ring for every free slot, claim, renew, give back."""
        self._live()
        due = self._timed("dispatch", self._dispatch)
        assert len(due) == WORKERS - HELD, due
        for number, job_id in enumerate(due):
            claim = self._timed("claim", partial(self._claim, job_id, HELD + number))
            assert claim is not None
            held = self._timed("renew", partial(self._renew, claim))
            assert held == "held"
            with self._database.transaction() as session:
                assert leases.release(session, claim)

    def _live(self) -> None:
        with self._database.transaction() as session:
            for number in range(WORKERS):
                dispatch.see_worker(session, f"worker {number}", [QUEUE], 1)

    def _dispatch(self) -> list[str]:
        with self._database.transaction() as session:
            due = [it for it, _ in dispatch.dispatchable(session, ring_seconds=RING_SECONDS, rounds=self._rounds)]
            dispatch.stamp_dispatched(session, due)
        return due

    def _claim(self, job_id: str, number: int) -> Claim | None:
        with self._database.transaction() as session:
            return leases.claim(session, job_id, worker=f"worker {number}", ttl_seconds=TTL_SECONDS)

    def _renew(self, claim: Claim) -> str:
        with self._database.transaction() as session:
            return leases.renew(session, claim.job_id, claim.token, ttl_seconds=TTL_SECONDS)

    def _timed(self, name: str, step: Callable[[], Answer]) -> Answer:
        began = time.perf_counter()
        answer = step()
        self.seconds[name].append(time.perf_counter() - began)
        return answer


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100 K rows, in half a minute")
    given = parser.parse_args(arguments)
    print(json.dumps(run(QUICK if given.quick else FULL)))


def run(plan: Plan) -> dict[str, float]:
    """The figures, which are also printed as they come."""
    facts = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{facts}, Python {platform.python_version()}; {plan.rounds} rounds of {WORKERS - HELD} jobs")
    growth: dict[str, list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalStack(Path(folder), durable=False, start_broker=False, start_storage=False) as urls,
    ):
        _server(urls.database_url, f"CREATE DATABASE {TEMPLATE}")
        upgrade(_at(urls.database_url, TEMPLATE))
        for shape in SHAPES:
            for step, found in _measure(urls.database_url, shape, plan).items():
                growth[step].append(found)
    return {f"{step}_growth": round(max(growth[step]), 3) for step in STEPS}


def _measure(server_url: str, shape: str, plan: Plan) -> dict[str, float]:
    """The growth of each step for one shape; its table, and its plans at the largest size, are printed."""
    with ExitStack() as stack:
        databases = {size: stack.enter_context(_filled(server_url, shape, size)) for size in plan.sizes}
        rounds = {size: Round(database) for size, database in databases.items()}
        for number in range(-WARM_ROUNDS, plan.rounds):
            for one in rounds.values():
                one.go()
                if number < 0:
                    one.seconds.clear()
        costs = {
            step: {size: 1e3 * statistics.median(one.seconds[step]) for size, one in rounds.items()} for step in STEPS
        }
        growth = {step: cost[max(plan.sizes)] / cost[min(plan.sizes)] for step, cost in costs.items()}
        print(f"\n{shape}: milliseconds, median of {plan.rounds} rounds (5th to 95th percentile)")
        for step, cost in costs.items():
            spread = {size: _spread(one.seconds[step]) for size, one in rounds.items()}
            shown = "   ".join(f"{size:>9,}: {it:6.3f} ({spread[size]})" for size, it in cost.items())
            print(f"  {step:>8}  {shown}   growth {growth[step]:.2f} (goal {GOAL})")
        largest = max(plan.sizes)
        print(f"\n{shape}, {largest:,} rows: every statement of a round, explained")
        with _explained(databases[largest]) as plans:
            rounds[largest].go()
        for statement, told in plans.items():
            print(f"\n{statement}\n{told}")
    return growth


def _spread(seconds: Sequence[float]) -> str:
    cuts = statistics.quantiles(seconds, n=20)
    return f"{1e3 * cuts[0]:.2f} to {1e3 * cuts[-1]:.2f}"


@contextmanager
def _filled(server_url: str, shape: str, size: int) -> Iterator[Database]:
    """A database of one shape and size, until the block ends."""
    name = f"queue_{shape}_{size}"
    _server(server_url, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    database = Database(_at(server_url, name), pool_size=1)
    try:
        _fill(database, shape, size)
        yield database
    finally:
        database.close()
        _server(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def _fill(database: Database, shape: str, size: int) -> None:
    with database.transaction() as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))
        for statement in NAMES.split(";"):
            session.execute(text(statement), {"tenants": TENANTS})

        def jobs(status: str, first: int, number: int, tenants: int) -> None:
            asked = {"queue": QUEUE, "request": json.dumps(REQUEST), "status": status}
            session.execute(text(JOBS), asked | {"first": first, "number": number, "tenants": tenants})

        if shape == "history":
            jobs("succeeded", 0, size, TENANTS)
            jobs("queued", size, SHORT_QUEUE, 3)
        else:
            jobs("queued", 0, size, 1 if shape == "backlog" else TENANTS)
        jobs("running", 2 * size, HELD, 3)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("VACUUM (ANALYZE) jobs, tenants, checkpoints"))
        connection.execute(text("RESET statement_timeout"))


@contextmanager
def _explained(database: Database) -> Iterator[dict[str, str]]:
    """Every statement that runs in the block with its plan, measured right before it in a savepoint that is undone."""
    plans: dict[str, str] = {}

    def explain(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        cursor.execute("SAVEPOINT explained")
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF) {statement}", parameters)
        plans.setdefault(statement.strip(), "\n".join(f"    {line}" for (line,) in cursor.fetchall()))
        cursor.execute("ROLLBACK TO SAVEPOINT explained")

    event.listen(database.engine, "before_cursor_execute", explain)
    try:
        yield plans
    finally:
        event.remove(database.engine, "before_cursor_execute", explain)


def _server(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _at(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


if __name__ == "__main__":
    main()
