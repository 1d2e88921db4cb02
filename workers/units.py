"""Units of running jobs: who has which, kept in the database, where every write names its holder and its run.

The worker that holds a job leads it; others on the same site assist. A unit of whoever leads is given back with the
job, one of an assistant has a lease of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sqlalchemy import case, delete, exists, func, insert, select, update
from sqlalchemy.exc import InterfaceError, OperationalError

from merge_core.errors import Canceled
from workers.alive import living
from workers.choosing import may_start
from workers.database import TROUBLE, said
from workers.jobs import JobState, JobStore, Lease, LeaseLost, held_units
from workers.settings import Settings
from workers.states import AT_WORK, UnitState
from workers.tables import Job, Unit

if TYPE_CHECKING:
    from merge_core.units import Result

_POLL_SECONDS = 0.2
_IDLE_SECONDS = 10.0
"""How long an assistant waits for the next phase."""
_MOST_RUNS = 3
"""A unit that was taken so often is left to whoever leads, whose deaths are counted."""
_LAST_PHASES = ("merging", "finishing", "storing")
log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


class NothingToDo(Exception):
    """An assistant's unit, or the job, is no longer its own; whatever it did does not count."""


@dataclass(frozen=True)
class Taken:
    """A worker's right to a unit; `run`: the how-manieth time it was taken."""

    job_id: str
    phase: str
    number: int
    holder: str
    run: int


class UnitStore:
    """Every change to units, each one transaction."""

    def __init__(self, store: JobStore) -> None:
        self._store, self.settings = store, store.settings

    # Whoever leads.

    def forget(self, lease: Lease) -> None:
        """Nothing that was done counts any more. Raises `LeaseLost`."""
        with self._store.session() as session:
            self._store.lock(session, lease)
            session.execute(delete(Unit).where(Unit.job_id == lease.job_id))

    def open(self, lease: Lease, phase: str, count: int) -> None:
        """Make the units of a phase that are not there yet. Raises `LeaseLost`."""
        with self._store.session() as session:
            self._store.lock(session, lease)
            here = select(Unit.number).where(Unit.job_id == lease.job_id, Unit.phase == phase)
            missing = sorted(set(range(count)) - set(session.scalars(here)))
            rows = [
                {"job_id": lease.job_id, "phase": phase, "number": number, "state": UnitState.OPEN, "runs": 0}
                for number in missing
            ]
            if rows:
                session.execute(insert(Unit), rows)

    def again(self, lease: Lease, phase: str, number: int) -> None:
        """A unit that was done has to be done again, by whoever leads. Raises `LeaseLost`."""
        with self._store.session() as session:
            self._store.lock(session, lease)
            its = update(Unit).where(Unit.job_id == lease.job_id, Unit.phase == phase, Unit.number == number)
            session.execute(its.where(Unit.state == UnitState.DONE).values(state=UnitState.LEFT, result=None))

    def results(self, job_id: str, phase: str, known: Mapping[int, Result]) -> dict[int, Result]:
        """What the units that are done came to; those that are `known` are not read again."""
        done = select(Unit.number).where(Unit.job_id == job_id, Unit.phase == phase, Unit.state == UnitState.DONE)
        with self._store.reading() as session:
            numbers = set(session.scalars(done))
            news = sorted(numbers - set(known))
            read = select(Unit.number, Unit.result).where(Unit.job_id == job_id, Unit.phase == phase)
            found = (
                {row.number: row.result for row in session.execute(read.where(Unit.number.in_(news)))} if news else {}
            )
        return {number: result for number, result in {**known, **found}.items() if number in numbers and result}

    # Both.

    def take(self, job_id: str, phase: str, holder: str, *, leads: bool) -> Taken | None:
        """Take a unit: the first that is open, or for an assistant the last; None: there is none.

        One that this holder took before, if it never heard of it, is given to it again.
        """
        its = (Unit.job_id == job_id, Unit.phase == phase)
        free = select(Unit.number).where(*its).limit(1).with_for_update(skip_locked=True)
        if leads:
            left_first = case((Unit.state == UnitState.LEFT, 0), else_=1)
            free = free.where(Unit.state.in_((UnitState.OPEN, UnitState.LEFT))).order_by(left_first, Unit.number)
        else:
            is_running = exists().where(Job.id == job_id, Job.state == JobState.RUNNING)
            free = free.where(Unit.state == UnitState.OPEN, Unit.runs < _MOST_RUNS, is_running)
            free = free.order_by(Unit.number.desc())
        taking = (
            update(Unit)
            .where(*its, Unit.number == free.scalar_subquery(), Unit.state.in_((UnitState.OPEN, UnitState.LEFT)))
            .values(
                state=UnitState.RUNNING,
                holder=holder,
                lease_until=None if leads else time.time() + self.settings.lease_seconds,
                runs=Unit.runs + 1,
            )
            .returning(Unit.number, Unit.runs)
        )
        mine = select(Unit.number, Unit.runs).where(*its, Unit.state == UnitState.RUNNING, Unit.holder == holder)
        with self._store.session() as session:
            row = session.execute(mine).first() or session.execute(taking).first()
        return None if row is None else Taken(job_id, phase, row.number, holder, row.runs)

    def done(self, unit: Taken, result: Result) -> bool:
        """Record what a unit came to; False if it is another's by now."""
        recorded = (
            self._held(unit)
            .values(state=UnitState.DONE, result=dict(result), lease_until=None, finished_at=time.time())
            .returning(Unit.number)
        )
        its = (Unit.job_id == unit.job_id, Unit.phase == unit.phase, Unit.number == unit.number)
        mine = (Unit.state == UnitState.DONE, Unit.holder == unit.holder, Unit.runs == unit.run)
        with self._store.session() as session:
            if session.execute(recorded).first() is not None:
                return True
            return session.scalars(select(Unit.number).where(*its, *mine)).first() is not None

    # Assistants.

    def find(self, job_id: str) -> Job | None:
        """A job of this site that has units to take: this one, or another."""
        here = (Job.state == JobState.RUNNING, Job.site == self.settings.site)
        is_open = exists().where(Unit.job_id == Job.id, Unit.state == UnitState.OPEN, Unit.runs < _MOST_RUNS)
        this_first = case((Job.id == job_id, 0), else_=1)
        with self._store.reading() as session:
            query = select(Job).where(*here, is_open).order_by(this_first, Job.priority.desc(), Job.id)
            return session.scalars(query.limit(1)).first()

    def renew(self, job_id: str, unit: Taken | None) -> bool:
        """Keep a unit; whether it is still this worker's, and the job one that goes on."""
        with self._store.session() as session:
            kept = True
            if unit is not None:
                until = time.time() + self.settings.lease_seconds
                kept = (
                    session.execute(self._held(unit).values(lease_until=until).returning(Unit.number)).first()
                    is not None
                )
            state = session.scalars(select(Job.state).where(Job.id == job_id)).first()
        return kept and state in (JobState.RUNNING, JobState.QUEUED)

    def give_back(self, unit: Taken, *, failed: bool = False) -> None:
        """Let others take a unit; one at which an assistant `failed` is left to whoever leads, who may tell why."""
        state = UnitState.LEFT if failed else UnitState.OPEN
        with self._store.session() as session:
            session.execute(self._held(unit).values(state=state, holder=None, lease_until=None))

    def phase(self, job_id: str) -> str | None:
        """What a running job is at; None: it is not running."""
        with self._store.reading() as session:
            return session.scalars(select(Job.phase).where(Job.id == job_id, Job.state == JobState.RUNNING)).first()

    def others_wait(self, since: float) -> bool:
        """Whether a job that may start was announced since then: it goes before helping another."""
        waiting = select(Job.id).where(*may_start(self.settings.max_attempts), Job.announced_at > since)
        with self._store.reading() as session:
            return session.scalars(waiting.limit(1)).first() is not None

    # Workers.

    def idle(self) -> int:
        """How many workers of this site have nothing to do."""
        live = [worker.name for worker in living(self._store) if worker.site == self.settings.site]
        with self._store.reading() as session:
            busy = {*session.scalars(select(Job.holder).where(Job.state.in_(AT_WORK)))}
            busy |= {*session.scalars(select(Unit.holder).where(*held_units()))}
        at_work = {holder.partition("/")[0] for holder in busy if holder}
        return sum(name not in at_work for name in live)

    def open_units(self) -> list[tuple[str, int]]:
        """The running jobs of this site that assistants could help, and how many units are open."""
        began = Job.started_at <= time.time() - self.settings.alone_seconds
        here = (Job.state == JobState.RUNNING, Job.site == self.settings.site, began)
        is_open = (Unit.state == UnitState.OPEN, Unit.runs < _MOST_RUNS)
        query = select(Job.id, func.count()).join(Unit, Unit.job_id == Job.id).where(*here, *is_open).group_by(Job.id)
        with self._store.reading() as session:
            return [(row[0], row[1]) for row in session.execute(query)]

    @staticmethod
    def _held(unit: Taken) -> Any:
        its = (Unit.job_id == unit.job_id, Unit.phase == unit.phase, Unit.number == unit.number)
        return update(Unit).where(
            *its, Unit.state == UnitState.RUNNING, Unit.holder == unit.holder, Unit.runs == unit.run
        )


class Leading:
    """The share of the worker that holds a job (`merge_core.units.Share`)."""

    def __init__(
        self,
        store: JobStore,
        lease: Lease,
        *,
        stop: Callable[[], bool],
        prove: Callable[[], None],
        wake: Callable[[int], None],
    ) -> None:
        """`stop` raises `LeaseLost` where the job is another's, `prove` asks the database; `wake(count)` calls idle
        workers.
        """
        self._units, self._lease, self._stop, self._prove, self._wake = UnitStore(store), lease, stop, prove, wake
        self._taken: Taken | None = None
        self._results: dict[str, dict[int, Result]] = {}
        self._began = time.monotonic()
        self.unit_bytes: int | None = store.settings.unit_bytes

    def forget(self) -> None:
        self._ask(lambda: self._units.forget(self._lease))

    def open(self, phase: str, count: int) -> None:
        self._ask(lambda: self._units.open(self._lease, phase, count))
        if time.monotonic() - self._began >= self._units.settings.alone_seconds:
            self._wake(count - 1)

    def take(self, phase: str) -> int | None:
        lease = self._lease
        self._taken = self._ask(lambda: self._units.take(lease.job_id, phase, lease.holder, leads=True))
        return None if self._taken is None else self._taken.number

    def done(self, phase: str, number: int, result: Result) -> None:
        taken = self._taken
        assert taken is not None and (taken.phase, taken.number) == (phase, number)
        if not self._ask(lambda: self._units.done(taken, result)):
            raise LeaseLost(self._lease.job_id)

    def results(self, phase: str) -> Mapping[int, Result]:
        known = self._results.get(phase, {})
        self._results[phase] = self._ask(lambda: self._units.results(self._lease.job_id, phase, known))
        return self._results[phase]

    def again(self, phase: str, number: int) -> None:
        log.warning("%s: unit %d of %s is not what was recorded; doing it again", self._lease.job_id, number, phase)
        self._ask(lambda: self._units.again(self._lease, phase, number))
        self._results.get(phase, {}).pop(number, None)

    def wait(self) -> bool:
        time.sleep(_POLL_SECONDS)
        return True

    def prove(self) -> None:
        self._ask(self._prove)

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        return patiently(question, self._stop)


class Assisting:
    """The share of a worker that helps another (`merge_core.units.Share`); keeps its unit from a thread of its own."""

    def __init__(self, store: JobStore, job_id: str, holder: str) -> None:
        self._units, self._job_id, self._holder = UnitStore(store), job_id, holder
        self.settings: Settings = store.settings
        self.unit_bytes: int | None = store.settings.unit_bytes
        self._taken: Taken | None = None
        self._changing = threading.Lock()
        self._began, self._worked, self._renewed = time.time(), time.monotonic(), time.monotonic()
        self._is_over = self._failed = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="unit", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if (taken := self._taken) is not None:
            try:
                self._units.give_back(taken, failed=self._failed)
            except (OperationalError, InterfaceError):
                log.warning("unit %d of %s is given back when its lease runs out", taken.number, self._job_id)

    def fail(self) -> None:
        """The unit cannot be done here: leave it to whoever leads, who may tell why."""
        self._failed = True

    def stop(self) -> bool:
        """Never true: raises `NothingToDo` once the unit is another's, or has not been kept for so long that it may be,
        or the job is over.
        """
        is_stale = self._taken is not None and time.monotonic() - self._renewed > self.settings.lease_seconds
        if self._is_over or is_stale:
            raise NothingToDo(self._job_id)
        return False

    def forget(self) -> None:
        raise NotImplementedError("only whoever leads can forget")

    def open(self, phase: str, count: int) -> None:
        raise NotImplementedError("only whoever leads can open a phase")

    def take(self, phase: str) -> int | None:
        if self._ask(lambda: self._units.others_wait(self._began)):
            return None
        with self._changing:
            self._taken = self._ask(lambda: self._units.take(self._job_id, phase, self._holder, leads=False))
            self._renewed = time.monotonic()
        if self._taken is None:
            return None
        self._worked = time.monotonic()
        return self._taken.number

    def done(self, phase: str, number: int, result: Result) -> None:
        with self._changing:
            taken, self._taken = self._taken, None
            assert taken is not None and (taken.phase, taken.number) == (phase, number)
            if not self._ask(lambda: self._units.done(taken, result)):
                raise NothingToDo(self._job_id)
        self._worked = time.monotonic()

    def results(self, phase: str) -> Mapping[int, Result]:
        return {}

    def again(self, phase: str, number: int) -> None:
        raise NotImplementedError("only whoever leads can have a unit done again")

    def wait(self) -> bool:
        """Wait for the next phase, unless this was the last or another job has come."""
        if self._ask(lambda: self._units.others_wait(self._began)):
            return False
        phase = self._ask(lambda: self._units.phase(self._job_id))
        if phase is None or phase in _LAST_PHASES or time.monotonic() - self._worked > _IDLE_SECONDS:
            return False
        time.sleep(_POLL_SECONDS)
        return True

    def prove(self) -> None:
        raise NotImplementedError("only whoever leads finishes a job")

    def _keep(self) -> None:
        while not self._done.wait(self.settings.heartbeat_seconds):
            try:
                with self._changing:
                    at = time.monotonic()
                    if self._units.renew(self._job_id, self._taken):
                        self._renewed = at
                    else:
                        self._is_over = True
            except TROUBLE as error:
                log.warning("a unit of %s could not be kept, trying again: %s", self._job_id, said(error))
            except Exception:
                log.exception("a unit of %s could not be kept; trying again", self._job_id)

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        return patiently(question, self.stop)


def patiently(question: Callable[[], _Answer], stop: Callable[[], bool]) -> _Answer:
    """Ask the database until it answers, which after a lost connection it does; `stop` may end that by raising."""
    while True:
        try:
            return question()
        except (OperationalError, InterfaceError) as error:
            if stop():
                raise Canceled("the merge was canceled") from None
            log.warning("the database did not answer, trying again: %s", error.orig)
            time.sleep(_POLL_SECONDS)
