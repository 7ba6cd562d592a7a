"""A runner that speaks the contract and computes nothing: the tests of the supervisor need no model.

``parameters`` of the job say how it behaves. Its ticks go to the file ``trace`` there: one line a step, with attempt
and process id, so that a test can see who computed what, and when.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from worker.runner.contract import DeadMansSwitch, ExitCode, Reporter, Stop, wait_for_job

NUMBERS = itertools.count(1)


def main() -> int:
    folder = Path(sys.argv[1])
    job = wait_for_job(folder)
    parameters: dict[str, Any] = job["parameters"]
    reporter, stop = Reporter(), Stop()
    DeadMansSwitch(job["lease_ttl_seconds"]).start()
    trace = Path(parameters.get("trace", os.devnull))  # a caller of the gateway cannot name one
    reporter.phase("validating")
    if parameters.get("keep_job"):
        kept = {**job, "_files": _files(folder / "inputs"), "_ahead": sys.argv[2:]}
        Path(parameters["keep_job"]).write_text(json.dumps(kept))
    start = 0
    if job["resume"]:
        start = json.loads((folder / job["resume"]).read_text())["step"]
    _note(trace, "start", job, start)
    for name, words in parameters.get("assets", {}).items():
        path = folder / "assets" / f"{name}.safetensors"
        path.write_text(words)
        reporter.asset(path, folder, name=parameters.get("asset_name", name))
    for name, words in parameters.get("work", {}).items():
        _work(folder, reporter, name, words)
    reporter.phase("unlearning")
    total = parameters.get("steps", 20)
    for step in range(start + 1, total + 1):
        time.sleep(0 if job["resume"] and parameters.get("hurry") else parameters.get("step_seconds", 0.02))
        _note(trace, "step", job, step)
        reporter.progress(
            step=step, total=total, eta_seconds=0.0, losses={"forget" + _odd(parameters, "odd_loss"): 1.0 / step}
        )
        stopping = stop.requested and not parameters.get("deaf")
        if stopping or step % parameters.get("state_every", 5) == 0:
            path = folder / "state" / f"{step:08d}.safetensors"
            path.write_text(json.dumps({"step": step}))
            reporter.state(path, folder, step=step)
        if stopping:
            for name, words in parameters.get("work_at_stop", {}).items():
                _work(folder, reporter, name, words)
            return ExitCode.INTERRUPTED
        _misbehave(parameters, job, step)
        if step == parameters.get("slow_at"):
            for _ in range(parameters["slow_parts"]):
                time.sleep(0.1)
                reporter.alive()
    reporter.phase("evaluating")
    return _result(folder, job, parameters, reporter)


def _work(folder: Path, reporter: Reporter, name: str, words: list[str]) -> None:
    """Leave something to the next attempt, each time anew."""
    for word in words:
        path = folder / "assets" / f"{name}.{next(NUMBERS)}.safetensors"
        path.write_text(word)
        reporter.asset(path, folder, name=name, scope="job")


def _files(folder: Path) -> dict[str, str]:
    """What was fetched, by path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {f"inputs/{path.relative_to(folder)}": path.read_text() for path in paths}


def _misbehave(parameters: dict[str, Any], job: dict[str, Any], step: int) -> None:
    if step == parameters.get("die_at") and job["attempt"] <= parameters.get("die_attempts", 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if step == parameters.get("babble_at"):
        os.write(_real_stdout(), b"this is no JSON\n")
        time.sleep(60)
    if step == parameters.get("silent_at") and job["attempt"] == 1:
        time.sleep(600)
    if step == parameters.get("crash_at"):
        raise RuntimeError("the secret name of a person")
    if step == parameters.get("out_of_memory_at") and job["micro_batch_divisor"] < parameters["fits_at_divisor"]:
        sys.exit(ExitCode.OUT_OF_MEMORY)


def _odd(parameters: dict[str, Any], name: str) -> str:
    """Text that no request can hold, from its escaped form."""
    return str(json.loads(f'"{parameters.get(name, "")}"'))


def _real_stdout() -> int:
    """The descriptor that the reporter kept: the lowest pipe above the standard ones."""
    return next(fd for fd in range(3, 64) if _is_pipe(fd))


def _is_pipe(descriptor: int) -> bool:
    try:
        return "pipe:" in os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return False


def _result(folder: Path, job: dict[str, Any], parameters: dict[str, Any], reporter: Reporter) -> int:
    problem = parameters.get("user_error")
    if problem:
        reporter.error("user_error", problem)
        return ExitCode.USER_ERROR
    artifacts = []
    for name, media_type in (
        ("tamed.safetensors", "application/octet-stream"),
        ("report.json", "application/json"),
    ):
        (folder / "outputs" / name).write_text(f"{name} of attempt {job['attempt']}")
        artifacts.append({"name": name, "path": f"outputs/{name}", "media_type": media_type})
    if parameters.get("link_out"):
        (folder / "outputs" / "report.json").unlink()
        (folder / "outputs" / "report.json").symlink_to(parameters["link_out"])
    reporter.result(
        parameters.get("outcome", "succeeded"),
        artifacts,
        {"verdict": "a sentence", "odd": _odd(parameters, "odd_summary")},
    )
    return ExitCode.REPORTED


def _note(trace: Path, what: str, job: dict[str, Any], step: int) -> None:
    with trace.open("a") as stream:
        stream.write(
            json.dumps(
                {
                    "what": what,
                    "job": job["job_id"],
                    "attempt": job["attempt"],
                    "step": step,
                    "pid": os.getpid(),
                    "divisor": job["micro_batch_divisor"],
                    "resumed": bool(job["resume"]),
                    "at": time.monotonic(),
                }
            )
            + "\n"
        )


if __name__ == "__main__":
    raise SystemExit(main())
