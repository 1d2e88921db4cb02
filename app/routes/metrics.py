"""`/metrics`, in Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import Response

from app.deps import QueueDep
from app.measures import MEASURES, DatabaseCollector

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=PlainTextResponse)
def read_metrics(queue: QueueDep) -> Response:
    """What the service has done and is at, for Prometheus to scrape. Nothing in it names a job or an owner."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DatabaseCollector(queue.store))
    return Response(generate_latest(MEASURES) + generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
