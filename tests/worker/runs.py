"""The runner alone, as a process on a folder: ``job.json`` in, messages and artifacts out, no server beside it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.checkpoints import read_manifest, save_checkpoint
from models.families import FLOWS
from models.images import flow_input, save_png
from models.protocol import CheckpointedFlow
from tests.worker.helpers import PATIENCE_SECONDS, ROOT
from worker.process import RUNNER_COMMAND
from worker.runner.__main__ import module_of
from worker.runner.contract import Reporter, Stop
from worker.runner.problems import UserError

SIDE = 8
N_BITS = 5
# The smallest flow of each family, beyond image shape and n_bits. A family that is registered gets an entry here.
TINY: dict[str, dict[str, Any]] = {
    "glow": {"n_block": 2, "n_flow": 2, "hidden": 16, "affine": True, "lu": [True, True]},
    "realnvp": {"n_block": 1, "n_flow": 2, "hidden": 8, "depth": 1},
    "maf": {"n_flow": 2, "hidden": 64, "depth": 1},
    "iaf": {"n_flow": 2, "hidden": 64, "depth": 1},
    "tarflow": {"patch_size": 2, "width": 16, "n_block": 2, "n_layer": 1},
    "class-prior": {"patch_size": 4, "width": 16, "n_block": 2, "n_layer": 1, "n_classes": 3},
}


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def blobs(count: int, *, seed: int = 0) -> Tensor:
    """uint8 (count, 1, 8, 8): grey pictures from dark to bright, smooth but for a little noise."""
    draws = generator(seed)
    level = torch.rand(count, 1, 1, 1, generator=draws)
    slope = torch.linspace(-0.15, 0.15, SIDE) * torch.randn(count, 1, 1, 1, generator=draws)
    noise = 0.05 * torch.randn(count, 1, SIDE, SIDE, generator=draws)
    return ((0.1 + 0.8 * level + slope + noise).clamp(0, 0.999) * 256).to(torch.uint8)


def tiny(family: str) -> CheckpointedFlow:
    """A flow of the family that has seen no more than what its initialisation asks for."""
    flow = FLOWS[family].model((1, SIDE, SIDE), N_BITS, **TINY[family], generator=generator())
    if callable(initialize := getattr(flow, "initialize", None)):
        initialize(flow_input(flow, blobs(64), N_BITS, generator(1)))
    return flow


@contextmanager
def one_thread() -> Iterator[None]:
    """As `Bench.run` starts its process: bits are equal for equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Ended:
    """How a runner ended."""

    status: int
    messages: list[dict[str, Any]]
    log: str

    @property
    def last(self) -> dict[str, Any]:
        """Its last word; its log where it said none."""
        assert self.messages, self.log
        return self.messages[-1]

    @property
    def result(self) -> dict[str, Any]:
        """What it reported as its result."""
        assert self.last["type"] == "result", (self.last, self.log)
        return self.last

    @property
    def problem(self) -> dict[str, Any]:
        """What it refused with."""
        assert (self.status, self.last["type"]) == (64, "error"), (self.last, self.log)
        return cast(dict[str, Any], self.last["problem"])


class Recorder(Reporter):
    """Keeps what a runner says instead of writing it to its standard output."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._phase, self._spoke_at = "validating", 0.0

    def _say(self, message: dict[str, Any]) -> None:
        self.messages.append(json.loads(json.dumps(message, allow_nan=False)))


class Bench:
    """A folder for one runner, and a job for it that a test changes where it means something."""

    def __init__(self, folder: Path, base: CheckpointedFlow | Path) -> None:
        self.folder = folder
        for name in ("inputs", "resume", "state", "outputs", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        weights = folder / "inputs" / "checkpoint.safetensors"
        if isinstance(base, Path):
            weights.write_bytes(base.read_bytes())
        else:
            save_checkpoint(weights, cast(nn.Module, base))
        self.job: dict[str, Any] = {
            "kind": "forget",
            "job_id": "job_0",
            "attempt": 1,
            "lease_ttl_seconds": PATIENCE_SECONDS,
            "method": "flow-taming",
            "target": None,
            "seed": 3,
            "parameters": {},
            "criteria": {},
            "evaluation": {},
            "micro_batch_divisor": 1,
            "inputs": {
                "checkpoint": "inputs/checkpoint.safetensors",
                "forget": [],
                "remember": None,
                "evaluation": {"same_identity": [], "held_out": []},
            },
            "remember": {"generated": 64},
            "digests": {"checkpoint": hashlib.sha256(weights.read_bytes()).hexdigest()},
            "resume": None,
        }

    def images(self, name: str, images: Tensor) -> list[str]:
        """Put a set into the folder; its paths as a job names them."""
        (self.folder / "inputs" / name).mkdir(parents=True, exist_ok=True)
        paths = [f"inputs/{name}/{index:06d}.png" for index in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            save_png(image, self.folder / path)
        return paths

    def run(
        self, during: Callable[[subprocess.Popen[bytes], dict[str, Any]], None] = lambda process, said: None
    ) -> Ended:
        """Start the runner, read it to its end.

        Args:
            during: called with the process and each of its messages as they come.
        """
        (self.folder / "job.json").write_text(json.dumps(self.job))
        log = self.folder / "log"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.folder / "tmp"),
            "OMP_NUM_THREADS": "1",
        }
        with (
            log.open("wb") as errors,
            subprocess.Popen(
                [*RUNNER_COMMAND, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            ) as process,
        ):
            messages = []
            for line in process.stdout or ():
                messages.append(json.loads(line))
                during(process, messages[-1])
            process.wait(PATIENCE_SECONDS)
        return Ended(process.returncode, messages, log.read_text())

    def run_here(self) -> Ended:
        """The same job in this process, which saves the seconds that a process takes to load its libraries."""
        recorder, before = Recorder(), signal.getsignal(signal.SIGTERM)
        try:
            module_of(self.job).run(self.job, self.folder, recorder, Stop())
        except UserError as error:
            recorder.error("user_error", error.problem)
            return Ended(64, recorder.messages, "")
        finally:
            signal.signal(signal.SIGTERM, before)
        return Ended(0, recorder.messages, "")

    def resume_from(self, state: Path) -> None:
        """Let the next run be a second attempt, from this state."""
        shutil.copy(state, self.folder / "resume" / "state.safetensors")
        self.job.update(resume="resume/state.safetensors", attempt=2)

    def digest(self) -> str:
        """Of the tensors of the flow that the runner wrote."""
        return read_manifest(self.folder / "outputs" / "tamed.safetensors").tensor_digest

    def report(self) -> dict[str, Any]:
        """The report that the runner wrote."""
        report: dict[str, Any] = json.loads((self.folder / "outputs" / "report.json").read_text())
        return report
