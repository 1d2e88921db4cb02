"""Webhooks: what was told to a job's, and what they know our messages by."""

# No `from __future__ import annotations`: the routes' annotations name dependencies of the function they are made in.

import functools
import json
from typing import Annotated

from fastapi import APIRouter, Depends

from app.auth import CallerDep
from app.deps import QueueDep, SettingsDep, job_of
from app.errors import HttpProblem, answers
from app.schemas import DeliveryList, DeliveryRead, WebhookSecret, moment
from workers.jobs import JobKind
from workers.signing import NoSigningKey, Signer
from workers.tables import Delivery, Job
from workers.webhooks import deliveries_of

router = APIRouter(prefix="/v1", tags=["webhooks"])


@router.get("/webhook-secret", responses=answers("not-found"))
def read_webhook_secret(caller: CallerDep, settings: SettingsDep) -> WebhookSecret:
    """What your webhooks verify messages with, as Standard Webhooks says. It is yours alone; nobody else's is the
    same.
    """
    try:
        return WebhookSecret(secret=Signer(settings).secret(caller.owner))
    except NoSigningKey as error:
        raise HttpProblem("not-found", str(error)) from None


@functools.cache
def deliveries_router(kind: JobKind) -> APIRouter:
    """What webhooks were told of the jobs of a kind."""
    router = APIRouter(prefix=f"/v1/{kind.plural}/{{job_id}}", tags=[kind.plural])

    @router.get("/deliveries", name=f"list_{kind}_deliveries", responses=answers("not-found"))
    def list_deliveries(job: Annotated[Job, Depends(job_of(kind))], queue: QueueDep) -> DeliveryList:
        """Every message to the job's webhook: whether it arrived, and what came of the latest attempt."""
        return DeliveryList(data=[_read(each) for each in deliveries_of(queue.store, job.id)])

    return router


def _read(delivery: Delivery) -> DeliveryRead:
    waiting = "pending" if delivery.next_at is not None else "failed"
    return DeliveryRead(
        id=delivery.id,
        event=json.loads(delivery.body)["type"],
        status="delivered" if delivery.delivered_at is not None else waiting,
        attempts=delivery.attempts,
        last_error=delivery.last_error,
        created_at=moment(delivery.created_at),
        delivered_at=None if delivery.delivered_at is None else moment(delivery.delivered_at),
        next_attempt_at=None if delivery.next_at is None else moment(delivery.next_at),
    )
