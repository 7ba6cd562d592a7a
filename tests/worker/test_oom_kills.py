"""The kernel's own count of what it killed for memory, read from files as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.memory import oom_kills

VMSTAT = "nr_free_pages 5\noom_kill 7\nallocstall_normal 3\n"
# What the kernel counts beside it: a group that met its limit, and a whole group that was ended at once.
EVENTS = "low 0\nhigh 0\nmax 41\noom 3\noom_kill 2\noom_group_kill 1\n"


class Machine:
    """The two folders in which a kernel tells: with this group for our process, these events of it, and this vmstat."""

    def __init__(self, folder: Path) -> None:
        self.groups, self.proc = folder / "cgroup", folder / "proc"

    def write(self, group: str | None = None, events: str | None = None, vmstat: str | None = None) -> None:
        (self.proc / "self").mkdir(parents=True, exist_ok=True)
        if group is not None:
            (self.proc / "self" / "cgroup").write_text(group)
        if events is not None:
            own = self.groups / "outer" / "own"
            own.mkdir(parents=True, exist_ok=True)
            (own / "memory.events").write_text(events)
        if vmstat is not None:
            (self.proc / "vmstat").write_text(vmstat)

    def count(self) -> int:
        return oom_kills(self.groups, self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_kills_in_our_own_group_are_counted_and_no_other(machine: Machine) -> None:
    machine.write("0::/outer/own\n", EVENTS, VMSTAT)
    before = machine.count()

    machine.write(events=EVENTS.replace("oom_kill 2", "oom_kill 3"), vmstat=VMSTAT.replace("7", "9"))

    assert (before, machine.count()) == (2, 3)


def test_the_group_of_version_2_is_found_behind_those_of_version_1(machine: Machine) -> None:
    machine.write("5:memory:/other\n1:name=systemd:/\n0::/outer/own\n", EVENTS, VMSTAT)

    assert machine.count() == 2


@pytest.mark.parametrize(
    ("group", "events"),
    [
        pytest.param("0::/\n", None, id="the root, which has no events"),
        pytest.param("0::/outer/own\n", None, id="no memory controller"),
        pytest.param("0::/outer/own\n", "low 0\nhigh 0\nmax 0\noom 0\n", id="a kernel that counts no kills"),
        pytest.param("5:memory:/outer/own\n", EVENTS, id="version 1"),
        pytest.param(None, EVENTS, id="no groups"),
    ],
)
def test_without_a_count_of_our_group_those_of_the_machine_are_counted(
    machine: Machine, group: str | None, events: str | None
) -> None:
    machine.write(group, events, VMSTAT)

    assert machine.count() == 7


@pytest.mark.parametrize("vmstat", [None, "", "nr_free_pages 5\n", "oom_kill\n"])
def test_a_kernel_that_does_not_say_counts_none(machine: Machine, vmstat: str | None) -> None:
    machine.write(vmstat=vmstat)

    assert machine.count() == 0


@pytest.mark.parametrize("line", ["oom_kill", "oom_kill many", "oom_kill -1", "oom_kill\t2", "oom_kill 2 3"])
def test_a_line_that_is_no_count_is_none(machine: Machine, line: str) -> None:
    machine.write("0::/outer/own\n", f"oom 3\n{line}\n", VMSTAT)

    assert machine.count() == 7


def test_a_group_whose_name_is_no_text_is_unknown(machine: Machine) -> None:
    machine.write(vmstat=VMSTAT)
    (machine.proc / "self" / "cgroup").write_bytes(b"0::/\xff\n")

    assert machine.count() == 7
