"""How long the phases of an attempt take: a histogram for the fleet, and a span each for its trace."""

from __future__ import annotations

import time

from services.leases import Claim
from services.metrics import Metrics
from services.tracing import Span

__all__ = ["Phases", "traced"]


class Phases:
    """The phases of one attempt, one after the other; one begins when the attempt does.

    Args:
        metrics: told how long each took.
        span: of the attempt.
        method: the job's.
    """

    def __init__(self, metrics: Metrics, span: Span, *, method: str, first: str = "validating") -> None:
        self._metrics, self._span, self._method = metrics, span, method
        self._phase: str | None = first
        self._begin()

    def enter(self, phase: str) -> None:
        """The attempt is in this phase now. Twice is as once."""
        if phase != self._phase:
            self.end()
            self._phase = phase
            self._begin()

    def end(self) -> None:
        """The attempt is over."""
        if self._phase is None:
            return
        self._metrics.phase(self._phase, self._method, time.monotonic() - self._began)
        self._span.child(self._phase, self._began_at, {"forgetd.phase": self._phase})
        self._phase = None

    def _begin(self) -> None:
        self._began, self._began_at = time.monotonic(), time.time_ns()


def traced(claim: Claim, outcome: str, method: str) -> dict[str, str | int]:
    """What a trace says of an attempt: identifiers and how it ended."""
    return {
        "forgetd.job": claim.job_id,
        "forgetd.attempt": claim.attempt,
        "forgetd.token": claim.token,
        "forgetd.queue": claim.queue,
        "forgetd.kind": claim.kind,
        "forgetd.method": method,
        "forgetd.outcome": outcome,
    }
