"""The names of the tensors that a job writes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "layouts",
        sa.Column("job_id", sa.String(32), primary_key=True),
        sa.Column("names", sa.LargeBinary(), nullable=False),
    )
