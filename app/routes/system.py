"""The service itself."""

from __future__ import annotations

import platform
from importlib.metadata import version

from fastapi import APIRouter

from app.deps import QueueDep, SettingsDep
from app.options import MAX_DEADLINE_SECONDS, MAX_LABELS
from app.schemas import Limits, SystemRead
from merge_core import __version__
from merge_core.documents import MAX_DOCUMENT_BYTES
from merge_core.methods import METHODS
from workers import alive
from workers.jobs import JobKind, JobState

MAX_PAGE = 100
router = APIRouter(prefix="/v1/system", tags=["system"])


@router.get("")
def read_system(queue: QueueDep, settings: SettingsDep) -> SystemRead:
    """What the service is, what it takes and how busy it is."""
    jobs = queue.store.counts()
    return SystemRead(
        version=__version__,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "fastapi", "celery")},
        kinds=list(JobKind),
        methods=len(METHODS),
        limits=Limits(
            document_bytes=MAX_DOCUMENT_BYTES,
            memory=settings.max_memory,
            page=MAX_PAGE,
            wait_seconds=settings.max_wait,
            labels=MAX_LABELS,
            deadline_seconds=MAX_DEADLINE_SECONDS,
        ),
        queued=jobs[JobState.QUEUED],
        running=jobs[JobState.RUNNING] + jobs[JobState.CANCELING],
        workers=len(alive.living(queue.store)),
    )
