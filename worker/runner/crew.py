"""A job on several GPUs: the runner trains with others of its kind, one a GPU, each on its share of every batch.

The runner reads the job, remembers, judges and reports as it would alone. The others are started for training only, as
``python -m worker.runner.crew FOLDER``; they load the checkpoint themselves, read the rest from a file, and say
nothing. They live as long as the runner holds their standard input open; a runner that loses one ends, since neither
it nor an exchange on the device would notice by itself, and the job is tried again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

import unlearning
from models.conditional import ConditionalModel
from unlearning import (
    AmnesiaParameters,
    AmnesiaResult,
    Callback,
    Check,
    Criterion,
    Examples,
    Fisher,
    Interrupted,
    Mixture,
    Noise,
    Pool,
    Processes,
    State,
    StateError,
    Surrogate,
    UnlearningError,
)
from unlearning.processes import ALONE
from worker.runner import contract
from worker.runner.conditional_base import load_conditional_base
from worker.runner.contract import JOB_FILE, ExitCode
from worker.runner.parcel import pack, unpack
from worker.runner.problems import is_out_of_memory
from worker.runner.steps import say

__all__ = ["Training", "processes_of", "train"]

COMMAND = (sys.executable, "-P", "-m", "worker.runner.crew")
FILE = "crew.safetensors"
MEETING = "crew.meeting"
LAST_WORDS_SECONDS = 1.0
"""Between the end of an exchange with a process and the end of that process."""
LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Training:
    """What `unlearning.forget_conditions` takes beside a model and what only the runner has."""

    conditions: Tensor
    surrogate: Surrogate
    replay: Examples
    fisher: Fisher = field(repr=False)
    parameters: AmnesiaParameters
    seed: int
    micro_batch: int
    recompute: bool
    state: State | None = field(repr=False)

    def run(
        self, model: ConditionalModel, processes: Processes, criterion: Criterion, callback: Callback | None
    ) -> AmnesiaResult:
        """See `unlearning.forget_conditions`; a state of another run is left out, here as in all processes."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        given |= {"model": model, "processes": processes, "criterion": criterion, "callback": callback}
        try:
            return unlearning.forget_conditions(**given)
        except StateError:
            if self.state is None:
                raise
            say("the state belongs to another run, such as one of an older release, and is left out")
            return unlearning.forget_conditions(**{**given, "state": None})


RECORDS = (Training, AmnesiaParameters, Examples, Fisher, Mixture, Noise, Pool, State)


def processes_of(job: Mapping[str, Any]) -> int:
    """How many processes train: as many as the worker gives a job GPUs, and never more than there are.

    Without any, as many train on the CPU, which is for trying it out.
    """
    wanted = int(job.get("gpus", 1))
    return min(wanted, torch.cuda.device_count()) if torch.cuda.is_available() else wanted


def train(
    training: Training,
    model: ConditionalModel,
    *,
    job: Mapping[str, Any],
    folder: Path,
    criterion: Criterion,
    callback: Callback,
) -> AmnesiaResult:
    """`forget_conditions`, on all of the job's GPUs.

    Raises:
        UnlearningError, Interrupted: as it does. Where another process fails, this one ends.
    """
    with _crew(training, processes_of(job), folder) as processes:
        return training.run(model, processes, criterion, callback)


@contextmanager
def _crew(training: Training, count: int, folder: Path) -> Iterator[Processes]:
    """Start the others; they are let go of, or killed where this one fails."""
    if count == 1:
        yield ALONE
        return
    pack(training, folder / FILE)
    (folder / MEETING).unlink(missing_ok=True)  # of one that was killed here: who reads it waits for the dead
    own, *others = _environments(count)
    before, threads = {name: os.environ.get(name) for name in own}, torch.get_num_threads()
    members = [_member(folder, environment) for environment in others]
    over = threading.Event()
    try:
        for member in members:
            threading.Thread(target=_watch, args=(member, over), daemon=True).start()
        os.environ.update(own)
        processes = _met(folder, members)
        yield processes
        processes.part()
    except (UnlearningError, Interrupted, contract.Interrupted):
        raise
    except Exception as error:
        _end_if_lost(members)
        if isinstance(error, dist.DistError):  # an exchange that fails may not fail again
            status = ExitCode.OUT_OF_MEMORY if is_out_of_memory(error) else ExitCode.INTERNAL
            _end_without_a_last_word(type(error).__name__, status)
        raise
    finally:
        over.set()
        for member in members:
            member.kill()
            member.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        torch.set_num_threads(threads)  # accelerate divides the cores
        for left in (FILE, MEETING):
            (folder / left).unlink(missing_ok=True)


def _environments(count: int) -> list[dict[str, str]]:
    """What accelerate reads, and by which way data goes: one for each process, the runner's first."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    if sys.platform == "linux":
        shared |= {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _launched(folder: Path) -> Processes:
    """Meet the others at a file: a port could be another's by the time that all are there."""
    return Processes.launched(cpu=not torch.cuda.is_available(), meeting=folder / MEETING)


def _met(folder: Path, members: Sequence[subprocess.Popen[bytes]]) -> Processes:
    """As `_launched`; who finds nobody has found out nothing about the job, which is tried again."""
    try:
        return _launched(folder)
    except contract.Interrupted:
        raise
    except Exception as error:
        _end_if_lost(members)
        traceback.print_exc()
        _end_without_a_last_word(type(error).__name__, ExitCode.INTERNAL)


def _member(folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # Its standard output is ours, which leads to standard error since there is a reporter.
    return subprocess.Popen(  # noqa: S603 our own module, no shell
        [*COMMAND, str(folder)], stdin=subprocess.PIPE, stdout=2, cwd=folder, env={**os.environ, **environment}
    )


def _watch(member: subprocess.Popen[bytes], over: threading.Event) -> None:
    """End this process with one that failed: it may be waiting for it, for ever."""
    if member.wait() and not over.is_set():
        _end_if_lost([member])


def _end_if_lost(members: Sequence[subprocess.Popen[bytes]]) -> None:
    """What broke here broke because of the one that was lost: no last word, so that the job is tried again."""
    by = time.monotonic() + LAST_WORDS_SECONDS
    while not (lost := [one.returncode for one in members if one.poll()]):
        if time.monotonic() > by:
            return
        time.sleep(LOOK_SECONDS)
    status = ExitCode.OUT_OF_MEMORY if lost[0] == ExitCode.OUT_OF_MEMORY else ExitCode.INTERNAL
    _end_without_a_last_word(f"a process of the job ended with {lost[0]}", status)


def _end_without_a_last_word(why: str, status: ExitCode) -> NoReturn:
    say(why)
    sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str]) -> int:
    """Train as one of the others."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first process hears it too, and says when all stop
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    folder = Path(argv[0])
    try:
        job = json.loads((folder / JOB_FILE).read_text())
        processes = _launched(folder)
        training: Training = unpack(folder / FILE, RECORDS)
        model = load_conditional_base(job, folder).model
        training.run(model, processes, _asks_nobody, None)
        processes.part()
    except (UnlearningError, Interrupted):
        return 0  # the first process met the same, and tells it
    except Exception as error:
        traceback.print_exc()
        return ExitCode.OUT_OF_MEMORY if is_out_of_memory(error) else ExitCode.INTERNAL
    return 0


def _end_with_the_runner() -> None:
    """Its end of the pipe closes whatever it dies of."""
    while os.read(0, 4096):
        continue
    os._exit(ExitCode.INTERNAL)


def _asks_nobody(_model: ConditionalModel, _seed: int) -> Check:
    raise RuntimeError("only the first process judges")


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # as the runner does: a library's own exit can only hang or crash
