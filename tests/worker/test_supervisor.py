"""One attempt from claim to end, by a supervisor in this process and the stub runner in its own."""

from __future__ import annotations

from tests.worker.helpers import Jobs
from worker.supervisor import Supervisor


def test_a_job_is_claimed_run_and_published(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue()

    outcome = supervisor.run(job_id)

    row = jobs.row(job_id)
    assert outcome == row.status == "succeeded"
    assert [artifact["name"] for artifact in row.artifacts or []] == ["tamed.safetensors", "report.json"]
    assert f"attempts/{row.fencing_token}/manifest.json" in jobs.keys(job_id)


def test_a_duplicate_doorbell_claims_nothing(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=1)
    supervisor.run(job_id)

    again = supervisor.run(job_id)

    assert again == "not claimed"
    assert len(jobs.starts(job_id)) == jobs.row(job_id).attempt == 1
