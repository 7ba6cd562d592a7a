"""The runner as the service starts it, without the service: a folder in, times and a changed checkpoint out.

It is stopped once the changed model has been written: its own evaluation of samples is not what is timed here, and
`benchmarks.amnesia_diffusion` judges the model itself. What a job leaves for later ones on its checkpoint (samples,
Fisher information) is kept in one folder, as the service keeps it in its store.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.checkpoints import read_manifest
from worker.process import RUNNER_COMMAND, RunnerProcess, runner_environment

LEASE_SECONDS = 600
LOOK_SECONDS = 0.2
FOLDERS = ("inputs/fisher", "resume", "state", "outputs", "tmp", "cache")


class JobFailed(RuntimeError):
    """The runner did not come to the end of its training."""


@dataclass(frozen=True)
class Ran:
    """One run of the runner, until it had written the changed model."""

    checkpoint: Path
    """The changed model's."""
    marks: Mapping[str, float]
    """Seconds from the start of the process to the beginning of each phase."""
    steps: int
    """Of the optimiser, at the last look."""
    met: bool
    """Whether it ended before the most steps that it was allowed."""
    made: int
    """Assets that it made, because none was there."""
    looks: Sequence[Mapping[str, float]] = field(default=())
    """What the judge said while it trained."""

    @property
    def until_training(self) -> float:
        """Seconds from the start of the process to the first step."""
        return self.marks["unlearning"]

    @property
    def training(self) -> float:
        """Seconds of steps and looks, with the confirmation."""
        return self.marks["evaluating"] - self.marks["unlearning"]

    @property
    def seconds(self) -> dict[str, float]:
        """Of every phase that there was."""
        names, starts = list(self.marks), [*self.marks.values()]
        return {"starting": starts[0]} | {
            name: end - start for name, start, end in zip(names, starts, starts[1:], strict=False)
        }


class Jobs:
    """Runs jobs on one checkpoint, one after another.

    Args:
        checkpoint: a file of ours.
        judge: a classifier in ONNX.
        folder: for the jobs, and for what they leave to each other; made if it is not there.
        threads: of the runner.
    """

    def __init__(self, checkpoint: Path, judge: Path, folder: Path, threads: int = 1) -> None:
        self._checkpoint, self._judge, self._folder, self._threads = checkpoint, judge, folder, threads
        self._assets = folder / "assets"
        self._ahead = ("forget", "selective-amnesia", read_manifest(checkpoint).family)
        self._assets.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, request: Mapping[str, Any]) -> Ran:
        """A request of kind `forget` and method `selective-amnesia`.

        Args:
            name: of the job's folder, which is emptied first.
            request: members of the job beside its inputs; `judge` without its file.

        Raises:
            JobFailed: the runner refused it, or broke.
        """
        folder, job = self._prepared(name, request)
        environment = runner_environment(folder, folder / "cache") | {"OMP_NUM_THREADS": str(self._threads)}
        began = time.monotonic()
        process = RunnerProcess(RUNNER_COMMAND, folder, environment=environment, ahead=self._ahead)
        try:
            part = folder / "job.part"
            part.write_text(json.dumps(job))
            part.rename(folder / "job.json")  # whole at once: the runner waits for it
            return self._watched(process, folder, began)
        finally:
            process.kill()
            process.finish()

    def _prepared(self, name: str, request: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        for each in FOLDERS:
            (folder / each).mkdir(parents=True)
        shutil.copy(self._checkpoint, folder / "inputs" / "checkpoint.safetensors")
        shutil.copy(self._judge, folder / "inputs" / "judge.onnx")
        given = {}
        for path in sorted(self._assets.iterdir()):
            shutil.copy(path, folder / "inputs" / "fisher")
            given[path.stem] = f"inputs/fisher/{path.name}"
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (self._checkpoint, self._judge)]
        judge = {"onnx": "inputs/judge.onnx", "sha256": digests[1], **request["judge"]}
        inputs = {"checkpoint": "inputs/checkpoint.safetensors", "fisher": given, "surrogate": [], "remember_sets": {}}
        standing = {
            "kind": "forget", "method": "selective-amnesia", "job_id": f"job_{name}", "attempt": 1,
            "lease_ttl_seconds": LEASE_SECONDS, "evaluation": {}, "micro_batch_divisor": 1, "resume": None,
            "digests": {"checkpoint": digests[0]},
        }  # fmt: skip
        return folder, {**standing, **request, "judge": judge, "inputs": inputs}

    def _watched(self, process: RunnerProcess, folder: Path, began: float) -> Ran:
        marks: dict[str, float] = {}
        looks: list[Mapping[str, float]] = []
        steps = total = made = 0
        while not process.ended:
            message = process.next_message(LOOK_SECONDS)
            process.beat()
            tamed = folder / "outputs" / "tamed.safetensors"
            if "evaluating" in marks and tamed.exists():
                return Ran(tamed, marks, steps, steps < total, made, looks)
            if message is None:
                continue
            kind = message["type"]
            if kind == "phase":
                marks[message["phase"]] = time.monotonic() - began
            elif kind == "asset" and message["scope"] == "job":
                (folder / message["path"]).unlink()  # for another attempt, which there is none of
            elif kind == "asset":
                shutil.copy(folder / message["path"], self._assets / f"{message['name']}.safetensors")
                made += 1
            elif kind == "progress" and message["phase"] == "unlearning":
                steps, total = message["step"], message["total"]
                looks += [{"step": steps, **message["metrics"]}] if message["metrics"] else []
            elif kind == "error":
                raise JobFailed(json.dumps(message))
        raise JobFailed(f"the runner ended without a word: {process.crash_note()}")
