"""What the service counts, by name, and how a transaction says what to count once it is committed.

The names stand here without the library that keeps the figures (``services.metrics``), for those who only count.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol

from sqlalchemy.orm import Session

__all__ = ["COUNTERS", "Counted", "CounterName", "note", "take_notes"]

CounterName = Literal[
    "jobs_accepted",
    "jobs_ended",
    "attempts",
    "attempts_ended",
    "lease_losses",
    "store_errors",
    "database_errors",
    "broker_errors",
    "http_requests",
    "doorbells",
    "loop_faults",
]
# Name, what it counts, labels. No label holds a tenant, an id, or a word of a caller's.
COUNTERS: Final[dict[CounterName, tuple[str, tuple[str, ...]]]] = {
    "jobs_accepted": ("Jobs accepted: their rows are committed.", ("kind",)),
    "jobs_ended": ("Jobs that reached their one terminal status.", ("kind", "status", "reason")),
    "attempts": ("Claims of jobs by workers.", ("queue",)),
    "attempts_ended": ("Attempts that gave their lease up, or were relieved of it.", ("outcome",)),
    "lease_losses": (
        "Leases lost: taken back by the control loop (expired), found gone by their worker (taken), given back because "
        "the runner died without a word (runner).",
        ("cause",),
    ),
    "store_errors": ("Tries of the object store that failed, those that a retry mended too.", ("operation", "error")),
    "database_errors": ("Statements or connections that PostgreSQL failed or refused.", ("error",)),
    "broker_errors": ("Doorbells that the broker did not take; they ring again.", ()),
    "http_requests": ("Requests answered, by route template.", ("method", "route", "status")),
    "doorbells": ("Doorbells rung.", ()),
    "loop_faults": ("Rounds of the control loop that failed; the next ones go on.", ("loop",)),
}
NOTES = "counted"


class Counted(Protocol):
    """Who keeps count."""

    def count(self, name: CounterName, **labels: str) -> None:
        """One more."""


def note(session: Session, name: CounterName, **labels: str) -> None:
    """Count this once the session's transaction is committed, and never if it is not."""
    session.info.setdefault(NOTES, []).append((name, labels))


def take_notes(session: Session) -> list[tuple[CounterName, dict[str, str]]]:
    """What was noted, once."""
    notes: list[tuple[CounterName, dict[str, str]]] = session.info.pop(NOTES, [])
    return notes
