"""Where attempts work: private folders on local disk, gone with the attempt, or at the latest with the next worker."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["Scratch", "ScratchRefused"]

logger = logging.getLogger(__name__)

LOCK = "lock"
GATE = "gate"
CACHE = "cache"
PREFIX = "worker-"


class ScratchRefused(Exception):
    """The scratch folder belongs to somebody else, or others may look into it; make one with mode 0700."""


class Scratch:
    """One worker process's folder under ``root``. Its lock dies with the process: an unlocked folder is a leftover."""

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(root)
        self.cache = root / CACHE  # what runners may keep between attempts: compiled kernels, font lists; never inputs
        self.cache.mkdir(mode=0o700, exist_ok=True)
        self._home = root / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        with (root / GATE).open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)  # one at a time: a folder that is not locked yet would pass for a leftover
            self._home.mkdir(mode=0o700)
            self._lock: IO[str] = (self._home / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for other in root.glob(f"{PREFIX}*"):
                if other != self._home:
                    _remove_if_dead(other)

    @contextmanager
    def attempt(self, job_id: str, token: int) -> Iterator[Path]:
        """A fresh folder for one attempt, removed at the end of the block however it ends."""
        folder = self._home / f"{job_id}-{token}"
        folder.mkdir(mode=0o700)
        try:
            for name in ("inputs", "resume", "state", "assets", "outputs", "tmp"):
                (folder / name).mkdir(mode=0o700)
            yield folder
        finally:
            _remove(folder)

    def free_bytes(self) -> int:
        """What its disk has left."""
        return shutil.disk_usage(self._home).free

    def close(self) -> None:
        """Remove the worker's folder."""
        _remove(self._home)
        self._lock.close()


def _check_private(root: Path) -> None:
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ScratchRefused(f"{root} is not a folder of this user; set FORGETD_SCRATCH_DIR to one that is.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ScratchRefused(f"{root} can be read by other users; run: chmod 700 {root}")


def _remove_if_dead(folder: Path) -> None:
    """Remove a folder whose worker is gone."""
    try:
        with (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
            logger.info("removed the scratch folder of a worker that died")
    except (FileNotFoundError, BlockingIOError):
        return


def _remove(folder: Path) -> None:
    """Remove a tree, folders that a runner closed to itself included; what stays waits for the next worker."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        folders = [folder]
        while folders:  # from the top: a folder must be opened before it can be looked into
            here = folders.pop()
            here.chmod(0o700)
            folders += [entry for entry in here.iterdir() if entry.is_dir() and not entry.is_symlink()]
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("a scratch folder could not be removed")
