"""How attempts end, and what is told of it: outcomes, faults of the runner, inputs that are gone."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from concurrent.futures import Future
from os import kill
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from services import object_keys
from services.settings import Settings
from services.tables import AuditEvent, ImageSet, Job
from tests.worker.helpers import LONG, PATIENCE_SECONDS, Jobs, alive, eventually
from worker import janitor
from worker.supervisor import Supervisor


def test_missed_criteria_keep_the_report_and_withhold_the_weights(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=1, outcome="criteria_not_met")

    outcome = supervisor.run(job_id)

    row = jobs.row(job_id)
    assert (outcome, row.reason) == ("failed", "criteria_not_met")
    assert [artifact["name"] for artifact in row.artifacts or []] == ["report.json"]
    assert not [key for key in jobs.keys(job_id) if key.endswith("tamed.safetensors")]
    assert (row.problem or {})["detail"] == "a sentence"


def test_missed_criteria_release_the_weights_on_demand(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=1, outcome="criteria_not_met", criteria={"release_weights": "always"})

    supervisor.run(job_id)

    names = [artifact["name"] for artifact in jobs.row(job_id).artifacts or []]
    assert names == ["tamed.safetensors", "report.json"]


def test_a_user_error_is_told_and_not_repeated(supervisor: Supervisor, jobs: Jobs) -> None:
    told = {"type": "urn:forgetd:problem:image-refused", "title": "No", "detail": "why"}
    job_id = jobs.queue(steps=1, user_error=told)

    outcome = supervisor.run(job_id)

    row = jobs.row(job_id)
    assert (outcome, row.reason, row.problem) == ("failed", "user_error", told)


def test_out_of_memory_halves_the_micro_batch_until_it_fits(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=5, out_of_memory_at=2, fits_at_divisor=4)

    outcomes = [supervisor.run(job_id) for _ in range(3)]

    assert outcomes == ["queued", "queued", "succeeded"]
    assert [start["divisor"] for start in jobs.starts(job_id)] == [1, 2, 4]
    assert jobs.row(job_id).infrastructure_losses == 0


def test_out_of_memory_at_every_size_fails(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=5, out_of_memory_at=2, fits_at_divisor=1000)

    outcomes = [supervisor.run(job_id) for _ in range(3)]

    assert outcomes == ["queued", "queued", "failed"]
    assert jobs.row(job_id).reason == "out_of_memory"


def test_a_kill_that_the_kernel_made_for_memory_counts_as_out_of_memory(
    make_supervisor: Callable[..., Supervisor], jobs: Jobs
) -> None:
    counts = iter([3, 4])
    job_id = jobs.queue(steps=5, die_at=2)

    make_supervisor(oom_kills=lambda: next(counts)).run(job_id)

    assert jobs.row(job_id).out_of_memory_losses == 1


def test_babble_is_an_internal_error(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(steps=5, babble_at=2)

    outcome = supervisor.run(job_id)

    assert (outcome, jobs.row(job_id).reason) == ("failed", "internal")


@pytest.mark.parametrize("outcome", ["succeeded", "criteria_not_met"])
@pytest.mark.parametrize("text", [r"\u0000", r"\ud800"])
def test_a_result_that_cannot_be_stored_ends_the_job_once(
    supervisor: Supervisor, jobs: Jobs, caplog: pytest.LogCaptureFixture, outcome: str, text: str
) -> None:
    job_id = jobs.queue(steps=1, outcome=outcome, odd_summary=f"secret{text}")

    ended = supervisor.run(job_id)

    row = jobs.row(job_id)
    assert (ended, row.status, row.reason) == ("failed", "failed", "internal")
    assert (row.attempt, row.infrastructure_losses, row.published_prefix) == (1, 0, None)
    assert "secret" not in caplog.text


def test_progress_that_cannot_be_stored_costs_neither_lease_nor_job(
    supervisor: Supervisor,
    jobs: Jobs,
    caplog: pytest.LogCaptureFixture,
    in_background: Callable[..., Future[str]],
) -> None:
    job_id = jobs.queue(**LONG, odd_loss=r"\u0000")
    ended = in_background(supervisor, job_id)

    eventually(lambda: "odd progress left out" in caplog.text)

    before = jobs.row(job_id).lease_until
    assert before is not None
    eventually(lambda: (jobs.row(job_id).lease_until or before) > before)
    supervisor.start_draining()  # and what is left unwritten then does not end the job either
    assert ended.result(PATIENCE_SECONDS) == "queued"
    assert jobs.row(job_id).infrastructure_losses == 0


def test_a_runner_that_hangs_in_silence_is_killed_and_counted_as_lost(
    make_supervisor: Callable[..., Supervisor], settings: Settings, jobs: Jobs
) -> None:
    supervisor = make_supervisor(settings=settings.model_copy(update={"runner_silence_seconds": 5.0}))
    job_id = jobs.queue(steps=4, state_every=2, silent_at=3)

    outcomes = [supervisor.run(job_id) for _ in range(2)]

    assert outcomes == ["queued", "succeeded"]
    assert jobs.row(job_id).infrastructure_losses == 1
    assert not alive(jobs.starts(job_id)[0]["pid"])


def test_a_runner_that_is_slow_and_says_that_it_lives_is_no_silent_one(
    make_supervisor: Callable[..., Supervisor], settings: Settings, jobs: Jobs
) -> None:
    supervisor = make_supervisor(settings=settings.model_copy(update={"runner_silence_seconds": 5.0}))
    job_id = jobs.queue(steps=4, slow_at=3, slow_parts=65)

    assert supervisor.run(job_id) == "succeeded"
    assert jobs.row(job_id).infrastructure_losses == 0


def test_a_crash_is_logged_by_its_place_and_not_by_its_words(
    supervisor: Supervisor, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = jobs.queue(steps=5, crash_at=2)

    with caplog.at_level(logging.INFO):
        outcome = supervisor.run(job_id)

    assert outcome == "queued"
    assert "RuntimeError" in caplog.text
    assert "secret name" not in caplog.text


@pytest.mark.parametrize(
    "behaviour", [{}, {"crash_at": 1}, {"babble_at": 1}, {"odd_summary": r"\u0000"}, {"link_out": "/etc/hostname"}]
)
def test_logs_events_audit_and_problem_tell_nothing_of_the_caller(
    supervisor: Supervisor,
    settings: Settings,
    jobs: Jobs,
    caplog: pytest.LogCaptureFixture,
    behaviour: dict[str, Any],
) -> None:
    image_set_id = jobs.image_set()
    with jobs.database.transaction() as session:
        digests = [image["sha256"] for image in session.get_one(ImageSet, image_set_id).images]
    job_id = jobs.queue(steps=2, image_set=image_set_id, canary="Jane Example", **behaviour)
    with jobs.database.transaction() as session:
        row = session.get_one(Job, job_id)
        row.request = {**row.request, "metadata": {"person": "Jane Example"}}

    with caplog.at_level(logging.INFO):
        supervisor.run(job_id)
        janitor.sweep(jobs.database, jobs.storage)

    with jobs.database.transaction() as session:
        audit = [[row.actor, row.action, row.subject, row.data] for row in session.scalars(select(AuditEvent))]
    told = caplog.text + repr([jobs.events(job_id), audit, jobs.row(job_id).problem])
    assert job_id in caplog.text
    assert len(digests) == 2
    assert not [secret for secret in ("Jane Example", *digests) if secret in told]


def test_a_link_out_of_the_folder_is_not_followed(supervisor: Supervisor, jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("secret")
    job_id = jobs.queue(steps=1, link_out=str(tmp_path / "credentials"))

    outcome = supervisor.run(job_id)

    assert (outcome, jobs.row(job_id).reason) == ("failed", "internal")
    assert jobs.keys(job_id) == []


def test_erased_images_are_a_problem_of_the_caller(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue(image_set="imgs_" + "0" * 32)

    outcome = supervisor.run(job_id)

    row = jobs.row(job_id)
    problem = row.problem or {}
    assert (outcome, row.reason) == ("failed", "user_error")
    assert problem["type"] == "urn:forgetd:problem:input-missing"
    assert problem["errors"] == [{"pointer": "/target/images", "detail": problem["detail"]}]
    # The runner that was loading its libraries meanwhile is gone.
    assert not [child for child in psutil.Process().children() if str(jobs.trace_path.parent) in str(child.cmdline())]


def test_weights_that_are_gone_from_the_store_are_pointed_at(supervisor: Supervisor, jobs: Jobs) -> None:
    job_id = jobs.queue()
    jobs.storage.erase(object_keys.checkpoint_prefix(jobs.tenant_id, jobs.checkpoint_id))

    outcome = supervisor.run(job_id)

    row = jobs.row(job_id)
    assert (outcome, row.reason) == ("failed", "user_error")
    assert [error["pointer"] for error in (row.problem or {})["errors"]] == ["/checkpoint"]


def test_a_runner_that_was_stopped_from_outside_hands_its_job_back(
    supervisor: Supervisor, jobs: Jobs, in_background: Callable[..., Future[str]]
) -> None:
    job_id = jobs.queue(**LONG)
    done = in_background(supervisor, job_id)
    eventually(jobs.at_step(job_id, 1))

    kill(jobs.starts(job_id)[0]["pid"], signal.SIGTERM)

    assert done.result(PATIENCE_SECONDS) == "queued"
    assert jobs.row(job_id).resume is not None
