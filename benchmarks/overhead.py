"""What does the service cost over the library: how soon does a job run, and how much longer does it take?

    python -m benchmarks.overhead [--quick]

The whole local service (PostgreSQL, Valkey, SeaweedFS, gateway, control loop, workers; in a temporary folder) forgets
five photos of one person, over and over, through the project's own client. Each sample sends a job and follows it to
its end, then does the same work by the library in this process, which is warm: same base, photos, parameters and seed,
and as many steps, or the benchmark fails.

    to run     POST /jobs/forget sent, until the client has seen status running (goal: 2 s, median)
    start      claimed, until the method begins: inputs, a new process and its imports, images, base
    unlearn    the method, of which fetching its last state
    evaluate   likelihoods, checkpoint, report
    publish    upload and the terminal status
    job        POST sent, until the client has seen status succeeded
    tame       the bare library call: unlearning.tame
    +report    tame, then what the runner computes on top: likelihoods, checkpoint, report as JSON and HTML
    over tame  job - tame (goal: 5 s, median)
    over both  job - (tame, +report): what the service itself adds

start to publish are differences of the server's own timestamps. The last line is one JSON object.
"""

import os

# On both sides as the runner has it (worker/process.py); read once, when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import itertools
import json
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cli.client import Client
from cli.resources import Event, Job
from cli.service import LocalService
from evidence.flow_evaluation import evaluate_taming
from evidence.rendering import render_html
from evidence.report import RunFacts, build_report
from examples.demo_inputs import FORGET_PHOTOS
from examples.orl import N_BITS, base_flow, base_path, load_faces
from models.checkpoints import save_checkpoint
from models.images import save_png
from models.protocol import Flow
from unlearning import TamingParameters, TamingResult, tame

PERSON = 4
"""Forgetting this person takes about the median number of steps."""
QUICK_DELTA = 1.0
"""A nearer goal, that fewer steps reach: what the service adds does not depend on them."""
JUDGE_SEED = 2**31
"""Apart from every seed that a taming run draws from."""
OWN_SETTINGS = "FORGETD_CACHE"
"""The one variable of the environment that stays: the others could name servers that are not ours to load."""
COLUMNS = "to run  start  unlearn  evaluate  publish     job    tame  +report  over tame  over both"


@dataclass(frozen=True)
class ServiceRun:
    """One job, in seconds; the first and the last by the client's clock, the others by the server's."""

    to_running: float
    start: float
    unlearn: float
    evaluate: float
    publish: float
    job: float


@dataclass(frozen=True)
class LibraryRun:
    """The same work without the service, in seconds."""

    tame: float
    tame_and_report: float


class Work:
    """One person's photos as the demo has them: five to forget, and three sets to remember and to measure on."""

    def __init__(self, person: int, delta: float) -> None:
        faces = load_faces()
        self.base, self.parameters = base_flow(), TamingParameters(delta=delta)
        self.forget, self.same_identity = faces.of(person)[:FORGET_PHOTOS], faces.of(person)[FORGET_PHOTOS:]
        self.remember, self.held_out = faces.training(without=person), faces.held_out()

    def by_library(self, folder: Path, seed: int, max_steps: int | None = None) -> tuple[LibraryRun, int]:
        """Do it here; returns also how many steps it took."""
        values = replace(self.parameters, max_steps=max_steps or self.parameters.max_steps)
        began = time.monotonic()
        result = tame(self.base, self.forget, self.remember, values, n_bits=N_BITS, seed=seed)
        tamed = time.monotonic() - began
        self._report(result, folder)
        return LibraryRun(tamed, time.monotonic() - began), result.steps

    def _report(self, result: TamingResult, folder: Path) -> None:
        """What worker/runner/forget.py does once the method has ended."""
        values = result.parameters
        dropped = set(result.removed_near_duplicates)
        evaluation = evaluate_taming(
            self.base,
            cast(Flow, result.flow),
            forget=self.forget,
            remember=self.remember[[row for row in range(len(self.remember)) if row not in dropped]],
            remember_source="images",
            same_identity=self.same_identity,
            held_out=self.held_out,
            n_bits=N_BITS,
            delta=values.delta,
            tolerance=values.tolerance,
            seed=JUDGE_SEED,
            remember_draws=1,
        )
        save_checkpoint(folder / "tamed.safetensors", result.flow)
        losses = {
            name: [(int(row["step"]), row[name]) for row in result.history if name in row]
            for name in {name for row in result.history for name in row} - {"step"}
        }
        report = build_report(evaluation, RunFacts(steps=result.steps, parameters=values.to_dict(), losses=losses))
        (folder / "report.json").write_text(report.to_json())
        (folder / "report.html").write_text(render_html(report))


class Caller:
    """A caller of the service. The person's own photos are erased with each job, and uploaded anew for the next."""

    def __init__(self, client: Client, work: Work, folder: Path) -> None:
        self._client, self._delta = client, work.parameters.delta
        self._checkpoint = client.push_checkpoint(base_path()).id
        self._remember = client.push_images(_pictures(work.remember, folder / "remember")).id
        self._held_out = client.push_images(_pictures(work.held_out, folder / "held_out")).id
        self._forget = _pictures(work.forget, folder / "forget")
        self._same_identity = _pictures(work.same_identity, folder / "same_identity")

    def by_service(self, seed: int) -> tuple[ServiceRun, int]:
        """Send a job and follow it to its end; returns also how many steps it took."""
        forget, same_identity = map(self._client.push_images, (self._forget, self._same_identity))
        running: list[float] = []

        def seen(job: Job) -> None:
            if job.status == "running" and not running:
                running.append(time.monotonic() - began)

        began = time.monotonic()
        job = self._client.forget(
            self._checkpoint,
            forget.id,
            remember=self._remember,
            same_identity=same_identity.id,
            held_out=self._held_out,
            parameters={"delta": self._delta},
            seed=seed,
        )
        job = self._client.wait(job.id, seen)
        seconds = time.monotonic() - began
        assert job.summary is not None
        start, unlearn, evaluate, publish = _phases(job, self._client.events(job.id))
        return ServiceRun(running[0], start, unlearn, evaluate, publish, seconds), int(job.summary["steps"])


def _phases(job: Job, events: Iterable[Event]) -> list[float]:
    """Seconds from the claim to the method, of the method, of the evaluation, and of the publication."""
    at = {event.data["phase"]: event.created_at for event in events if event.type == "phase"}
    moments = [job.started_at, at["unlearning"], at["evaluating"], at["publishing"], job.finished_at]
    return [(end - begin).total_seconds() for begin, end in itertools.pairwise(filter(None, moments))]


def _pictures(images: Tensor, folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{index:04d}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        save_png(image, path)
    return paths


def measure(samples: int, person: int, delta: float) -> tuple[list[ServiceRun], list[LibraryRun]]:
    """Both sides in turn, a line for each sample; everything that was started or written is gone at the end."""
    by_service: list[ServiceRun] = []
    by_library: list[LibraryRun] = []
    work = Work(person, delta)
    with (
        tempfile.TemporaryDirectory(prefix="forgetd-overhead-") as name,
        LocalService(Path(name, "data")) as service,
        Client(service.url, service.key) as client,
    ):
        folder = Path(name)
        caller = Caller(client, work, folder)
        work.by_library(folder, seed=0, max_steps=1)  # warm, as a notebook is
        print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
        print(f"service ready in {service.start_seconds:.1f} s; load {os.getloadavg()[0]:.1f}")
        print(f"person {person}, delta {delta:g}; all in seconds")
        print(COLUMNS)
        for seed in range(samples):
            served, steps = caller.by_service(seed)
            bare, own_steps = work.by_library(folder, seed)
            if steps != own_steps:
                raise SystemExit(f"not the same work: {steps} steps by the service, {own_steps} by the library")
            by_service.append(served)
            by_library.append(bare)
            show(served, bare)
    return by_service, by_library


def show(served: ServiceRun, bare: LibraryRun) -> None:
    """One line of the table."""
    over = (served.job - bare.tame, served.job - bare.tame_and_report)
    figures = (*astuple(served), *astuple(bare), *over)
    widths = (6, 6, 8, 9, 8, 7, 7, 8, 10, 10)
    print(" ".join(f"{figure:{width}.2f}" for figure, width in zip(figures, widths, strict=True)), flush=True)


def summary(by_service: list[ServiceRun], by_library: list[LibraryRun]) -> dict[str, float | int]:
    """The figures of the last line."""
    pairs = list(zip(by_service, by_library, strict=True))
    return {
        "samples": len(pairs),
        "post_to_running_median_seconds": statistics.median(run.to_running for run in by_service),
        "post_to_running_worst_seconds": max(run.to_running for run in by_service),
        "job_seconds_median": statistics.median(run.job for run in by_service),
        "tame_seconds_median": statistics.median(run.tame for run in by_library),
        "tame_and_report_seconds_median": statistics.median(run.tame_and_report for run in by_library),
        "overhead_over_tame_median_seconds": statistics.median(a.job - b.tame for a, b in pairs),
        "overhead_over_tame_and_report_median_seconds": statistics.median(a.job - b.tame_and_report for a, b in pairs),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n")[0])
    quick = f"one sample instead of ten, to delta {QUICK_DELTA:g} only"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--samples", type=int, help="how many jobs, each beside the same work by the library")
    parser.add_argument("--person", type=int, default=PERSON, help=f"whom to forget, of 1 to 36 (default: {PERSON})")
    options = parser.parse_args(arguments)
    for name in [name for name in os.environ if name.startswith("FORGETD_") and name != OWN_SETTINGS]:
        del os.environ[name]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the service is stopped
    try:
        samples = options.samples or (1 if options.quick else 10)
        runs = measure(samples, options.person, QUICK_DELTA if options.quick else TamingParameters.delta)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the service is stopped.") from None
    print(json.dumps(summary(*runs)))


if __name__ == "__main__":
    main()
