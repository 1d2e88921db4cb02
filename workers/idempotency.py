"""Requests that may be sent twice and are to be carried out once: the same key and the same request, the same job.

The key is written in the transaction that writes the job. There is no moment at which one is there without the other,
so that nothing has to be cleaned up after a kill, and of two at once the second finds what the first made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from workers.tables import IdempotencyKey, Job

REMEMBERED_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class RequestKey:
    """The key that a caller gave a request. `digest`: sha256 of all that was asked."""

    owner: str
    key: str
    digest: str


class KeyReused(Exception):
    """The key was given to another request before."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"the key {key[:60]!r} was used for another request in the last 24 hours; take a new one")


class Repeated(Exception):
    """The request was carried out before: it made this job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        super().__init__(f"the same request made {job.id}")


def made_by(session: Session, request: RequestKey) -> Job | None:
    """The job that the same request made, deleted or not. Raises `KeyReused`."""
    mine = (IdempotencyKey.owner == request.owner, IdempotencyKey.key == request.key)
    known = session.scalars(select(IdempotencyKey).where(*mine, IdempotencyKey.created_at > _oldest())).one_or_none()
    if known is None:
        return None
    if known.digest != request.digest:
        raise KeyReused(request.key)
    return session.get(Job, known.job_id)


def remember(session: Session, request: RequestKey, job_id: str) -> None:
    """Note which job a request makes. Raises SQLAlchemy's `IntegrityError` if one like it was quicker."""
    mine = (IdempotencyKey.owner == request.owner, IdempotencyKey.key == request.key)
    session.execute(delete(IdempotencyKey).where(*mine, IdempotencyKey.created_at <= _oldest()))
    session.add(
        IdempotencyKey(
            owner=request.owner, key=request.key, digest=request.digest, job_id=job_id, created_at=time.time()
        )
    )
    session.flush()


def _oldest() -> float:
    return time.time() - REMEMBERED_SECONDS
