"""Disk promised to jobs: no more of it than there is, so that what is accepted does not fail for want of room.

A job's promise is made in the transaction that queues it and ends with the job. What the job has written already is no
longer free, so it is taken off its promise, not counted twice. Promises are made one after the other, in any number of
processes: each begins by writing the same row.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import Session

from merge_core.errors import InsufficientStorage
from workers.counters import RESERVATIONS, count
from workers.settings import Settings
from workers.states import AT_WORK, FINISHED, JobState
from workers.tables import Job

_BESIDE = 2**20
"""For what a plan does not count: the lock file, the model card, the journal."""
_PER_TENSOR = 1024
_ACTIVE = [state for state in JobState if state not in FINISHED]


def needed(plan: Mapping[str, Any]) -> int:
    """The disk that a job with this plan may fill."""
    files = plan.get("bytes_on_disk", plan.get("bytes_written", 0)) + plan.get("bytes_beside", 0)
    return int(files + _BESIDE + _PER_TENSOR * plan.get("tensors", 0))


def reserve(session: Session, settings: Settings, size: int, *, job_id: str = "") -> None:
    """Promise so much disk to a job that is queued in this transaction. Raises `InsufficientStorage`."""
    count(session, RESERVATIONS)
    _require(session, settings, size, job_id, Job.state.in_(_ACTIVE))


def check(session: Session, settings: Settings, job_id: str) -> None:
    """Whether what was promised to a job that is about to start is there: others may fill the disk too. What waits
    has its own check to come. Raises `InsufficientStorage`.
    """
    found = session.execute(select(Job.reserved_bytes, Job.attempt).where(Job.id == job_id)).one()
    size = found.reserved_bytes - written(settings, job_id, found.attempt)
    _require(session, settings, size, job_id, Job.state.in_(AT_WORK))


def written(settings: Settings, job_id: str, attempt: int) -> int:
    """Bytes of the disk that a job has filled. One folder holds them; which attempt's, its rename may change."""
    folders = [settings.artifacts / f".{job_id}.{number}.partial" for number in range(attempt, 0, -1)]
    return sum(_allocated(folder) for folder in (*folders, settings.artifacts / job_id))


def _require(session: Session, settings: Settings, size: int, job_id: str, others: ColumnElement[bool]) -> None:
    if size <= 0:
        return
    others = and_(others, Job.id != job_id)
    waiting = select(func.sum(Job.reserved_bytes)).where(others, Job.attempt == 0)
    promised = session.scalars(waiting).one() or 0
    for row in session.execute(select(Job.id, Job.reserved_bytes, Job.attempt).where(others, Job.attempt > 0)):
        promised += max(0, row.reserved_bytes - written(settings, row.id, row.attempt))
    free = shutil.disk_usage(settings.artifacts).free
    if size > free - promised - settings.disk_reserve:
        raise InsufficientStorage(
            f"the job needs {_gigabytes(size)}; {_gigabytes(free)} are free, of which {_gigabytes(promised)} are "
            f"promised to other jobs and {_gigabytes(settings.disk_reserve)} are given to none; "
            "wait until others have ended, or free some space"
        )


def _allocated(folder: Path) -> int:
    size = 0
    for place, _, files in os.walk(folder):
        for name in files:
            # A file may be renamed or removed at any moment.
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(place, name), follow_symlinks=False).st_blocks * 512  # noqa: PTH116, PTH118
    return size


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"
