"""The part of the client that sends what jobs work on: models, classifiers, images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from cli.caller import LONG_POLL_SECONDS, WAITING_PATIENCE_SECONDS, BytesProgress, Caller, FilePath, once
from cli.errors import CheckpointRejected, ClientError, Unreachable
from cli.parts import LARGE_BYTES, Part, StoreOutOfReach, send_parts
from cli.resources import Checkpoint, Classifier, ImageSet
from cli.transfers import LazyFile, digest_header, file_chunks, file_digest

__all__ = ["Uploads"]

ABORT_SECONDS = 5.0


class Uploads(Caller):
    """Uploads, and what became of them."""

    # Checkpoints.

    def push_checkpoint(
        self,
        path: FilePath,
        *,
        name: str | None = None,
        image_size: int | None = None,
        n_bits: int | None = None,
        family: str | None = None,
        noise_std: float | None = None,
        prediction_type: str | None = None,
        wait: bool = True,
        progress: BytesProgress | None = None,
        notice: Callable[[str], object] | None = None,
    ) -> Checkpoint:
        """Upload a model and have it validated.

        The file is streamed with its SHA-256 (Content-Digest), so that damage on the way is refused. One of 64 MiB and
        more goes straight to the object store, in parts, and its SHA-256 is checked by the validation; where the store
        cannot be reached from here it goes through the service as well. What its shapes tell is inferred; say the rest.

        Args:
            path: A safetensors file, a plain state dict, or a diffusers folder as a plain tar.
            name: How it is listed; the file's name by default.
            image_size: Side of the images in pixels, where the file does not say.
            n_bits: Bits per colour channel the model was trained on, where the file does not say.
            family: The kind of model, e.g. ``glow``.
            noise_std: Of a TarFlow's noise, in the units of published files (images in [-1, 1]).
            prediction_type: What a diffusion model predicts, ``epsilon`` or ``v_prediction``, where the file does not
                say.
            wait: Whether to return only when validation has ended.
            progress: Called with bytes sent and bytes in all.
            notice: Called with a sentence where the file goes another way than it should.

        Raises:
            CheckpointRejected: Validation ended badly (only with ``wait``).
        """
        path = Path(path)
        query = {"image_size": image_size, "n_bits": n_bits, "family": family, "noise_std": noise_std}
        query |= {"prediction_type": prediction_type}
        said = {"name": name or path.name} | query
        made = self._push_parts(path, said, progress, notice) if path.stat().st_size >= LARGE_BYTES else None
        checkpoint = Checkpoint.from_wire(made or self._push("/checkpoints", path, said, progress))
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

    # Classifiers.

    def push_classifier(
        self,
        path: FilePath,
        classes: Sequence[str],
        *,
        name: str | None = None,
        output: str = "logits",
        threshold: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        progress: BytesProgress | None = None,
    ) -> Classifier:
        """Upload a classifier, which the service loads and tries once before it answers.

        Args:
            path: An ONNX file with its weights inside: float images (n, c, h, w) in, a figure a class out.
            classes: Their names, in the order of the output; none has a comma.
            name: How it is listed; the file's name by default.
            output: What a row of the output is: ``logits``, ``probabilities``, or one ``score``.
            threshold: From which value on an image is of the second of two classes.
            mean: Of each channel of pixels in [0, 1], which are shifted and scaled by it and ``std``; as they are
                without.
            std: Of each channel.
            progress: Called with bytes sent and bytes in all.
        """
        path = Path(path)
        query: dict[str, Any] = {"name": name or path.name, "classes": list(classes), "output": output}
        query |= {"threshold": threshold, "mean": list(mean) if mean else None, "std": list(std) if std else None}
        return Classifier.from_wire(self._push("/classifiers", path, query, progress))

    def classifier(self, classifier_id: str) -> Classifier:
        """A classifier as it is now."""
        return Classifier.from_wire(self._get(f"/classifiers/{classifier_id}").json())

    def classifiers(self) -> Iterator[Classifier]:
        """All classifiers that were not erased, newest first, asked page by page."""
        return map(Classifier.from_wire, self._pages("/classifiers", {}))

    def erase_classifier(self, classifier_id: str) -> Classifier:
        """Erase a classifier's file now; what it was stays readable.

        Raises:
            ConflictError: A job that has not ended needs it.
        """
        answer = self._transport.send("DELETE", f"/classifiers/{classifier_id}", repeatable=True)
        return Classifier.from_wire(answer.json())

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
        answer = self._transport.send("POST", "/image-sets", files=parts, headers=once(None), repeatable=True)
        return ImageSet.from_wire(answer.json())

    def erase_images(self, image_set_id: str) -> ImageSet:
        """Erase the images of a set now; the empty set stays readable, with the time of its erasure.

        Raises:
            ConflictError: A job that has not ended reads it.
        """
        answer = self._transport.send("DELETE", f"/image-sets/{image_set_id}", repeatable=True)
        return ImageSet.from_wire(answer.json())

    def _push_parts(
        self,
        path: Path,
        said: Mapping[str, Any],
        progress: BytesProgress | None,
        notice: Callable[[str], object] | None,
    ) -> Mapping[str, Any] | None:
        """Send a checkpoint's file straight to the store; what the service made of it, or None: not from here."""
        body = {key: value for key, value in said.items() if value is not None} | {"bytes": path.stat().st_size}
        begun = self._transport.send(
            "POST", "/checkpoints/uploads", json=body, headers=once(None), repeatable=True
        ).json()
        place = f"/checkpoints/uploads/{begun['id']}"

        def missing() -> list[Part]:
            answer = self._get(place, patience=WAITING_PATIENCE_SECONDS)  # hours may have been sent by now
            return [Part(it["first"], it["bytes"], it["url"]) for it in answer.json()["missing"]]

        with ThreadPoolExecutor(1, thread_name_prefix="digest") as beside:
            digest = beside.submit(file_digest, path)
            try:
                send_parts(path, missing, timeout=self._timeout, patience=self._transport.patience, progress=progress)
                made: Mapping[str, Any] = self._transport.send(
                    "POST",
                    f"{place}/complete",
                    json={"sha256": digest.result().hex()},
                    repeatable=True,
                    patience=WAITING_PATIENCE_SECONDS,
                ).json()
            except BaseException as error:
                self._abort(place)
                if not isinstance(error, StoreOutOfReach):
                    raise
                if notice:
                    notice(f"{error} Sending it through the service.")
                return None
        return made

    def _abort(self, place: str) -> None:
        """An upload that stays unfinished is to count for nothing; where nobody answers, it ends by itself."""
        with suppress(ClientError):
            self._transport.send("DELETE", place, patience=0.0, timeout=ABORT_SECONDS)

    def _push(
        self, route: str, path: Path, query: Mapping[str, Any], progress: BytesProgress | None
    ) -> Mapping[str, Any]:
        """Stream a file with its SHA-256, so that damage on the way is refused; what the service made of it."""
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(path.stat().st_size),
            "Content-Digest": digest_header(file_digest(path)),
        } | once(None)
        answer = self._transport.send(
            "POST",
            route,
            params={key: value for key, value in query.items() if value is not None},
            headers=headers,
            repeatable=True,
            body=lambda: file_chunks(path, progress),
        )
        made: Mapping[str, Any] = answer.json()
        return made
