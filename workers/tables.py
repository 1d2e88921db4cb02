"""The tables. Every change to them is a file in `workers/migrations/versions`. Times are seconds since 1970, UTC."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

LOCAL_OWNER = "local"
"""Who owns what is made where no keys are asked for."""

_ID = String(32)
_NAME = String(100)
_STATE = String(16)


class Base(DeclarativeBase):
    """Tables."""


class Job(Base):
    """One thing that somebody asked for; `recipe` is the document that says it.

    `owner` asked for it, `holder` is the worker that is at it. `version` grows with every change of the row, `events`
    is the number of the latest event. `resolved`: what names of Hub models in the document meant when it was accepted;
    `hub`: by which credential, named, and at which endpoint; `published`: where on it the result is. `parent`: the
    search that a view is a candidate of; such a view is in no list.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_state", "state", "id"),
        Index("jobs_by_owner", "owner", "kind", "id"),
        Index("jobs_by_expiry", "expires_at"),
        Index("jobs_by_parent", "parent"),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    kind: Mapped[str] = mapped_column(_STATE, default="merge")
    owner: Mapped[str] = mapped_column(_NAME, default=LOCAL_OWNER)
    state: Mapped[str] = mapped_column(_STATE, default="queued")
    phase: Mapped[str] = mapped_column(_NAME, default="")
    version: Mapped[int] = mapped_column(Integer, default=1)
    events: Mapped[int] = mapped_column(Integer, default=0)
    recipe: Mapped[dict[str, Any] | list[dict[str, Any]]] = mapped_column(JSON)
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    labels: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    webhook: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    progress: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    warnings: Mapped[list[str]] = mapped_column(JSON, default=list)
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    resolved: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    hub: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    published: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    request_id: Mapped[str | None] = mapped_column(_NAME, default=None)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    deadline_at: Mapped[float | None] = mapped_column(Float, default=None)
    expires_at: Mapped[float | None] = mapped_column(Float, default=None)
    deleted_at: Mapped[float | None] = mapped_column(Float, default=None)
    reserved_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    asked_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    site: Mapped[str | None] = mapped_column(_NAME, default=None)
    parent: Mapped[str | None] = mapped_column(_ID, default=None)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    deaths: Mapped[int] = mapped_column(Integer, default=0)
    holder: Mapped[str | None] = mapped_column(_NAME, default=None)
    lease_until: Mapped[float | None] = mapped_column(Float, default=None)
    announced: Mapped[int] = mapped_column(Integer, default=0)
    announced_at: Mapped[float] = mapped_column(Float, default=0.0)
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float, default=None)
    finished_at: Mapped[float | None] = mapped_column(Float, default=None)


class Event(Base):
    """Something that happened to a job: `kind` is state, phase, warning or log; numbered from 1 for each job."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(_STATE)
    data: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)


class Unit(Base):
    """A part of a running job that any worker may take: some tensors in one phase.

    `result` is what was found, written once. `runs` counts how often the unit was taken.
    """

    __tablename__ = "units"
    __table_args__ = (Index("units_by_state", "job_id", "phase", "state"),)

    job_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    phase: Mapped[str] = mapped_column(_NAME, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    state: Mapped[str] = mapped_column(_STATE, default="open")
    holder: Mapped[str | None] = mapped_column(_NAME, default=None)
    lease_until: Mapped[float | None] = mapped_column(Float, default=None)
    runs: Mapped[int] = mapped_column(Integer, default=0)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    finished_at: Mapped[float | None] = mapped_column(Float, default=None)


class Trial(Base):
    """A trial of a search: `outcome` is what it came to, known of every trial of its owner's with this `digest`."""

    __tablename__ = "trials"
    __table_args__ = (Index("trials_by_digest", "owner", "digest"),)

    job_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    owner: Mapped[str] = mapped_column(_NAME)
    digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(_STATE, default="open")
    tried: Mapped[dict[str, Any]] = mapped_column(JSON)
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    seconds: Mapped[float | None] = mapped_column(Float, default=None)
    created_at: Mapped[float] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float, default=None)


class Layout(Base):
    """The names of the tensors that a job writes, in the order of its output: compressed JSON."""

    __tablename__ = "layouts"

    job_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    names: Mapped[bytes] = mapped_column(LargeBinary)


class WorkerProcess(Base):
    """A worker that reported lately. `site`: those of one site see the same data folder."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    host: Mapped[str] = mapped_column(_NAME)
    site: Mapped[str] = mapped_column(_NAME)
    device: Mapped[str] = mapped_column(_NAME, default="cpu")
    started_at: Mapped[float] = mapped_column(Float)
    seen_at: Mapped[float] = mapped_column(Float)


class Owner(Base):
    """Somebody with limits of their own, beside the service's; one who is not here has the service's."""

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    quotas: Mapped[dict[str, int]] = mapped_column(JSON, default=dict)
    created_at: Mapped[float] = mapped_column(Float)


class ApiKey(Base):
    """A key by which an owner is known: `digest` is the sha256 of the secret, which nobody keeps."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("api_keys_by_owner", "owner", "id"), Index("api_keys_by_digest", "digest", unique=True))

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    owner: Mapped[str] = mapped_column(_NAME)
    name: Mapped[str] = mapped_column(_NAME, default="")
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float | None] = mapped_column(Float, default=None)
    revoked_at: Mapped[float | None] = mapped_column(Float, default=None)
    used_at: Mapped[float | None] = mapped_column(Float, default=None)


class Credential(Base):
    """A secret of an owner for another service, sealed; jobs name it."""

    __tablename__ = "credentials"

    owner: Mapped[str] = mapped_column(_NAME, primary_key=True)
    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    kind: Mapped[str] = mapped_column(_STATE)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[float] = mapped_column(Float)
    changed_at: Mapped[float] = mapped_column(Float)


class Upload(Base):
    """A file of data that an owner sent; its bytes lie in the data folder under their `sha256`."""

    __tablename__ = "uploads"

    owner: Mapped[str] = mapped_column(_NAME, primary_key=True)
    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    changed_at: Mapped[float] = mapped_column(Float)


class IdempotencyKey(Base):
    """A request that made a job: the same one again is answered with that job. `digest`: sha256 of what was asked."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("idempotency_keys_by_age", "created_at"),)

    owner: Mapped[str] = mapped_column(_NAME, primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(_ID, default=None)
    created_at: Mapped[float] = mapped_column(Float)


class Delivery(Base):
    """A message to somebody's webhook, which waits to be sent (outbox)."""

    __tablename__ = "deliveries"
    __table_args__ = (Index("deliveries_by_time", "next_at"), Index("deliveries_by_job", "job_id"))

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    job_id: Mapped[str] = mapped_column(_ID)
    url: Mapped[str] = mapped_column(Text)
    body: Mapped[str] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_at: Mapped[float | None] = mapped_column(Float)
    holder: Mapped[str | None] = mapped_column(_NAME, default=None)
    delivered_at: Mapped[float | None] = mapped_column(Float, default=None)
    last_error: Mapped[str | None] = mapped_column(Text, default=None)
    created_at: Mapped[float] = mapped_column(Float)


class Counter(Base):
    """A count that only grows; `labels` are separated by tabs."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    labels: Mapped[str] = mapped_column(String(200), primary_key=True)
    value: Mapped[float] = mapped_column(Float)
