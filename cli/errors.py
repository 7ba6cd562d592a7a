"""What can go wrong for a caller of the client, as one tree.

ClientError                  catch this to catch everything below
├── Unreachable              no answer, or none that forgetd would give
├── ProblemError             the service answered with an RFC 9457 problem
│   ├── AuthenticationError    401: the API key is missing, unknown or revoked
│   ├── NotFoundError          404
│   ├── ConflictError          409: the resource is in a state that does not allow this
│   ├── ContentError           413, 422: what was sent cannot be used
│   └── ServiceUnavailable     429 and 5xx: try again later
├── CheckpointRejected       validation of an upload ended badly
├── JobFailed                a job ended without success
│   ├── CriteriaNotMet         it ran to its end and missed its criteria: there is a report
│   └── JobCancelled
├── WaitTimeout              the caller's own time limit passed; the job runs on
└── DownloadCorrupt          bytes arrived that are not the bytes announced
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cli.resources import Checkpoint, Job

__all__ = [
    "AuthenticationError",
    "CheckpointRejected",
    "ClientError",
    "ConflictError",
    "ContentError",
    "CriteriaNotMet",
    "DownloadCorrupt",
    "JobCancelled",
    "JobFailed",
    "NotFoundError",
    "ProblemError",
    "ServiceUnavailable",
    "Unreachable",
    "WaitTimeout",
]

PROBLEM_PREFIX = "urn:forgetd:problem:"


class ClientError(Exception):
    """Something that forgetd's client was asked to do did not come about."""


class Unreachable(ClientError):
    """There is no forgetd at this address, or none that answers."""


class ProblemError(ClientError):
    """The service refused, and said why.

    Attributes:
        status: HTTP status.
        type: Stable URI of this kind of problem, e.g. ``urn:forgetd:problem:checkpoint-not-ready``.
        title: What this kind of problem is, in words.
        detail: What is wrong here, and what to do.
        errors: Where in the request, each with ``pointer`` (a JSON pointer) and ``detail``.
        members: The whole problem as sent.
    """

    def __init__(self, status: int, members: dict[str, Any]) -> None:
        self.status = status
        self.members = members
        self.type = str(members.get("type") or "about:blank")
        self.title = str(members.get("title") or f"HTTP {status}")
        self.detail = str(members.get("detail") or "")
        errors = members.get("errors") or []
        self.errors = [error for error in errors if isinstance(error, dict)]
        super().__init__(f"{self.title} {self.detail}".strip())

    def is_a(self, slug: str) -> bool:
        """Whether this is the problem of that short name, e.g. ``checkpoint-not-ready``."""
        return self.type == PROBLEM_PREFIX + slug

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later, unchanged."""
        return self.status == 429 or self.status >= 500


class AuthenticationError(ProblemError):
    """The API key is missing, unknown or revoked."""


class NotFoundError(ProblemError):
    """Nothing of that name is yours."""


class ConflictError(ProblemError):
    """The resource is in a state that does not allow this."""


class ContentError(ProblemError):
    """What was sent cannot be used."""


class ServiceUnavailable(ProblemError):
    """The service cannot answer now."""


class CheckpointRejected(ClientError):
    """The checkpoint did not pass validation; ``checkpoint.problem`` says why."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        problem = checkpoint.problem or {}
        why = " ".join(str(problem[key]) for key in ("title", "detail") if problem.get(key))
        super().__init__(f"Checkpoint {checkpoint.id} was rejected. {why}".strip())


class JobFailed(ClientError):
    """The job ended without success; ``job.reason`` and ``job.problem`` say why."""

    def __init__(self, job: Job) -> None:
        self.job = job
        problem = job.problem or {}
        why = " ".join(str(problem[key]) for key in ("title", "detail") if problem.get(key))
        super().__init__(f"Job {job.id} ended {job.status}{f' ({job.reason})' if job.reason else ''}. {why}".strip())


class CriteriaNotMet(JobFailed):
    """The job ran to its end and missed its criteria: the report tells how far."""


class JobCancelled(JobFailed):
    """The job was cancelled."""


class WaitTimeout(ClientError):
    """The time limit of the wait passed; the job runs on."""

    def __init__(self, job: Job, seconds: float) -> None:
        self.job = job
        super().__init__(f"Job {job.id} is still {job.status} after {seconds:g} s; it runs on.")


class DownloadCorrupt(ClientError):
    """Bytes arrived that are not the bytes announced; nothing was kept."""


_LEAVES: dict[int, type[ProblemError]] = {
    401: AuthenticationError,
    404: NotFoundError,
    409: ConflictError,
    413: ContentError,
    422: ContentError,
    429: ServiceUnavailable,
}


def problem_error(status: int, members: dict[str, Any]) -> ProblemError:
    """The leaf for a status."""
    leaf = ServiceUnavailable if status >= 500 else _LEAVES.get(status, ProblemError)
    return leaf(status, members)


def job_error(job: Job) -> JobFailed:
    """The leaf for a job that ended without success."""
    if job.reason == "criteria_not_met":
        return CriteriaNotMet(job)
    return JobCancelled(job) if job.status == "cancelled" else JobFailed(job)
