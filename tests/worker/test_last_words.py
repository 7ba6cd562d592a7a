"""Whose fault an error is, by what the libraries really say; and what a smaller attempt is."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

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


def fail_as_a_gpu_does() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def fill_the_disk() -> None:
    with open("/dev/full", "wb", buffering=0) as disk:
        disk.write(b"x")


def fail_as_safetensors_does_on_a_full_disk() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fail_because_the_disk_was_full() -> None:
    try:
        fill_the_disk()
    except OSError as error:
        raise ValueError("the picture was not written") from error


def fail_of_its_own() -> None:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)")


SILENT: list[str] = []


@pytest.mark.parametrize(
    ("deed", "status", "words"),
    [
        (ask_for_too_much, ExitCode.OUT_OF_MEMORY, SILENT),
        (fail_as_cuda_does, ExitCode.OUT_OF_MEMORY, SILENT),
        (fail_as_torch_does_elsewhere, ExitCode.OUT_OF_MEMORY, SILENT),
        (fail_as_python_does, ExitCode.OUT_OF_MEMORY, SILENT),
        # Silence with this status is an attempt that was lost: another follows.
        (fail_as_a_gpu_does, ExitCode.INTERNAL, SILENT),
        (fill_the_disk, ExitCode.INTERNAL, SILENT),
        (fail_as_safetensors_does_on_a_full_disk, ExitCode.INTERNAL, SILENT),
        (fail_because_the_disk_was_full, ExitCode.INTERNAL, SILENT),
        (fail_of_its_own, ExitCode.INTERNAL, ["internal"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_runner_says_whose_fault_it_was(
    deed: Any, status: ExitCode, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    reporter = SimpleNamespace(phase=lambda *_: None, error=lambda reason, _: said.append(reason))
    # What it does to its process is not for this one.
    monkeypatch.setattr(os, "umask", lambda _: 0)
    monkeypatch.setattr(program, "_loading", nullcontext)
    monkeypatch.setattr(program, "Stop", lambda: SimpleNamespace(requested=False, at_once=nullcontext))
    monkeypatch.setattr(program, "Reporter", lambda: reporter)
    monkeypatch.setattr(program, "wait_for_job", lambda _: JOB)
    monkeypatch.setattr(program, "DeadMansSwitch", lambda _: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(program, "module_of", lambda _: SimpleNamespace(run=lambda *_: deed()))

    assert program.main([str(tmp_path)]) == status
    assert said == words


@pytest.mark.parametrize(("divisor", "images"), [(1, 64), (2, 32), (4, 16), (1000, 1)])
def test_each_retry_passes_half_as_many_images_at_once(divisor: int, images: int) -> None:
    assert micro_batch_of({"parameters": {"micro_batch": 64}, "micro_batch_divisor": divisor}, (3, 32, 32)) == images


def test_without_a_bound_of_the_callers_the_pixels_decide() -> None:
    whole = micro_batch_of({"parameters": {}}, (3, 32, 32))

    assert whole == MICRO_BATCH_PIXELS // 32**2
    assert micro_batch_of({"parameters": {}, "micro_batch_divisor": 2}, (3, 32, 32)) == whole // 2
