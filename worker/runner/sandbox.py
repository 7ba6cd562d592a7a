"""The walls around the reader of hostile files: no network, no other folder, no other process, limits on everything.

Each wall is best effort, since a kernel or a container may refuse it; the reader itself (``weights_only``, checked
headers) is the first defence and these are the second.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType

__all__ = ["CpuTimeSpent", "close_doors", "die_with", "limit_resources"]

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38

# Landlock (Linux 5.13 and later); the same numbers on every architecture.
SYS_CREATE_RULESET, SYS_ADD_RULE, SYS_RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH = 1
READ = 0b1101  # execute, read a file, read a folder
EVERYTHING = 0b1_1111_1111_1111  # every right that the first version knows

READABLE = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/opt/rocm",
    "/opt/intel",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/sys",
    "/proc/self",
    "/proc/cpuinfo",  # without it torch takes the processor for one that it cannot run on
)
PYTHONS = ("bin", "lib", "lib64", "pyvenv.cfg")  # of an interpreter's or a virtual environment's folder
LIBRARIES = ("site-packages", "dist-packages")  # folders of modules that lie elsewhere, such as a user's own
# What the reader of checkpoints is made of. Their parent is not readable: a checkout holds .forgetd, with credentials
# and scratch.
PACKAGES = ("models", "worker")
OPEN_FILES = 256
OUTPUT_PER_SOURCE = 4
OUTPUT_BASE_BYTES = 64 * 2**20


class CpuTimeSpent(Exception):
    """The file took more CPU time to read than the converter grants."""


def close_doors(folder: Path, packages: Sequence[str] = PACKAGES) -> list[str]:
    """No network, no new privileges, no core dump, and no file but Python's own, our code and those of ``folder``.

    Call it before a library is imported that starts threads (onnxruntime and OpenBLAS may, at import): the walls hold
    for the thread that raises them and those that it starts later, and the kernel gives no process of several threads
    a user namespace.

    Args:
        folder: what stays open, for reading and writing.
        packages: ours that can still be imported.

    Returns:
        The walls that stand, which is up to the host: of "no_new_privs", "network" and "files".

    Raises:
        RuntimeError: there is a second thread already.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not sys.platform.startswith("linux"):
        return []
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"walls are raised in a process of one thread, and this one has {threads}")
    libc = ctypes.CDLL(None, use_errno=True)
    sys.meta_path.insert(0, _Found(packages))
    standing = []
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        standing.append("no_new_privs")
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0:
        standing.append("network")
    if _landlock(libc, folder, packages):
        standing.append("files")
    return standing


def die_with(parent: int) -> None:
    """End this process once the thread that started it ends, however that comes about; Linux alone can.

    Call it after `close_doors`: the kernel forgets it where credentials change.

    Args:
        parent: the process that started this one.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


class _Found(MetaPathFinder):
    """Packages that were found while their parent could still be listed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._specs = {name: importlib.util.find_spec(name) for name in names}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the package is; None for everything else."""
        del path, target
        return self._specs.get(fullname)


def _landlock(libc: ctypes.CDLL, folder: Path, packages: Sequence[str]) -> bool:
    """Read beneath Python, our packages and the system's libraries, everything beneath the folder; this also hides
    other processes, among them the supervisor with its credentials in its environment."""
    attributes = struct.pack("=Q", EVERYTHING)
    ruleset = libc.syscall(SYS_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    code = Path(__file__).resolve().parents[2]
    pythons = [Path(prefix, part) for prefix in (sys.prefix, sys.base_prefix) for part in PYTHONS]
    libraries = [Path(one) for one in sys.path if Path(one).name in LIBRARIES]
    allowed = (*map(Path, READABLE), *pythons, *libraries, *(code / name for name in packages))
    rules = [(path, READ) for path in allowed]
    for path, rights in [*rules, (folder, EVERYTHING)]:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not path.is_dir():
            rights &= 0b101  # what a file can grant
        rule = struct.pack("=Qi", rights, descriptor)
        libc.syscall(SYS_ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0)
        os.close(descriptor)
    done = libc.syscall(SYS_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return bool(done)


def limit_resources(*, memory_bytes: int, cpu_seconds: int, source_bytes: int) -> None:
    """Limits for what follows, on top of what the process holds by now (the address space of torch is large)."""
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    _lower(resource.RLIMIT_FSIZE, OUTPUT_PER_SOURCE * source_bytes + OUTPUT_BASE_BYTES)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(spent.ru_utime + spent.ru_stime) + cpu_seconds + 1)
    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes)
    signal.signal(signal.SIGXCPU, _cpu_time_spent)


def _lower(limit: int, value: int) -> None:
    """Lower the soft limit; the hard one only where it is higher, a second above for CPU time."""
    _, hard = resource.getrlimit(limit)
    ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (ceiling, hard if limit == resource.RLIMIT_CPU else ceiling))


def _cpu_time_spent(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise CpuTimeSpent
