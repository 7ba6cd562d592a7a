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
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from cli.errors import CheckpointRejected, DownloadCorrupt, ProblemError, Unreachable, WaitTimeout, job_error
from cli.resources import Artifact, Checkpoint, Event, ImageSet, Job
from cli.transfers import LazyFile, digest_header, file_chunks, file_digest, save, sha256_of_header
from cli.transport import Transport

__all__ = ["Client"]

TIMEOUT_SECONDS = 30.0
PATIENCE_SECONDS = 15.0
WAITING_PATIENCE_SECONDS = 120.0  # a wait outlives a restart of the gateway
LONG_POLL_SECONDS = 20.0  # the service holds 30 at most
PAGE_SIZE = 50

FilePath = str | Path
BytesProgress = Callable[[int, int], None]


class Client:
    """A caller of one forgetd service.

    Every method raises the leaves of ``cli.errors.ClientError``. Any call may be repeated without harm, and is, while
    the service does not answer: what makes something carries an Idempotency-Key, the same in every try.

    Args:
        url: Where the service is, e.g. ``http://127.0.0.1:8080``.
        key: The API key; sent to that address and nowhere else, in particular not to the object store.
        timeout: Seconds to connect, and between two pieces of an answer.
        patience: Seconds during which a call is repeated while the service does not answer.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._timeout = timeout
        self._transport = Transport(url, key, timeout=timeout, patience=patience)

    @property
    def url(self) -> str:
        """The service's address."""
        return self._transport.url

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    # Checkpoints.

    def push_checkpoint(
        self,
        path: FilePath,
        *,
        name: str | None = None,
        image_size: int | None = None,
        n_bits: int | None = None,
        family: str | None = None,
        wait: bool = True,
        progress: BytesProgress | None = None,
    ) -> Checkpoint:
        """Upload a model and have it validated.

        The file is streamed with its SHA-256 (Content-Digest), so that damage on the way is refused. What its shapes
        tell is inferred; say the rest.

        Args:
            path: A safetensors file or a plain state dict.
            name: How it is listed; the file's name by default.
            image_size: Side of the images in pixels, where the file does not say.
            n_bits: Bits per colour channel the model was trained on, where the file does not say.
            family: The kind of model, e.g. ``glow``.
            wait: Whether to return only when validation has ended.
            progress: Called with bytes sent and bytes in all.

        Raises:
            CheckpointRejected: Validation ended badly (only with ``wait``).
        """
        path = Path(path)
        query = {"name": name or path.name, "image_size": image_size, "n_bits": n_bits, "family": family}
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(path.stat().st_size),
            "Content-Digest": digest_header(file_digest(path)),
        } | _once(None)
        answer = self._transport.send(
            "POST",
            "/checkpoints",
            params={key: value for key, value in query.items() if value is not None},
            headers=headers,
            repeatable=True,
            body=lambda: file_chunks(path, progress),
        )
        checkpoint = Checkpoint.from_wire(answer.json())
        return self.wait_checkpoint(checkpoint.id) if wait else checkpoint

    def wait_checkpoint(self, checkpoint_id: str, *, timeout: float | None = None) -> Checkpoint:
        """Return a checkpoint when its validation has ended.

        Raises:
            CheckpointRejected: It ended badly.
            Unreachable: ``timeout`` seconds passed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = LONG_POLL_SECONDS if deadline is None else min(LONG_POLL_SECONDS, deadline - time.monotonic())
            if left <= 0:
                raise Unreachable(f"Checkpoint {checkpoint_id} is still validating after {timeout:g} s.")
            answer = self._get(
                f"/checkpoints/{checkpoint_id}",
                patience=WAITING_PATIENCE_SECONDS,
                params={"wait": f"{left:.1f}"},
                timeout=self._timeout + LONG_POLL_SECONDS,
            )
            checkpoint = Checkpoint.from_wire(answer.json())
            if checkpoint.status == "rejected":
                raise CheckpointRejected(checkpoint)
            if checkpoint.ready:
                return checkpoint

    def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """A checkpoint as it is now."""
        return Checkpoint.from_wire(self._get(f"/checkpoints/{checkpoint_id}").json())

    def checkpoints(self) -> Iterator[Checkpoint]:
        """All checkpoints, newest first, asked page by page."""
        return map(Checkpoint.from_wire, self._pages("/checkpoints", {}))

    # Images.

    def push_images(self, paths: Sequence[FilePath], *, progress: BytesProgress | None = None) -> ImageSet:
        """Upload images as one set: JPEG, PNG or WebP. Their file names are not sent.

        Args:
            paths: The files, in order.
            progress: Called with images sent and images in all.
        """
        files = [Path(path) for path in paths]
        sent = 0

        def one_more() -> None:
            nonlocal sent
            sent += 1
            if progress:
                progress(min(sent, len(files)), len(files))

        parts = [
            ("images", (f"{index:05d}{path.suffix.lower()}", LazyFile(path, one_more)))
            for index, path in enumerate(files)
        ]
        answer = self._transport.send("POST", "/image-sets", files=parts, headers=_once(None), repeatable=True)
        return ImageSet.from_wire(answer.json())

    def erase_images(self, image_set_id: str) -> ImageSet:
        """Erase the images of a set now; the empty set stays readable, with the time of its erasure.

        Raises:
            ConflictError: A job that has not ended reads it.
        """
        answer = self._transport.send("DELETE", f"/image-sets/{image_set_id}", repeatable=True)
        return ImageSet.from_wire(answer.json())

    # Jobs.

    def forget(
        self,
        checkpoint: str,
        images: str,
        *,
        remember: str | int | None = None,
        parameters: Mapping[str, Any] | None = None,
        criteria: Mapping[str, Any] | None = None,
        same_identity: str | None = None,
        held_out: str | None = None,
        sample_grid: bool = False,
        seed: int | None = None,
        priority: int = 0,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Ask for a checkpoint that no longer makes what the images show; the answer is a queued job.

        Args:
            checkpoint: Id of a ready checkpoint.
            images: Id of the image set to forget.
            remember: Id of an image set that must stay, or how many samples of the base model stand in for one.
            parameters: The method's parameters; what is left out takes the method's default.
            criteria: When the job may call itself succeeded, e.g. ``{"release_weights": "always"}``.
            same_identity: Id of a set of other images of the same, measured only.
            held_out: Id of a set of images that the model never saw, measured only.
            sample_grid: Whether the report shows samples of both models; they may show faces.
            seed: Of all randomness; drawn and reported when unset.
            priority: Higher first.
            metadata: Yours; returned as sent.
            idempotency_key: Repeat a call with the same key and it is the same job; made anew when unset.
        """
        evaluation: dict[str, Any] = {"sample_grid": sample_grid}
        if same_identity:
            evaluation["same_identity"] = {"images": same_identity}
        if held_out:
            evaluation["held_out"] = {"images": held_out}
        body: dict[str, Any] = {
            "checkpoint": checkpoint,
            "target": {"images": images},
            "parameters": dict(parameters or {}),
            "criteria": dict(criteria or {}),
            "evaluation": evaluation,
            "priority": priority,
            "metadata": dict(metadata or {}),
        }
        if remember is not None:
            body["remember"] = {"generated": remember} if isinstance(remember, int) else {"images": remember}
        if seed is not None:
            body["seed"] = seed
        return self.submit(body, idempotency_key=idempotency_key)

    def submit(self, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """Send the body of ``POST /jobs/forget`` as it is."""
        headers = _once(idempotency_key)
        answer = self._transport.send("POST", "/jobs/forget", json=dict(body), headers=headers, repeatable=True)
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
        return [Artifact.from_wire(item) for item in _items(self._get(f"/jobs/{job_id}/artifacts").json())]

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
        answer = self._get(path)
        location = answer.headers.get("location")
        announced = sha256 or sha256_of_header(answer.headers.get("repr-digest", ""))
        if not answer.is_redirect or not location:
            raise Unreachable(f"{self.url}{path} did not say where the file is.")
        if not announced:
            raise DownloadCorrupt(f"{self.url}{path} announced no SHA-256; nothing was fetched.")
        link = str(answer.url.join(location))
        return save(link, directory / name, sha256=announced, timeout=self._timeout, progress=progress)

    # The service itself.

    def ready(self) -> bool:
        """Whether the service says that it can work; False also when nothing answers."""
        try:
            self._get("/readyz", patience=0.0)
        except (ProblemError, Unreachable):
            return False
        return True

    def _get(self, path: str, *, patience: float | None = None, **options: Any) -> httpx.Response:
        return self._transport.send("GET", path, patience=patience, **options)

    def _pages(self, path: str, query: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        params = {key: value for key, value in query.items() if value is not None} | {"limit": PAGE_SIZE}
        while True:
            page = self._get(path, params=params).json()
            yield from _items(page)
            cursor = page.get("next_cursor") if isinstance(page, dict) else None
            if cursor is None:
                return
            params["after"] = cursor


def _items(page: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = page["items"] if isinstance(page, dict) else page
    return items


def _once(key: str | None) -> dict[str, str]:
    """The header that makes repeating a call the same as sending it once."""
    return {"Idempotency-Key": key or str(uuid.uuid4())}


def _job(answer: httpx.Response) -> Job:
    return Job.from_wire(answer.json(), etag=answer.headers.get("etag"))
