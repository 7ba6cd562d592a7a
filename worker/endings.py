"""How an attempt can end, and what each ending writes: the one place that turns an outcome into a job's status."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.orm import Session

from services import leases, reaper
from services.leases import Claim
from services.settings import Settings
from services.storage import ObjectStorage
from worker import publication
from worker.process import Malformed
from worker.publication import Artifact

__all__ = ["INTERRUPTED_STATUS", "Ending", "classify", "internal", "problem"]

OUT_OF_MEMORY_STATUS = 71
INTERRUPTED_STATUS = 75

# "stopped": the caller cancelled, or the deadline has passed; the row says which.
Kind = Literal["succeeded", "failed", "stopped", "released", "out_of_memory", "lost", "gone"]


def problem(slug: str, title: str, detail: str, *, pointer: str | None = None) -> dict[str, Any]:
    """The members of a job's problem; ``pointer`` is the place in the request that it is about, where there is one."""
    members: dict[str, Any] = {"type": f"urn:forgetd:problem:{slug}", "title": title, "detail": detail}
    return members if pointer is None else {**members, "errors": [{"pointer": pointer, "detail": detail}]}


@dataclass(frozen=True)
class Ending:
    """An attempt's end. ``artifacts`` are still to be uploaded; ``prefix`` and ``rows`` are there once they are."""

    kind: Kind
    why: str = ""
    reason: str = ""
    problem: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    artifacts: list[Artifact] | None = None
    prefix: str | None = None
    rows: list[dict[str, Any]] | None = None

    @classmethod
    def failed(cls, reason: str, problem: dict[str, Any]) -> Ending:
        """For good, with nothing to show."""
        return cls("failed", reason=reason, problem=problem)

    def uploaded(self, storage: ObjectStorage, claim: Claim, going_on: Callable[[], bool]) -> Ending:
        """This ending with its artifacts in the store; ``Stopped`` once ``going_on`` says no."""
        prefix, rows = publication.upload(storage, claim, self.artifacts or [], going_on)
        return replace(self, artifacts=None, prefix=prefix, rows=rows)

    def write(self, session: Session, claim: Claim, settings: Settings) -> str | None:
        """The fenced statement of this ending; a cancel or deadline that came first wins. None: the token is stale."""
        if self.kind == "lost":
            return reaper.lose(session, claim, why=self.why, budget=settings.infrastructure_budget)
        if self._write(session, claim):
            return {"released": "queued", "out_of_memory": "queued"}.get(self.kind, self.kind)
        if leases.cancelled(session, claim):
            return "cancelled"
        return "failed" if leases.expire(session, claim) else None

    def _write(self, session: Session, claim: Claim) -> bool:
        if self.kind == "succeeded":
            return leases.publish(
                session, claim, prefix=self.prefix or "", artifacts=self.rows or [], summary=self.summary or {}
            )
        if self.kind == "failed":
            return leases.fail(
                session,
                claim,
                reason=self.reason,
                problem=self.problem or {},
                prefix=self.prefix,
                artifacts=self.rows,
                summary=self.summary,
            )
        if self.kind == "released":
            return leases.release(session, claim, why=self.why)
        if self.kind == "out_of_memory":
            return leases.retry_smaller(session, claim)
        return False


def classify(
    claim: Claim,
    settings: Settings,
    *,
    status: int,
    oom_kill: bool,
    result: dict[str, Any] | None,
    error: dict[str, Any] | None,
    malformed: Malformed | None,
    folder: Path,
) -> Ending:
    """What the runner's last words and its exit status mean."""
    if malformed is not None:
        return internal(f"The runner broke its contract: {malformed}.")
    if error is not None:
        return _from_error(claim, settings, error)
    if result is not None:  # its last word; a crash on the way out (drivers do that) takes nothing back
        try:
            return _from_result(claim, result, folder)
        except Malformed as broken:
            return internal(f"The runner broke its contract: {broken}.")
    if status == OUT_OF_MEMORY_STATUS or (status == -signal.SIGKILL and oom_kill):
        return _out_of_memory(claim, settings)
    return Ending("lost", why=f"signal {-status}" if status < 0 else f"exit {status}")


def _from_result(claim: Claim, result: dict[str, Any], folder: Path) -> Ending:
    artifacts = publication.artifacts_of(result, folder)
    summary: dict[str, Any] = result["summary"]
    if result.get("outcome") == "succeeded":
        if claim.kind == "import" and (not artifacts or not artifacts[0].is_weights or "manifest" not in summary):
            raise Malformed("an import has no weights or no manifest")
        return Ending("succeeded", summary=summary, artifacts=artifacts)
    if result.get("outcome") != "criteria_not_met":
        raise Malformed("an unknown outcome")
    if (claim.request.get("criteria") or {}).get("release_weights") != "always":
        artifacts = [artifact for artifact in artifacts if not artifact.is_weights]
    detail = summary.get("verdict")
    return Ending(
        "failed",
        reason="criteria_not_met",
        problem=problem(
            "criteria-not-met",
            "The job ran and missed its criteria",
            detail if isinstance(detail, str) else "The report says which criterion was missed, and by how much.",
        ),
        summary=summary,
        artifacts=artifacts,
    )


def _from_error(claim: Claim, settings: Settings, error: dict[str, Any]) -> Ending:
    reason, told = error.get("reason"), error.get("problem")
    if reason == "out_of_memory":
        return _out_of_memory(claim, settings)
    if reason == "user_error" and isinstance(told, dict):
        return Ending.failed("user_error", told)
    return internal("The runner met an error of its own; its place is in the worker's log.")


def _out_of_memory(claim: Claim, settings: Settings) -> Ending:
    if claim.out_of_memory_losses < settings.out_of_memory_budget:
        return Ending("out_of_memory")
    smaller = 2**claim.out_of_memory_losses
    return Ending.failed(
        "out_of_memory",
        problem(
            "out-of-memory",
            "The job does not fit into the worker's memory",
            f"It ran out of memory {claim.out_of_memory_losses + 1} times, at last with a micro-batch {smaller} times "
            "smaller. Send it again with a smaller micro_batch, or to a worker with more memory.",
        ),
    )


def internal(detail: str) -> Ending:
    """A defect of ours, or of the runner: for good, since the next attempt would meet it again."""
    return Ending.failed("internal", problem("internal", "forgetd made a mistake", detail))
