"""Jobs: their states, their legal moves, and the store that makes each move exactly once.

The row is the truth. A worker owns a running job by a lease; every write it makes names its owner and attempt, so that
a worker whose lease has passed to another writes nothing (fencing).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    ColumnElement,
    Engine,
    Float,
    Index,
    Integer,
    String,
    and_,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from workers.settings import Settings

RecipeData = dict[str, Any] | list[dict[str, Any]]
"""A recipe, or a document of another kind, as it was sent: one document, or the list of several."""


class JobKind(StrEnum):
    """What a job makes. `workers.kinds` says of each how."""

    MERGE = "merge"
    ALIGNMENT = "alignment"
    PATCH = "patch"

    @property
    def prefix(self) -> str:
        """What the ids of such jobs begin with."""
        return {JobKind.MERGE: "mrg_", JobKind.ALIGNMENT: "aln_", JobKind.PATCH: "pat_"}[self]

    @property
    def plural(self) -> str:
        """Many of them, as the service's paths say it."""
        return "patches" if self is JobKind.PATCH else f"{self}s"


class JobState(StrEnum):
    """Where a job is. `canceling` waits for its worker to notice."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELING = "canceling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELED, JobState.FAILED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.CANCELING, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.CANCELING: frozenset({JobState.CANCELED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELED: frozenset(),
}
"""A finished state moves nowhere. What finishes while it is being canceled has finished."""

FINISHED = frozenset(state for state, moves in MOVES.items() if not moves)
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class Base(DeclarativeBase):
    """Tables."""


class Job(Base):
    """One thing that somebody asked for; `recipe` is the document that says it. Times are seconds since 1970, UTC."""

    __tablename__ = "jobs"
    __table_args__ = (Index("jobs_by_state", "state", "id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), default=JobKind.MERGE, server_default=JobKind.MERGE)
    state: Mapped[str] = mapped_column(String(16), default=JobState.QUEUED)
    phase: Mapped[str] = mapped_column(String(100), default="")
    recipe: Mapped[RecipeData] = mapped_column(JSON)
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    progress: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    warnings: Mapped[list[str]] = mapped_column(JSON, default=list)
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    deaths: Mapped[int] = mapped_column(Integer, default=0)
    owner: Mapped[str | None] = mapped_column(String(100), default=None)
    lease_until: Mapped[float | None] = mapped_column(Float, default=None)
    announced: Mapped[int] = mapped_column(Integer, default=0)
    announced_at: Mapped[float] = mapped_column(Float, default=0.0)
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float, default=None)
    finished_at: Mapped[float | None] = mapped_column(Float, default=None)


@dataclass(frozen=True)
class Lease:
    """The right to work on a job, good until `lease_until` unless renewed."""

    job_id: str
    owner: str
    attempt: int
    kind: JobKind
    recipe: RecipeData


class LeaseLost(Exception):
    """Another worker has the job now; whatever this one did does not count."""


class IllegalMove(Exception):
    """A job was asked to move to a state that its own does not lead to."""

    def __init__(self, job_id: str, state: str, wanted: JobState) -> None:
        self.job_id, self.state, self.wanted = job_id, state, wanted
        super().__init__(f"{job_id} is {state}; it cannot become {wanted}")


def new_job_id(kind: JobKind) -> str:
    """The kind's prefix and a ULID: 48 bits of milliseconds, 80 random bits, so that ids sort by age."""
    number = int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10))
    return kind.prefix + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def open_engine(url: str | URL, patience: float) -> Engine:
    """An engine for SQLite (write-ahead log, waits `patience` seconds for other writers) or any other database."""
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": patience})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


def _add_kind(engine: Engine) -> None:
    """Give a database from before there were kinds of jobs their column: all that it has are merges."""
    if "kind" in {column["name"] for column in inspect(engine).get_columns("jobs")}:
        return
    column = f"kind VARCHAR(16) NOT NULL DEFAULT '{JobKind.MERGE}'"
    try:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE jobs ADD COLUMN {column}"))
    except (OperationalError, ProgrammingError):
        # Unless another process, which started at the same time, was quicker.
        if "kind" not in {column["name"] for column in inspect(engine).get_columns("jobs")}:
            raise


class JobStore:
    """Every change to a job, each one statement or one transaction."""

    def __init__(self, settings: Settings, *, patience: float = 30.0) -> None:
        settings.prepare()
        self.settings = settings
        self.engine = open_engine(settings.database, patience)
        Base.metadata.create_all(self.engine)
        _add_kind(self.engine)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def add(
        self,
        recipe: RecipeData,
        plan: Mapping[str, Any],
        warnings: Sequence[str] = (),
        *,
        kind: JobKind = JobKind.MERGE,
    ) -> Job:
        """Put a new job in the queue's table; `queue.submit` also announces it."""
        now = time.time()
        job = Job(
            id=new_job_id(kind),
            kind=kind,
            recipe=recipe,
            plan=dict(plan),
            warnings=list(warnings),
            created_at=now,
            announced_at=now,
        )
        with self._session() as session:
            session.add(job)
        return job

    def get(self, job_id: str) -> Job | None:
        with self._session() as session:
            return session.get(Job, job_id)

    def page(
        self,
        *,
        kind: JobKind = JobKind.MERGE,
        state: JobState | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> Sequence[Job]:
        """Jobs of a kind, newest first, older than the id `before`."""
        query = select(Job).where(Job.kind == kind).order_by(Job.id.desc()).limit(limit)
        if state:
            query = query.where(Job.state == state)
        if before:
            query = query.where(Job.id < before)
        with self._session() as session:
            return session.scalars(query).all()

    def claim(self, job_id: str, owner: str) -> Lease | None:
        """Take a queued job; None: somebody else has it, or it is finished."""
        now = time.time()
        taken = (
            update(Job)
            .where(Job.id == job_id, Job.state == JobState.QUEUED, Job.deaths < self.settings.max_attempts)
            .values(
                state=JobState.RUNNING,
                phase="starting",
                owner=owner,
                attempt=Job.attempt + 1,
                lease_until=now + self.settings.lease_seconds,
                started_at=func.coalesce(Job.started_at, now),
            )
            .returning(Job.attempt, Job.kind, Job.recipe)
        )
        with self._session() as session:
            row = session.execute(taken).one_or_none()
        return Lease(job_id, owner, row.attempt, JobKind(row.kind), row.recipe) if row else None

    def heartbeat(self, lease: Lease, *, phase: str, progress: Mapping[str, Any]) -> JobState:
        """Renew the lease and store the progress; the job's state, `canceling` if somebody wants it stopped. Raises
        `LeaseLost`.
        """
        renewed = (
            update(Job)
            .where(self._held(lease))
            .values(lease_until=time.time() + self.settings.lease_seconds, phase=phase, progress=dict(progress))
            .returning(Job.state)
        )
        with self._session() as session:
            state = session.execute(renewed).scalar_one_or_none()
        if state is None:
            raise LeaseLost(lease.job_id)
        return JobState(state)

    def succeed(
        self, lease: Lease, *, files: Sequence[Mapping[str, Any]], warnings: Sequence[str], progress: Mapping[str, Any]
    ) -> None:
        self._finish(lease, JobState.SUCCEEDED, files=list(files), warnings=list(warnings), progress=dict(progress))

    def fail(self, lease: Lease, error: Mapping[str, Any]) -> None:
        self._finish(lease, JobState.FAILED, error=dict(error))

    def confirm_cancel(self, lease: Lease) -> None:
        self._finish(lease, JobState.CANCELED)

    def announced(self, job_id: str, *, sent: bool = True) -> None:
        """Remember that a message for this job was sent, or that it could not be."""
        values = {"announced": Job.announced + sent, "announced_at": time.time()}
        with self._session() as session:
            session.execute(update(Job).where(Job.id == job_id).values(values))

    def cancel(self, job_id: str) -> Job | None:
        """Ask for a job to stop: a queued one is canceled at once. None: no such job. Raises `IllegalMove` if it has
        finished.
        """
        now = time.time()
        with self._session() as session:
            session.execute(
                update(Job)
                .where(Job.id == job_id, Job.state == JobState.QUEUED)
                .values(state=JobState.CANCELED, finished_at=now, phase="")
            )
            session.execute(
                update(Job).where(Job.id == job_id, Job.state == JobState.RUNNING).values(state=JobState.CANCELING)
            )
            job = session.get(Job, job_id)
        if job is not None and job.state in (JobState.SUCCEEDED, JobState.FAILED):
            raise IllegalMove(job_id, job.state, JobState.CANCELED)
        return job

    def release(self, owner_prefix: str, *, died: bool = True) -> None:
        """Give back what a worker that is gone held: its jobs are queued again. `died`: not because it was told to."""
        self._give_back(Job.owner.startswith(owner_prefix, autoescape=True), died=died)

    def give_back_expired(self) -> None:
        """Queue the jobs again whose worker has been silent for longer than its lease."""
        self._give_back(Job.lease_until < time.time(), died=True)

    def is_silent(self, owner_prefix: str) -> bool:
        """Whether a worker holds a job whose lease has run out: it hangs, or its child does."""
        silent = select(Job.id).where(
            Job.owner.startswith(owner_prefix, autoescape=True), Job.lease_until < time.time()
        )
        with self._session() as session:
            return session.scalars(silent.limit(1)).first() is not None

    def give_up(self) -> list[str]:
        """Fail the queued jobs that were started as often as they may be. The ids."""
        error = {
            "code": "worker-lost",
            "title": "The worker died",
            "detail": f"the worker died {self.settings.max_attempts} times at this job; has the machine the memory?",
            "retryable": True,
        }
        lost = (
            update(Job)
            .where(Job.state == JobState.QUEUED, Job.deaths >= self.settings.max_attempts)
            .values(state=JobState.FAILED, error=error, finished_at=time.time(), phase="")
            .returning(Job.id)
        )
        with self._session() as session:
            return list(session.scalars(lost))

    def overdue(self) -> list[str]:
        """Queued jobs whose message may be lost: announced long ago, and longer ago the more often it was done."""
        with self._session() as session:
            queued = session.scalars(select(Job).where(Job.state == JobState.QUEUED).order_by(Job.id).limit(100)).all()
        now, wait = time.time(), self.settings.redeliver_seconds
        return [job.id for job in queued if now - job.announced_at > wait * 2 ** min(max(job.announced - 1, 0), 5)]

    def _give_back(self, which: ColumnElement[bool], *, died: bool) -> None:
        nobody = {"owner": None, "lease_until": None, "phase": ""}
        again = {"state": JobState.QUEUED, "deaths": Job.deaths + died, "announced": 0, "announced_at": 0.0, **nobody}
        stopped = {"state": JobState.CANCELED, "finished_at": time.time(), **nobody}
        with self._session() as session:
            session.execute(update(Job).where(which, Job.state == JobState.RUNNING).values(again))
            session.execute(update(Job).where(which, Job.state == JobState.CANCELING).values(stopped))

    def _finish(self, lease: Lease, state: JobState, **values: Any) -> None:
        sources = [before for before, moves in MOVES.items() if state in moves]
        finished = (
            update(Job)
            .where(self._held(lease), Job.state.in_(sources))
            .values(state=state, phase="", owner=None, lease_until=None, finished_at=time.time(), **values)
            .returning(Job.id)
        )
        with self._session() as session:
            if session.execute(finished).one_or_none() is None:
                raise LeaseLost(lease.job_id)

    @staticmethod
    def _held(lease: Lease) -> ColumnElement[bool]:
        held = (JobState.RUNNING, JobState.CANCELING)
        return and_(Job.id == lease.job_id, Job.owner == lease.owner, Job.attempt == lease.attempt, Job.state.in_(held))
