"""The process that runs a caller's ONNX classifiers for the runner, behind the walls of the reader of checkpoints.

The runtime parses and runs what a stranger wrote. The files were tried at the door, on images of zeros; here they meet
others, beside a checkpoint, with the network and other jobs' files in reach. So their sessions live in a child without
them: ``python -m worker.runner.judge_process OPTIONS``, started by `worker.runner.walled_model`. The walls come first:
NumPy and the runtime may start threads when they are imported, and a thread that is older than a wall stands before it.

Frames both ways: a big-endian length, then that many bytes. Out, at first: a JSON object, the walls. In: a JSON object
with a file to open, or with the number of an open one and the length of the frame of images that follows, uint8
(n, c, h, w). Out: a JSON object, and for images that were judged a frame of n labels, int64, or of their probabilities,
float64 (n, k), where the message asked for these.
"""

from __future__ import annotations

import importlib
import json
import signal
import struct
import sys
from pathlib import Path
from typing import IO, Any

from worker.runner import sandbox

__all__ = ["LONGEST_REPLY", "raise_walls", "read_frame", "write_frame"]

MEMORY_BYTES = 8 * 2**30
"""Address space beyond what the libraries take, for all classifiers of a job: batches on their way through large ones.
"""
CPU_SECONDS = 24 * 3600
"""Of one job, for a host where the process does not end with the runner; the runner's own deadlines are shorter."""
LONGEST_MESSAGE = 2**20  # a thousand classes with long names
LONGEST_REPLY = 2**16
PACKAGES = ("evidence", "worker")
SESSIONS = "worker.runner.judge_sessions"


def read_frame(stream: IO[bytes], at_most: int) -> bytes | None:
    """The next frame; None at the end, and for one that is cut short or longer: no memory is given for a lie."""
    header = stream.read(8)
    if len(header) < 8 or (size := struct.unpack(">Q", header)[0]) > at_most:
        return None
    data = stream.read(size)
    return data if len(data) == size else None


def write_frame(stream: IO[bytes], data: bytes) -> None:
    """Send a length and its bytes."""
    stream.write(struct.pack(">Q", len(data)))
    stream.write(data)
    stream.flush()


def raise_walls(folder: Path) -> tuple[list[str], Any]:
    """Every wall that this host allows, then what opens classifiers: the walls, and `judge_sessions.Sessions`.

    Args:
        folder: that of the files, all that stays open.

    Raises:
        RuntimeError: there is a second thread already.
    """
    walls = sandbox.close_doors(folder, PACKAGES)
    sessions = importlib.import_module(SESSIONS).Sessions()
    sandbox.limit_resources(memory_bytes=MEMORY_BYTES, cpu_seconds=CPU_SECONDS, source_bytes=0)
    return walls, sessions


def main() -> None:
    """Serve until standard input ends."""
    # A drain may signal all of a job's processes: the runner decides when it is over, and we end with it.
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    options = json.loads(sys.argv[1])
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    try:
        walls, sessions = raise_walls(Path(options["folder"]))
        sandbox.die_with(options["parent"])
    except Exception as error:  # nothing of the caller's was read yet: it is ours, and the runner tells its log
        return write_frame(outgoing, json.dumps({"failed": f"{type(error).__name__}: {error}"[:1000]}).encode())
    write_frame(outgoing, json.dumps({"walls": walls}).encode())
    while (message := read_frame(incoming, LONGEST_MESSAGE)) is not None:
        for frame in sessions.answers(json.loads(message), incoming):
            write_frame(outgoing, frame)
    return None


if __name__ == "__main__":
    main()
