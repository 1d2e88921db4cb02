"""What you may have, and what you have of it."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.auth import CallerDep
from app.deps import QueueDep
from workers import quotas

router = APIRouter(prefix="/v1/quota", tags=["quota"])
_WHAT = "; ".join(f"`{name}`: {meaning}" for name, meaning in quotas.LIMITS.items())


class QuotaRead(BaseModel):
    """An owner's limits and what they have now."""

    owner: str
    limits: dict[str, int | None] = Field(description=f"{_WHAT}. null: no limit")
    used: dict[str, int] = Field(description="the same of what there is now; `job_bytes` is of one job, and not here")


@router.get("")
def read_quota(queue: QueueDep, caller: CallerDep) -> QuotaRead:
    """Your limits, and what you have now."""
    with queue.store.reading() as session:
        return QuotaRead(
            owner=caller.owner,
            limits=quotas.limits(session, queue.store.settings, caller.owner),
            used=quotas.used(session, caller.owner),
        )
