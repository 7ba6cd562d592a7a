"""The whole way with real processes: control loop, broker, worker, runner; and what each of them may suffer."""

from __future__ import annotations

from collections.abc import Callable

from tests.worker.helpers import Jobs, Process


def test_a_queued_job_runs_and_is_published(
    jobs: Jobs, start_worker: Callable[[], Process], start_control: Callable[[], Process]
) -> None:
    start_control()
    start_worker()
    job_id = jobs.queue()

    row = jobs.end(job_id)

    assert row.status == "succeeded"
