"""A real worker process whose runner is the stub: ``python worker_process.py QUEUES``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from services.logs import configure_logging
from services.settings import get_settings
from worker.main import serve

STUB = Path(__file__).with_name("stub_runner.py")


def main(queues: Sequence[str]) -> int:
    """Work on these queues."""
    configure_logging()
    return serve(get_settings(), queues=list(queues), runner_command=(sys.executable, str(STUB)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1].split(",")))
