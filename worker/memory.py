"""Whether the kernel killed something for memory: the only witness when a runner dies by SIGKILL."""

from __future__ import annotations

from pathlib import Path

__all__ = ["oom_kills"]


def oom_kills() -> int:
    """How many processes the out-of-memory killer has ended: in our control group where that is known, else at all.

    Zero where the kernel does not say (macOS); then a kill counts as a lost attempt.
    """
    for source in (_own_group(), Path("/proc/vmstat")):
        if source is not None and (count := _counter(source)) is not None:
            return count
    return 0


def _own_group() -> Path | None:
    """``memory.events`` of this process's control group (version 2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("0::/"):
            return Path("/sys/fs/cgroup") / line[4:] / "memory.events"
    return None


def _counter(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return None
