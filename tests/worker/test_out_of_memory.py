"""What counts as memory that ran out, by what torch really says, and what a smaller attempt is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worker.runner import __main__ as program
from worker.runner.base import MICRO_BATCH_PIXELS, micro_batch_of
from worker.runner.contract import ExitCode

BEYOND_ANY_MACHINE = 2**56
JOB = {"kind": "forget", "method": "flow-taming", "job_id": "job_1", "lease_ttl_seconds": 600.0}


def ask_for_too_much() -> None:
    torch.empty(BEYOND_ANY_MACHINE, dtype=torch.uint8)


def fail_as_cuda_does() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def fail_as_torch_does_elsewhere() -> None:
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")


def fail_as_python_does() -> None:
    raise MemoryError


def fail_of_its_own() -> None:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)")


@pytest.mark.parametrize(
    ("deed", "status"),
    [
        (ask_for_too_much, ExitCode.OUT_OF_MEMORY),
        (fail_as_cuda_does, ExitCode.OUT_OF_MEMORY),
        (fail_as_torch_does_elsewhere, ExitCode.OUT_OF_MEMORY),
        (fail_as_python_does, ExitCode.OUT_OF_MEMORY),
        (fail_of_its_own, ExitCode.INTERNAL),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_runner_says_by_its_status_that_memory_ran_out(
    deed: Any, status: ExitCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    quiet = SimpleNamespace(phase=lambda *_: None, error=lambda *_: None)
    monkeypatch.setattr(program, "Reporter", lambda: quiet)
    monkeypatch.setattr(program, "wait_for_job", lambda _: JOB)
    monkeypatch.setattr(program, "DeadMansSwitch", lambda _: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(program, "module_of", lambda _: SimpleNamespace(run=lambda *_: deed()))

    assert program.main([str(tmp_path)]) == status


@pytest.mark.parametrize(("divisor", "images"), [(1, 64), (2, 32), (4, 16), (1000, 1)])
def test_each_retry_passes_half_as_many_images_at_once(divisor: int, images: int) -> None:
    assert micro_batch_of({"parameters": {"micro_batch": 64}, "micro_batch_divisor": divisor}, (3, 32, 32)) == images


def test_without_a_bound_of_the_callers_the_pixels_decide() -> None:
    whole = micro_batch_of({"parameters": {}}, (3, 32, 32))

    assert whole == MICRO_BATCH_PIXELS // 32**2
    assert micro_batch_of({"parameters": {}, "micro_batch_divisor": 2}, (3, 32, 32)) == whole // 2
