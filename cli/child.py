"""Runs ``main(arguments)`` of a module under ``forgetd up``: ``python -m cli.child PRELOAD MODULE [ARGUMENT...]``.

Two things that the module need not know. It and what it preloads are imported at once, while the servers it will talk
to are still starting; it begins to work at the line on stdin that says where they are. And it ends when its parent
does, however the parent ended: stdin is a pipe whose other end the parent holds and never closes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time

ORPHAN_SECONDS = 10.0  # for an orderly end once the parent is gone; the embedded servers go with it
READ_BYTES = 65536


def main() -> None:
    """Import, wait for the environment, run."""
    preload, name, *arguments = sys.argv[1:]
    module = importlib.import_module(name)
    for other in filter(None, preload.split(",")):
        with contextlib.suppress(ImportError):  # a library moved; it will be found when it is needed
            importlib.import_module(other)
    os.environ.update(_environment())
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    sys.exit(module.main(arguments))


def _environment() -> dict[str, str]:
    """The line that the parent sends when everything is up."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, READ_BYTES)
        if not piece:
            sys.exit(0)  # the parent has gone
        line += piece
    environment: dict[str, str] = json.loads(line)
    return environment


def _end_with_parent() -> None:
    while os.read(0, READ_BYTES):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
