"""``forgetd demo``: a real person is forgotten, end to end, through HTTP with the client alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from cli.client import Client
from cli.demo_table import lines
from cli.errors import ClientError, job_error
from cli.exits import ExitCode
from cli.output import emit, progress_bar, say, watch_bar
from cli.profile import data_dir as resolve_data_dir
from cli.profile import live_profile
from cli.resources import Job
from cli.service import LocalService
from cli.up import signals_stop

__all__ = ["run"]

ROOT = Path(__file__).resolve().parent.parent
SETS = ("forget", "same_identity", "remember", "held_out")


def run(*, person: int, seed: int, out: Path, keep_running: bool, data_dir: Path | None, port: int) -> int:
    """Start, train, upload, forget, fetch, show; an interrupt stops what was started."""
    try:
        return _run(person, seed, out, keep_running, resolve_data_dir(data_dir), port)
    except KeyboardInterrupt:
        say("Interrupted; everything that the demo started is stopped.")
        return ExitCode.INTERRUPTED


def _run(person: int, seed: int, out: Path, keep_running: bool, data_dir: Path, port: int) -> int:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="forgetd-demo-") as folder, ExitStack() as stack:
        photos = Path(folder)
        preparation = stack.enter_context(
            _Python("examples.demo_inputs", "--person", str(person), "--out", str(photos))
        )
        service, client = _service(stack, data_dir, port)
        prepared = json.loads(preparation.finish("Preparing the photos"))
        base = Path(prepared["base"])
        if prepared["trained"]:
            say(f"2/5  The base Glow is there from an earlier time: {base}")
        else:
            _train(base)
        job = _forget(client, base, photos, person=person, seed=seed)
        _fetch(client, job, out)
        report = json.loads((out / "report.json").read_text())
        head = f"Person {person}, five photos. The whole demo took {time.monotonic() - began:.0f} s."
        emit("\n".join(["", head, "", *lines(report), "", *_files(job, out)]))
        if keep_running and service is not None:
            say(f"The service goes on at {service.url}/docs until Ctrl-C.")
            with signals_stop(service) as stopped:
                stopped.wait()
    return ExitCode.OK if job.succeeded else ExitCode.CRITERIA_NOT_MET


def _service(stack: ExitStack, folder: Path, port: int) -> tuple[LocalService | None, Client]:
    """The service that runs here, or one started for the demo."""
    if (running := live_profile(folder)) is not None:
        say(f"1/5  Using the service at {running.url}.")
        return None, stack.enter_context(Client(running.url, running.key))
    say("1/5  Starting PostgreSQL, Valkey, SeaweedFS, gateway, control loop and two workers ...")
    service = stack.enter_context(LocalService(folder, port=port, tell=say))
    say(f"     Ready in {service.start_seconds:.1f} s at {service.url}.")
    return service, stack.enter_context(Client(service.url, service.key))


def _train(base: Path) -> None:
    """Train the base flow in its own process; it appears whole or not at all."""
    say("2/5  Training a Glow on the photos of 36 people, once; it is kept for the next time.")
    base.parent.mkdir(parents=True, exist_ok=True)
    fresh = base.with_name(f".{base.name}.part")
    try:
        with (
            _Python("examples.orl", "train", "--out", str(fresh), "--json") as training,
            progress_bar("training") as show,
        ):
            for line in training.lines():
                if "step" in line:
                    show(line["seconds"], line["total_seconds"], f"step {line['step']}, {line['bpd']:.3f} BPD")
            training.finish("Training")
        fresh.replace(base)
    finally:
        fresh.unlink(missing_ok=True)


def _forget(client: Client, base: Path, photos: Path, *, person: int, seed: int) -> Job:
    """Upload everything, ask for the job and follow it to its end."""
    say("3/5  Uploading the model, five photos to forget, and the images to measure on ...")
    checkpoint = client.push_checkpoint(base, name="ORL faces")
    sets = {name: client.push_images(sorted((photos / name).iterdir())).id for name in SETS}
    job = client.forget(
        checkpoint.id,
        sets["forget"],
        remember=sets["remember"],
        same_identity=sets["same_identity"],
        held_out=sets["held_out"],
        sample_grid=True,
        seed=seed,
        metadata={"demo": f"person {person}"},
    )
    say(f"4/5  Forgetting: job {job.id}")
    with watch_bar() as show:
        job = client.wait(job.id, show, raise_on_failure=False)
    if not job.succeeded and job.reason != "criteria_not_met":
        raise job_error(job)
    return job


def _fetch(client: Client, job: Job, out: Path) -> None:
    """Everything that the job published; a run that missed its criteria publishes no weights."""
    say(f"5/5  Fetching the result into {out}/")
    (out / "tamed.safetensors").unlink(missing_ok=True)  # of an earlier demo: a withheld one must not look published
    for artifact in client.artifacts(job.id):
        client.download_artifact(job.id, artifact, out)


def _files(job: Job, out: Path) -> list[str]:
    kinds = {
        "report.html": "the report, open it in a browser",
        "report.json": "the same as data",
        "samples.png": "samples of the model before and after",
        "tamed.safetensors": "the model that has forgotten",
    }
    found = [f"{out / name!s:<36}  {what}" for name, what in kinds.items() if (out / name).exists()]
    return found if job.succeeded else [*found, "The weights are withheld: the criteria were not met."]


class _Python:
    """A module of ours in its own process, so that this one never loads torch; ended with its block."""

    def __init__(self, module: str, *arguments: str) -> None:
        environment = dict(os.environ)
        if ROOT.name != "site-packages":  # a checkout: found from any folder
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed with the block
        self._process = subprocess.Popen(  # noqa: S603 our own argument list
            [sys.executable, "-m", module, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._errors.close()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Its output as it comes, one JSON object a line."""
        assert self._process.stdout is not None  # noqa: S101 asked for above
        for line in self._process.stdout:
            yield json.loads(line)

    def finish(self, what: str) -> str:
        """Its (remaining) output once it has ended well.

        Raises:
            ClientError: It did not; with the end of what it said.
        """
        output = self._process.communicate()[0]
        if self._process.returncode != 0:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise ClientError("\n".join([f"{what} failed (exit code {self._process.returncode}).", *said[-8:]]))
        return output
