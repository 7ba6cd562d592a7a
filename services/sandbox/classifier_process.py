"""The process that tries foreign classifiers: ONNX files on standard input, what they are on standard output.

Started as a script by ``services.sandbox.classifiers`` and never imported by the service, which has no use for
onnxruntime. Frames both ways: a big-endian length, then that many bytes. In: one file. Out: a JSON object.

Network and privileges go before onnxruntime and NumPy come, which may start threads when they are imported: a thread
that is older than such a wall stands before it. The files go after: the libraries read some when they are imported.
"""

from __future__ import annotations

import importlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where our own rooms are: -I leaves it out

from services.sandbox.walls import cut_off, end_with, grant_seconds, shut_in, write_frame

CPU_SECONDS = 60
TRIAL = "services.sandbox.classifier_trial"


def raise_walls(empty_folder: str, memory_bytes: int) -> tuple[list[str], Any]:
    """Every wall that this host allows, and ``classifier_trial``, which was loaded between them."""
    done = cut_off()
    trial = importlib.import_module(TRIAL)
    trial.warm_up()
    return [*done, *shut_in(empty_folder, memory_bytes)], trial


def main() -> None:
    """Serve until standard input ends."""
    options = json.loads(sys.argv[1])
    isolation, trial = raise_walls(options["empty_folder"], options["memory_bytes"])
    end_with(options["lifeline"])
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    write_frame(outgoing, json.dumps({"isolation": isolation}).encode())
    outgoing.flush()
    while header := incoming.read(8):
        grant_seconds(CPU_SECONDS)
        facts = trial.facts_of(incoming.read(struct.unpack(">Q", header)[0]), options["output"], options["classes"])
        write_frame(outgoing, json.dumps(facts).encode())
        outgoing.flush()


if __name__ == "__main__":
    main()
