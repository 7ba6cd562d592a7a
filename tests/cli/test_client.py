"""The client against a server with bad days: what is repeated, what is not, and what is never sent."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import Client, ClientError, ProblemError, Unreachable
from cli.errors import (
    AuthenticationError,
    CheckpointRejected,
    ConflictError,
    ContentError,
    CriteriaNotMet,
    DownloadCorrupt,
    JobCancelled,
    JobFailed,
    NotFoundError,
    ServiceUnavailable,
    WaitTimeout,
)
from tests.cli.conftest import KEY
from tests.cli.scripted import Answer, ScriptedServer

MakeServer = Callable[..., ScriptedServer]
Connect = Callable[..., Client]


def as_json(data: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(data).encode(), headers)


def problem(status: int, slug: str, **members: Any) -> Answer:
    body = {"type": f"urn:forgetd:problem:{slug}", "title": "A title.", "status": status, "detail": "A detail."}
    return Answer(status, json.dumps(body | members).encode(), {"Content-Type": "application/problem+json"})


def job(status: str, **members: Any) -> dict[str, Any]:
    return {"id": "job_1", "status": status, "created_at": "2026-01-01T00:00:00Z", **members}


UNAVAILABLE = problem(503, "unavailable")


class TestRepeats:
    def test_a_read_survives_hangups_and_503(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(Answer(drop=True), UNAVAILABLE, as_json(job("queued")))

        found = connect(server.url).job("job_1")

        assert found.status == "queued"
        assert len(server.received) == 3

    def test_a_forget_request_keeps_its_idempotency_key(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(Answer(drop=True), UNAVAILABLE, as_json(job("queued"), 202))

        connect(server.url).forget("ckpt_1", "imgs_1")

        keys = {request.headers["idempotency-key"] for request in server.received}
        assert len(server.received) == 3
        assert len(keys) == 1

    def test_two_forget_requests_are_two_jobs(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(as_json(job("queued"), 202))
        client = connect(server.url)

        client.forget("ckpt_1", "imgs_1")
        client.forget("ckpt_1", "imgs_1")

        first, second = (request.headers["idempotency-key"] for request in server.received)
        assert first != second

    def test_an_upload_is_repeated_whole_under_one_key(
        self, make_server: MakeServer, connect: Connect, tmp_path: Path
    ) -> None:
        (tmp_path / "a.png").write_bytes(b"the picture")
        server = make_server(Answer(drop=True), UNAVAILABLE, as_json({"id": "imgs_1", "count": 1}, 201))

        connect(server.url).push_images([tmp_path / "a.png"])

        assert len({request.headers["idempotency-key"] for request in server.received}) == 1
        assert [request.body.count(b"the picture") for request in server.received] == [1, 1, 1]

    def test_retry_after_is_honoured(self, make_server: MakeServer, connect: Connect) -> None:
        wait = problem(503, "unavailable")
        wait.headers["Retry-After"] = "1"
        server = make_server(wait, as_json(job("queued")))
        began = time.monotonic()

        connect(server.url).job("job_1")

        assert time.monotonic() - began >= 1

    def test_patience_ends(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(UNAVAILABLE)

        with pytest.raises(ServiceUnavailable) as refusal:
            connect(server.url, patience=3.0).job("job_1")

        assert refusal.value.retryable
        assert len(server.received) > 1

    def test_a_refusal_is_not_repeated(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(problem(404, "not-found"))

        with pytest.raises(NotFoundError):
            connect(server.url).job("job_1")

        assert len(server.received) == 1

    def test_a_service_that_is_not_there_is_unreachable(self, connect: Connect) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        with pytest.raises(Unreachable, match="Nothing answers"):
            connect(f"http://127.0.0.1:{port}", patience=0).job("job_1")


class TestProblems:
    @pytest.mark.parametrize(
        ("status", "leaf"),
        [
            (401, AuthenticationError),
            (404, NotFoundError),
            (409, ConflictError),
            (413, ContentError),
            (422, ContentError),
            (500, ServiceUnavailable),
        ],
    )
    def test_each_status_has_its_leaf(
        self, make_server: MakeServer, connect: Connect, status: int, leaf: type[ProblemError]
    ) -> None:
        server = make_server(problem(status, "some-kind"))

        with pytest.raises(leaf):
            connect(server.url).job("job_1")

    def test_a_problem_carries_all_that_was_said(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(
            problem(422, "invalid-request", errors=[{"pointer": "/seed", "detail": "too large"}], limit=5)
        )

        with pytest.raises(ProblemError) as refusal:
            connect(server.url).forget("ckpt_1", "imgs_1", seed=1)

        assert refusal.value.is_a("invalid-request")
        assert (refusal.value.title, refusal.value.detail) == ("A title.", "A detail.")
        assert refusal.value.errors == [{"pointer": "/seed", "detail": "too large"}]
        assert refusal.value.members["limit"] == 5

    def test_another_program_at_the_address_is_told_apart(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(Answer(404, b"<h1>It works!</h1>", {"Content-Type": "text/html"}))

        with pytest.raises(Unreachable, match="not as forgetd would"):
            connect(server.url).job("job_1")

    @pytest.mark.parametrize("url", ["localhost:8080", "ftp://host", "http://", ""])
    def test_an_address_that_is_none_is_refused(self, url: str) -> None:
        with pytest.raises(ClientError, match="not an http"):
            Client(url, KEY)


class TestWait:
    def test_changes_come_by_long_poll_with_the_etag(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(
            as_json(job("queued"), ETag='"1"'),
            Answer(304, b"", {"ETag": '"1"'}),
            as_json(job("running", phase="unlearning"), ETag='"2"'),
            as_json(job("succeeded"), ETag='"3"'),
        )
        seen = []

        connect(server.url).wait("job_1", lambda found: seen.append(found.status))

        assert seen == ["queued", "running", "succeeded"]
        assert [request.headers.get("if-none-match") for request in server.received] == [None, '"1"', '"1"', '"2"']
        assert all("wait=" in request.path for request in server.received[1:])

    @pytest.mark.parametrize(
        ("members", "leaf"),
        [
            ({"status": "failed", "reason": "criteria_not_met"}, CriteriaNotMet),
            ({"status": "failed", "reason": "internal"}, JobFailed),
            ({"status": "cancelled"}, JobCancelled),
        ],
    )
    def test_each_bad_end_has_its_leaf(
        self, make_server: MakeServer, connect: Connect, members: dict[str, str], leaf: type[JobFailed]
    ) -> None:
        server = make_server(as_json({"id": "job_1", **members}))

        with pytest.raises(leaf) as failure:
            connect(server.url).wait("job_1")

        assert failure.value.job.id == "job_1"

    def test_the_time_limit_leaves_the_job_alone(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(as_json(job("running")))

        with pytest.raises(WaitTimeout):
            connect(server.url).wait("job_1", timeout=0.2)

        assert all(request.method == "GET" for request in server.received)

    def test_an_outage_in_the_middle_is_outlived(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(as_json(job("running")), Answer(drop=True), UNAVAILABLE, as_json(job("succeeded")))

        found = connect(server.url, patience=0).wait("job_1")

        assert found.succeeded

    def test_a_rejected_checkpoint_says_why(self, make_server: MakeServer, connect: Connect) -> None:
        rejected = {"id": "ckpt_1", "name": "x", "status": "rejected", "problem": {"detail": "A key is missing."}}
        server = make_server(as_json(rejected))

        with pytest.raises(CheckpointRejected, match="A key is missing"):
            connect(server.url).wait_checkpoint("ckpt_1")


class TestUploads:
    def test_a_checkpoint_is_streamed_with_its_digest(
        self, make_server: MakeServer, connect: Connect, tmp_path: Path
    ) -> None:
        content = bytes(range(256)) * 20_000
        (tmp_path / "glow.safetensors").write_bytes(content)
        server = make_server(as_json({"id": "ckpt_1", "name": "glow", "status": "validating"}, 202))
        steps: list[tuple[int, int]] = []

        connect(server.url).push_checkpoint(
            tmp_path / "glow.safetensors",
            name="my glow",
            n_bits=5,
            wait=False,
            progress=lambda done, total: steps.append((done, total)),
        )

        request = server.received[0]
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert request.body == content
        assert request.headers["content-digest"] == f"sha-256=:{digest}:"
        assert request.headers["content-length"] == str(len(content))
        assert request.path == "/checkpoints?name=my+glow&n_bits=5"
        assert steps[-1] == (len(content), len(content))

    def test_many_images_need_few_open_files(
        self, make_server: MakeServer, connect: Connect, tmp_path: Path, few_open_files: None
    ) -> None:
        files = [tmp_path / f"{index}.png" for index in range(300)]
        for file in files:
            file.write_bytes(file.name.encode())
        server = make_server(as_json({"id": "imgs_1", "count": 300}, 201))

        images = connect(server.url).push_images(files)

        assert images.count == 300
        assert server.received[0].body.count(b"Content-Disposition") == 300

    def test_file_names_stay_here(self, make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
        (tmp_path / "anna-example.png").write_bytes(b"png")
        server = make_server(as_json({"id": "imgs_1", "count": 1}, 201))

        connect(server.url).push_images([tmp_path / "anna-example.png"])

        assert b"anna" not in server.received[0].body

    def test_a_classifier_goes_with_all_that_is_said_of_it_and_its_digest(
        self, make_server: MakeServer, connect: Connect, tmp_path: Path
    ) -> None:
        server = make_server(UNAVAILABLE, as_json({"id": "clf_1", "name": "smiles", "classes": ["a b", "c"]}, 201))
        (tmp_path / "smiles.onnx").write_bytes(b"onnx")

        made = connect(server.url).push_classifier(
            tmp_path / "smiles.onnx", ["a b", "c"], output="score", threshold=0.0, mean=[0.5], std=[0.25]
        )

        first, again = server.received
        assert (made.id, made.classes) == ("clf_1", ("a b", "c"))
        assert first.path == again.path
        assert first.path == (
            "/classifiers?name=smiles.onnx&classes=a+b&classes=c&output=score&threshold=0.0&mean=0.5&std=0.25"
        )
        assert first.body == again.body == b"onnx"
        assert first.headers["idempotency-key"] == again.headers["idempotency-key"]
        digest = base64.b64encode(hashlib.sha256(b"onnx").digest()).decode()
        assert first.headers["content-digest"] == f"sha-256=:{digest}:"

    def test_what_is_not_said_is_not_sent(self, make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
        server = make_server(as_json({"id": "x_1", "status": "validating"}, 202))
        (tmp_path / "file").write_bytes(b"bytes")

        client = connect(server.url)
        client.push_classifier(tmp_path / "file", ["a", "b"])
        client.push_checkpoint(tmp_path / "file", wait=False)
        client.push_checkpoint(tmp_path / "file", wait=False, noise_std=0.05)

        assert [request.path for request in server.received] == [
            "/classifiers?name=file&classes=a&classes=b&output=logits",
            "/checkpoints?name=file",
            "/checkpoints?name=file&noise_std=0.05",
        ]

    def test_a_classifier_that_a_job_needs_is_a_conflict(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(problem(409, "classifier-in-use"))

        with pytest.raises(ConflictError):
            connect(server.url).erase_classifier("clf_1")

        assert server.received[0].path == "/classifiers/clf_1"


class TestDownloads:
    CONTENT = b"weights" * 100_000

    def redirect(self, store: ScriptedServer, content: bytes = CONTENT) -> Answer:
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        headers = {"Location": f"{store.url}/tamed?signature=s", "Repr-Digest": f"sha-256=:{digest}:"}
        return Answer(307, b"", headers)

    def test_a_file_arrives_verified(self, make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
        store = make_server(Answer(200, self.CONTENT))
        server = make_server(self.redirect(store))

        path = connect(server.url).download("job_1", tmp_path / "new")

        assert path.read_bytes() == self.CONTENT
        assert list(path.parent.iterdir()) == [path]

    def test_the_store_never_sees_the_key(self, make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
        store = make_server(Answer(200, self.CONTENT))
        server = make_server(self.redirect(store))

        connect(server.url).download("job_1", tmp_path)

        assert KEY in server.received[0].headers["authorization"]
        assert "authorization" not in store.received[0].headers
        assert KEY not in str(store.received)

    @pytest.mark.parametrize("arrived", [b"other", CONTENT[:-1], b""])
    def test_other_bytes_are_not_kept(
        self, make_server: MakeServer, connect: Connect, tmp_path: Path, arrived: bytes
    ) -> None:
        (tmp_path / "tamed.safetensors").write_bytes(b"from an earlier job")
        store = make_server(Answer(200, arrived))
        server = make_server(self.redirect(store))

        with pytest.raises(DownloadCorrupt):
            connect(server.url).download("job_1", tmp_path)

        assert [path.name for path in tmp_path.iterdir()] == ["tamed.safetensors"]
        assert (tmp_path / "tamed.safetensors").read_bytes() == b"from an earlier job"

    def test_an_answer_without_a_digest_is_not_followed(
        self, make_server: MakeServer, connect: Connect, tmp_path: Path
    ) -> None:
        store = make_server(Answer(200, self.CONTENT))
        server = make_server(Answer(307, b"", {"Location": store.url}))

        with pytest.raises(DownloadCorrupt):
            connect(server.url).download("job_1", tmp_path)

        assert store.received == []

    def test_an_expired_link_leaves_nothing(self, make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
        store = make_server(Answer(403, b"<Error/>"))
        server = make_server(self.redirect(store))

        with pytest.raises(Unreachable, match="403"):
            connect(server.url).download("job_1", tmp_path)

        assert list(tmp_path.iterdir()) == []


class TestReading:
    def test_unknown_members_are_kept_and_break_nothing(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(as_json(job("running", novelty={"a": 1}, progress={"step": 3, "novelty": 2})))

        found = connect(server.url).job("job_1")

        assert found.progress.step == 3
        assert found.wire["novelty"] == {"a": 1}

    def test_lists_are_read_page_by_page(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(
            as_json({"items": [job("queued")], "next_cursor": "job_1"}),
            as_json({"items": [job("failed")], "next_cursor": None}),
        )

        found = list(connect(server.url).jobs(status="queued"))

        assert [one.status for one in found] == ["queued", "failed"]
        assert "after" not in server.received[0].path
        assert "after=job_1" in server.received[1].path
        assert "status=queued" in server.received[1].path

    def test_a_page_is_asked_for_when_it_is_needed(self, make_server: MakeServer, connect: Connect) -> None:
        server = make_server(as_json({"items": [job("queued")], "next_cursor": "job_1"}))

        next(connect(server.url).jobs())

        assert len(server.received) == 1
