"""Jobs of several kinds; all that there were are merges."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    op.add_column("jobs", sa.Column("kind", sa.String(16), nullable=False, server_default="merge"))
