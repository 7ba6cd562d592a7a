"""turns between tenants, quotas, deadlines, and queues by capability

Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TO_DIFFUSION = """
UPDATE jobs SET queue = 'gpu.diffusion' FROM checkpoints
WHERE checkpoints.id = jobs.checkpoint_id AND jobs.queue = 'gpu.flow' AND jobs.finished_at IS NULL
AND checkpoints.manifest ->> 'family' IN ('ddpm', 'stable-diffusion', 'stable-diffusion-xl')
"""


def upgrade() -> None:
    op.add_column("tenants", sa.Column("max_running_jobs", sa.Integer(), nullable=True))
    op.add_column("tenants", sa.Column("max_open_jobs", sa.Integer(), nullable=True))
    op.add_column("tenants", sa.Column("last_served_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True))
    op.create_check_constraint(
        op.f("ck_jobs_succeeded_in_time"), "jobs", "status <> 'succeeded' OR finished_at <= deadline_at"
    )
    op.execute("UPDATE jobs SET queue = 'cpu' WHERE queue = 'cpu.convert'")
    op.execute(TO_DIFFUSION)
    _drop("ix_jobs_leased", "ix_jobs_queued")
    # Renewals write lease_until alone: as no index names it any more, and pages keep room, they touch no index.
    op.execute("ALTER TABLE jobs SET (fillfactor = 85)")
    _index("ix_jobs_queued", "queue", "tenant_id", sa.text("priority DESC"), "id", where="status = 'queued'")
    _index("ix_jobs_rung", "dispatched_at", where="status = 'queued' AND dispatched_at IS NOT NULL")
    _index("ix_jobs_held", "tenant_id", where="status IN ('running', 'cancelling')")
    _index("ix_jobs_open", "tenant_id", where="finished_at IS NULL")
    _index("ix_jobs_deadline", "deadline_at", where="status = 'queued' AND deadline_at IS NOT NULL")


def downgrade() -> None:
    """Deadlines, quotas and turns are forgotten; what failed by a deadline stays so, and jobs go to older queues."""
    _drop("ix_jobs_deadline", "ix_jobs_open", "ix_jobs_held", "ix_jobs_rung", "ix_jobs_queued")
    op.execute("ALTER TABLE jobs RESET (fillfactor)")
    _index("ix_jobs_queued", "queue", sa.text("priority DESC"), "id", where="status = 'queued'")
    _index("ix_jobs_leased", "lease_until", where="lease_until IS NOT NULL")
    op.execute("UPDATE jobs SET queue = 'gpu.flow' WHERE queue LIKE 'gpu.%' AND queue <> 'gpu.flow'")
    op.execute("UPDATE jobs SET queue = 'cpu.convert' WHERE queue = 'cpu'")
    op.drop_constraint(op.f("ck_jobs_succeeded_in_time"), "jobs", type_="check")
    op.drop_column("jobs", "deadline_at")
    op.drop_column("tenants", "last_served_at")
    op.drop_column("tenants", "max_open_jobs")
    op.drop_column("tenants", "max_running_jobs")


def _index(name: str, *columns: str | sa.TextClause, where: str) -> None:
    op.create_index(name, "jobs", list(columns), unique=False, postgresql_where=sa.text(where))


def _drop(*names: str) -> None:
    for name in names:
        op.drop_index(name, table_name="jobs")
