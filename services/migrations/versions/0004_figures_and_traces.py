"""figures of every process, and the trace that a job belongs to

Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "process_counters",
        sa.Column("process", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("samples", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("process", name=op.f("pk_process_counters")),
    )
    op.add_column("jobs", sa.Column("traceparent", sa.Text(), nullable=True))
    op.create_index(
        "ix_jobs_unstarted",
        "jobs",
        ["queue", "created_at"],
        unique=False,
        postgresql_where=sa.text("status = 'queued' AND started_at IS NULL"),
    )


def downgrade() -> None:
    """Totals begin anew, and what is queued belongs to no trace any more."""
    op.drop_index("ix_jobs_unstarted", table_name="jobs")
    op.drop_column("jobs", "traceparent")
    op.drop_table("process_counters")
