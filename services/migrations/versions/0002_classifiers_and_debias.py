"""classifiers in the store, and jobs that debias

Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "classifiers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("classes", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("scale", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("channels", sa.Integer(), nullable=True),
        sa.Column("size", sa.Integer(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("output IN ('logits', 'probabilities', 'score')", name=op.f("ck_classifiers_output")),
        sa.CheckConstraint("(key IS NULL) = (erased_at IS NOT NULL)", name=op.f("ck_classifiers_erased_has_no_file")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_classifiers_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_classifiers")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_classifiers_tenant_id_id")),
    )
    _kinds("'forget', 'debias', 'import'")


def downgrade() -> None:
    """Jobs that debias go with the version that knows them; the audit trail keeps that they were.

    The rows of classifiers go, and their files stay behind in the object store: the worker of a version that
    knows classifiers removes them once it runs again, the older one does not look. Delete the classifiers over the API
    before the downgrade, or the objects below tenants/*/classifiers/ after it.
    """
    op.execute("DELETE FROM job_events USING jobs WHERE jobs.id = job_events.job_id AND jobs.kind = 'debias'")
    op.execute("DELETE FROM jobs WHERE kind = 'debias'")
    _kinds("'forget', 'import'")
    op.drop_table("classifiers")


def _kinds(kinds: str) -> None:
    op.drop_constraint(op.f("ck_jobs_kind"), "jobs", type_="check")
    op.create_check_constraint(op.f("ck_jobs_kind"), "jobs", f"kind IN ({kinds})")
