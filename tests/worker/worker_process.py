"""A real worker process whose runner is the stub: ``python worker_process.py QUEUES``."""

from __future__ import annotations

import sys
from pathlib import Path

from services.settings import get_settings
from worker.logs import configure_logging
from worker.main import serve

STUB = Path(__file__).with_name("stub_runner.py")

if __name__ == "__main__":
    configure_logging()
    raise SystemExit(serve(get_settings(), queues=sys.argv[1].split(","), runner_command=(sys.executable, str(STUB))))
