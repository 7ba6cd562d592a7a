"""What the tests of the whole service share: waiting for conditions, a job's events, the process that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import pytest

from cli.client import Client
from cli.resources import Event, Job

T = TypeVar("T")
SECONDS = 240.0  # for whatever a condition waits for, on a loaded machine


def until(question: Callable[[], T | None], what: str) -> T:
    """The answer, once there is one."""
    deadline = time.monotonic() + SECONDS
    while (answer := question()) is None:
        if time.monotonic() > deadline:
            pytest.fail(f"waited {SECONDS:.0f} s for {what}")
        time.sleep(0.05)
    return answer


def events(client: Client, job: Job, kind: str) -> list[Event]:
    """The job's events of one type, in order."""
    return [event for event in client.events(job.id) if event.type == kind]


def runner_pid(job: Job) -> int | None:
    """The process that runs the job now."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "worker.runner" in command and any(job.id in part for part in command):
            return process.pid
    return None
