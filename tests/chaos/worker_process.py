"""A worker process for chaos: ``worker_process.py NAME QUEUES RUNNER...``, the last of which start its runners."""

from __future__ import annotations

import sys

from services.logs import configure_logging
from services.settings import get_settings
from worker.main import serve

if __name__ == "__main__":
    configure_logging()
    name, queues, *runner = sys.argv[1:]
    raise SystemExit(serve(get_settings(), queues=queues.split(","), name=name, runner_command=runner))
