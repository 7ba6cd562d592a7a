"""A runner for chaos: ``runner.py TRACE PACE FOLDER [AHEAD...]``. It plays a profile, or becomes the real runner.

Every start, step and end goes into a file of the TRACE folder of its own process: who computed what, and when.
Standard library and the runner's contract alone, so that thousands of them can be started.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import IO, Any

from tests.chaos.profile import Profile, is_real, profile
from worker.runner.contract import DeadMansSwitch, ExitCode, Reporter, Stop, wait_for_job

PROBLEM = {"type": "urn:forgetd:problem:unusable-input", "title": "No", "detail": "The profile says so."}


def main() -> int:
    trace, pace, folder = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    job = wait_for_job(folder)
    if job["kind"] == "import" or is_real(job["seed"]):
        _note(trace, job, "start", real=True).close()
        os.execv(sys.executable, [sys.executable, "-P", "-m", "worker.runner", str(folder)])
    reporter, stop = Reporter(), Stop()
    DeadMansSwitch(job["lease_ttl_seconds"]).start()
    with _note(trace, job, "start") as notes:
        return _play(profile(job["seed"], pace), job, folder, reporter, stop, notes)


def _play(part: Profile, job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop, notes: IO[str]) -> int:
    reporter.phase("validating")
    done = json.loads((folder / job["resume"]).read_text())["step"] if job["resume"] else 0
    reporter.phase("unlearning")
    for step in range(done + 1, part.steps + 1):
        time.sleep(part.step_seconds)
        _write(notes, what="step", step=step)
        reporter.progress(step=step, total=part.steps, eta_seconds=0.0, losses={"forget": 1.0 / step})
        if stop.requested or step % part.state_every == 0:
            state = folder / "state" / f"{step:08d}.safetensors"
            state.write_text(json.dumps({"step": step}))
            reporter.state(state, folder, step=step)
        if stop.requested:
            _write(notes, what="stopped", step=step)
            return ExitCode.INTERRUPTED
        if step > part.steps // 2 and job["micro_batch_divisor"] < part.fits_at_divisor:
            _write(notes, what="out of memory", step=step)
            return ExitCode.OUT_OF_MEMORY
    reporter.phase("evaluating")
    if part.ending == "user_error":
        reporter.error("user_error", PROBLEM)
        return ExitCode.USER_ERROR
    nonce = secrets.token_hex(16)
    report = {"seed": job["seed"], "nonce": nonce}
    (folder / "outputs" / "report.json").write_text(json.dumps(report))
    (folder / "outputs" / "tamed.safetensors").write_bytes(json.dumps(report).encode() + bytes(part.padding))
    _write(notes, what="end", nonce=nonce)
    reporter.result(
        part.ending,
        [
            {
                "name": "tamed.safetensors",
                "path": "outputs/tamed.safetensors",
                "media_type": "application/octet-stream",
            },
            {"name": "report.json", "path": "outputs/report.json", "media_type": "application/json"},
        ],
        {"verdict": "as the profile says"},
    )
    return ExitCode.REPORTED


def _note(trace: Path, job: dict[str, Any], what: str, **more: object) -> IO[str]:
    notes = (trace / f"{job['job_id']}.{os.getpid()}.{secrets.token_hex(4)}").open("w")
    _write(notes, what=what, job=job["job_id"], resumed=bool(job.get("resume")), **more)
    return notes


def _write(notes: IO[str], **line: object) -> None:
    """Through to the file at once: a kill must not lose it."""
    notes.write(json.dumps({**line, "at": time.monotonic()}) + "\n")
    notes.flush()


if __name__ == "__main__":
    raise SystemExit(main())
