"""Runs one server and never lets it outlive us: a tiny parent process, run as a script on the standard library alone.

A server needs a parent that reaps it (a dead postmaster left as a zombie blocks the next one through its lock file),
and something that stops it when forgetd itself is killed with SIGKILL and can clean up nothing. The guardian does
both on Linux and macOS by watching its parent's process id. On Linux the kernel stops the server too if the guardian
is killed. PR_SET_PDEATHSIG straight from forgetd would not do: it fires when the *thread* that forked ends.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

POLL_SECONDS = 0.1  # how late the death of forgetd or of the server may be noticed

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522
_LINUX = sys.platform == "linux"


def main() -> int:
    """Start the server that the one argument describes, print its process id, and stay until it has ended."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    # From here on a signal means "stop the server", never "leave it alone".
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log = os.open(spec["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    server = subprocess.Popen(  # noqa: S603 - our own argument list
        spec["argv"],
        cwd=spec["cwd"],
        env=spec["env"],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        preexec_fn=lambda: _become_server(spec),  # this process has one thread
    )
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{server.pid}\n".encode())
    os.close(log)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # forgetd reads to the end of the pipe: do not hold it open
    while server.poll() is None and not stopping and os.getppid() == spec["parent"]:
        time.sleep(POLL_SECONDS)
    if server.poll() is None:
        server.send_signal(spec["stop_signal"])
        try:
            server.wait(timeout=spec["grace_seconds"])
        except subprocess.TimeoutExpired:
            server.kill()
    return server.wait()


def _become_server(spec: dict[str, Any]) -> None:
    """Between fork and exec: default signals, the unprivileged user where one is named, and the death signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if spec["user"] is not None:
        _drop_root(spec["user"]["uid"], spec["user"]["gid"], spec["user"]["needs"])
    if _LINUX:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, spec["death_signal"], 0, 0, 0)


def _drop_root(uid: int, gid: int, needs: list[str]) -> None:
    """Become `uid`; where a folder on the way to `needs` is root's alone, keep the one capability to pass through it.

    PostgreSQL refuses to run as root, while a root-owned home folder (0700) holds both its binaries and its data.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if _LINUX:
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if not _LINUX or all(os.access(path, os.X_OK) for path in needs):
        return
    for capability in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE):
        mask = 1 << capability
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        sets = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)  # effective, permitted, inheritable; low and high word
        if libc.capset(header, sets) == 0:
            libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0)
            return


if __name__ == "__main__":
    sys.exit(abs(main()) & 0xFF)
