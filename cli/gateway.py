"""Serves the gateway on a listening socket that ``forgetd up`` holds and passes as a file descriptor.

The socket outlives the process: a gateway that crashed and is started again keeps its address, and callers who come in
between wait for it instead of being refused.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import uvicorn

APP = "api.app:process_app"
GRACEFUL_SECONDS = 3  # long polls and event streams end after this when the service stops


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM on the descriptor that is the one argument."""
    listener = socket.socket(fileno=int(argv[0]))
    config = uvicorn.Config(
        APP,
        factory=True,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0
