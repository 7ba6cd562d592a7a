"""``python -m worker.runner SCRATCH [KIND]``: one attempt at one job, files in, files out. See docs/architecture.md.

With a kind, its libraries are loaded while the supervisor still fetches the inputs. Whoever is to read a hostile file
is started without: nothing heavy is imported before it has its walls.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from worker.runner import sandbox
from worker.runner.contract import DeadMansSwitch, ExitCode, Interrupted, Reporter, Stop, wait_for_job
from worker.runner.problems import OutOfMemory, UserError

# The module that runs a job, by its method, or by its kind too where both matter, and what is loaded ahead by its kind,
# when no more is known. Each has a function ``run(job, folder, reporter, stop)``.
METHODS: dict[str | tuple[str, str], str] = {
    "flow-taming": "worker.runner.forget",
    "steering": "worker.runner.steer",
    "class-removal": "worker.runner.classes",
    "class-taming": "worker.runner.classes",
    "selective-amnesia": "worker.runner.amnesia",
    ("debias", "selective-amnesia"): "worker.runner.balance",
}
KINDS = {"forget": "worker.runner.forget", "debias": "worker.runner.steer", "import": "worker.runner.imports"}


def main(argv: Sequence[str]) -> int:
    """Run the job in the folder; the exit status says how it went (``ExitCode``)."""
    os.umask(0o077)
    folder, ahead = Path(argv[0]).resolve(), argv[1:]
    reporter, stop = Reporter(), Stop()
    try:
        with stop.at_once():
            for kind in ahead:
                importlib.import_module(KINDS[kind])
            job = wait_for_job(folder)
            if job["kind"] == "import":
                sandbox.close_doors(folder)  # before there is a second thread
            DeadMansSwitch(job["lease_ttl_seconds"]).start()
            reporter.phase("validating")
            module = module_of(job)
        module.run(job, folder, reporter, stop)
    except Interrupted:
        return ExitCode.INTERRUPTED
    except UserError as error:
        reporter.error("user_error", error.problem)
        return ExitCode.USER_ERROR
    except Exception as error:
        if isinstance(error, OutOfMemory | MemoryError) or _is_out_of_memory(error):
            return ExitCode.OUT_OF_MEMORY
        traceback.print_exc()
        if "CUDA error" not in str(error):  # a device that failed may work next time: then silence asks for a retry
            reporter.error("internal", {"detail": type(error).__name__})
        return ExitCode.INTERNAL
    return ExitCode.REPORTED


def module_of(job: Mapping[str, Any]) -> ModuleType:
    """The module that runs the job."""
    if job["kind"] == "import":
        return importlib.import_module(KINDS["import"])
    return importlib.import_module(METHODS.get((job["kind"], job["method"])) or METHODS[job["method"]])


def _is_out_of_memory(error: BaseException) -> bool:
    """torch says it in three ways: a type on the accelerator, and two wordings on the CPU."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    )


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # nothing is left to clean up, and a driver's or a library's own exit can only hang or crash
