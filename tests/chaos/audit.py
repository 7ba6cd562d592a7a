"""The auditor: rows, events, audit trail, store, scratch and processes after the faults, against what was promised."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services import image_sets, object_keys
from services.database import Database
from services.storage import ObjectStorage
from services.tables import AuditEvent, Checkpoint, ImageSet, Job, JobEvent
from tests.chaos.callers import Promised
from tests.chaos.profile import is_real, profile
from worker import janitor

__all__ = ["Findings", "Unsettled", "audit", "endings", "leftovers_of_processes", "unsettled"]

TERMINAL = ("succeeded", "failed", "cancelled")
MANY = 1_000_000
AHEAD = timedelta(minutes=15)
ENDS = tuple(f"job.{status}" for status in TERMINAL)
WHOLE_SECONDS = timedelta(seconds=2)  # the store tells times without fractions


@dataclass
class Findings:
    """What is wrong, by promise; each entry a sentence about one job or object."""

    lost: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    published_twice: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    held_by_the_dead: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # any other law

    def any(self) -> bool:
        """Whether something is wrong."""
        return any(vars(self).values())


@dataclass(frozen=True)
class Unsettled:
    """What still waits for something."""

    open: list[str]
    """Jobs that have not ended."""
    unswept: list[str]
    """Jobs that have, with no janitor behind them yet, and photos that it has not erased yet."""

    @property
    def count(self) -> int:
        return len(self.open) + len(self.unswept)


def unsettled(database: Database) -> Unsettled:
    """What waits now."""
    with database.transaction() as session:
        jobs = list(session.scalars(select(Job.id).where(Job.status.not_in(TERMINAL))))
        ended = session.scalars(select(Job.id).where(Job.status.in_(TERMINAL), Job.swept_at.is_(None)))
        return Unsettled(jobs, [*ended, *image_sets.due(session, limit=MANY)])


def endings(database: Database) -> dict[str, int]:
    """How many jobs ended how."""
    with database.transaction() as session:
        return dict(Counter(map(_how, session.scalars(select(Job).where(Job.kind != "import")))).most_common())


def audit(database: Database, storage: ObjectStorage, promised: Promised, trace: Path, *, budget: int = 0) -> Findings:
    """Everything that can be seen from database, store and trace, once the fleet has settled.

    Args:
        database: as nobody disturbs it.
        storage: likewise.
        promised: what callers were told.
        trace: what runners wrote.
        budget: lost attempts after which a job may end for it.
    """
    findings = Findings()
    _left_behind(findings, database, storage)  # what the service's own janitor did not see
    janitor.sweep(database, storage)
    # Nobody uploads or computes any more. Ids tell when they were made, by clocks that were ahead by minutes.
    janitor.tidy(database, storage, unfinished=-AHEAD, stale=timedelta())
    with database.transaction() as session:
        jobs = list(session.scalars(select(Job)))
        _promises(findings, promised, {job.id: job for job in jobs}, budget)
        _checkpoints(findings, session, promised, jobs, budget)
        _ends(findings, session, jobs)
        _leases(findings, jobs)
        _attempts(findings, session, jobs)
        _personal(findings, session, promised)
        referenced = _referenced(session, jobs)
        pushed = _pushed(session, promised)
    nonces = _nonces(trace)
    for job in jobs:
        if job.published_prefix is not None and job.kind != "import":
            _publication(findings, storage, job, nonces)
    for checkpoint, import_job in pushed:
        _weights(findings, storage, checkpoint, import_job)
    _orphans(findings, storage, referenced)
    return findings


def _promises(findings: Findings, promised: Promised, jobs: dict[str, Job], budget: int) -> None:
    findings.lost += [f"{job_id} was accepted and has no row" for job_id in promised.jobs if job_id not in jobs]
    findings.stuck += [f"{job.id} is {job.status}" for job in jobs.values() if job.status not in TERMINAL]
    findings.broken += [f"the key {key} was answered with two jobs" for key in promised.two_for_one]
    findings.broken += [f"refused: {answer}" for answer in promised.refused]
    seeds = Counter(job.seed for job in jobs.values() if job.kind != "import")
    findings.broken += [f"{count} jobs for one request (seed {seed})" for seed, count in seeds.items() if count > 1]
    for job_id, seed in promised.jobs.items():
        job = jobs.get(job_id)
        if job is None or job.status not in TERMINAL:
            continue
        ended, wanted = _how(job), _expected(promised, job, seed, budget)
        if ended not in wanted:
            findings.broken.append(f"{job_id} ended as {ended}; expected {' or '.join(sorted(wanted))}")
        if promised.told.get(job_id, job.status) != job.status:
            findings.broken.append(f"{job_id} is {job.status}; a caller was told {promised.told[job_id]}")


def _checkpoints(findings: Findings, session: Session, promised: Promised, jobs: Iterable[Job], budget: int) -> None:
    """A pushed file that is in order becomes ready, unless its validation was lost too often."""
    lost = {job.checkpoint_id: job.infrastructure_losses for job in jobs if job.kind == "import"}
    rows = select(Checkpoint.id, Checkpoint.status).where(Checkpoint.id.in_(promised.checkpoints))
    found = {row.id: row.status for row in session.execute(rows)}
    findings.lost += [f"{name} was accepted and has no row" for name in promised.checkpoints - found.keys()]
    findings.broken += [
        f"the checkpoint {name} is {status}, after {lost.get(name)} losses"
        for name, status in found.items()
        if status != "ready" and not (status == "rejected" and lost.get(name, 0) >= budget > 0)
    ]


def _how(job: Job) -> str:
    return f"failed: {job.reason}" if job.status == "failed" else job.status


def _expected(promised: Promised, job: Job, seed: int, budget: int) -> set[str]:
    """How a job may end after all that."""
    if job.id in promised.cancelled:
        return {"cancelled"}
    ending = profile(seed).ending
    wanted = {ending if ending == "succeeded" else f"failed: {ending}"}
    if is_real(seed):  # a taming may miss its criteria; whether this one did, its report says
        wanted = {"succeeded", "failed: criteria_not_met"}
    late = job.deadline_at is not None and job.finished_at is not None and job.finished_at >= job.deadline_at
    if job.id in promised.hurried and late:
        wanted.add("failed: deadline_exceeded")
    if job.infrastructure_losses >= budget > 0:
        wanted.add("failed: attempts_exhausted")
    return wanted


def _ends(findings: Findings, session: Session, jobs: Iterable[Job]) -> None:
    """Each job has one terminal event and one audit event of its end, and nothing happens after it."""
    events: dict[str, list[str]] = defaultdict(list)
    for row in session.execute(select(JobEvent.job_id, JobEvent.type).order_by(JobEvent.id)):
        events[row.job_id].append(row.type)
    audited: dict[str, list[str]] = defaultdict(list)
    for row in session.execute(select(AuditEvent.subject, AuditEvent.action).where(AuditEvent.action.in_(ENDS))):
        audited[row.subject].append(row.action)
    for job in jobs:
        ends = [event for event in events[job.id] if event in TERMINAL]
        if ends.count("succeeded") > 1 or audited[job.id].count("job.succeeded") > 1:
            findings.published_twice.append(f"{job.id} succeeded {ends.count('succeeded')} times")
        if job.status in TERMINAL and (ends != [job.status] or audited[job.id] != [f"job.{job.status}"]):
            findings.broken.append(f"{job.id} is {job.status}, its ends are {ends}, audited {audited[job.id]}")
        if ends and events[job.id][-1] not in TERMINAL:
            findings.broken.append(f"{job.id}: {events[job.id][-1]} happened after its end")


def _leases(findings: Findings, jobs: Iterable[Job]) -> None:
    for job in jobs:
        if job.status in TERMINAL and (job.lease_until is not None or job.worker is not None):
            findings.held_by_the_dead.append(f"{job.id} has ended and is held by {job.worker}")


def _attempts(findings: Findings, session: Session, jobs: Iterable[Job]) -> None:
    """Attempts are claims, less those that a drain gave back."""
    rows = session.execute(
        select(JobEvent.job_id, JobEvent.type, func.count()).group_by(JobEvent.job_id, JobEvent.type)
    )
    counts = {(job_id, kind): count for job_id, kind, count in rows}
    for job in jobs:
        claims, drains = counts.get((job.id, "attempt_started"), 0), counts.get((job.id, "drained"), 0)
        if job.attempt != claims - drains:
            findings.broken.append(f"{job.id} counts {job.attempt} attempts, with {claims} claims and {drains} drains")


def _personal(findings: Findings, session: Session, promised: Promised) -> None:
    kept = select(ImageSet.id).where(ImageSet.id.in_(promised.image_sets), ImageSet.erased_at.is_(None))
    findings.orphans += [f"the images {image_set} outlive their job" for image_set in session.scalars(kept)]


def _publication(findings: Findings, storage: ObjectStorage, job: Job, nonces: Counter[str]) -> None:
    """What is served is whole, and was made by the attempt whose token ended the job."""
    prefix = job.published_prefix or ""
    if not prefix.endswith(f"/attempts/{job.fencing_token}/"):
        findings.published_twice.append(f"{job.id} serves {prefix} and was ended by token {job.fencing_token}")
    try:
        manifest = json.loads(storage.read(prefix + "manifest.json"))
        bodies = {item["name"]: storage.read(prefix + item["name"]) for item in job.artifacts or []}
    except KeyError as gone:
        findings.broken.append(f"{job.id} serves what is not there: {gone}")
        return
    digests = {name: hashlib.sha256(body).hexdigest() for name, body in bodies.items()}
    if manifest["token"] != job.fencing_token or manifest["artifacts"] != job.artifacts:
        findings.broken.append(f"{job.id}: the manifest is another attempt's")
    if any(digests[item["name"]] != item["sha256"] for item in job.artifacts or []):
        findings.broken.append(f"{job.id} serves bytes that are not those of its row")
    report = json.loads(bodies["report.json"])
    if is_real(job.seed):
        outcome = report.get("verdict", {}).get("outcome")
        if outcome != (job.reason or job.status):
            findings.broken.append(f"{job.id} ended as {_how(job)}; its report says {outcome}")
    elif report.get("seed") != job.seed or nonces[report.get("nonce")] != 1:
        findings.broken.append(f"{job.id} serves a report that no attempt of it made")


def _pushed(session: Session, promised: Promised) -> list[tuple[Checkpoint, Job]]:
    """The checkpoints that became ready, each with the job that validated it."""
    rows = select(Checkpoint, Job).join(Job, (Job.checkpoint_id == Checkpoint.id) & (Job.kind == "import"))
    wanted = rows.where(Checkpoint.id.in_(promised.checkpoints), Checkpoint.status == "ready")
    return [(checkpoint, job) for checkpoint, job in session.execute(wanted)]


def _weights(findings: Findings, storage: ObjectStorage, checkpoint: Checkpoint, job: Job) -> None:
    """What a checkpoint names is whole, and was written by the attempt whose token ended its validation."""
    key = checkpoint.weights_key or ""
    if f"/{job.fencing_token}/" not in key:
        findings.published_twice.append(f"{checkpoint.id} serves {key} and was ended by token {job.fencing_token}")
    try:
        body = storage.read(key)
    except KeyError:
        findings.broken.append(f"{checkpoint.id} serves what is not there: {key}")
        return
    if hashlib.sha256(body).hexdigest() != checkpoint.weights_sha256:
        findings.broken.append(f"{checkpoint.id} serves bytes that are not those of its row")


def _referenced(session: Session, jobs: Iterable[Job]) -> tuple[set[str], set[str]]:
    """Prefixes and keys that rows name."""
    prefixes = {job.published_prefix for job in jobs if job.published_prefix is not None}
    keys = {key for key in session.scalars(select(Checkpoint.weights_key)) if key is not None}
    assets = {
        object_keys.assets_prefix(row.tenant_id, row.id)
        for row in session.execute(select(Checkpoint.tenant_id, Checkpoint.id))
    }
    # Images that no accepted job is about stay for their day: a deadline may have passed while their owner tried.
    waiting = select(ImageSet.tenant_id, ImageSet.id).where(ImageSet.erased_at.is_(None))
    sets = {object_keys.image_set_prefix(row.tenant_id, row.id) for row in session.execute(waiting)}
    return prefixes | assets | sets, keys


def _left_behind(findings: Findings, database: Database, storage: ObjectStorage) -> None:
    """States and unpublished attempts of swept jobs, but for what a stale attempt wrote after the end of its job.

    The sweep begins after that end, so that what is older was there for it to see.
    """
    with database.transaction() as session:
        swept = select(Job).where(Job.swept_at.is_not(None), Job.kind != "import")
        jobs = {object_keys.job_prefix(job.tenant_id, job.id): job for job in session.scalars(swept)}
    for key, written in _written(storage):
        job = jobs.get("/".join(key.split("/")[:4]) + "/")
        if job is None or (job.published_prefix is not None and key.startswith(job.published_prefix)):
            continue
        assert job.finished_at is not None
        may_be_late = job.infrastructure_losses > 0 or job.status != "succeeded"
        if not may_be_late or written < job.finished_at - WHOLE_SECONDS:
            findings.orphans.append(f"the sweep of {job.id} ({_how(job)}) left {key}")


def _written(storage: ObjectStorage) -> Iterator[tuple[str, datetime]]:
    pages = storage._client.get_paginator("list_objects_v2").paginate(Bucket=storage.bucket, Prefix="tenants/")
    for page in pages:
        for item in page.get("Contents", []):
            yield item["Key"], item["LastModified"]


def _orphans(findings: Findings, storage: ObjectStorage, referenced: tuple[set[str], set[str]]) -> None:
    prefixes, keys = referenced
    for key in storage.keys("tenants/"):
        if key not in keys and key[: key.rfind("/") + 1] not in prefixes:
            findings.orphans.append(f"nothing names {key}")
    findings.orphans += [f"an upload of {key} was never finished" for key, _ in storage.unfinished("tenants/")]


def leftovers_of_processes(folder: Path, scratches: Iterable[Path]) -> Findings:
    """Runners that nobody watches, and folders of attempts that are over; asked while the workers idle."""
    findings = Findings()
    limit = time.monotonic() + 5
    while (runners := _runners(folder)) and time.monotonic() < limit:
        time.sleep(0.1)
    findings.held_by_the_dead += [f"runner {pid} still computes" for pid in runners]
    for scratch in scratches:
        findings.orphans += [f"{path} outlives its attempt" for path in scratch.glob("worker-*/job_*")]
    return findings


def _runners(folder: Path) -> list[int]:
    """Processes whose command line names a runner and this run, and that are no worker, which names both too."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        runs = any("runner" in part for part in line[1:5]) and not any("worker_process" in part for part in line)
        if runs and any(str(folder) in part for part in line):
            found.append(process.pid)
    return found


def _nonces(trace: Path) -> Counter[str]:
    return Counter(line["nonce"] for lines in traced(trace).values() for line in lines if line["what"] == "end")


def traced(trace: Path) -> dict[Path, list[dict[str, Any]]]:
    """What each runner wrote, whole lines alone."""
    found = {}
    for path in trace.iterdir():
        lines = path.read_text().split("\n")[:-1]
        found[path] = [json.loads(line) for line in lines]
    return found
