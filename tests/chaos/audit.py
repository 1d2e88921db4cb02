"""A second set of eyes inside the database: triggers that write down every move of every job and unit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, text

from workers.jobs import FINISHED, MOVES, JobState

_SQLITE_NOW = "(julianday('now') - 2440587.5) * 86400.0"
_POSTGRES_NOW = "extract(epoch from clock_timestamp())"
_COLUMNS = "at, what, job_id, phase, number, before, after, holder, runs, changed"
_JOB = "'job', NEW.id, NEW.phase, 0, OLD.state, NEW.state, coalesce(NEW.holder, OLD.holder), NEW.attempt"
_UNIT = "'unit', NEW.job_id, NEW.phase, NEW.number, OLD.state, NEW.state, coalesce(NEW.holder, OLD.holder), NEW.runs"
_WATCHED = {
    "jobs": (
        _JOB,
        ("state", "attempt", "files", "error"),
        ("files", "error"),
    ),
    "units": (_UNIT, ("state", "runs", "result"), ("result",)),
}
"""Of each table: what is written down, upon a change of which columns, and which of them are a result."""


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
                "number INTEGER, before TEXT, after TEXT, holder TEXT, runs INTEGER, changed INTEGER)"
            )
        )
        for table, (values, columns, results) in _WATCHED.items():
            for statement in (_sqlite if is_sqlite else _postgres)(table, values, columns, results):
                connection.exec_driver_sql(statement)


def _sqlite(table: str, values: str, columns: Sequence[str], results: Sequence[str]) -> Iterator[str]:
    differ = " OR ".join(f"OLD.{column} IS NOT NEW.{column}" for column in columns)
    result = " OR ".join(f"OLD.{column} IS NOT NEW.{column}" for column in results)
    yield (
        f"CREATE TRIGGER chaos_{table} AFTER UPDATE ON {table} WHEN {differ} BEGIN "
        f"INSERT INTO chaos_moves ({_COLUMNS}) VALUES ({_SQLITE_NOW}, {values}, ({result})); END"
    )


def _postgres(table: str, values: str, columns: Sequence[str], results: Sequence[str]) -> Iterator[str]:
    differ = " OR ".join(f"OLD.{column}::text IS DISTINCT FROM NEW.{column}::text" for column in columns)
    result = " OR ".join(f"OLD.{column}::text IS DISTINCT FROM NEW.{column}::text" for column in results)
    yield (
        f"CREATE FUNCTION chaos_{table}() RETURNS trigger AS $$ BEGIN "
        f"INSERT INTO chaos_moves ({_COLUMNS}) VALUES ({_POSTGRES_NOW}, {values}, ({result})::int); RETURN NULL; END "
        "$$ LANGUAGE plpgsql"
    )
    yield (
        f"CREATE TRIGGER chaos_{table} AFTER UPDATE ON {table} FOR EACH ROW WHEN ({differ}) "
        f"EXECUTE FUNCTION chaos_{table}()"
    )


def moves(engine: Engine) -> list[Move]:
    """Everything that was written down, in order."""
    with engine.connect() as connection:
        rows = connection.execute(text(f"SELECT {_COLUMNS} FROM chaos_moves ORDER BY seq")).all()
    return [Move(*row[:-1], changed=bool(row[-1])) for row in rows]


def violations(found: Sequence[Move], takeovers: Mapping[str, int], retries: Mapping[str, int]) -> Iterator[str]:
    """What must never happen and did. `takeovers`: how often each job could have been taken from its worker by faults;
    `retries`: how often somebody asked for it again.
    """
    attempts: Counter[str] = Counter()
    retried: Counter[str] = Counter()
    done: Counter[tuple[str, str, int]] = Counter()
    taken: Counter[tuple[str, str, int]] = Counter()
    for move in found:
        if move.what == "job":
            yield from _job_violations(move, attempts, retried)
        else:
            unit = (move.job_id, move.phase, move.number)
            taken[unit] = max(taken[unit], move.runs)
            if move.after == "done" and move.before != "done":
                done[unit] += 1
            if move.before == "done" and move.changed:
                yield f"{move.job_id}: the result of unit {move.phase}/{move.number} was written again"
    for job_id, count in retried.items():
        if count > retries.get(job_id, 0):
            yield f"{job_id} left a finished state {count} times, and was asked to {retries.get(job_id, 0)} times"
    for job_id, attempt in attempts.items():
        most = 1 + takeovers.get(job_id, 0) + retries.get(job_id, 0)
        if attempt > most:
            yield f"{job_id} was begun {attempt} times, where faults explain {most}"
    for unit, count in done.items():
        if count > 1 + retries.get(unit[0], 0):
            yield f"{unit[0]}: unit {unit[1]}/{unit[2]} was done {count} times"
    repeated: dict[str, int] = defaultdict(int)
    for unit, runs in taken.items():
        repeated[unit[0]] += runs - 1
    for job_id, count in repeated.items():
        most = takeovers.get(job_id, 0) + retries.get(job_id, 0)
        if count > most:
            yield f"{job_id}: {count} units were taken again, where faults explain {most}"


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
