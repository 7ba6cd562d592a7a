"""A walled process lives as long as the process that started it: no shorter, whatever its threads do, and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_SECONDS = 30.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when it next reads or writes")

# An owner that starts a process from a thread that ends, and asks it something when told to.
OWNER = """
import ctypes, io, os, sys, threading, time
if sys.argv[3] != "root":
    ctypes.CDLL(None).unshare(0x10000000)  # a namespace without a map of its users: root is nobody in it
sys.path.append(sys.argv[1])
from PIL import Image
from services.sandbox import DECODERS, ImageDecoder, classifiers
from services.sandbox.process import WalledProcess
def start():
    options = {"output": "logits", "classes": 2}
    started.append(
        ImageDecoder(max_pixels=10**6)
        if sys.argv[2] == "images"
        else WalledProcess(classifiers.PROGRAM, options, memory_bytes=classifiers.MEMORY_BYTES, wall_seconds=60.0)
    )
started = []
thread = threading.Thread(target=start)
thread.start()
thread.join()
while len(os.listdir("/proc/self/task")) > 1:
    time.sleep(0.01)
print(started[0].pid, flush=True)
sys.stdin.readline()
file = io.BytesIO()
Image.new("L", (9, 7)).save(file, "PNG")
print(started[0].decode(file.getvalue(), index=0).width, flush=True)
"""


@pytest.fixture(params=["root", "another"])
def user(request: pytest.FixtureRequest) -> str:
    """Who owns the process: the walls change the user of root's alone, and with it who may signal whom."""
    if request.param == "root" and os.getuid() != 0:
        pytest.skip("we are not root")
    return str(request.param)


@contextmanager
def owner(program: str, user: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process that owns a walled one, and that one."""
    command = [sys.executable, "-I", "-c", OWNER, str(ROOT), program, user]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={}) as process:
        assert process.stdout is not None
        walled = psutil.Process(int(process.stdout.readline()))
        try:
            yield process, walled
        finally:
            process.kill()
            with suppress(psutil.NoSuchProcess):
                walled.kill()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_outlives_the_thread_that_started_it(user: str) -> None:
    with owner("images", user) as (process, _):
        assert process.communicate("\n", timeout=PATIENCE_SECONDS)[0].strip() == "9"


@pytest.mark.parametrize("program", ["images", "classifiers"])
def test_it_ends_with_an_owner_that_is_killed_even_while_it_reads_no_pipe(program: str, user: str) -> None:
    with owner(program, user) as (process, walled):
        walled.suspend()  # as deep in its work as can be
        until(lambda: walled.status() == psutil.STATUS_STOPPED)

        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)

        until(lambda: ended(walled))
