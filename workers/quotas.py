"""What an owner may have, at once and in a day: held to when a job is made, and when one starts.

Both are decided in the transaction that makes or starts the job, and for one owner one after the other: each such
transaction begins by writing the owner's row.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Integer, and_, case, cast, func, literal, null, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from merge_core.errors import WeightsmithError
from workers.settings import Settings
from workers.states import AT_WORK, FINISHED, JobState
from workers.tables import LOCAL_OWNER, ApiKey, Job, Owner, Upload

LIMITS: Mapping[str, str] = {
    "running_jobs": "jobs that are being worked at; further ones wait in the queue",
    "queued_jobs": "jobs that wait",
    "job_bytes": "bytes that one job reads and writes",
    "daily_bytes": "bytes that the jobs of the last 24 hours read and write",
    "disk_bytes": "bytes of finished artifacts and of data that were sent, and what is promised to unfinished jobs",
}
"""What is limited. A service has a limit for everybody in `WEIGHTSMITH_QUOTA_…`, which an owner's row replaces."""
UNLIMITED = -1
"""In an owner's row: no limit, whatever the service's is."""
_DAY = 86_400.0
_SOON = 15
_ACTIVE = [state for state in JobState if state not in FINISHED]


class QuotaExceeded(WeightsmithError):
    """The owner has as much as they may have, for now; `retry_after` seconds may change that."""

    code = "quota-exceeded"
    title = "Too much at once"
    retryable = True

    def __init__(self, limit: str, used: int, allowed: int, asked: int, detail: str, retry_after: int = 0) -> None:
        self.limit, self.used, self.allowed, self.asked, self.retry_after = limit, used, allowed, asked, retry_after
        super().__init__(detail)

    def facts(self) -> dict[str, Any]:
        """What programs need to know."""
        return {"limit": self.limit, "used": self.used, "allowed": self.allowed, "asked": self.asked}


class QuotaTooSmall(QuotaExceeded):
    """The owner may not have as much, and waiting does not change that."""

    code = "quota"
    title = "More than is allowed"
    retryable = False


def asked_bytes(plan: Mapping[str, Any]) -> int:
    """What a job with this plan reads and writes."""
    return int(plan.get("bytes_read", 0) + plan.get("bytes_written", 0))


def limits(session: Session, settings: Settings, owner: str) -> dict[str, int | None]:
    """An owner's limits; None: there is none. The service's own are not for `local`, who has no keys."""
    row = session.get(Owner, owner)
    theirs = row.quotas if row is not None else {}
    found: dict[str, int | None] = {}
    for name in LIMITS:
        usual = None if owner == LOCAL_OWNER else getattr(settings, f"quota_{name}")
        limit = theirs.get(name, usual)
        found[name] = None if limit is None or limit < 0 else limit
    return found


def used(session: Session, owner: str) -> dict[str, int]:
    """What an owner has now, under the names of `LIMITS`."""
    active = Job.state.in_(_ACTIVE)
    held = func.coalesce(func.sum(case((active, Job.reserved_bytes), else_=Job.stored_bytes)), 0)
    at_work = func.coalesce(func.sum(case((Job.state.in_(AT_WORK), 1), else_=0)), 0)
    waiting = func.coalesce(func.sum(case((Job.state == JobState.QUEUED, 1), else_=0)), 0)
    there = select(at_work, waiting, held).where(Job.owner == owner, Job.deleted_at.is_(None))
    running, queued, disk = session.execute(there).one()
    sent = session.scalars(select(func.coalesce(func.sum(Upload.size), 0)).where(Upload.owner == owner)).one()
    lately = and_(Job.owner == owner, Job.created_at > time.time() - _DAY)
    daily = session.scalars(select(func.coalesce(func.sum(Job.asked_bytes), 0)).where(lately)).one()
    disk = int(disk) + int(sent)
    return {"running_jobs": running, "queued_jobs": queued, "daily_bytes": int(daily), "disk_bytes": disk}


def admit(session: Session, settings: Settings, owner: str, *, asked: int, disk: int) -> None:
    """Let an owner make a job, in the transaction that makes it, that reads and writes `asked` bytes and may fill
    `disk` bytes. Raises `QuotaExceeded`, `QuotaTooSmall`.
    """
    allowed = limits(session, settings, owner)
    if all(limit is None for limit in allowed.values()):
        return
    _require(
        "job_bytes", allowed["job_bytes"], 0, asked, "this one job reads and writes {asked}, and {allowed} are allowed"
    )
    _require(
        "daily_bytes",
        allowed["daily_bytes"],
        0,
        asked,
        "this one job reads and writes {asked}, and {allowed} a day are allowed",
    )
    _one_after_the_other(session, owner)
    now = used(session, owner)
    disk_full = "{used} of {allowed} are in use, and this job may need {asked}: delete what you need no more"
    _require("disk_bytes", allowed["disk_bytes"], now["disk_bytes"], disk, disk_full)
    _require_queue(allowed["queued_jobs"], now["queued_jobs"])
    day = allowed["daily_bytes"]
    if day is not None and now["daily_bytes"] + asked > day:
        detail = f"of {_size(day)} a day {_size(now['daily_bytes'])} are used, and this job needs {_size(asked)}"
        wait = _until_fits(session, owner, now["daily_bytes"] + asked - day)
        raise QuotaExceeded("daily_bytes", now["daily_bytes"], day, asked, detail, wait)


def admit_again(session: Session, settings: Settings, owner: str) -> None:
    """Let an owner queue a job again that had ended, in the transaction that has queued it. Raises as `admit`."""
    allowed = limits(session, settings, owner)
    if allowed["queued_jobs"] is None and allowed["disk_bytes"] is None:
        return
    _one_after_the_other(session, owner)
    now = used(session, owner)
    _require_queue(allowed["queued_jobs"], now["queued_jobs"] - 1)
    disk_full = "with this job {used} of {allowed} would be in use: delete what you need no more"
    _require("disk_bytes", allowed["disk_bytes"], now["disk_bytes"], 0, disk_full)


def admit_upload(session: Session, settings: Settings, owner: str, size: int, *, instead_of: int) -> None:
    """Let an owner keep a file of data in place of one, in the transaction that does. Raises `QuotaTooSmall`."""
    allowed = limits(session, settings, owner)["disk_bytes"]
    if allowed is None:
        return
    _one_after_the_other(session, owner)
    has = used(session, owner)["disk_bytes"] - instead_of
    disk_full = "with these {asked} more than {allowed} would be in use, {used} are: delete what you need no more"
    _require("disk_bytes", allowed, has, size, disk_full)


def may_run_more(settings: Settings) -> ColumnElement[bool]:
    """Of a job's row: whether its owner may have another one running."""
    other = aliased(Job)
    theirs = select(Owner.quotas["running_jobs"].as_integer()).where(Owner.name == Job.owner)
    usual = cast(null(), Integer) if settings.quota_running_jobs is None else literal(settings.quota_running_jobs)
    everybody_s = case((Job.owner == LOCAL_OWNER, cast(null(), Integer)), else_=usual)
    limit = func.coalesce(theirs.correlate(Job).scalar_subquery(), everybody_s)
    at_work = select(func.count()).where(other.owner == Job.owner, other.state.in_(AT_WORK))
    return or_(limit.is_(None), limit < 0, at_work.correlate(Job).scalar_subquery() < limit)


def runs_too_many(session: Session, settings: Settings, owner: str) -> bool:
    """Whether an owner has more jobs running than they may, in the transaction that started one: where others start
    theirs at the same time, neither sees the other's before this.
    """
    allowed = limits(session, settings, owner)["running_jobs"]
    if allowed is None:
        return False
    _one_after_the_other(session, owner)
    return used(session, owner)["running_jobs"] > allowed


def set_limits(session: Session, owner: str, changed: Mapping[str, int | None]) -> None:
    """Give an owner limits of their own; None: the service's. Raises ValueError for one that there is not."""
    if unknown := sorted(changed.keys() - LIMITS.keys()):
        raise ValueError(f"there is no limit {unknown[0]!r}; there are {', '.join(LIMITS)}")
    _one_after_the_other(session, owner)
    row = session.get_one(Owner, owner)
    row.quotas = {name: limit for name, limit in {**row.quotas, **changed}.items() if limit is not None}


def owners(session: Session) -> list[str]:
    """Everybody with keys, limits or jobs."""
    return sorted(
        {
            name
            for column in (Owner.name, ApiKey.owner, Job.owner)
            for name in session.scalars(select(column).distinct())
        }
    )


def _one_after_the_other(session: Session, owner: str) -> None:
    """Wait until no other transaction is at this owner's limits; others wait from here on."""
    mine = update(Owner).where(Owner.name == owner).values(name=owner).returning(Owner.name)
    if session.execute(mine).all():
        return
    try:
        with session.begin_nested():
            session.add(Owner(name=owner, created_at=time.time()))
    except IntegrityError:
        session.execute(mine)


def _require(limit: str, allowed: int | None, has: int, asked: int, detail: str) -> None:
    if allowed is not None and has + asked > allowed:
        told = detail.format(used=_size(has), allowed=_size(allowed), asked=_size(asked))
        raise QuotaTooSmall(limit, has, allowed, asked, told)


def _require_queue(allowed: int | None, has: int) -> None:
    if allowed is None or has < allowed:
        return
    if allowed == 0:
        raise QuotaTooSmall("queued_jobs", has, allowed, 1, "no jobs are allowed")
    detail = f"{has} jobs wait already, and {allowed} may; wait until one has started"
    raise QuotaExceeded("queued_jobs", has, allowed, 1, detail, _SOON)


def _until_fits(session: Session, owner: str, excess: int) -> int:
    """Seconds until so many bytes are a day old."""
    now = time.time()
    lately = select(Job.created_at, Job.asked_bytes).where(Job.owner == owner, Job.created_at > now - _DAY)
    for row in session.execute(lately.order_by(Job.created_at)):
        excess -= row.asked_bytes
        if excess <= 0:
            return max(1, int(row.created_at + _DAY - now) + 1)
    return int(_DAY)


def _size(count: int) -> str:
    return f"{count / 1e9:,.3f} GB" if count >= 10**6 else f"{count:,} bytes"
