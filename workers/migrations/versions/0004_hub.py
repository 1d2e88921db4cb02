"""What jobs have of a Hub: which commits their models' names came to mean, and how they speak with it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("jobs", sa.Column("resolved", sa.JSON(), nullable=False, server_default="[]"))
    op.add_column("jobs", sa.Column("hub", sa.JSON()))
