"""Callers over HTTP: they post, repeat what was not answered, cancel and follow some, and note what they were told."""

from __future__ import annotations

import base64
import hashlib
import random
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.fleet import Fleet
from tests.chaos.profile import REAL

__all__ = ["Callers", "Material", "Promised"]

AT_ONCE, FOLLOWERS = 12, 6
ATTEMPT_SECONDS = 20.0
AGAIN_SECONDS = 0.25
PATIENCE_SECONDS = 300.0  # for one call, repeated through every outage
WITH_IMAGES, BALANCED, CANCELLED, REPEATED, IN_A_HURRY, FOLLOWED = 0.2, 0.2, 0.1, 0.1, 0.05, 0.1
DEADLINE_SECONDS = (2, 20)
A_CHECKPOINT_EVERY = 40  # jobs
FOLLOWED_SECONDS = 20.0
NOT_NOW = frozenset({429, 502, 503, 504})
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class Material:
    """What jobs are about: ids of checkpoints in the service, and files."""

    with_classes: str  # a checkpoint with classes of its own
    real: str  # one that the real runner tames
    images: list[Path]
    pushed: Path  # the file of a checkpoint that is pushed again and again


@dataclass
class Promised:
    """What the service said to its callers."""

    jobs: dict[str, int] = field(default_factory=dict)  # id -> seed, of every 202
    real: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)  # a cancel of theirs was answered with 202
    hurried: set[str] = field(default_factory=set)  # they have a deadline
    two_for_one: list[str] = field(default_factory=list)  # a key that was answered with two jobs
    refused: list[str] = field(default_factory=list)  # answers that no caller of these should get
    too_late: int = 0  # their deadline had passed when somebody answered: nothing was accepted
    checkpoints: set[str] = field(default_factory=set)  # pushed, each a 202 too
    told: dict[str, str] = field(default_factory=dict)  # by job, the end that a caller was told
    gave_up: int = 0  # calls that nobody answered in PATIENCE_SECONDS
    tried_again: int = 0
    posts: list[tuple[float, bool]] = field(default_factory=list)  # wall time of each job's; 202 at the first try?
    queued_cancels: list[float] = field(default_factory=list)  # seconds of the call that ended a waiting job
    image_sets: dict[str, str] = field(default_factory=dict)  # of its id the job that used it


class Callers:
    """Post so many jobs in so many seconds."""

    def __init__(self, fleet: Fleet, material: Material, *, seed: int, count: int, seconds: float) -> None:
        self.promised = Promised()
        self._fleet, self._material = fleet, material
        self._draw, self._count, self._seconds = random.Random(f"callers {seed}"), count, seconds
        self._first_seed = (seed * 1_000_003) % 2**40 * REAL
        self._lock = threading.Lock()
        self._clients = {url: httpx.Client(base_url=url, timeout=ATTEMPT_SECONDS) for url in fleet.urls}
        self._follows: list[Future[None]] = []
        self._headers = {"Authorization": f"Bearer {fleet.key.secret}"}

    def run(self) -> None:
        """Until every job was accepted, or given up."""
        pause, began = self._seconds / self._count, time.monotonic()
        with (
            ThreadPoolExecutor(FOLLOWERS, thread_name_prefix="follower") as self._followers,
            ThreadPoolExecutor(AT_ONCE, thread_name_prefix="caller") as pool,
        ):
            posts = []
            for number in range(self._count):
                time.sleep(max(0.0, began + number * pause - time.monotonic()))
                posts.append(pool.submit(self._post, self._first_seed + number, random.Random(self._draw.random())))
                if number % A_CHECKPOINT_EVERY == A_CHECKPOINT_EVERY // 2:
                    posts.append(pool.submit(self._push, random.Random(self._draw.random())))
            for post in posts:
                post.result()
            for follow in self._follows:
                follow.result()
        for client in self._clients.values():
            client.close()

    def _post(self, seed: int, draw: random.Random) -> None:
        real = seed % REAL == REAL - 1
        images = self._images(draw) if real or draw.random() < WITH_IMAGES else None
        body: dict[str, Any] = {"seed": seed, "metadata": {"case": str(uuid.UUID(int=draw.getrandbits(128)))}}
        route = "/jobs/forget"
        if real:
            body |= {
                "checkpoint": self._material.real,
                "target": {"images": images},
                "remember": {"generated": 64},
                "parameters": {"max_steps": 40},
            }
        elif images is not None:
            body |= {"checkpoint": self._material.real, "target": {"images": images}}
        elif draw.random() < BALANCED:
            route = "/jobs/debias"
            shares = {"0": 0.5, "1": 0.5, "2": 0}
            body |= {
                "checkpoint": self._material.with_classes,
                "attribute": {"classes": True},
                "target_distribution": shares,
            }
        else:
            body |= {"checkpoint": self._material.with_classes, "target": {"class_label": draw.randrange(3)}}
        if hurried := not real and draw.random() < IN_A_HURRY:
            limit = datetime.now(UTC) + timedelta(seconds=draw.uniform(*DEADLINE_SECONDS))
            body["deadline"] = limit.isoformat()
        key = str(uuid.UUID(int=draw.getrandbits(128)))
        job_id = self._accepted(route, body, key, draw)
        if job_id is None:
            return
        if draw.random() < REPEATED and self._accepted(route, body, key, draw) != job_id:
            self.promised.two_for_one.append(key)
        with self._lock:
            self.promised.jobs[job_id] = seed
            if real:
                self.promised.real.add(job_id)
            if hurried:
                self.promised.hurried.add(job_id)
            if images is not None:
                self.promised.image_sets[images] = job_id
        if not real and draw.random() < CANCELLED:
            time.sleep(draw.uniform(0, 3))
            self._cancel(job_id, draw)
        if draw.random() < FOLLOWED:
            self._follows.append(self._followers.submit(self._follow, job_id, draw))

    def _accepted(self, route: str, body: dict[str, Any], key: str, draw: random.Random) -> str | None:
        tries: list[float] = []
        answer = self._call(draw, "POST", route, tries, json=body, headers={"Idempotency-Key": key})
        if answer is None:
            return None
        with self._lock:
            self.promised.posts.append((tries[0], len(tries) == 1))
        if answer.status_code != httpx.codes.ACCEPTED:
            with self._lock:
                if "deadline" in body and answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
                    self.promised.too_late += 1
                else:
                    self._refused(answer)
            return None
        job_id: str = answer.json()["id"]
        return job_id

    def _push(self, draw: random.Random) -> None:
        """A checkpoint, twice with one key."""
        content, key = self._material.pushed.read_bytes(), str(uuid.UUID(int=draw.getrandbits(128)))
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        headers = {"Idempotency-Key": key, "Content-Digest": f"sha-256=:{digest}:"}
        headers["Content-Type"] = "application/octet-stream"
        ids = set()
        for _ in range(2):
            answer = self._call(draw, "POST", "/checkpoints", params={"name": key}, content=content, headers=headers)
            if answer is None:
                return
            if answer.status_code != httpx.codes.ACCEPTED:
                self._refused(answer)
                return
            ids.add(answer.json()["id"])
        if len(ids) > 1:
            self.promised.two_for_one.append(key)
        self.promised.checkpoints |= ids

    def _follow(self, job_id: str, draw: random.Random) -> None:
        """Ask after a job until it has ended, or for some seconds."""
        tag: dict[str, str] = {}
        limit = time.monotonic() + FOLLOWED_SECONDS
        while time.monotonic() < limit:
            answer = self._call(draw, "GET", f"/jobs/{job_id}", params={"wait": 5}, headers=tag)
            if answer is None:
                return
            if answer.status_code == httpx.codes.NOT_MODIFIED:
                continue
            if answer.status_code != httpx.codes.OK:
                self._refused(answer)
                return
            tag = {"If-None-Match": answer.headers["etag"]}
            if (status := answer.json()["status"]) in TERMINAL:
                self.promised.told[job_id] = status
                return

    def _refused(self, answer: httpx.Response) -> None:
        self.promised.refused.append(f"{answer.request.url.path}: {answer.status_code} {answer.text[:300]}")

    def _images(self, draw: random.Random) -> str | None:
        files = [("images", (path.name, path.read_bytes())) for path in islice(self._material.images, 2)]
        key = str(uuid.UUID(int=draw.getrandbits(128)))
        answer = self._call(draw, "POST", "/image-sets", files=files, headers={"Idempotency-Key": key})
        if answer is None or answer.status_code != httpx.codes.CREATED:
            if answer is not None:
                self._refused(answer)
            return None
        image_set: str = answer.json()["id"]
        return image_set

    def _cancel(self, job_id: str, draw: random.Random) -> None:
        before = time.monotonic()
        answer = self._call(draw, "POST", f"/jobs/{job_id}/cancel")
        if answer is None or answer.status_code == httpx.codes.CONFLICT:  # it had ended
            return
        if answer.status_code != httpx.codes.ACCEPTED:
            self._refused(answer)
            return
        with self._lock:
            self.promised.cancelled.add(job_id)
            if answer.json()["status"] == "cancelled":
                self.promised.queued_cancels.append(time.monotonic() - before)

    def _call(
        self, draw: random.Random, method: str, path: str, tries: list[float] | None = None, **more: Any
    ) -> httpx.Response | None:
        """Ask one gateway after the other until somebody answers with something else than "not now".

        ``tries`` comes to hold the wall time of each.
        """
        headers = {**self._headers, **more.pop("headers", {})}
        urls = self._fleet.urls[:]
        draw.shuffle(urls)
        limit = time.monotonic() + PATIENCE_SECONDS
        turn = 0
        while time.monotonic() < limit:
            if tries is not None:
                tries.append(time.time())
            try:
                answer = self._clients[urls[turn % len(urls)]].request(method, path, headers=headers, **more)
                if answer.status_code not in NOT_NOW:
                    return answer
            except httpx.HTTPError:
                pass
            turn += 1
            with self._lock:
                self.promised.tried_again += 1
            time.sleep(AGAIN_SECONDS)
        with self._lock:
            self.promised.gave_up += 1
        return None
