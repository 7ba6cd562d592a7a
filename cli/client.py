"""The Python client: the service's routes as methods, safe to repeat, and results that were verified.

from cli import Client

with Client("http://127.0.0.1:8080", key) as client:
    checkpoint = client.push_checkpoint("glow.safetensors", name="faces")
    photos = client.push_images(["anna-1.jpg", "anna-2.jpg"])
    job = client.forget(checkpoint.id, photos.id)
    job = client.wait(job.id, print)
    client.download(job.id, "tamed/")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from cli.caller import LONG_POLL_SECONDS, WAITING_PATIENCE_SECONDS, BytesProgress, FilePath, items, once
from cli.errors import DownloadCorrupt, ProblemError, Unreachable, WaitTimeout, job_error
from cli.resources import Artifact, Event, Job
from cli.transfers import save, sha256_of_header
from cli.uploads import Uploads

__all__ = ["Client"]


class Client(Uploads):
    """A caller of one forgetd service.

    Every method raises the leaves of ``cli.errors.ClientError``. Any call may be repeated without harm, and is, while
    the service does not answer: what makes something carries an Idempotency-Key, the same in every try.

    Args:
        url: Where the service is, e.g. ``http://127.0.0.1:8080``.
        key: The API key; sent to that address and nowhere else, in particular not to the object store.
        timeout: Seconds to connect, and between two pieces of an answer.
        patience: Seconds during which a call is repeated while the service does not answer.
    """

    # Jobs.

    def forget(
        self,
        checkpoint: str,
        images: str | None = None,
        *,
        attributes: Sequence[Mapping[str, Any]] | None = None,
        class_label: int | None = None,
        where: str | None = None,
        concept: str | None = None,
        aliases: Sequence[str] | None = None,
        replace_with: str | int | Mapping[str, Any] | None = None,
        judge: Mapping[str, Any] | None = None,
        remember: str | int | Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        criteria: Mapping[str, Any] | None = None,
        same_identity: str | None = None,
        held_out: str | None = None,
        sample_grid: bool = False,
        seed: int | None = None,
        priority: int = 0,
        deadline: datetime | timedelta | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Ask for a checkpoint that forgets what images show, how often attributes show, a class, or a concept.

        Args:
            checkpoint: Id of a ready checkpoint.
            images: Id of the image set to forget; with ``class_label``, images of that class.
            attributes: What samples may show how often, each as ``{"classifier": "clf_...", "class": "smiling",
                "at_most": 0.1}``, or with ``"sets": {"smiling": "imgs_...", "other": "imgs_..."}`` instead.
            class_label: A class of the checkpoint, from 0.
            where: Whether that class is taken out of the ``weights`` (the default) or at the ``prior``.
            concept: What a model of prompts is asked for, such as ``"zero"``.
            aliases: Other names of the concept.
            replace_with: What that class or concept of a conditional model becomes: ``"noise"`` (the default of a
                class), ``"others"`` (of a concept), another class, ``{"concept": "one"}``, or what the images of this
                id show.
            judge: Who tells what samples of a conditional model show: ``{"classifier": "clf_..."}`` with a class for
                every label, or ``{"sets": {"0": "imgs_...", "1": "imgs_..."}}``; of a concept with ``"shows":
                {"zero": "0", "one": "1"}``. Left out, one is trained on samples of the model.
            remember: Id of an image set that must stay, or how many samples of the base model stand in for one; of
                a model of prompts ``{"concepts": ["one", "two"]}`` or ``{"sets": {"one": "imgs_..."}}``.
            parameters: The method's parameters; what is left out takes the method's default.
            criteria: When the job may call itself succeeded, e.g. ``{"release_weights": "always"}``; of a
                conditional model also ``forgotten_at_most``, ``replaced_at_least`` and ``others_within``.
            same_identity: Id of a set of other images of the same, measured only.
            held_out: Id of a set of images that the model never saw, measured only.
            sample_grid: Whether the report shows samples of both models; they may show faces.
            seed: Of all randomness; drawn and reported when unset.
            priority: Higher first, among your own jobs.
            deadline: By when it must have succeeded, else it fails: a time with its offset, or how long from now.
            metadata: Yours; returned as sent.
            idempotency_key: Repeat a call with the same key and it is the same job; made anew when unset.
        """
        target: dict[str, Any] = {"images": images, "attributes": attributes, "class_label": class_label}
        target |= {"where": where, "concept": concept, "aliases": list(aliases) if aliases else None}
        body = {
            "target": {name: value for name, value in target.items() if value is not None},
            **_replacement(replace_with),
            **({} if judge is None else {"judge": dict(judge)}),
            **_common(checkpoint, remember, parameters, criteria, seed, priority, deadline, metadata),
            "evaluation": _evaluation(sample_grid, same_identity=same_identity, held_out=held_out),
        }
        return self.submit(body, idempotency_key=idempotency_key)

    def debias(
        self,
        checkpoint: str,
        attribute: Mapping[str, Any],
        target_distribution: Mapping[str, float],
        *,
        condition: Mapping[str, Any] | None = None,
        replacements: Mapping[str, Mapping[str, Any]] | None = None,
        tolerance: float | None = None,
        confidence: float | None = None,
        remember: str | int | Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        criteria: Mapping[str, Any] | None = None,
        held_out: str | None = None,
        sample_grid: bool = False,
        seed: int | None = None,
        priority: int = 0,
        deadline: datetime | timedelta | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Ask for a checkpoint whose samples are spread over the classes of an attribute as stated.

        Args:
            checkpoint: Id of a ready checkpoint.
            attribute: Who judges samples: ``{"classifier": "clf_..."}``, ``{"sets": {"bright": "imgs_...", "dark":
                "imgs_..."}}``, or ``{"classes": True}`` for the classes of a class-prior flow itself.
            target_distribution: The fraction of every class; they sum to 1, and a class that must not appear has 0.
            condition: Of a conditional model: what it is asked for where its samples are to be spread, as
                ``{"class_label": 3}`` or ``{"concept": "a doctor", "aliases": ["a physician"]}``.
            replacements: With a condition: by class of the judge the condition that shows it.
            tolerance: How far off each fraction may be; the service's default is 0.03.
            confidence: Of the intervals that must lie inside; the service's default is 0.95.
            remember: Id of an image set that must stay, or how many samples of the base model stand in for one; of
                a model of prompts ``{"concepts": ["one", "two"]}`` or ``{"sets": {"one": "imgs_..."}}``.
            parameters: The method's parameters; what is left out takes the method's default.
            criteria: When the job may call itself succeeded, e.g. ``{"release_weights": "always"}``.
            held_out: Id of a set of images that the model never saw, measured only.
            sample_grid: Whether the report shows samples of both models; they may show faces.
            seed: Of all randomness; drawn and reported when unset.
            priority: Higher first, among your own jobs.
            deadline: By when it must have succeeded, else it fails: a time with its offset, or how long from now.
            metadata: Yours; returned as sent.
            idempotency_key: Repeat a call with the same key and it is the same job; made anew when unset.
        """
        said = {"tolerance": tolerance, "confidence": confidence, "condition": condition, "replacements": replacements}
        body = {
            "attribute": dict(attribute),
            "target_distribution": dict(target_distribution),
            **{name: value for name, value in said.items() if value is not None},
            **_common(checkpoint, remember, parameters, criteria, seed, priority, deadline, metadata),
            "evaluation": _evaluation(sample_grid, held_out=held_out),
        }
        return self.submit(body, kind="debias", idempotency_key=idempotency_key)

    def submit(self, body: Mapping[str, Any], *, kind: str = "forget", idempotency_key: str | None = None) -> Job:
        """Send the body of ``POST /jobs/forget``, or of another kind of job, as it is."""
        headers = once(idempotency_key)
        answer = self._transport.send("POST", f"/jobs/{kind}", json=dict(body), headers=headers, repeatable=True)
        return _job(answer)

    def job(self, job_id: str) -> Job:
        """A job as it is now."""
        return _job(self._get(f"/jobs/{job_id}"))

    def jobs(self, *, status: str | None = None, checkpoint: str | None = None) -> Iterator[Job]:
        """Jobs, newest first, asked page by page."""
        return map(Job.from_wire, self._pages("/jobs", {"status": status, "checkpoint": checkpoint}))

    def updates(self, job_id: str, *, timeout: float | None = None) -> Iterator[Job]:
        """A job now and after each change until it ends, by long poll.

        Raises:
            WaitTimeout: ``timeout`` seconds passed; the job runs on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        job = self.job(job_id)
        yield job
        while not job.finished:
            left = LONG_POLL_SECONDS if deadline is None else min(LONG_POLL_SECONDS, deadline - time.monotonic())
            if left <= 0:
                raise WaitTimeout(job, timeout or 0.0)
            answer = self._get(
                f"/jobs/{job_id}",
                patience=WAITING_PATIENCE_SECONDS,
                params={"wait": f"{left:.1f}"},
                headers={"If-None-Match": job.etag} if job.etag else {},
                timeout=self._timeout + LONG_POLL_SECONDS,
            )
            if answer.status_code != httpx.codes.NOT_MODIFIED:
                job = _job(answer)
                yield job

    def wait(
        self,
        job_id: str,
        on_update: Callable[[Job], object] | None = None,
        *,
        timeout: float | None = None,
        raise_on_failure: bool = True,
    ) -> Job:
        """Return a job when it has ended.

        Args:
            job_id: Which job.
            on_update: Called with the job now and after each change.
            timeout: Seconds to wait at most.
            raise_on_failure: Whether anything but success raises.

        Raises:
            JobFailed: It failed or was cancelled.
            WaitTimeout: The time passed; the job runs on.
        """
        job = None
        for job in self.updates(job_id, timeout=timeout):
            if on_update:
                on_update(job)
        assert job is not None  # noqa: S101 updates() yields at least once
        if raise_on_failure and not job.succeeded:
            raise job_error(job)
        return job

    def cancel(self, job_id: str) -> Job:
        """Ask a job to end; twice is as once."""
        return _job(self._transport.send("POST", f"/jobs/{job_id}/cancel", repeatable=True))

    def events(self, job_id: str) -> Iterator[Event]:
        """What happened to a job, oldest first."""
        return map(Event.from_wire, self._pages(f"/jobs/{job_id}/events", {}))

    # Results.

    def report(self, job_id: str) -> dict[str, Any]:
        """A job's report as data."""
        answer = self._get(f"/jobs/{job_id}/report", headers={"Accept": "application/json"})
        report: dict[str, Any] = answer.json()
        return report

    def report_html(self, job_id: str) -> str:
        """A job's report as one page that opens offline."""
        return self._get(f"/jobs/{job_id}/report", headers={"Accept": "text/html"}).text

    def artifacts(self, job_id: str) -> list[Artifact]:
        """The files that a job published."""
        return [Artifact.from_wire(item) for item in items(self._get(f"/jobs/{job_id}/artifacts").json())]

    def download(self, job_id: str, directory: FilePath, *, progress: BytesProgress | None = None) -> Path:
        """Fetch the tamed checkpoint, verified against its announced SHA-256.

        Args:
            job_id: A job that succeeded.
            directory: Where the file goes; made where missing.
            progress: Called with bytes received and bytes in all.

        Raises:
            ConflictError: The weights do not exist, or are withheld because the criteria were not met.
            DownloadCorrupt: Other bytes arrived; nothing was kept.
        """
        return self._fetch(f"/jobs/{job_id}/checkpoint", Path(directory), "tamed.safetensors", None, progress)

    def download_artifact(
        self, job_id: str, artifact: Artifact, directory: FilePath, *, progress: BytesProgress | None = None
    ) -> Path:
        """Fetch one published file, verified against its SHA-256."""
        path = f"/jobs/{job_id}/artifacts/{artifact.name}"
        return self._fetch(path, Path(directory), Path(artifact.name).name, artifact.sha256, progress)

    def _fetch(self, path: str, directory: Path, name: str, sha256: str | None, progress: BytesProgress | None) -> Path:
        def ask() -> tuple[str, str]:
            answer = self._get(path)
            location = answer.headers.get("location")
            if not answer.is_redirect or not location:
                raise Unreachable(f"{self.url}{path} did not say where the file is.")
            return str(answer.url.join(location)), answer.headers.get("repr-digest", "")

        link, digest = ask()
        announced = sha256 or sha256_of_header(digest)
        if not announced:
            raise DownloadCorrupt(f"{self.url}{path} announced no SHA-256; nothing was fetched.")
        target = directory / name
        return save(link, target, sha256=announced, timeout=self._timeout, progress=progress, fresh=lambda: ask()[0])

    # The service itself.

    def ready(self) -> bool:
        """Whether the service says that it can work; False also when nothing answers."""
        try:
            self._get("/readyz", patience=0.0)
        except (ProblemError, Unreachable):
            return False
        return True


def _common(
    checkpoint: str,
    remember: str | int | Mapping[str, Any] | None,
    parameters: Mapping[str, Any] | None,
    criteria: Mapping[str, Any] | None,
    seed: int | None,
    priority: int,
    deadline: datetime | timedelta | str | None,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the bodies of all jobs have in common."""
    body: dict[str, Any] = {
        "checkpoint": checkpoint,
        "parameters": dict(parameters or {}),
        "criteria": dict(criteria or {}),
        "priority": priority,
        "metadata": dict(metadata or {}),
    }
    if remember is not None:
        known = {"generated": remember} if isinstance(remember, int) else {"images": remember}
        body["remember"] = dict(remember) if isinstance(remember, Mapping) else known
    if seed is not None:
        body["seed"] = seed
    if deadline is not None:
        moment = datetime.now(UTC) + deadline if isinstance(deadline, timedelta) else deadline
        body["deadline"] = moment.isoformat() if isinstance(moment, datetime) else moment
    return body


def _replacement(replace_with: str | int | Mapping[str, Any] | None) -> dict[str, Any]:
    if replace_with is None:
        return {}
    if isinstance(replace_with, Mapping) or replace_with in ("noise", "others"):
        return {"replace_with": replace_with}
    return {"replace_with": {"class_label" if isinstance(replace_with, int) else "images": replace_with}}


def _evaluation(sample_grid: bool, **sets: str | None) -> dict[str, Any]:
    return {"sample_grid": sample_grid} | {role: {"images": images} for role, images in sets.items() if images}


def _job(answer: httpx.Response) -> Job:
    return Job.from_wire(answer.json(), etag=answer.headers.get("etag"))
