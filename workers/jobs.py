"""Jobs: their states, their legal moves, and the store that makes each move exactly once.

The row is the truth. A worker owns a running job by a lease; every write it makes names its owner and attempt, so that
a worker whose lease has passed to another writes nothing (fencing).
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sqlalchemy import ColumnElement, Update, and_, case, delete, func, select, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from workers.choosing import may_start, next_job
from workers.counters import LEASES_EXPIRED, PHASE_SECONDS, PHASES, count, count_ends
from workers.database import for_reading, open_database
from workers.idempotency import Repeated, RequestKey, made_by, remember
from workers.problems import problem_of
from workers.quotas import admit, admit_again, asked_bytes, may_run_more, runs_too_many
from workers.reservations import reserve
from workers.settings import Settings
from workers.states import AT_WORK, UnitState
from workers.states import FINISHED as FINISHED
from workers.states import MOVES as MOVES
from workers.states import JobKind as JobKind
from workers.states import JobState as JobState
from workers.tables import LOCAL_OWNER, Event, Job, Layout, Trial, Unit
from workers.webhooks import deliveries

RecipeData = dict[str, Any] | list[dict[str, Any]]
"""A recipe, or a document of another kind, as it was sent: one document, or the list of several."""
_UNFINISHED = select(1).where(Job.state.in_([state for state in JobState if state not in FINISHED])).limit(1)
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """A worker's right to work on a job, good until `lease_until` unless renewed; `owner` asked for the job."""

    job_id: str
    holder: str
    attempt: int
    kind: JobKind
    owner: str
    recipe: RecipeData
    request_id: str | None = None
    resolved: Sequence[Mapping[str, Any]] = ()
    hub: Mapping[str, Any] | None = None


class _TooManyRunning(Exception):
    """While a job was started, others of its owner were, by other workers: this one is left to wait."""


class LeaseLost(Exception):
    """Another worker has the job now; whatever this one did does not count."""


class IllegalMove(Exception):
    """A job was asked for what its state does not lead to."""

    def __init__(self, job_id: str, state: str, wanted: str) -> None:
        self.job_id, self.state, self.wanted = job_id, state, wanted
        super().__init__(f"{job_id} is {state}; it cannot be {wanted}")


@dataclass(frozen=True)
class Pulse:
    """What changes of a job while somebody watches it. `events` is the number of its latest event."""

    version: int
    state: JobState
    phase: str
    progress: Mapping[str, Any]
    events: int
    is_deleted: bool


def new_id(prefix: str) -> str:
    """The prefix and a ULID: 48 bits of milliseconds, 80 random bits, so that ids sort by age; those that one process
    makes also within a millisecond.
    """
    number = _ids.after(int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10)))
    return prefix + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


class _Ids:
    """The latest number of an id in this process."""

    def __init__(self) -> None:
        self._latest, self._turn = 0, threading.Lock()

    def after(self, number: int) -> int:
        """The number, or a random one after the latest where that is larger; a clock put back by more than a second is
        believed.
        """
        with self._turn:
            if number <= self._latest < number + (1000 << 80):
                number = self._latest + 1 + int.from_bytes(os.urandom(8))
            self._latest = number
        return number


_ids = _Ids()


class JobStore:
    """Every change to a job, each one statement or one transaction, with the event that tells of it."""

    def __init__(self, settings: Settings, *, patience: float = 30.0) -> None:
        settings.prepare()
        self.settings = settings
        self.engine = open_database(settings, patience=patience)
        self._turn, self._patience = threading.Lock(), patience
        self._for_reading = for_reading(self.engine)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction that writes, alone on SQLite: what it reads before it writes stays so."""
        with self._in_turn(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """One writer of this process at a time, on SQLite: who waits there for its lock waits without a turn, and of
        many threads some never get it.
        """
        if self.engine.dialect.name != "sqlite":
            yield
            return
        if not self._turn.acquire(timeout=self._patience):
            raise OperationalError("BEGIN IMMEDIATE", None, sqlite3.OperationalError("database is locked"))
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads."""
        with Session(self._for_reading, expire_on_commit=False) as session, session.begin():
            yield session

    # What people ask for.

    def add(
        self,
        recipe: RecipeData,
        plan: Mapping[str, Any],
        warnings: Sequence[str] = (),
        *,
        kind: JobKind = JobKind.MERGE,
        owner: str = LOCAL_OWNER,
        request: RequestKey | None = None,
        **fields: Any,
    ) -> Job:
        """Put a new job in the queue's table; `queue.submit` also announces it. `fields` are columns of `Job`.

        Raises `InsufficientStorage` where its `reserved_bytes` cannot be promised, `QuotaExceeded` where its owner has
        enough, `Repeated` or `KeyReused` if there was a `request` with this key before.
        """
        now = time.time()
        job = Job(
            id=new_id(kind.prefix),
            kind=kind,
            owner=owner,
            recipe=recipe,
            plan=dict(plan),
            warnings=list(warnings),
            created_at=now,
            announced_at=now,
            events=1 + len(warnings),
            **fields,
        )
        job.asked_bytes = asked_bytes(plan)
        try:
            with self.session() as session:
                if request is not None:
                    remember(session, request, job.id)
                admit(session, self.settings, owner, asked=job.asked_bytes, disk=job.reserved_bytes or 0)
                if job.reserved_bytes:
                    reserve(session, self.settings, job.reserved_bytes)
                session.add(job)
                session.add(Event(job_id=job.id, seq=1, at=now, kind="state", data={"status": JobState.QUEUED}))
                for seq, warning in enumerate(warnings, 2):
                    session.add(Event(job_id=job.id, seq=seq, at=now, kind="warning", data={"warning": warning}))
        except IntegrityError:
            if request is not None:
                self.check_new(request)
            raise
        return job

    def check_new(self, request: RequestKey) -> None:
        """Raise `Repeated` or `KeyReused` if there was a request with this key before."""
        with self.session() as session:
            job = made_by(session, request)
        if job is not None:
            raise Repeated(job)

    def get(self, job_id: str) -> Job | None:
        """A job, whoever asked for it; None if it is deleted."""
        with self.reading() as session:
            return session.scalars(select(Job).where(Job.id == job_id, Job.deleted_at.is_(None))).one_or_none()

    def find(self, job_id: str, owner: str, kind: JobKind) -> Job | None:
        """A job of that kind, if that owner asked for it."""
        job = self.get(job_id)
        return job if job is not None and job.owner == owner and job.kind == kind else None

    def page(
        self,
        *,
        owner: str = LOCAL_OWNER,
        kind: JobKind = JobKind.MERGE,
        states: Collection[JobState] = (),
        labels: Mapping[str, str] = MappingProxyType({}),
        limit: int = 50,
        before: str | None = None,
    ) -> Sequence[Job]:
        """An owner's jobs of a kind, newest first, older than the id `before`, in one of the states (any, if none is
        given) and with all these labels.
        """
        theirs = select(Job).where(Job.owner == owner, Job.kind == kind, Job.deleted_at.is_(None), Job.parent.is_(None))
        query = theirs.order_by(Job.id.desc()).limit(limit)
        if states:
            query = query.where(Job.state.in_(states))
        for name, value in labels.items():
            query = query.where(Job.labels[name].as_string() == value)
        if before:
            query = query.where(Job.id < before)
        with self.reading() as session:
            return session.scalars(query).all()

    def newest(
        self,
        *,
        owner: str = LOCAL_OWNER,
        kinds: Iterable[JobKind] = JobKind,
        states: Collection[JobState] = (),
        labels: Mapping[str, str] = MappingProxyType({}),
        limit: int = 50,
        before: str | None = None,
    ) -> list[Job]:
        """As `page`, of several kinds together. `before` is an id of any kind: behind the kind all ids sort by age."""
        found: list[Job] = []
        for kind in kinds:
            older = kind.prefix + _age(before) if before else None
            found += self.page(owner=owner, kind=kind, states=states, labels=labels, limit=limit, before=older)
        return sorted(found, key=lambda job: _age(job.id), reverse=True)[:limit]

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state that is not an end, whoever asked for them."""
        active = [state for state in JobState if state not in FINISHED]
        query = select(Job.state, func.count()).where(Job.state.in_(active)).group_by(Job.state)
        with self.reading() as session:
            found = {JobState(state): number for state, number in session.execute(query)}
        return {state: found.get(state, 0) for state in active}

    def events(self, job_id: str, *, after: int = 0, limit: int = 100, kinds: Collection[str] = ()) -> Sequence[Event]:
        """What happened to a job since its event number `after`, of these kinds (any, if none is given)."""
        query = select(Event).where(Event.job_id == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
        if kinds:
            query = query.where(Event.kind.in_(kinds))
        with self.reading() as session:
            return session.scalars(query).all()

    def order(self, job_id: str) -> list[str]:
        """The tensors that a job writes, in the order of its output, as far as a worker has told them."""
        with self.reading() as session:
            packed = session.scalars(select(Layout.names).where(Layout.job_id == job_id)).one_or_none()
        return [] if packed is None else [str(name) for name in json.loads(zlib.decompress(packed))]

    def pulses(self, job_ids: Collection[str]) -> dict[str, Pulse]:
        """What changes of these jobs while somebody watches them; the deleted ones too."""
        watched = (Job.id, Job.version, Job.state, Job.phase, Job.progress, Job.events, Job.deleted_at)
        with self.reading() as session:
            rows = session.execute(select(*watched).where(Job.id.in_(job_ids))).all()
        return {
            row.id: Pulse(
                row.version, JobState(row.state), row.phase, row.progress, row.events, row.deleted_at is not None
            )
            for row in rows
        }

    def cancel(self, job_id: str) -> Job | None:
        """Ask for a job to stop: a queued one is canceled at once. None: no such job. Raises `IllegalMove` if it has
        finished.
        """
        with self.session() as session:
            # Held from here on: between the two moves it must not become what neither of them is for.
            session.scalar(select(Job.id).where(Job.id == job_id).with_for_update())
            self._move(
                session,
                update(Job).where(Job.id == job_id, Job.state == JobState.QUEUED),
                state=JobState.CANCELED,
                finished_at=time.time(),
                phase="",
            )
            running = update(Job).where(Job.id == job_id, Job.state == JobState.RUNNING)
            self._move(session, running, state=JobState.CANCELING)
            job = session.get(Job, job_id)
        if job is not None and job.state in (JobState.SUCCEEDED, JobState.FAILED):
            raise IllegalMove(job_id, job.state, "canceled")
        return job

    def retry(self, job_id: str, *, deadline_at: float | None = None) -> Job | None:
        """Queue a failed or canceled job again, as if no worker had died at it; units that are done stay done. A
        deadline that has passed is replaced. None: no such job. Raises `IllegalMove` for any other state, and
        `InsufficientStorage` where what it needs cannot be promised again, `QuotaExceeded` where its owner has enough.
        """
        again = update(Job).where(
            Job.id == job_id, Job.state.in_((JobState.FAILED, JobState.CANCELED)), Job.deleted_at.is_(None)
        )
        now = time.time()
        kept = case((Job.deadline_at > now, Job.deadline_at), else_=None)
        with self.session() as session:
            moved = self._move(
                session,
                again,
                told={"because": "retry"},
                state=JobState.QUEUED,
                error=None,
                deadline_at=kept if deadline_at is None else deadline_at,
                progress={},
                phase="",
                deaths=0,
                announced=0,
                announced_at=now,
                started_at=None,
                finished_at=None,
                expires_at=None,
            )
            job = session.get(Job, job_id)
            if moved and job is not None:
                session.execute(update(Unit).where(Unit.job_id == job_id).values(runs=0))
                admit_again(session, self.settings, job.owner)
                if job.reserved_bytes:
                    reserve(session, self.settings, job.reserved_bytes, job_id=job_id)
        if job is None or job.deleted_at is not None:
            return None
        if not moved:
            raise IllegalMove(job_id, job.state, "retried")
        return job

    def delete(self, job_id: str) -> bool:
        """Forget a finished job: what is left of its row tells nothing but that it was. False: no such job. Raises
        `IllegalMove` while it is active.
        """
        ended = update(Job).where(Job.id == job_id, Job.state.in_(FINISHED), Job.deleted_at.is_(None))
        nothing: dict[str, Any] = {"recipe": {}, "plan": {}, "labels": {}, "progress": {}, "warnings": [], "files": []}
        nothing |= {"error": None, "webhook": None, "request_id": None, "stored_bytes": 0, "expires_at": None}
        nothing |= {"resolved": [], "hub": None, "published": None}
        forgotten = ended.values(deleted_at=time.time(), version=Job.version + 1, **nothing).returning(Job.id)
        with self.session() as session:
            if session.execute(forgotten).first() is not None:
                session.execute(delete(Event).where(Event.job_id == job_id))
                session.execute(delete(Unit).where(Unit.job_id == job_id))
                session.execute(delete(Trial).where(Trial.job_id == job_id))
                session.execute(delete(Layout).where(Layout.job_id == job_id))
                return True
            job = session.get(Job, job_id)
        if job is None or job.deleted_at is not None:
            return False
        raise IllegalMove(job_id, job.state, "deleted; cancel it first")

    # Candidates of searches.

    def add_candidate(self, job_id: str, parent: Lease, plan: Mapping[str, Any], **fields: Any) -> None:
        """Show a candidate of a search as a view that is prepared, for as long as the search wants it."""
        now, nothing = time.time(), {"state": JobState.SUCCEEDED, "kind": JobKind.VIEW, "parent": parent.job_id}
        about = {"owner": parent.owner, "resolved": list(parent.resolved), "hub": parent.hub}
        times = dict.fromkeys(("created_at", "started_at", "finished_at"), now)
        with self.session() as session:
            session.add(Job(id=job_id, plan=dict(plan), **nothing, **about, **times, **fields))

    def forget_candidates(self, *which: ColumnElement[bool]) -> list[str]:
        """Forget such candidates; their ids, for whoever removes their files."""
        with self.session() as session:
            gone = delete(Job).where(Job.parent.is_not(None), *which).returning(Job.id)
            return list(session.scalars(gone))

    # What workers do.

    def claim(self, job_id: str, holder: str) -> Lease | None:
        """Take this queued job; None: somebody else has it, or it is finished."""
        return self._claim(Job.id == job_id, holder)

    def claim_next(self, holder: str) -> Lease | None:
        """Take the queued job whose turn it is (`workers.choosing`); None: there is none that may start."""
        chosen = next_job(self.settings.max_attempts, may_run_more(self.settings))
        try:
            return self._claim(Job.id == chosen.scalar_subquery(), holder)
        except _TooManyRunning:
            return None

    def _claim(self, which: ColumnElement[bool], holder: str) -> Lease | None:
        now = time.time()
        with self.session() as session:
            moved = self._move(
                session,
                update(Job).where(which, *may_start(self.settings.max_attempts)),
                state=JobState.RUNNING,
                phase="starting",
                holder=holder,
                attempt=Job.attempt + 1,
                site=self.settings.site,
                lease_until=now + self.settings.lease_seconds,
                started_at=func.coalesce(Job.started_at, now),
            )
            job = session.get(Job, moved[0]) if moved else None
            if job is not None and runs_too_many(session, self.settings, job.owner):
                raise _TooManyRunning
        if job is None:
            return None
        about = (job.owner, job.recipe, job.request_id, job.resolved, job.hub)
        return Lease(job.id, holder, job.attempt, JobKind(job.kind), *about)

    def lock(self, session: Session, lease: Lease) -> None:
        """Keep a job its holder's until the transaction ends. Raises `LeaseLost`."""
        held = update(Job).where(self._held(lease)).values(lease_until=Job.lease_until).returning(Job.id)
        if session.execute(held).first() is None:
            raise LeaseLost(lease.job_id)

    def heartbeat(self, lease: Lease, *, phase: str, progress: Mapping[str, Any]) -> JobState:
        """Renew the lease and store the progress; the job's state, `canceling` if somebody wants it stopped. Raises
        `LeaseLost`.
        """
        renewed = (
            update(Job)
            .where(self._held(lease))
            .values(
                lease_until=time.time() + self.settings.lease_seconds,
                phase=phase[:100],
                progress=dict(progress),
                version=Job.version + 1,
            )
            .returning(Job.state)
        )
        with self.session() as session:
            state = session.execute(renewed).scalar_one_or_none()
        if state is None:
            raise LeaseLost(lease.job_id)
        return JobState(state)

    def count_phases(self, kind: JobKind, seconds: Mapping[str, float]) -> None:
        """Count how long a worker was in each phase of a job."""
        with self.session() as session:
            for phase in sorted(seconds):
                count(session, PHASE_SECONDS, kind, phase, by=seconds[phase])
                count(session, PHASES, kind, phase)

    def tell(self, lease: Lease, kind: str, data: Mapping[str, Any]) -> None:
        """Add an event to a job. Raises `LeaseLost`."""
        numbered = update(Job).where(self._held(lease)).values(events=Job.events + 1).returning(Job.events)
        with self.session() as session:
            number = session.execute(numbered).scalar_one_or_none()
            if number is None:
                raise LeaseLost(lease.job_id)
            session.add(Event(job_id=lease.job_id, seq=number, at=time.time(), kind=kind, data=dict(data)))

    def keep_order(self, lease: Lease, names: Sequence[str]) -> None:
        """Remember the tensors that a job writes, in the order of its output. Raises `LeaseLost`."""
        packed = zlib.compress(json.dumps(list(names)).encode())
        with self.session() as session:
            self.lock(session, lease)
            session.merge(Layout(job_id=lease.job_id, names=packed))

    def succeed(
        self,
        lease: Lease,
        *,
        files: Sequence[Mapping[str, Any]],
        warnings: Sequence[str],
        progress: Mapping[str, Any],
        published: Mapping[str, Any] | None = None,
    ) -> None:
        stored = sum(file.get("size", 0) for file in files)
        days = self.settings.keep_days
        self._finish(
            lease,
            JobState.SUCCEEDED,
            files=list(files),
            warnings=list(warnings),
            progress=dict(progress),
            stored_bytes=stored,
            published=None if published is None else dict(published),
            expires_at=None if days is None else time.time() + days * 86_400,
        )

    def fail(self, lease: Lease, error: Mapping[str, Any]) -> None:
        self._finish(lease, JobState.FAILED, error=dict(error))

    def confirm_cancel(self, lease: Lease) -> None:
        self._finish(lease, JobState.CANCELED)

    def announced(self, job_id: str, *, sent: bool = True) -> None:
        """Remember that a message for this job was sent, or that it could not be."""
        values = {"announced": Job.announced + int(sent), "announced_at": time.time()}
        with self.session() as session:
            session.execute(update(Job).where(Job.id == job_id).values(values))

    # What keeps things going.

    def release(self, holder_prefix: str, *, died: bool = True) -> None:
        """Give back what a worker that is gone held: its jobs are queued again, its units open. `died`: not because it
        was told to.
        """
        self._open_units(Unit.holder.startswith(holder_prefix, autoescape=True))
        self._give_back(Job.holder.startswith(holder_prefix, autoescape=True), died=died)

    def is_idle(self) -> bool:
        """Whether every job has ended."""
        with self.engine.connect() as connection:
            return connection.execute(_UNFINISHED).first() is None

    def give_back_expired(self) -> None:
        """Queue the jobs again, and open the units, whose worker has been silent for longer than its lease."""
        self._open_units(Unit.lease_until < time.time())
        self._give_back(Job.lease_until < time.time(), died=True, counted=LEASES_EXPIRED)

    def is_silent(self, holder_prefix: str) -> bool:
        """Whether a worker holds a job or a unit whose lease has run out: it hangs, or its child does."""
        now = time.time()
        jobs = select(Job.id).where(
            Job.state.in_(AT_WORK),
            Job.holder.startswith(holder_prefix, autoescape=True),
            Job.lease_until < now,
        )
        units = select(Unit.job_id).where(
            *held_units(), Unit.holder.startswith(holder_prefix, autoescape=True), Unit.lease_until < now
        )
        with self.reading() as session:
            return any(session.scalars(silent.limit(1)).first() is not None for silent in (jobs, units))

    def give_up(self) -> list[str]:
        """Fail the queued jobs that were started as often as they may be. The ids."""
        detail = f"the worker died {self.settings.max_attempts} times at this job; has the machine the memory?"
        error = problem_of("worker-lost", detail)
        lost = _in_order(Job.state == JobState.QUEUED, Job.deaths >= self.settings.max_attempts)
        with self.session() as session:
            return self._move(session, lost, state=JobState.FAILED, error=error, finished_at=time.time(), phase="")

    def end_late(self) -> list[str]:
        """Fail the jobs whose deadline has passed; a worker that is at one learns of it as it renews its lease. The
        ids.
        """
        detail = "its deadline passed before it was done; give it longer, or a higher priority"
        error = problem_of("deadline-exceeded", detail)
        late = _in_order(Job.deadline_at < time.time(), Job.state.in_((JobState.QUEUED, JobState.RUNNING)))
        nobody: dict[str, Any] = {"phase": "", "holder": None, "lease_until": None}
        with self.session() as session:
            return self._move(session, late, state=JobState.FAILED, error=error, finished_at=time.time(), **nobody)

    def overdue(self) -> list[str]:
        """Queued jobs whose message may be lost: announced long ago, and longer ago the more often it was done. Not
        those whose owners have as many running as they may: their turn comes when one of these has ended.
        """
        with self.reading() as session:
            waiting = select(Job).where(Job.state == JobState.QUEUED, may_run_more(self.settings))
            queued = session.scalars(waiting.order_by(Job.id).limit(100)).all()
        now, wait = time.time(), self.settings.redeliver_seconds
        return [job.id for job in queued if now - job.announced_at > wait * 2 ** min(max(job.announced - 1, 0), 5)]

    def _give_back(self, which: ColumnElement[bool], *, died: bool, counted: str = "") -> None:
        nobody: dict[str, Any] = {"holder": None, "lease_until": None, "phase": ""}
        again = {"deaths": Job.deaths + int(died), "announced": 0, "announced_at": 0.0, **nobody}
        with self.session() as session:
            running = _in_order(which, Job.state == JobState.RUNNING)
            given = self._move(session, running, state=JobState.QUEUED, **again)
            session.execute(_opened(Unit.job_id.in_(given), Unit.lease_until.is_(None)))  # which their holders had
            canceling = _in_order(which, Job.state == JobState.CANCELING)
            given += self._move(session, canceling, state=JobState.CANCELED, finished_at=time.time(), **nobody)
            if given and counted:
                count(session, counted, by=len(given))
        for job_id in given:
            log.warning("its worker died" if died else "handed back by its worker", extra={"job_id": job_id})

    def _open_units(self, which: ColumnElement[bool]) -> None:
        with self.session() as session:
            session.execute(_opened(which))

    def _finish(self, lease: Lease, state: JobState, **values: Any) -> None:
        sources = [before for before, moves in MOVES.items() if state in moves]
        held = update(Job).where(self._held(lease), Job.state.in_(sources))
        nobody: dict[str, Any] = {"phase": "", "holder": None, "lease_until": None}
        with self.session() as session:
            if not self._move(session, held, state=state, finished_at=time.time(), **nobody, **values):
                raise LeaseLost(lease.job_id)

    @staticmethod
    def _move(
        session: Session,
        which: Update,
        *,
        state: JobState,
        told: Mapping[str, Any] = MappingProxyType({}),
        **values: Any,
    ) -> list[str]:
        """Move jobs to a state, with an event for each that tells also this; the ids of those that were moved."""
        moved = session.execute(
            which.values(state=state, version=Job.version + 1, events=Job.events + 1, **values).returning(
                Job.id,
                Job.events,
                Job.kind,
                Job.attempt,
                Job.labels,
                Job.webhook,
                Job.plan["method"].as_string().label("method"),
            )
        ).all()
        if state in FINISHED:
            count_ends(session, [(row.kind, state, row.method) for row in moved])
        data: dict[str, Any] = {"status": state, **told}
        if values.get("error"):
            data["error"] = values["error"]
        for row in moved:
            session.add(Event(job_id=row.id, seq=row.events, at=time.time(), kind="state", data=data))
            session.add_all(deliveries(row, state, values.get("error")))
        return [row.id for row in moved]

    @staticmethod
    def _held(lease: Lease) -> ColumnElement[bool]:
        mine = and_(Job.id == lease.job_id, Job.holder == lease.holder, Job.attempt == lease.attempt)
        return and_(mine, Job.state.in_(AT_WORK))


def _age(job_id: str) -> str:
    """What of an id sorts by age, of whichever kind."""
    return job_id.partition("_")[2]


def _in_order(*which: ColumnElement[bool]) -> Update:
    """An update of many jobs that locks the oldest first, so that two that want the same ones wait in turn."""
    oldest_first = select(Job.id).where(*which).order_by(Job.id).with_for_update()
    return update(Job).where(Job.id.in_(oldest_first), *which)


def held_units() -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """What is true of the units that somebody is at; those of jobs that ended do not count."""
    return Unit.job_id.in_(select(Job.id).where(Job.state.not_in(FINISHED))), Unit.state == UnitState.RUNNING


def _opened(*which: ColumnElement[bool]) -> Update:
    return update(Unit).where(*held_units(), *which).values(state=UnitState.OPEN, holder=None, lease_until=None)
