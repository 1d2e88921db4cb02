"""The trials of searches, and whose candidate a view is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add table and column."""
    op.add_column("jobs", sa.Column("parent", sa.String(32)))
    op.create_index("jobs_by_parent", "jobs", ["parent"])
    op.create_table(
        "trials",
        sa.Column("job_id", sa.String(32), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("owner", sa.String(100), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("tried", sa.JSON, nullable=False),
        sa.Column("outcome", sa.JSON),
        sa.Column("seconds", sa.Float),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("finished_at", sa.Float),
    )
    op.create_index("trials_by_digest", "trials", ["owner", "digest"])
