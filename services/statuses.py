"""Which jobs are queued, held or open, in the very words of the partial indexes of ``services.tables``.

PostgreSQL uses a partial index only where it can prove its condition, and a bound parameter proves nothing once a plan
is kept: so these conditions are written out.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, literal_column

from services.tables import Job

__all__ = ["is_held", "is_open", "is_queued"]


def is_queued() -> ColumnElement[bool]:
    """Whether a job waits for its first or next attempt."""
    return Job.status == literal_column("'queued'")


def is_held() -> ColumnElement[bool]:
    """Whether an attempt holds a job's lease."""
    return Job.status.in_([literal_column("'running'"), literal_column("'cancelling'")])


def is_open() -> ColumnElement[bool]:
    """Whether a job has not ended."""
    return Job.finished_at.is_(None)
