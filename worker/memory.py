"""Whether the kernel killed something for memory: the only witness when a runner dies by SIGKILL."""

from __future__ import annotations

from pathlib import Path

__all__ = ["oom_kills"]

GROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")


def oom_kills(groups: Path = GROUPS, proc: Path = PROC) -> int:
    """How many processes the out-of-memory killer has ended: in our control group where that is known, else at all.

    Zero where the kernel does not say (macOS); then a kill counts as a lost attempt.
    """
    for source in (_own_group(groups, proc), proc / "vmstat"):
        if source is not None and (count := _counter(source)) is not None:
            return count
    return 0


def _own_group(groups: Path, proc: Path) -> Path | None:
    """``memory.events`` of this process's control group (version 2)."""
    for line in _lines(proc / "self" / "cgroup"):
        if line.startswith("0::/"):
            return groups / line[4:] / "memory.events"
    return None


def _counter(path: Path) -> int | None:
    for line in _lines(path):
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.isdecimal():
            return int(value)
    return None


def _lines(path: Path) -> list[str]:
    """Nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
