"""This host: where attempts work, and what they compute on."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from services.diagnosis.accelerators import VISIBLE, Seen
from services.diagnosis.findings import Finding, first_line, ok, warning, wrong
from services.diagnosis.work import Listener

__all__ = ["gpu", "scratch"]

GIB = 2**30
COPIES = 2  # of a model: what a job reads and what it writes


def scratch(folder: Path, largest_checkpoint: int) -> Iterator[Finding]:
    """Private, writable, and with room for the largest model."""
    check = "scratch"
    try:
        found = folder.lstat()
    except FileNotFoundError:
        yield from _not_yet(check, folder)
    except OSError as error:
        yield wrong(check, first_line(error), "Set FORGETD_SCRATCH_DIR to a folder of this user.")
        return
    else:
        fault = _private(check, folder, found) or _writable(check, folder)
        if fault is not None:
            yield fault
            return
        yield ok(check, f"{folder} is private and can be written")
    near = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("/"))
    free = shutil.disk_usage(near).free
    if free < COPIES * largest_checkpoint:
        says = f"{free / GIB:.1f} GiB are free, the largest model has {largest_checkpoint / GIB:.1f}"
        yield warning(f"{check} space", says, "Make room there, or set FORGETD_SCRATCH_DIR to a larger disk.")
    else:
        yield ok(f"{check} space", f"{free / GIB:.1f} GiB free")


def _not_yet(check: str, folder: Path) -> Iterator[Finding]:
    parent = next(parent for parent in folder.parents if parent.exists())
    if os.access(parent, os.W_OK | os.X_OK):
        yield ok(check, f"{folder} is not there yet; a worker makes it")
    else:
        says = f"{folder} is not there, and this user cannot make it"
        yield wrong(check, says, f"Run: install -d -m 700 -o USER {folder}, or set FORGETD_SCRATCH_DIR.")


def _private(check: str, folder: Path, found: os.stat_result) -> Finding | None:
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        says = f"{folder} is not a folder of this user; a worker of this user refuses it"
        return wrong(check, says, "Run the doctor as the worker's user, or set FORGETD_SCRATCH_DIR to another folder.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        return wrong(check, f"other users can look into {folder}: workers refuse it", f"Run: chmod 700 {folder}")
    return None


def _writable(check: str, folder: Path) -> Finding | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
            file.flush()
    except OSError as error:
        says = f"{folder} cannot be written: {error.strerror or first_line(error)}"
        return wrong(check, says, "Make room or mount it writable, or set FORGETD_SCRATCH_DIR to another folder.")
    return None


def gpu(seen: Seen | None, live: Sequence[Listener], environment: Mapping[str, str]) -> Iterator[Finding]:
    """What torch sees here, and whether a worker here needs it."""
    check = "gpu"
    visible = environment.get(VISIBLE)
    limit = "" if visible is None else f" ({VISIBLE}={visible})"
    here = sorted({one.worker for one in live if one.queue.startswith("gpu.") and _local(one.worker)})
    if seen is not None and seen.names:
        yield ok(check, f"torch sees {len(seen.names)}: {', '.join(seen.names)}{limit}")
        return
    problem = seen.problem if seen is not None else "torch did not answer in time"
    told = problem or f"torch sees none{limit}"
    if here:
        mend = "Install driver and a CUDA build of torch, or take these queues from it: small flows alone do without."
        yield warning(check, f"{told}, and {here[0]} listens to gpu queues here: its jobs run on the CPU", mend)
    elif problem and (seen is None or seen.installed):
        mend = "A worker here could not know its GPU. See what this says: python -c 'import torch; torch.cuda.init()'"
        yield warning(check, told, mend)
    else:
        yield ok(check, f"{told}: fine for all but a worker on gpu queues")


def _local(worker: str) -> bool:
    """Whether a worker, known by its name, process and a random part, is a process of this host."""
    name, _, process = worker.rpartition("-")[0].rpartition("-")
    named = name == socket.gethostname() or name.startswith((f"{socket.gethostname()}-", "local-"))
    return named and process.isdecimal() and Path(f"/proc/{process}").exists()
