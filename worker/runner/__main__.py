"""``python -m worker.runner SCRATCH [KIND METHOD FAMILY]``: one attempt at one job, files in, files out.

With the job's kind and method and the family of its checkpoint, their libraries are loaded while the supervisor still
fetches the inputs. Whoever is to read a hostile file is started without: nothing heavy is imported before it has its
walls. See docs/architecture.md.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from worker.runner import sandbox
from worker.runner.contract import DeadMansSwitch, ExitCode, Interrupted, Reporter, Stop, wait_for_job
from worker.runner.problems import UserError, is_out_of_memory, is_the_hosts

# The module that runs a job, by its method, or by its kind too where both matter. Each has a function
# ``run(job, folder, reporter, stop)``.
METHODS: dict[str | tuple[str, str], str] = {
    "flow-taming": "worker.runner.forget",
    "steering": "worker.runner.steer",
    "class-removal": "worker.runner.classes",
    "class-taming": "worker.runner.classes",
    "selective-amnesia": "worker.runner.amnesia",
    ("debias", "selective-amnesia"): "worker.runner.balance",
}
IMPORTS = "worker.runner.imports"


def main(argv: Sequence[str]) -> int:
    """Run the job in the folder; the exit status says how it went (``ExitCode``)."""
    os.umask(0o077)
    folder, ahead = Path(argv[0]).resolve(), argv[1:]
    reporter, stop = Reporter(), Stop()
    try:
        with stop.at_once(), _loading():
            load_ahead(*ahead)
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
        if stop.requested:
            return ExitCode.INTERRUPTED
        reporter.error("user_error", error.problem)
        return ExitCode.USER_ERROR
    except Exception as error:
        # Told to stop, a library may make an error of its own of that: the next attempt will tell.
        if stop.requested:
            return ExitCode.INTERRUPTED
        if is_out_of_memory(error):
            return ExitCode.OUT_OF_MEMORY
        traceback.print_exc()
        if not is_the_hosts(error):  # else silence asks for another attempt
            reporter.error("internal", {"detail": type(error).__name__})
        return ExitCode.INTERNAL
    return ExitCode.REPORTED


def module_of(job: Mapping[str, Any]) -> ModuleType:
    """The module that runs the job."""
    if job["kind"] == "import":
        return importlib.import_module(IMPORTS)
    return importlib.import_module(METHODS.get((job["kind"], job["method"])) or METHODS[job["method"]])


def load_ahead(kind: str = "import", method: str = "", family: str = "", *_: str) -> None:
    """Load what a job of this kind and method runs on, and what a model of this family is built of.

    It saves time and decides nothing: what is unknown here loads nothing, and is told once the job is there. Nor does
    an import, whose walls have to stand first.
    """
    module = METHODS.get((kind, method)) or METHODS.get(method)
    if kind == "import" or module is None:
        return
    importlib.import_module(module)
    families = importlib.import_module("models.families").FAMILIES
    if family in families:
        families[family].load()


@contextmanager
def _loading() -> Iterator[None]:
    """Libraries make a million objects that stay: a tenth of the time of loading them is a search for garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor is any looked for among them later
        gc.enable()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # nothing is left to clean up, and a driver's or a library's own exit can only hang or crash
