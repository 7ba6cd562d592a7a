"""A job on several devices: as many processes train, end where one would, stop as one does, and outlive nobody."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.worker.amnesia_runs import assets_of, given
from tests.worker.helpers import PATIENCE_SECONDS
from tests.worker.judges import write_bands
from tests.worker.runs import Bench, Ended, one_thread

# An odd batch: the shares differ.
FEW = {"max_steps": 40, "batch": 31, "check_every": 20, "learning_rate": 1e-3}


def job_on(vae_file: Path, folder: Path, *, gpus: int, **parameters: Any) -> Bench:
    bench = Bench(folder, vae_file)
    bench.job.update(
        method="selective-amnesia",
        target={"class_label": 0},
        replace_with={"noise": True},
        judge=write_bands(folder / "inputs" / "classifiers" / "0.onnx"),
        criteria={"forgotten_at_most": 0.001, "others_within": 0.001},
        parameters=FEW | parameters,
        remember={"generated": 200},
        gpus=gpus,
    )
    bench.job["inputs"].update(surrogate=[], fisher={})
    return bench


@pytest.fixture(scope="module")
def alone(vae_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Ended]:
    """A run of one process."""
    bench = job_on(vae_file, tmp_path_factory.mktemp("alone"), gpus=1)
    with one_thread():
        return bench, bench.run_here()


def tamed(bench: Bench) -> dict[str, torch.Tensor]:
    return load_file(bench.folder / "outputs" / "tamed.safetensors")


def assert_near(bench: Bench, alone: Bench) -> None:
    """The weights are those of one process, but for the rounding of sums in another order."""
    start = load_file(alone.folder / "inputs" / "checkpoint.safetensors")
    for name, value in tamed(alone).items():
        moved = float((value - start[name]).abs().max())
        torch.testing.assert_close(tamed(bench)[name], value, rtol=0, atol=max(0.05 * moved, 1e-6))


def members_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children() if "worker.runner.crew" in one.cmdline()]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, PATIENCE_SECONDS)[1]


@dataclass
class Blow:
    """Does something to a runner once it has saved so many steps, and knows the processes that it had then."""

    step: int
    act: Callable[[subprocess.Popen[bytes], list[psutil.Process]], None]
    members: list[psutil.Process] = field(default_factory=list)

    def __call__(self, process: subprocess.Popen[bytes], said: dict[str, Any]) -> None:
        """After each message."""
        if not self.members and said["type"] == "state" and said["step"] >= self.step:
            self.members = members_of(process)
            self.act(process, self.members)


def test_two_processes_end_where_one_would_though_killed_between(
    vae_file: Path, alone: tuple[Bench, Ended], tmp_path: Path
) -> None:
    bench = given(job_on(vae_file, tmp_path, gpus=2), assets_of(*alone))
    blow = Blow(10, lambda process, _: process.kill())

    first = bench.run(blow)
    state = [one for one in first.messages if one["type"] == "state"][-1]
    bench.resume_from(bench.folder / state["path"])
    second = bench.run()

    assert (len(blow.members), gone(blow.members)) == (1, True)
    assert 0 < state["step"] < 40
    assert second.result["summary"]["steps"] == 40
    assert_near(bench, alone[0])


def test_a_job_whose_other_process_dies_ends_at_once_without_a_last_word(
    vae_file: Path, alone: tuple[Bench, Ended], tmp_path: Path
) -> None:
    def kill(_: subprocess.Popen[bytes], members: list[psutil.Process]) -> None:
        for one in members:
            one.terminate()  # whoever stops a machine tells all of them; it is the runner that decides
        survived = psutil.wait_procs(members, 0.5)[1]
        for one in survived:
            one.kill()
        assert survived

    bench = given(job_on(vae_file, tmp_path, gpus=2, max_steps=100_000), assets_of(*alone))

    ended = bench.run(Blow(1, kill))

    assert ended.status == 70
    assert ended.last["type"] not in {"result", "error"}
