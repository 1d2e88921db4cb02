"""Owners and their keys, units, events, webhooks, and what jobs have of them. What there was belongs to `local`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Rename the worker's column, add the others, make the tables."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("owner", new_column_name="holder")
        jobs.alter_column("kind", server_default=None, existing_type=sa.String(16), existing_nullable=False)
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("owner", sa.String(100), nullable=False, server_default="local"))
        jobs.add_column(sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
        jobs.add_column(sa.Column("events", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("labels", sa.JSON(), nullable=False, server_default="{}"))
        jobs.add_column(sa.Column("webhook", sa.JSON()))
        jobs.add_column(sa.Column("request_id", sa.String(100)))
        jobs.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("deadline_at", sa.Float()))
        jobs.add_column(sa.Column("expires_at", sa.Float()))
        jobs.add_column(sa.Column("deleted_at", sa.Float()))
        jobs.add_column(sa.Column("reserved_bytes", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("asked_bytes", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("site", sa.String(100)))
    op.create_index("jobs_by_owner", "jobs", ["owner", "kind", "id"])
    op.create_index("jobs_by_expiry", "jobs", ["expires_at"])
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(32), primary_key=True),
        sa.Column("seq", sa.Integer(), primary_key=True),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
    )
    op.create_table(
        "units",
        sa.Column("job_id", sa.String(32), primary_key=True),
        sa.Column("phase", sa.String(100), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("holder", sa.String(100)),
        sa.Column("lease_until", sa.Float()),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("result", sa.JSON()),
        sa.Column("finished_at", sa.Float()),
    )
    op.create_index("units_by_state", "units", ["job_id", "phase", "state"])
    op.create_table(
        "workers",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("host", sa.String(100), nullable=False),
        sa.Column("site", sa.String(100), nullable=False),
        sa.Column("device", sa.String(100), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "owners",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("quotas", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(100), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float()),
        sa.Column("revoked_at", sa.Float()),
        sa.Column("used_at", sa.Float()),
    )
    op.create_index("api_keys_by_owner", "api_keys", ["owner", "id"])
    op.create_index("api_keys_by_digest", "api_keys", ["digest"], unique=True)
    op.create_table(
        "credentials",
        sa.Column("owner", sa.String(100), primary_key=True),
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("changed_at", sa.Float(), nullable=False),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(100), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(32)),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["created_at"])
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.Float()),
        sa.Column("holder", sa.String(100)),
        sa.Column("delivered_at", sa.Float()),
        sa.Column("last_error", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_index("deliveries_by_time", "deliveries", ["next_at"])
    op.create_index("deliveries_by_job", "deliveries", ["job_id"])
    op.create_table(
        "counters",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("labels", sa.String(200), primary_key=True),
        sa.Column("value", sa.Float(), nullable=False),
    )
