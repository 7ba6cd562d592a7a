"""A gateway that is back in milliseconds after a kill: ``forking_gateway.py DESCRIPTOR``.

The application is loaded once, here; each child serves it on the inherited socket, and the next is forked when one
died. Each child's process id is a line on standard output.
"""

from __future__ import annotations

import os
import socket
import sys

import uvicorn

from api.app import create_app


def main() -> int:
    listener = socket.socket(fileno=int(sys.argv[1]))
    application = create_app()  # connects to nothing before the first request
    while True:
        child = os.fork()
        if child == 0:
            uvicorn.Server(uvicorn.Config(application, log_level="warning")).run(sockets=[listener])
            os._exit(0)
        print(child, flush=True)  # noqa: T201 the contract
        os.waitpid(child, 0)


if __name__ == "__main__":
    raise SystemExit(main())
