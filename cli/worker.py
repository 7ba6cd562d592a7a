"""``forgetd worker``: keeps a worker alive on one GPU, on some or on each, or becomes one without a GPU."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DataDir, command

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cli.gpus import Place
    from services.settings import Settings

__all__ = ["register"]

GPU_QUEUES, CPU_QUEUES = "gpu.flow,gpu.diffusion", "cpu"
NO_TORCH = 'A worker computes with torch, which is not installed here. Run: pip install "forgetd[worker]"'


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, example="forgetd worker --gpu 0")(worker)


def worker(
    gpu: Annotated[
        str | None, typer.Option(metavar="N|N,N|all", help="Which GPU; several for FORGETD_GPUS_PER_JOB; or all.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU; listens to cpu unless --queues says more.")] = False,
    queues: Annotated[
        str | None, typer.Option(metavar="NAMES", help="What it takes: gpu.flow, gpu.diffusion, cpu; with commas.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What it is called in logs; the host's name, and its GPU, by default.")
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Jobs at once. Only with --cpu; 1 by default.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Run jobs on this host until SIGTERM or Ctrl-C; what runs then saves its state and goes back to the queue.

    With --gpu N the worker sees that GPU alone; a second one on the same GPU of this host is refused. With --gpu all
    there is a worker for each GPU (or for each FORGETD_GPUS_PER_JOB of them). With --gpu a worker that dies is started
    again. With --cpu this process is the worker, without a GPU, and validates uploads. If CUDA_VISIBLE_DEVICES is set,
    N counts in it.

    Needs the FORGETD_... variables of the service; without them it joins the `forgetd up` that runs here.
    """
    if (gpu is None) == (not cpu):
        raise typer.BadParameter("Say which GPU (--gpu 0, --gpu all), or that there is none (--cpu).")
    if slots is not None and not cpu:
        raise typer.BadParameter("--slots is for --cpu: the slots of a worker share its GPU, which one job fills.")
    named = [queue.strip() for queue in (queues or (CPU_QUEUES if cpu else GPU_QUEUES)).split(",")]
    if not all(named):
        raise typer.BadParameter("--queues has an empty name.")
    environment, settings = _settings(data_dir)
    host = name or socket.gethostname()
    if gpu is None:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        _become([*_arguments(named, host), "--slots", str(slots or 1)], environment)
    else:
        _on_gpus(gpu, named, host, environment, settings)


def _settings(data_dir: Path | None) -> tuple[dict[str, str], Settings]:
    """The worker's variables and settings, or what is wrong with them, each by its name."""
    from importlib.util import find_spec

    from cli.errors import ClientError
    from cli.profile import data_dir as resolve_data_dir
    from cli.profile import service_environment
    from services.diagnosis.variables import read

    environment = service_environment(resolve_data_dir(data_dir))
    reading = read(environment)
    faults = [f"{finding.says}. {finding.mend}" for finding in reading.findings if finding.state == "wrong"]
    if faults:
        raise ClientError("\n  ".join(["A worker cannot start with these settings:", *faults]))
    if find_spec("torch") is None:
        raise ClientError(NO_TORCH)
    return environment, reading.settings


def _on_gpus(gpu: str, queues: Sequence[str], host: str, environment: dict[str, str], settings: Settings) -> None:
    from cli.gpus import Keeper, Member, places, take

    chosen = places(gpu, environment, per_job=settings.gpus_per_job)
    held = [take(place, settings.scratch_dir) for place in chosen]
    members = [
        Member(place, _command(_arguments(queues, f"{host}-gpu{place.number}")), _seeing(environment, place), locks)
        for place, locks in zip(chosen, held, strict=True)
    ]
    raise typer.Exit(Keeper(members, grace_seconds=settings.drain_grace_seconds).run())


def _seeing(environment: Mapping[str, str], place: Place) -> dict[str, str]:
    """What makes a process see these GPUs and no other."""
    return _importable(environment) | {"CUDA_VISIBLE_DEVICES": ",".join(place.devices)}


def _arguments(queues: Sequence[str], name: str) -> list[str]:
    return ["--queues", ",".join(queues), "--name", name]


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "worker.main", *arguments]


def _become(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """This process is the worker from here on: its signals and exit code are the worker's."""
    os.execve(sys.executable, _command(arguments), _importable(environment))  # noqa: S606 our own module


def _importable(environment: Mapping[str, str]) -> dict[str, str]:
    """The same, with a checkout found from any folder."""
    from cli.children import ROOT

    if ROOT.name == "site-packages":
        return dict(environment)
    return dict(environment) | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))}
