"""The walls around a process that reads foreign bytes: what it gives up before it looks at the first of them.

Standard library alone: the processes that stand behind these walls are started as scripts.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from typing import IO

__all__ = ["cut_off", "grant_seconds", "isolate", "shut_in", "write_frame"]

OPEN_FILES = 16
NOBODY = 65534

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x00020000, 0x10000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def isolate(empty_folder: str, memory_bytes: int) -> list[str]:
    """Give up what reading a file does not need; returns what this kernel and user allowed.

    For a process whose libraries start no threads. One whose libraries do calls ``cut_off`` before it imports them, and
    ``shut_in`` once they have loaded all that they read.

    Raises:
        RuntimeError: There is a second thread already.
    """
    return [*cut_off(), *shut_in(empty_folder, memory_bytes)]


def cut_off() -> list[str]:
    """Give up network and privileges: they go for this thread, and those that it starts later, alone.

    Raises:
        RuntimeError: There is a second thread already. It would keep both, and a user namespace is refused.
    """
    if sys.platform != "linux":
        return []
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"walls are raised in a process of one thread, and this one has {threads}")
    done = []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    user = () if os.geteuid() == 0 else (CLONE_NEWUSER,)
    if libc.unshare(sum((CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWNS, *user))) == 0:
        done.append("network")
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        done.append("privileges")
    return done


def shut_in(empty_folder: str, memory_bytes: int) -> list[str]:
    """Give up files, root and the right to more than some memory; all threads of the process do."""
    done = ["limits"]
    try:
        os.chroot(empty_folder)
        os.chdir("/")
        done.append("files")
    except OSError:
        pass
    if os.geteuid() == 0 and sys.platform == "linux":
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            done.append("user")
        except OSError:
            pass
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    if sys.platform == "linux":  # macOS accepts neither in a process that already has its libraries
        limit(resource.RLIMIT_NPROC, 0)
        limit(resource.RLIMIT_AS, memory_bytes)
    return done


def limit(what: int, value: int) -> None:
    """Lower a limit for good."""
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def grant_seconds(seconds: int) -> None:
    """Allow this much more processor time before the kernel ends the process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + seconds, hard))


def write_frame(stream: IO[bytes], data: bytes) -> None:
    """Send a length and its bytes."""
    stream.write(struct.pack(">Q", len(data)))
    stream.write(data)
