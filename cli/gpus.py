"""The GPUs of this host: which there are, who has them, and a worker on each, kept alive and stopped in order."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer

from cli.errors import ClientError
from cli.exits import ExitCode
from cli.output import say

__all__ = ["Keeper", "Member", "Place", "places", "take"]

ALL = "all"
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
LOOK_SECONDS = 0.5
BACKOFF_SECONDS, BACKOFF_MAX_SECONDS = 1.0, 30.0
STEADY_SECONDS = 60.0  # a worker that lived this long starts with a fresh backoff
EXIT_SECONDS = 15.0  # past the drain's grace, after which a worker ends itself
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """The GPUs of one worker: their numbers here, and what CUDA calls them."""

    numbers: tuple[int, ...]
    devices: tuple[str, ...]

    @property
    def number(self) -> str:
        """In the worker's name."""
        return "+".join(str(number) for number in self.numbers)


def places(said: str, environment: dict[str, str], *, per_job: int) -> list[Place]:
    """The workers that ``--gpu`` asks for, one after the other.

    Raises:
        BadParameter: It is no number, numbers or all.
        ClientError: There are no such GPUs, torch cannot be asked, or a job would leave some of them idle.
    """
    from services.diagnosis.accelerators import look

    if VISIBLE not in environment:
        environment.setdefault(ORDER, "PCI_BUS_ID")  # numbers as nvidia-smi has them
    wanted = None if said == ALL else _numbers(said)
    if wanted is not None and len(wanted) > per_job:
        raise ClientError(
            f"A job has {per_job} GPU{'' if per_job == 1 else 's'} (FORGETD_GPUS_PER_JOB): the others of {said} would "
            f"be idle. Set FORGETD_GPUS_PER_JOB={len(wanted)}, or start a worker on each with --gpu all."
        )
    seen = look(environment)
    if seen.problem:
        raise ClientError(f"The GPUs of this host are not known: {seen.problem}.")
    if not seen.names:
        limit = f" ({VISIBLE}={environment[VISIBLE]})" if VISIBLE in environment else ""
        raise ClientError(
            f"torch sees no GPU here{limit}. See nvidia-smi, and that torch is a CUDA build. Without a GPU, for small "
            "flows: forgetd worker --cpu --queues gpu.flow"
        )
    absent = [number for number in wanted or () if number >= len(seen.names)]
    if absent:
        there = ", ".join(f"{number} ({name})" for number, name in enumerate(seen.names))
        raise ClientError(f"There is no GPU {absent[0]} here. There are: {there}.")
    names = [name.strip() for name in environment[VISIBLE].split(",")] if environment.get(VISIBLE) else None
    every = range(len(seen.names))
    groups = [wanted] if wanted is not None else [tuple(every[at : at + per_job]) for at in every[::per_job]]
    return [Place(group, tuple(names[n] if names else str(n) for n in group)) for group in groups]


def _numbers(said: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", said):
        raise typer.BadParameter(f"--gpu takes a number, several with commas, or all; not {said!r}.")
    numbers = tuple(int(number) for number in said.split(","))
    if len(set(numbers)) < len(numbers):
        raise typer.BadParameter(f"--gpu {said} names one twice.")
    return numbers


def take(place: Place, root: Path) -> list[int]:
    """Hold a lock file for each GPU, below the scratch folder that this host's workers share.

    Returns:
        Descriptors; whoever has them, or inherits them, holds the GPUs until it ends.

    Raises:
        ClientError: A worker has one of them.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    held: list[int] = []
    for number, device in zip(place.numbers, place.devices, strict=True):
        path = root / f"gpu-{re.sub(r'[^A-Za-z0-9-]', '_', device)}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            who = f" (process {holder})" if holder.isdecimal() else ""
            for one in (*held, descriptor):
                os.close(one)
            raise ClientError(f"GPU {number} has a worker already{who}; a second would only get in its way.") from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        held.append(descriptor)
    return held


@dataclass(frozen=True)
class Member:
    """A worker to be kept: where, how it is started, and the locks that it inherits."""

    place: Place
    command: Sequence[str]
    environment: Mapping[str, str]
    locks: Sequence[int]


class Keeper:
    """Keeps workers alive until a signal, then drains all of them beside each other; a second signal kills them."""

    def __init__(self, members: Sequence[Member], *, grace_seconds: float) -> None:
        self._kept = [_Kept(member) for member in members]
        self._grace = grace_seconds + EXIT_SECONDS
        self._stop, self._hurry = threading.Event(), threading.Event()

    def run(self) -> int:
        """Until all have ended. 0 if each did so by itself and in order."""
        former = {
            number: signal.signal(number, self._told) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            while not self._stop.wait(LOOK_SECONDS):
                for one in self._kept:
                    one.look_after()
            for one in self._kept:
                one.drain()
            deadline = time.monotonic() + self._grace
            while any(one.alive for one in self._kept) and time.monotonic() < deadline and not self._hurry.wait(0.1):
                pass
            orderly = [one.end() for one in self._kept]
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return ExitCode.OK if all(orderly) else ExitCode.FAILURE

    def _told(self, _number: int, _frame: FrameType | None) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()


class _Kept:
    """One of them."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._backoff = BACKOFF_SECONDS
        self._not_before = 0.0

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def look_after(self) -> None:
        """Start it if it does not run, and not too soon after it ended."""
        if self.alive:
            return
        now = time.monotonic()
        if self._process is not None:
            if now - self._began > STEADY_SECONDS:
                self._backoff = BACKOFF_SECONDS
            code = self._process.returncode
            say(f"The worker on GPU {self._member.place.number} ended ({code}); again in {self._backoff:.0f} s.")
            self._process, self._not_before = None, now + self._backoff
            self._backoff = min(2 * self._backoff, BACKOFF_MAX_SECONDS)
        if now >= self._not_before:
            self._start()

    def drain(self) -> None:
        if self.alive and self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> bool:
        """Kill what is left. Whether it had ended by itself, with 0."""
        if self._process is None:
            return True
        orderly = self._process.poll() == 0
        if self.alive:
            self._process.kill()
            self._process.wait()
        return orderly

    def _start(self) -> None:
        self._began = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603 our own module, no shell
            list(self._member.command),
            env=dict(self._member.environment),
            pass_fds=tuple(self._member.locks),
            start_new_session=True,  # a terminal's Ctrl-C comes to us, and from us once
            preexec_fn=_drain_with_parent,  # this process has one thread
        )


def _drain_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone, however it went (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
