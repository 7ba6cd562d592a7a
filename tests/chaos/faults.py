"""The catalogue of faults: each a function that breaks one thing, waits, and lets the fleet mend it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from kombu.exceptions import OperationalError as BrokerAway
from redis.exceptions import RedisError
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from services.local.server import LocalServerError
from services.tables import Job
from tests.chaos.fleet import Fleet, broker_of, database_of
from tests.chaos.processes import Kept
from tests.relays import Weather
from worker.celery_app import RUN_TASK, make_app

__all__ = ["CATALOGUE", "DRAIN_SECONDS", "Broken", "Fault", "plan", "spares"]

PREY_SECONDS = 6.0  # how long a fault waits for a runner to break
DRAIN_SECONDS = 60.0  # what a drain may take (docs/guarantees.md)
FORCED = 1  # the exit status of a worker whose drain took too long
DATABASE_TRIES = 5


@dataclass
class Broken:
    """What the faults saw, for the figures."""

    worker_kills: list[tuple[float, list[str]]] = field(default_factory=list)  # wall time, jobs that it held
    drains: list[float] = field(default_factory=list)  # seconds from SIGTERM to the end
    drains_forced: int = 0  # that the worker itself broke off, its time being over
    drains_cut: int = 0  # that had to be killed
    broker_outages: list[tuple[float, float]] = field(default_factory=list)  # wall times: gone, back


@dataclass(frozen=True)
class Fault:
    """One of the plan: ``kind`` of the catalogue, with draws of its own."""

    kind: str
    seed: int


Act = Callable[[Fleet, random.Random, Broken], bool]
"""Breaks one thing and lets it be mended; False where it found nothing to break."""


@dataclass(frozen=True)
class Kind:
    """``site``: faults at the same one follow each other. ``weight``: how often it is drawn."""

    act: Act
    site: str
    weight: int
    possible: Callable[[Fleet], bool] = lambda _fleet: True


# Processes.


def kill_one(group: Callable[[Fleet], list[Kept]]) -> Act:
    def act(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
        victim = draw.choice(group(fleet))
        held = _held_by(fleet, victim) if group is workers else []
        at = time.time()
        if not victim.send(signal.SIGKILL):
            return False
        if held:
            broken.worker_kills.append((at, held))
        return True

    return act


def _held_by(fleet: Fleet, worker: Kept) -> list[str]:
    with suppress(SQLAlchemyError), database_of(fleet.settings) as database, database.transaction() as session:
        return list(session.scalars(select(Job.id).where(Job.worker.like(f"{worker.name}-{worker.pid}-%"))))
    return []


def gateways(fleet: Fleet) -> list[Kept]:
    return fleet.gateways


def controls(fleet: Fleet) -> list[Kept]:
    return fleet.controls


def workers(fleet: Fleet) -> list[Kept]:
    return fleet.workers


def freeze_one(group: Callable[[Fleet], list[Kept]], leases: float) -> Act:
    """SIGSTOP for so many leases, then SIGCONT: it wakes up believing that nothing happened."""

    def act(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
        victim = draw.choice(group(fleet))
        pid = victim.pid
        if not victim.send(signal.SIGSTOP):
            return False
        time.sleep(leases * fleet.shape.lease_ttl_seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return True

    return act


def drain_one(group: Callable[[Fleet], list[Kept]]) -> Act:
    def act(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
        victim = draw.choice(group(fleet))
        pid, before = victim.pid, time.monotonic()
        if not victim.send(signal.SIGTERM):
            return False
        if victim.wait_end(pid, DRAIN_SECONDS):
            broken.drains.append(time.monotonic() - before)
            broken.drains_forced += victim.ends.get(pid) == FORCED
        else:
            broken.drains_cut += 1
            victim.send(signal.SIGKILL)
        return True

    return act


def _prey(fleet: Fleet, draw: random.Random) -> int | None:
    """A runner at work."""
    limit = time.monotonic() + PREY_SECONDS
    while time.monotonic() < limit:
        if runners := [pid for worker in fleet.workers for pid in worker.runners()]:
            return draw.choice(runners)
        time.sleep(0.1)
    return None


def kill_runner(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    pid = _prey(fleet, draw)
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False  # it was quicker


def freeze_runner(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    pid = _prey(fleet, draw)
    if pid is None:
        return False
    try:
        process = psutil.Process(pid)
        process.suspend()
    except psutil.NoSuchProcess:
        return False
    time.sleep(1.4 * fleet.shape.lease_ttl_seconds)
    with suppress(psutil.NoSuchProcess):
        process.resume()
    return True


# Servers.


def kill_broker(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    gone = time.time()
    fleet.stack.kill_server("valkey")
    time.sleep(draw.uniform(0.5, 6))
    fleet.stack.start_server("valkey")
    broken.broker_outages.append((gone, time.time()))
    return True


def flush_broker(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    with suppress(RedisError), broker_of(fleet.settings) as broker:
        for _ in range(draw.randint(1, 5)):
            broker.flushall()
            time.sleep(0.1)
        return True
    return False


def ring_twice(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    """Duplicate and belated doorbells: of jobs that wait, that run, and that ended."""
    app = make_app(fleet.settings)
    with suppress(SQLAlchemyError, BrokerAway, RedisError, OSError):  # a server is away
        with database_of(fleet.settings) as database, database.transaction() as session:
            ids = list(session.scalars(select(Job.id).order_by(Job.id.desc()).limit(40)))
        for job_id in draw.choices(ids, k=20) if ids else []:
            app.send_task(RUN_TASK, args=[job_id], queue="gpu.flow", retry=False, ignore_result=True)
        return bool(ids)
    return False


def end_database(number: int) -> Act:
    """SIGINT is a fast shutdown of PostgreSQL, SIGQUIT an immediate one, SIGKILL a crash."""

    def act(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
        ended = _end_database(fleet, number)
        time.sleep(draw.uniform(0, 3))
        _start_database(fleet)
        return ended

    return act


def _end_database(fleet: Fleet, number: int) -> bool:
    pid = fleet.stack.pids.get("postgres")
    if pid is None:
        return False
    with suppress(ProcessLookupError, psutil.Error):
        process = psutil.Process(pid)
        process.send_signal(number)
        process.wait(20)
        return True
    return False


def _start_database(fleet: Fleet) -> None:
    for left in reversed(range(DATABASE_TRIES)):
        try:
            fleet.stack.start_server("postgres")
            return
        except LocalServerError:  # children of a killed postmaster may still hold its memory for a moment
            if not left:
                raise
            time.sleep(0.5)


def lose_commit(kind: str) -> Act:
    def act(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
        for number in range(draw.randint(1, 4)):
            sprung = threading.Event()
            fleet.database_relay.trap(kind, sprung.set)  # type: ignore[arg-type]  # one of two words
            if not sprung.wait(PREY_SECONDS):
                return number > 0
        return True

    return act


def kill_database_in_commit(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    """SIGKILL while a COMMIT is on its way: it may count or not, and nobody is told."""
    sprung = threading.Event()
    fleet.database_relay.trap("reply lost", sprung.set)
    committing = sprung.wait(PREY_SECONDS)
    time.sleep(draw.choice((0, 0, 0.0005, 0.002)))
    _end_database(fleet, signal.SIGKILL)
    _start_database(fleet)
    return committing


def weather(kind: Weather, least: float, most: float) -> Act:
    def act(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
        fleet.store_relay.turn(kind)
        time.sleep(draw.uniform(least, most))
        fleet.store_relay.turn("fair")
        return True

    return act


def kill_store(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    fleet.stack.kill_server("seaweedfs")
    time.sleep(draw.uniform(0, 3))
    fleet.stack.start_server("seaweedfs")
    return True


# Disks and clocks.


def fill_disk(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    """Fill the small disk of the last worker, through the eyes of that process."""
    folder = Path(f"/proc/{fleet.workers[-1].pid}/root{fleet.small_disk}")
    try:
        if folder.stat().st_dev == fleet.folder.stat().st_dev:  # its disk is not mounted yet: this is the machine's own
            return False
        there = os.open(folder, os.O_RDONLY)  # whatever becomes of the process, this folder
    except OSError:  # the worker was gone, and its disk with it
        return False
    try:
        filler = os.open("filler", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=there)
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(2**20)):
                pass
        time.sleep(draw.uniform(1, 5))
        os.unlink("filler", dir_fd=there)
    except OSError:
        return False
    finally:
        os.close(there)
    return True


def jump_clock(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    """The wall clock of one process is wrong for a while. (Beyond 15 minutes S3 refuses signatures: an assumption.)"""
    name = draw.choice(fleet.kept()).name
    fleet.clocks.set(name, draw.choice((-1, 1)) * draw.randint(30, 600))
    time.sleep(draw.uniform(2, 8))
    fleet.clocks.set(name, 0)
    return True


def jump_leases(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    """The database's clock jumps by an hour, as leases see it: every one of them is over at once."""
    over = text(
        "UPDATE jobs SET lease_until = lease_until - interval '1 hour' WHERE lease_until > now() RETURNING jobs.id"
    )
    limit = time.monotonic() + PREY_SECONDS
    while time.monotonic() < limit:
        with suppress(SQLAlchemyError), database_of(fleet.settings) as database, database.transaction() as session:
            if session.execute(over).all():
                return True
        time.sleep(0.1)
    return False


CATALOGUE: dict[str, Kind] = {
    "gateway killed": Kind(kill_one(gateways), "gateways", 6),
    "gateway drained": Kind(drain_one(gateways), "gateways", 3),
    "control killed": Kind(kill_one(controls), "controls", 6),
    "control frozen": Kind(freeze_one(controls, 2.0), "controls", 3),
    "worker killed": Kind(kill_one(workers), "workers", 12),
    "worker frozen past its lease": Kind(freeze_one(workers, 1.4), "frozen worker", 8),
    "worker drained": Kind(drain_one(workers), "drained worker", 8),
    "runner killed": Kind(kill_runner, "runners", 10),
    "runner frozen past its lease": Kind(freeze_runner, "frozen runner", 6),
    "broker killed": Kind(kill_broker, "broker", 6),
    "broker flushed": Kind(flush_broker, "broker", 6),
    "doorbells doubled": Kind(ring_twice, "doorbells", 5),
    "database stopped (fast)": Kind(end_database(signal.SIGINT), "database", 3),
    "database stopped (immediate)": Kind(end_database(signal.SIGQUIT), "database", 3),
    "database killed": Kind(end_database(signal.SIGKILL), "database", 3),
    "database killed in a commit": Kind(kill_database_in_commit, "database", 4),
    "commit lost": Kind(lose_commit("commit lost"), "database", 4),
    "reply to a commit lost": Kind(lose_commit("reply lost"), "database", 6),
    "store answers 503": Kind(weather("refusing", 2, 8), "store", 5),
    "store slow": Kind(weather("slow", 3, 8), "store", 4),
    "store truncates": Kind(weather("truncating", 2, 8), "store", 5),
    "store gone": Kind(weather("gone", 2, 8), "store", 3),
    "store gone for a minute": Kind(weather("gone", 60, 60), "store", 0),  # once a run, see plan
    "store killed": Kind(kill_store, "store", 3),
    "disk full": Kind(fill_disk, "disk", 4, lambda fleet: fleet.small_disk is not None),
    "clock of a process jumps": Kind(jump_clock, "clocks", 4, lambda fleet: fleet.clocks.can_jump),
    "clock of the database jumps": Kind(jump_leases, "leases", 3),
}


def spares(fleet: Fleet, seed: int, count: int, only: Collection[str] = ()) -> list[Fault]:
    """Further faults of kinds that are drawn by weight."""
    draw = random.Random(f"spares {seed}")
    possible = _possible(fleet, only)
    drawn = draw.choices(list(possible), [kind.weight for kind in possible.values()], k=count)
    return [Fault(kind, draw.getrandbits(32)) for kind in drawn]


def _possible(fleet: Fleet, only: Collection[str]) -> dict[str, Kind]:
    return {name: kind for name, kind in CATALOGUE.items() if kind.possible(fleet) and (not only or name in only)}


def plan(fleet: Fleet, seed: int, count: int, only: Collection[str] = ()) -> list[Fault]:
    """So many faults: each kind once where there is room, the rest by weight, in an order of the seed's."""
    draw = random.Random(f"plan {seed}")
    possible = _possible(fleet, only)
    names = [name for name, kind in possible.items() if kind.weight or count >= len(possible)]
    draw.shuffle(names)
    drawn = names[:count]
    weights = [possible[name].weight for name in names]
    drawn += draw.choices(names, weights, k=count - len(drawn))
    draw.shuffle(drawn)
    return [Fault(kind, draw.getrandbits(32)) for kind in drawn]
