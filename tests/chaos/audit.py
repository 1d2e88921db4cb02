"""A second set of eyes inside the database: triggers that write down every move of every job and unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, text

from workers.database import for_reading
from workers.jobs import FINISHED, MOVES, JobState

_COLUMNS = "at, what, job_id, phase, number, before, after, holder, runs, changed"
_JOB = "'job', NEW.id, NEW.phase, 0, OLD.state, NEW.state, coalesce(NEW.holder, OLD.holder), NEW.attempt"
_UNIT = "'unit', NEW.job_id, NEW.phase, NEW.number, OLD.state, NEW.state, coalesce(NEW.holder, OLD.holder), NEW.runs"
_GONE = "'unit', OLD.job_id, OLD.phase, OLD.number, OLD.state, 'gone', OLD.holder, OLD.runs"
DONE, RUNNING, GONE = "done", "running", "gone"
"""States of units; one whose row is removed is gone: its job is begun anew in an empty folder, or deleted."""
WORKERS = 3
"""The most that can be at one job: each may have a unit in hand when all of them lose their leases."""


@dataclass(frozen=True)
class Move:
    """A change of a job's or a unit's row; `changed`: its result changed too."""

    at: float
    what: str
    job_id: str
    phase: str
    number: int
    before: str
    after: str
    holder: str | None
    runs: int
    changed: bool


def install(engine: Engine) -> None:
    """Watch the tables from now on."""
    is_sqlite = engine.dialect.name == "sqlite"
    serial = "INTEGER PRIMARY KEY AUTOINCREMENT" if is_sqlite else "BIGSERIAL PRIMARY KEY"
    with engine.begin() as connection:
        connection.execute(
            text(
                f"CREATE TABLE chaos_moves (seq {serial}, at DOUBLE PRECISION, what TEXT, job_id TEXT, phase TEXT, "
                "number INTEGER, before TEXT, after TEXT, holder TEXT, runs INTEGER, changed BOOLEAN)"
            )
        )
        differs = ("OLD.{0} IS NOT NEW.{0}" if is_sqlite else "OLD.{0}::text IS DISTINCT FROM NEW.{0}::text").format
        result = f"{differs('files')} OR {differs('error')}"
        moved = f"({differs('state')} OR {differs('attempt')} OR {result}) AND NEW.deleted_at IS NULL"
        _watch(connection, "UPDATE", "jobs", moved, f"{_JOB}, {result}")
        taken = f"{differs('state')} OR {differs('runs')} OR {differs('result')}"
        _watch(connection, "UPDATE", "units", taken, f"{_UNIT}, {differs('result')}")
        _watch(connection, "DELETE", "units", "1 = 1", f"{_GONE}, 1 = 0")


def _watch(connection: Connection, event: str, table: str, when: str, values: str) -> None:
    """Write down `values` after an `event`, of rows of which `when` is true."""
    name = f"chaos_{table}_{event}".lower()
    happens = f"TRIGGER {name} AFTER {event} ON {table}"
    insert = f"INSERT INTO chaos_moves ({_COLUMNS}) VALUES"
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(
            f"CREATE {happens} WHEN {when} BEGIN {insert} ((julianday('now') - 2440587.5) * 86400.0, {values}); END"
        )
        return
    connection.exec_driver_sql(
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"{insert} (extract(epoch from clock_timestamp()), {values}); RETURN NULL; END $$"
    )
    connection.exec_driver_sql(f"CREATE {happens} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION {name}()")


def moves(engine: Engine) -> list[Move]:
    """Everything that was written down, in order."""
    with for_reading(engine).connect() as connection:
        rows = connection.execute(text(f"SELECT {_COLUMNS} FROM chaos_moves ORDER BY seq")).all()
    return [Move(*row[:-1], changed=bool(row[-1])) for row in rows]


def violations(found: Sequence[Move], takeovers: Mapping[str, int], retries: Mapping[str, int]) -> Iterator[str]:
    """What must never happen and did. `takeovers`: how often each job could have been taken from its worker by faults;
    `retries`: how often somebody asked for it again.
    """
    attempts: Counter[str] = Counter()
    retried: Counter[str] = Counter()
    done: set[tuple[str, str, int]] = set()
    for move in found:
        unit = (move.job_id, move.phase, move.number)
        if move.what == "job":
            yield from _job_violations(move, attempts, retried)
        elif move.after == GONE:
            done.discard(unit)
        elif move.after == DONE and move.before != DONE:
            if unit in done:
                yield f"{move.job_id}: unit {move.phase}/{move.number} was done twice"
            done.add(unit)
        elif move.before == DONE and (move.after != DONE or move.changed):
            yield f"{move.job_id}: unit {move.phase}/{move.number} was done and became {move.after}"
    for job_id, count in retried.items():
        if count > retries.get(job_id, 0):
            yield f"{job_id} left a finished state {count} times, and was asked to {retries.get(job_id, 0)} times"
    for job_id, attempt in attempts.items():
        most = 1 + takeovers.get(job_id, 0) + retries.get(job_id, 0)
        if attempt > most:
            yield f"{job_id} was begun {attempt} times, where faults explain {most}"
    for job_id, count in repeated(found).items():
        most = WORKERS * (takeovers.get(job_id, 0) + retries.get(job_id, 0))
        if count > most:
            yield f"{job_id}: {count} units were taken again, where faults explain {most}"


def repeated(found: Sequence[Move]) -> Mapping[str, int]:
    """How many units of each job were taken more than once, where it was not begun anew in an empty folder."""
    taken: Counter[tuple[str, str, int]] = Counter()
    counts: Counter[str] = Counter()
    for move in found:
        if move.what == "unit":
            unit = (move.job_id, move.phase, move.number)
            if move.after == GONE:
                del taken[unit]
            elif move.after == RUNNING and move.before != RUNNING:
                counts[move.job_id] += taken[unit] > 0
                taken[unit] += 1
    return counts


def _job_violations(move: Move, attempts: Counter[str], retried: Counter[str]) -> Iterator[str]:
    before, after = JobState(move.before), JobState(move.after)
    attempts[move.job_id] = max(attempts[move.job_id], move.runs)
    if before is after:
        if before in FINISHED and move.changed:
            yield f"{move.job_id} is {before}, and its result was changed"
        return
    if before in (JobState.FAILED, JobState.CANCELED) and after is JobState.QUEUED:
        retried[move.job_id] += 1
    elif after not in MOVES[before]:
        yield f"{move.job_id} moved from {before} to {after}"
