"""A transfer that takes long does not keep a job from being cancelled or a worker from being stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from sqlalchemy import update

from services import object_keys
from services.jobs import cancel
from services.settings import Settings
from services.storage import PARALLEL_FROM_BYTES, PART_BYTES, ObjectStorage, Stopped
from services.tables import Checkpoint
from tests.relays import StoreRelay, relaying
from tests.worker.helpers import PATIENCE_SECONDS, Jobs, eventually
from worker.supervisor import Supervisor

BIG = PARALLEL_FROM_BYTES + PART_BYTES  # fetched in parts; through the slow relay, far longer than anybody's grace


@pytest.fixture
def slow(settings: Settings) -> Iterator[ObjectStorage]:
    """A way to the store that crawls."""
    url = str(settings.s3_endpoint_url)
    with relaying(StoreRelay, url, seed=0) as relay:
        relay.turn("crawling")
        yield ObjectStorage(settings.model_copy(update={"s3_endpoint_url": relay.instead_of(url)}))
        relay.turn("fair")


@pytest.fixture
def big_job(jobs: Jobs) -> str:
    """A job on a checkpoint of that size."""
    key = object_keys.checkpoint_prefix(jobs.tenant_id, jobs.checkpoint_id) + "weights.safetensors"
    stored = jobs.storage.put(key, bytes(BIG), media_type="application/octet-stream")
    with jobs.database.transaction() as session:
        facts = {"weights_bytes": stored.bytes, "weights_sha256": stored.sha256}
        session.execute(update(Checkpoint).where(Checkpoint.id == jobs.checkpoint_id).values(**facts))
    return jobs.queue(steps=1)


@pytest.mark.parametrize("why", ["cancel", "drain"])
def test_inputs_on_their_way_are_dropped(
    why: str,
    slow: ObjectStorage,
    big_job: str,
    make_supervisor: Callable[..., Supervisor],
    in_background: Callable[..., Future[str]],
    jobs: Jobs,
) -> None:
    supervisor = make_supervisor(storage=slow)
    done = in_background(supervisor, big_job)
    eventually(jobs.status(big_job, "running"))
    moved = slow.moved_at
    eventually(lambda: slow.moved_at > moved, what="the transfer has begun")

    if why == "cancel":
        with jobs.database.transaction() as session:
            cancel(session, jobs.caller, big_job)
    else:
        supervisor.start_draining()

    assert done.result(PATIENCE_SECONDS) == {"cancel": "cancelled", "drain": "queued"}[why]
    row = jobs.row(big_job)
    assert (row.attempt, row.infrastructure_losses) == ({"cancel": 1, "drain": 0}[why], 0)


@pytest.mark.parametrize("size", [3 * PART_BYTES, BIG])
def test_a_fetch_that_nobody_wants_any_more_stops(storage: ObjectStorage, tmp_path: Path, size: int) -> None:
    storage.put("tenants/big", bytes(size), media_type="application/octet-stream")
    until = time.monotonic() + 0.0

    with pytest.raises(Stopped):
        storage.fetch("tenants/big", tmp_path / "copy", going_on=lambda: time.monotonic() < until)
