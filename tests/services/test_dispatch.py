"""Whose doorbell rings: as many as there are free slots, to tenants in turn, and nothing twice."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given
from sqlalchemy import func, select, update

from services import dispatch, leases, tenancy
from services.database import Database
from services.places import Places
from services.tables import Tenant, WorkerSlot
from services.tenancy import Caller
from tests.services.test_leases import RING, Protocol
from worker import control


@pytest.fixture
def protocol(database: Database, caller: Caller) -> Protocol:
    """The protocol on a fresh database."""
    return Protocol(database, caller)


def others(database: Database, count: int) -> list[Protocol]:
    """Further tenants."""
    found = []
    for number in range(count):
        with database.transaction() as session:
            key = tenancy.create_key(session, tenant=f"tenant-{number}", name="test")
        found.append(Protocol(database, Caller(key.tenant_id, key.id)))
    return found


def test_bells_ring_for_free_slots_only_best_first(protocol: Protocol) -> None:
    low, high, middle = protocol.queue(priority=-1), protocol.queue(priority=5), protocol.queue()
    protocol.see(slots=2)

    due = protocol.due()

    assert due == [high, middle]
    assert low not in due


def test_what_an_older_gateway_accepted_into_a_queue_of_its_own_rings_in_this_version_s(
    protocol: Protocol, database: Database
) -> None:
    protocol.see(queues=("cpu",))
    waits, runs = protocol.queue(queue="cpu.convert"), protocol.queue(queue="cpu.convert")
    protocol.stamp(waits)
    protocol.claimed(runs)

    control.reap(database, budget=1)

    assert protocol.due() == []  # its one slot is taken by what runs
    protocol.see(queues=("cpu",), slots=2)
    assert protocol.due() == [waits]
    assert protocol.row(runs).queue == "cpu.convert"


def test_nothing_rings_without_a_worker(protocol: Protocol) -> None:
    protocol.queue()
    protocol.see(queues=("cpu",))

    assert protocol.due() == []


def test_a_rung_bell_is_silent_until_the_interval_is_over(protocol: Protocol) -> None:
    job_id = protocol.queue()
    protocol.see(slots=5)
    protocol.stamp(job_id)

    assert protocol.due() == []
    protocol.change(job_id, dispatched_at=func.clock_timestamp() - timedelta(seconds=RING + 1))
    assert protocol.due() == [job_id]


def test_a_busy_worker_is_not_rung_from_its_other_queue(protocol: Protocol) -> None:
    protocol.see(queues=("gpu.flow", "cpu"))
    protocol.claimed(protocol.queue(queue="cpu"))
    protocol.queue()

    assert protocol.due() == []


def test_the_lease_of_a_dead_worker_takes_no_slot(protocol: Protocol) -> None:
    protocol.see("dead")
    protocol.claimed(protocol.queue(), "dead")
    with protocol.database.transaction() as session:
        session.execute(update(WorkerSlot).values(seen_at=func.clock_timestamp() - timedelta(minutes=1)))
    protocol.see("alive")
    job_id = protocol.queue()

    assert protocol.due() == [job_id]


def test_two_control_loops_ring_different_bells(protocol: Protocol) -> None:
    first, second = protocol.queue(), protocol.queue()
    protocol.see()

    with protocol.database.transaction() as one, protocol.database.transaction() as other:
        rung = [dispatch.dispatchable(session, ring_seconds=RING) for session in (one, other)]

    assert [job_id for rows in rung for job_id, _ in rows] == [first, second]


def test_a_retired_worker_is_not_rung(protocol: Protocol) -> None:
    protocol.queue()
    protocol.see()
    with protocol.database.transaction() as session:
        dispatch.retire_worker(session, "worker")

    assert protocol.due() == []


# One slot is one slot.


def test_a_slot_that_listens_to_two_queues_is_rung_from_one(protocol: Protocol) -> None:
    protocol.see(queues=("gpu.flow", "gpu.diffusion"))
    for queue in ("gpu.flow", "gpu.diffusion"):
        protocol.queue(queue=queue)

    assert len(protocol.due()) == 1


def test_a_bell_on_its_way_takes_the_slot_of_the_other_queue_too(protocol: Protocol) -> None:
    protocol.see(queues=("gpu.flow", "gpu.diffusion"))
    protocol.stamp(protocol.queue(queue="gpu.diffusion"))
    protocol.queue(queue="gpu.flow")

    assert protocol.due() == []


def test_a_bell_is_placed_where_it_leaves_room_for_the_others(protocol: Protocol) -> None:
    protocol.see("both", queues=("gpu.flow", "gpu.diffusion"))
    protocol.see("flow", queues=("gpu.flow",))
    protocol.stamp(protocol.queue(queue="gpu.flow"))
    diffusion = protocol.queue(queue="gpu.diffusion")

    assert protocol.due() == [diffusion]


QUEUES = ("a", "b", "c")


@given(
    workers=st.lists(st.tuples(st.sets(st.sampled_from(QUEUES), min_size=1), st.integers(0, 2)), max_size=4),
    bells=st.lists(st.sampled_from(QUEUES), max_size=8),
)
def test_a_bell_is_refused_only_if_no_placing_of_all_exists(
    workers: list[tuple[set[str], int]], bells: list[str]
) -> None:
    places = Places()
    for queues, free in workers:
        places.add(queues, free)

    taken = Counter[str]()
    for bell in bells:
        before = taken.copy()
        before[bell] += 1
        # Hall: bells of any set of queues are no more than the slots that listen to one of them.
        fits = all(
            sum(before[queue] for queue in some) <= sum(free for queues, free in workers if queues & some)
            for some in (
                {queue for queue, on in zip(QUEUES, chosen, strict=True) if on} for chosen in product((0, 1), repeat=3)
            )
        )
        assert places.take(bell) == fits
        taken[bell] += fits


# Turns.


def test_a_long_backlog_of_one_tenant_does_not_hold_up_another(protocol: Protocol, database: Database) -> None:
    [other] = others(database, 1)
    first, second, _ = (protocol.queue() for _ in range(3))
    late = other.queue()
    protocol.see(slots=3)

    assert protocol.due() == [first, late, second]


def test_what_a_tenant_holds_counts_as_served(protocol: Protocol, database: Database) -> None:
    [other] = others(database, 1)
    protocol.see(slots=2)
    protocol.claimed(protocol.queue())
    protocol.queue()
    theirs = other.queue()

    assert protocol.due() == [theirs]


def test_bells_on_their_way_count_as_served(protocol: Protocol, database: Database) -> None:
    [other] = others(database, 1)
    protocol.see(slots=2)
    protocol.stamp(protocol.queue())
    protocol.queue()
    theirs = other.queue()

    assert protocol.due() == [theirs]


def test_with_as_little_the_tenant_served_longest_ago_is_next(protocol: Protocol, database: Database) -> None:
    tenants = [protocol, *others(database, 2)]
    protocol.see()
    for tenant in tenants:
        for _ in range(3):
            tenant.queue()

    served = []
    for _ in range(6):
        [job_id] = protocol.due()
        protocol.stamp(job_id)
        protocol.publish(protocol.claimed(job_id))
        served.append(protocol.row(job_id).tenant_id)

    assert served == 2 * [tenant.caller.tenant_id for tenant in tenants]


def test_priority_orders_within_a_tenant_and_starves_nobody(protocol: Protocol, database: Database) -> None:
    [other] = others(database, 1)
    for _ in range(3):
        protocol.queue(priority=100)
    low, high = other.queue(priority=-100), other.queue(priority=-99)
    protocol.see(slots=4)

    due = protocol.due()

    assert due.index(high) < due.index(low)
    assert {low, high} <= set(due)


def test_a_shared_slot_alternates_between_the_tenants_of_its_queues(protocol: Protocol, database: Database) -> None:
    [other] = others(database, 1)
    protocol.see(queues=("gpu.flow", "gpu.diffusion"))
    for _ in range(2):
        protocol.queue(queue="gpu.diffusion")
        other.queue(queue="gpu.flow")

    served = []
    for _ in range(4):
        [job_id] = protocol.due()
        protocol.stamp(job_id)
        protocol.publish(protocol.claimed(job_id))
        served.append(protocol.row(job_id).queue)

    assert sorted(served[:2]) == sorted(served[2:]) == ["gpu.diffusion", "gpu.flow"]


def test_of_more_tenants_than_are_weighed_at_once_each_is_served_before_one_is_served_again(
    protocol: Protocol, database: Database
) -> None:
    tenants = others(database, 9)
    for tenant in tenants:
        for _ in range(9):
            tenant.queue()
    protocol.see()
    rounds: dict[str, str] = {}

    served = Counter[str]()
    for _ in range(9):
        [job_id] = protocol.due(rounds=rounds, tenants_at_once=2)
        protocol.stamp(job_id)
        protocol.publish(protocol.claimed(job_id))
        served[protocol.row(job_id).tenant_id] += 1

    assert served == {tenant.caller.tenant_id: 1 for tenant in tenants}


def test_tenants_that_may_run_nothing_hide_nobody(protocol: Protocol, database: Database) -> None:
    for tenant in others(database, 5):
        tenant.queue()
    with database.transaction() as session:
        session.execute(update(Tenant).where(Tenant.id != protocol.caller.tenant_id).values(max_running_jobs=0))
    mine = protocol.queue()
    protocol.see()

    assert protocol.due(tenants_at_once=1) == [mine]


def test_no_more_ring_than_a_tenant_may_have_at_work(protocol: Protocol, database: Database) -> None:
    protocol.see(slots=5)
    protocol.claimed(protocol.queue())
    for _ in range(4):
        protocol.queue()

    assert len(protocol.due(running_jobs=3)) == 2
    with database.transaction() as session:
        session.execute(update(Tenant).values(max_running_jobs=2))
    assert len(protocol.due(running_jobs=3)) == 1


def test_a_job_past_its_deadline_is_not_rung(protocol: Protocol) -> None:
    protocol.queue(deadline_at=func.clock_timestamp() - timedelta(seconds=1))
    protocol.see()

    assert protocol.due() == []


# Several control loops.


def test_control_loops_at_once_ring_nothing_twice(protocol: Protocol, database: Database) -> None:
    queued = [protocol.queue() for _ in range(12)]
    protocol.see(slots=12)
    rung: list[str] = []

    def look(_: int) -> list[str]:
        with database.transaction() as session:
            due = [job_id for job_id, _ in dispatch.dispatchable(session, ring_seconds=60)]
            dispatch.stamp_dispatched(session, due)
        return due

    with ThreadPoolExecutor(4) as pool:
        for due in pool.map(look, range(8)):
            rung += due

    assert sorted(rung) == sorted(queued)


def test_a_control_loop_that_hangs_holds_up_no_other(protocol: Protocol, database: Database) -> None:
    first, second = protocol.queue(), protocol.queue()
    protocol.see(slots=1)

    with database.transaction() as hanging:
        held = dispatch.dispatchable(hanging, ring_seconds=RING)
        dispatch.stamp_dispatched(hanging, [first])
        with database.transaction() as session:
            found = dispatch.dispatchable(session, ring_seconds=RING)
            dispatch.stamp_dispatched(session, [job_id for job_id, _ in found])

    assert (held, found) == ([(first, "gpu.flow")], [(second, "gpu.flow")])


# What a look costs.


def test_a_renewal_touches_no_index(protocol: Protocol, database: Database) -> None:
    claim = protocol.claimed(protocol.queue())
    hot = select(func.pg_stat_get_xact_tuples_hot_updated(func.to_regclass("jobs")))

    with database.transaction() as session:
        leases.renew(session, claim.job_id, claim.token, ttl_seconds=30)
        leases.record_progress(session, claim, phase="unlearning", progress={"step": 1})
        updated = session.scalar(hot)

    assert updated == 2
