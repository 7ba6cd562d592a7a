"""Folders of workers that share a root: each has its own, and none is taken for the leftover of a dead one."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from pathlib import Path

from tests.worker.helpers import ROOT
from worker.scratch import GATE, Scratch

DIES = """
import os, sys
from pathlib import Path
from worker.scratch import Scratch
Scratch(Path(sys.argv[1]))
os._exit(0)
"""


def homes(root: Path) -> list[Path]:
    return sorted(root.glob("worker-*"))


def test_workers_of_one_root_have_folders_of_their_own(tmp_path: Path) -> None:
    first, second = Scratch(tmp_path / "root"), Scratch(tmp_path / "root")

    assert len(homes(tmp_path / "root")) == 2
    first.close()
    assert len(homes(tmp_path / "root")) == 1
    second.close()
    assert homes(tmp_path / "root") == []


def test_the_folder_of_a_dead_worker_is_removed_by_the_next(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "root")], cwd=ROOT, check=True)
    [left] = homes(tmp_path / "root")

    next_one = Scratch(tmp_path / "root")

    assert len(homes(tmp_path / "root")) == 1
    assert not left.exists()
    next_one.close()


def test_no_folder_can_be_seen_before_it_is_locked(tmp_path: Path) -> None:
    Scratch(tmp_path / "root").close()
    made: list[Scratch] = []
    starting = threading.Thread(target=lambda: made.append(Scratch(tmp_path / "root")))

    with (tmp_path / "root" / GATE).open("w") as another:
        fcntl.flock(another, fcntl.LOCK_EX)  # another worker looks for leftovers
        starting.start()
        starting.join(0.3)
        waiting = homes(tmp_path / "root")
    starting.join()

    assert waiting == []
    assert len(homes(tmp_path / "root")) == 1
    made[0].close()
