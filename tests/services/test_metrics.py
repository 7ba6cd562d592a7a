"""Figures of many processes as one: sums that no death, fold or lost reply makes wrong or lets go backwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import OperationalError

from services import metrics_table
from services.counted import COUNTERS, note
from services.database import Database
from services.metrics import Metrics, Push, headers
from services.metrics_gauges import COUNTED_AT_MOST, gauges
from services.metrics_table import Row
from services.tables import Job, ProcessCounters, WorkerSlot
from services.tenancy import Caller
from tests.services.test_migrations import _job

RUNG = "forgetd_doorbells_total"
SILENCE = timedelta(hours=1, minutes=1)


def fall_silent(database: Database, process: str) -> None:
    """As if the process had written nothing for an hour."""
    with database.transaction() as session:
        session.execute(
            update(ProcessCounters)
            .where(ProcessCounters.process.startswith(process))
            .values(seen_at=func.clock_timestamp() - SILENCE)
        )


def fold(database: Database) -> int:
    with database.transaction() as session:
        return metrics_table.fold(session)


def total(database: Database, key: str = RUNG) -> float:
    with database.transaction() as session:
        return metrics_table.totals(session).get(key, 0.0)


def rolled_back(database: Database) -> None:
    with database.transaction() as session:
        note(session, "doorbells")
        raise KeyError


@pytest.fixture
def away() -> Iterator[Database]:
    """A database that does not answer."""
    nobody = Database("postgresql+psycopg://nobody:x@127.0.0.1:9/none")
    yield nobody
    nobody.close()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("count"), st.integers(0, 2)),
        st.tuples(st.just("write"), st.integers(0, 2)),
        st.tuples(st.just("fail"), st.integers(0, 2)),
        st.tuples(st.just("silent"), st.integers(0, 2)),
        st.tuples(st.just("fold"), st.just(0)),
        st.tuples(st.just("restart"), st.integers(0, 2)),
    ),
    max_size=25,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_totals_are_what_was_written_by_the_living_and_the_dead(
    database: Database, away: Database, steps: list[tuple[str, int]]
) -> None:
    with database.transaction() as session:
        session.execute(delete(ProcessCounters))
    names = [f"p{number}" for number in range(3)]
    rows = [Row(name, "worker") for name in names]
    counted, written, ended = [0.0] * 3, [0.0] * 3, 0.0
    for number, (what, which) in enumerate(steps):
        if what == "count":
            counted[which] += 1
        elif what == "write":
            rows[which].write(database, {RUNG: counted[which]})
            written[which] = counted[which]
        elif what == "fail":
            with pytest.raises(OperationalError):
                rows[which].write(away, {RUNG: counted[which]})
        elif what == "silent":
            fall_silent(database, names[which])
        elif what == "fold":
            fold(database)
        else:
            ended += written[which]
            names[which] = f"p{which}-{number}"
            rows[which] = Row(names[which], "worker")
            counted[which] = written[which] = 0.0

        assert total(database) == ended + sum(written)


def test_figures_are_not_lost_to_failed_writes_and_a_fold(database: Database, away: Database) -> None:
    row = Row("worker", "worker")
    row.write(database, {RUNG: 10.0})
    for count in (20.0, 30.0):
        with pytest.raises(OperationalError):
            row.write(away, {RUNG: count})
    fall_silent(database, "worker")
    fold(database)

    row.write(database, {RUNG: 31.0})

    assert total(database) == 31.0


def test_a_row_that_speaks_is_not_folded(database: Database) -> None:
    Row("silent", "worker").write(database, {RUNG: 2.0})
    Row("lively", "worker").write(database, {RUNG: 1.0})
    fall_silent(database, "silent")

    folded = fold(database)

    with database.transaction() as session:
        left = set(session.scalars(select(ProcessCounters.process)))
    assert (folded, left) == (1, {"lively", "gone"})


def test_a_first_write_whose_reply_was_lost_is_written_again_and_counted_once(database: Database) -> None:
    Row("worker", "worker").write(database, {RUNG: 3.0})

    Row("worker", "worker").write(database, {RUNG: 4.0})

    assert total(database) == 4.0


def test_what_a_transaction_notes_is_counted_once_it_is_committed_and_only_then(
    database_url: str,
) -> None:
    metrics = Metrics()
    database = Database(database_url, counted=metrics)
    rung: list[float] = []

    with database.transaction() as session:
        note(session, "doorbells")
        rung.append(metrics.samples()[RUNG])
    rung.append(metrics.samples()[RUNG])
    with pytest.raises(KeyError):
        rolled_back(database)
    rung.append(metrics.samples()[RUNG])

    database.close()
    assert rung == [0.0, 1.0, 1.0]


def test_what_the_database_refuses_is_counted_by_its_kind(database_url: str) -> None:
    metrics = Metrics()
    database = Database(database_url, counted=metrics)

    with pytest.raises(Exception, match="division by zero"), database.transaction() as session:
        session.execute(text("SELECT 1 / 0"))

    database.close()
    assert metrics.samples()['forgetd_database_errors_total{error="DivisionByZero"}'] == 1.0


def test_the_last_push_is_the_leaving_ones(database: Database) -> None:
    metrics = Metrics()
    push = Push(database, metrics, process="short", kind="worker", every_seconds=60)
    push.start()
    metrics.count("doorbells")

    push.leave()

    assert total(database) == 1.0


def test_pushing_survives_a_database_that_is_away(database: Database) -> None:
    metrics = Metrics()
    metrics.count("doorbells")
    nobody = Database("postgresql+psycopg://nobody:x@127.0.0.1:9/none")
    away = Push(nobody, metrics, process="p", kind="worker", every_seconds=0.01)
    away.start()

    away.leave()

    assert not away.is_alive()
    nobody.close()


def test_the_exposition_parses_and_says_what_the_samples_say() -> None:
    metrics = Metrics()
    metrics.count("store_errors", operation="PutObject", error='odd "quoted"\\\n')
    metrics.phase("unlearning", "flow-taming", 70.0)
    metrics.request("BREW", "/jobs/{job_id}", 200, 0.004)
    samples = metrics.samples()

    families = list(text_string_to_metric_families(metrics_table.expose(samples, headers())))

    told = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for f in families for sample in f.samples}
    expected = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert told == expected
    assert {family.name for family in families} >= {f"forgetd_{name}" for name in COUNTERS}
    buckets = [s.value for f in families if f.name == "forgetd_phase_seconds" for s in f.samples if "le" in s.labels]
    assert buckets == sorted(buckets)
    assert (
        "forgetd_http_requests_total",
        (("method", "other"), ("route", "/jobs/{job_id}"), ("status", "200")),
    ) in told


def test_what_another_version_counts_is_left_out() -> None:
    shown = metrics_table.expose({"forgetd_new_total": 1.0, RUNG: 2.0}, headers())

    assert "forgetd_new" not in shown
    assert f"{RUNG} 2.0\n" in shown


@pytest.fixture
def gauge(database: Database) -> Callable[[str], float]:
    """What a scrape shows for a sample."""

    def ask(key: str) -> float:
        with database.transaction() as session:
            lines = gauges(session).splitlines()
        return float(dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))[key])

    return ask


def test_gauges_tell_how_queues_and_workers_stand(
    database: Database, caller: Caller, gauge: Callable[[str], float]
) -> None:
    oldest, other, held, lost = (_job(database, caller, "forget") for _ in range(4))
    with database.transaction() as session:
        session.execute(
            update(Job).where(Job.id == oldest).values(created_at=func.clock_timestamp() - timedelta(minutes=5))
        )
        session.execute(update(Job).where(Job.id == other).values(queue="cpu"))
        running = {"status": "running", "started_at": func.clock_timestamp(), "worker": "w", "fencing_token": 1}
        for job_id, seconds in ((held, 30), (lost, -30)):
            until = func.clock_timestamp() + timedelta(seconds=seconds)
            session.execute(update(Job).where(Job.id == job_id).values(lease_until=until, **running))
        session.execute(update(Job).where(Job.id == lost).values(status="cancelling"))
        for worker, seconds in (("w", 0), ("dead", 60)):
            seen = func.clock_timestamp() - timedelta(seconds=seconds)
            session.execute(insert(WorkerSlot).values(id=worker, queue="gpu.flow", slots=2, seen_at=seen))

    shown = {
        key: gauge(f"forgetd_{key}")
        for key in (
            'queue_jobs{queue="gpu.flow"}',
            'queue_jobs{queue="cpu"}',
            'jobs_running{queue="gpu.flow"}',
            'workers{queue="gpu.flow"}',
            'worker_slots{queue="gpu.flow"}',
            'workers{queue="cpu"}',
            "jobs_cancelling",
            "leases_expired",
            "jobs_unswept",
            "database_up",
        )
    }
    age = gauge('forgetd_queue_oldest_seconds{queue="gpu.flow"}')

    assert list(shown.values()) == [1, 1, 2, 1, 2, 0, 1, 1, 0, 1]
    assert 300 <= age < 400


def test_a_drained_job_is_not_old_to_the_queue_that_it_came_back_to(
    database: Database, caller: Caller, gauge: Callable[[str], float]
) -> None:
    job_id = _job(database, caller, "forget")
    long_ago = func.clock_timestamp() - timedelta(hours=20)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(created_at=long_ago, started_at=long_ago))

    assert gauge('forgetd_queue_jobs{queue="gpu.flow"}') == 1
    assert gauge('forgetd_queue_oldest_seconds{queue="gpu.flow"}') == 0


def test_a_long_backlog_is_counted_up_to_a_point_and_by_its_indexes(
    database: Database, caller: Caller, gauge: Callable[[str], float]
) -> None:
    model = _job(database, caller, "forget")
    with database.transaction() as session:
        session.execute(
            text(
                "INSERT INTO jobs (id, tenant_id, kind, queue, checkpoint_id, request, seed) "
                "SELECT 'job_' || number, tenant_id, kind, queue, checkpoint_id, request, seed "
                "FROM jobs, generate_series(1, 20000) AS number WHERE id = :model"
            ),
            {"model": model},
        )
        session.execute(text("ANALYZE jobs"))

    plan = _plan(
        database,
        "SELECT created_at FROM jobs WHERE status = 'queued' AND started_at IS NULL "
        "AND queue = 'gpu.flow' ORDER BY created_at LIMIT 1",
    )

    assert gauge('forgetd_queue_jobs{queue="gpu.flow"}') == COUNTED_AT_MOST
    assert "ix_jobs_unstarted" in plan


def _plan(database: Database, query: str) -> str:
    with database.transaction() as session:
        return json.dumps(session.execute(text(f"EXPLAIN (FORMAT JSON) {query}")).scalar())
