"""Doorbells: as many as there is room for, and none on top of those that nobody has heard yet."""

from __future__ import annotations

import time

from services import dispatch
from services.settings import Settings
from tests.worker.helpers import QUEUE, Jobs
from worker import control
from worker.celery_app import make_app, unheard

RING_SECONDS = 0.05


def test_bells_that_nobody_hears_do_not_pile_up(settings: Settings, jobs: Jobs) -> None:
    app = make_app(settings)
    for _ in range(5):
        jobs.queue()
    with jobs.database.transaction() as session:
        dispatch.see_worker(session, "worker", [QUEUE], 2)

    rung = []
    for _ in range(4):
        rung.append(control.dispatch(jobs.database, app, ring_seconds=RING_SECONDS))
        time.sleep(2 * RING_SECONDS)

    assert rung == [2, 0, 0, 0]
    assert unheard(app, QUEUE) == 2


def test_a_bell_that_got_lost_rings_again(settings: Settings, jobs: Jobs) -> None:
    app = make_app(settings)
    job_id = jobs.queue()
    with jobs.database.transaction() as session:
        dispatch.see_worker(session, "worker", [QUEUE], 1)
    control.dispatch(jobs.database, app, ring_seconds=RING_SECONDS)
    with app.connection_for_write() as connection:
        connection.default_channel.queue_purge(QUEUE)
    time.sleep(2 * RING_SECONDS)

    rung = control.dispatch(jobs.database, app, ring_seconds=RING_SECONDS)

    assert (rung, unheard(app, QUEUE), jobs.row(job_id).status) == (1, 1, "queued")
