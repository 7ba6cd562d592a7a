"""The walls around a process that reads foreign bytes: what it gives up before it looks at the first of them.

Standard library alone: the processes that stand behind these walls are started as scripts.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import signal
import struct
import sys
from typing import IO

__all__ = ["cut_off", "end_with", "grant_seconds", "isolate", "shut_in", "write_frame"]

OPEN_FILES = 16
NOBODY = 65534

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x00020000, 0x10000000, 0x40000000, 0x08000000
PR_SET_NO_NEW_PRIVS = 38


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


def end_with(lifeline: int) -> None:
    """End this process, whatever it is doing, once nobody holds the other end of a pipe that nobody writes to.

    PR_SET_PDEATHSIG would not do: it fires when the *thread* that started us ends, and a gateway's threads come and go.
    Call it once the user is the last one: the kernel asks whether whoever armed it may signal us. Linux alone; on other
    systems a process whose owner is gone ends when it next reads or writes, or when its processor time is spent.

    Args:
        lifeline: the end of the pipe that is ours to read.
    """
    if sys.platform != "linux":
        return
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    ended = select.poll()
    ended.register(lifeline, 0)
    if ended.poll(0):  # its owner was gone before we asked
        os._exit(1)


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
