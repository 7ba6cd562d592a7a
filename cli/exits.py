"""Exit codes: what a script can tell apart without reading text."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cli.errors import ClientError

__all__ = ["ExitCode", "exit_code_of"]


class ExitCode(IntEnum):
    """What the ``forgetd`` command ends with."""

    OK = 0
    FAILURE = 1  # something on this machine: a file, a port, a child process
    USAGE = 2
    REFUSED = 3  # the service said no, and why: a 4xx problem, or a checkpoint that did not pass validation
    UNREACHABLE = 4  # no answer, a 5xx, or a download that arrived damaged: try again
    JOB_FAILED = 5  # failed or cancelled
    CRITERIA_NOT_MET = 6  # the job ran to its end and missed its criteria
    STILL_RUNNING = 7  # --timeout passed first
    INTERRUPTED = 130


def exit_code_of(error: ClientError) -> ExitCode:
    """The code that an error of the client ends the command with."""
    from cli import errors

    match error:
        case errors.CriteriaNotMet():
            return ExitCode.CRITERIA_NOT_MET
        case errors.JobFailed():
            return ExitCode.JOB_FAILED
        case errors.WaitTimeout():
            return ExitCode.STILL_RUNNING
        case errors.ProblemError(retryable=False) | errors.CheckpointRejected():
            return ExitCode.REFUSED
        case errors.ProblemError() | errors.Unreachable() | errors.DownloadCorrupt():
            return ExitCode.UNREACHABLE
        case _:
            return ExitCode.FAILURE
