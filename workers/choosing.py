"""Which of the queued jobs is taken next. A message says that there is work; it does not say whose turn it is."""

from __future__ import annotations

import time

from sqlalchemy import ColumnElement, Select, Subquery, func, or_, select
from sqlalchemy.orm import aliased

from workers.states import AT_WORK, JobState
from workers.tables import Job


def may_start(max_attempts: int) -> list[ColumnElement[bool]]:
    """What must be true of a job's own row for a worker to take it."""
    in_time = or_(Job.deadline_at.is_(None), Job.deadline_at > time.time())
    return [Job.state == JobState.QUEUED, Job.deaths < max_attempts, in_time]


def running_jobs() -> Subquery:
    """How many jobs each owner has running: `owner`, `jobs`."""
    other = aliased(Job)
    counted = select(other.owner, func.count().label("jobs")).where(other.state.in_(AT_WORK)).group_by(other.owner)
    return counted.subquery("running")


def next_job(max_attempts: int, may_run_more: ColumnElement[bool]) -> Select[str]:
    """The id of the job whose turn it is: of owners who `may_run_more`, the highest priority; of these the owner with
    the fewest jobs running; of theirs the oldest.

    Where rows can be locked (PostgreSQL), one that another worker is just taking is passed over.
    """
    running = running_jobs()
    already = func.coalesce(running.c.jobs, 0)
    return (
        select(Job.id)
        .outerjoin(running, running.c.owner == Job.owner)
        .where(*may_start(max_attempts), may_run_more)
        .order_by(Job.priority.desc(), already, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=Job)
    )
