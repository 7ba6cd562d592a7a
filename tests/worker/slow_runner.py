"""A runner of ours of which one phase lasts until somebody ends it, on a machine of whatever speed."""

from __future__ import annotations

import sys
import time
from typing import Any

from worker.runner import __main__ as runner
from worker.runner.contract import Phase, Reporter

SECONDS = 0.1  # for each of hundreds of batches or steps
PHASE = sys.argv.pop(1)


class Slow(Reporter):
    """Takes its time to report."""

    _slow = False

    def phase(self, phase: Phase) -> None:
        """As it would."""
        super().phase(phase)
        self._slow = phase == PHASE

    def progress(self, **said: Any) -> None:
        """As it would, and wait."""
        super().progress(**said)
        if self._slow:
            time.sleep(SECONDS)


if __name__ == "__main__":
    runner.Reporter = Slow  # type: ignore[misc]  # in this process alone
    raise SystemExit(runner.main(sys.argv[1:]))
