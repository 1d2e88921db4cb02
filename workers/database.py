"""The database: SQLite in the data folder, or what a URL names; its tables are brought up to date when it is opened."""

from __future__ import annotations

import fcntl
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from merge_core.errors import WeightsmithError
from workers.settings import Settings

MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x77656967
"""The number of PostgreSQL's advisory lock under which one process migrates."""
TROUBLE = (OperationalError, InterfaceError, exc.TimeoutError)
"""What is raised where the database is not there, not willing, or busy for too long."""
Result = TypeVar("Result")
log = logging.getLogger(__name__)
_READS = "weightsmith_reads"
_LIKE = "it is like postgresql://user:password@host/database or sqlite:////folder/file"


class DatabaseUnavailable(WeightsmithError):
    """The database cannot be used; the message names no password."""

    code = "database-unavailable"
    title = "The database cannot be used"
    retryable = True


def open_database(settings: Settings, *, patience: float = 30.0) -> Engine:
    """An engine whose tables are as `workers.tables` says; whoever waits for another's lock, or for a connection, does
    so for `patience` seconds. Raises `DatabaseUnavailable`.
    """
    engine = open_engine(settings.database, patience)
    try:
        if not _is_current(engine):
            _migrate(engine, settings)
    except TROUBLE as error:
        engine.dispose()
        raise DatabaseUnavailable(f"the database {shown(engine.url)} cannot be used: {said(error)}") from None
    return engine


def open_engine(url: str | URL, patience: float) -> Engine:
    """An engine for SQLite (write-ahead log) or PostgreSQL (by psycopg). Raises `DatabaseUnavailable`."""
    try:
        url = make_url(url)
    except (ArgumentError, ValueError):
        raise DatabaseUnavailable(f"DATABASE_URL is no URL; {_LIKE}") from None
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        return _open_sqlite(url, patience)
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return _open_postgres(url.set(drivername="postgresql+psycopg"), patience)
    raise DatabaseUnavailable(f"DATABASE_URL begins with {url.drivername}://, which is not known here; {_LIKE}")


def shown(url: URL) -> str:
    """A URL as it may be told: passwords stand in its middle or among its parameters."""
    return url.set(query={}, drivername=url.get_backend_name()).render_as_string(hide_password=True)


def for_reading(engine: Engine) -> Engine:
    """The same engine, for transactions that only read: on SQLite they wait for no writer."""
    return engine.execution_options(**{_READS: True}, postgresql_readonly=True)


def _open_sqlite(url: URL, patience: float) -> Engine:
    engine = create_engine(
        url, hide_parameters=True, connect_args={"timeout": patience, "isolation_level": None}, pool_timeout=patience
    )

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        _write_ahead(cursor, patience)
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Whoever reads and then writes must hold the lock before: what was read would be old, and SQLite refuses then
        # at once, however long one is willing to wait.
        reads = connection.get_execution_options().get(_READS)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _write_ahead(cursor: sqlite3.Cursor, patience: float) -> None:
    """Switch to the write-ahead log. SQLite waits for nobody here, whatever its timeout: where several open a new
    database at once, all but one are refused.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _open_postgres(url: URL, patience: float) -> Engine:
    milliseconds = round(1000 * patience)
    limits = {
        "connect_timeout": max(2, round(patience)),
        "application_name": "weightsmith",
        # A host that vanished is noticed, and a process that was stopped in a transaction holds nobody up for long.
        "keepalives_idle": 30,
        "tcp_user_timeout": milliseconds,
        "options": f"-c statement_timeout={milliseconds} -c idle_in_transaction_session_timeout={2 * milliseconds}",
    }
    try:
        return create_engine(
            url,
            connect_args={name: value for name, value in limits.items() if name not in url.query},
            hide_parameters=True,
            pool_pre_ping=True,
            pool_timeout=patience,
            pool_size=5,
            max_overflow=15,
        )
    except ModuleNotFoundError:
        raise DatabaseUnavailable("PostgreSQL needs a package: pip install 'weightsmith[postgres]'") from None


def said(error: SQLAlchemyError) -> str:
    """What the database said, in one line, without the statement."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


def persistently(action: Callable[[], Result], seconds: float) -> Result:
    """Do something again while the database cannot be used, for so long. It must be right to do it twice: nobody knows
    whether what failed was written.
    """
    deadline = time.monotonic() + seconds
    wait = 0.1
    while True:
        try:
            return action()
        except TROUBLE as error:
            if time.monotonic() + wait > deadline:
                raise
            log.warning("the database cannot be used, trying again: %s", said(error))
        time.sleep(wait)
        wait = min(2 * wait, 2.0)


def head() -> str:
    """The newest revision: the migrations' names begin with their numbers."""
    return max(path.stem.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def revision(engine: Engine) -> str | None:
    """The revision that the database's tables are at; None: it is empty, or from before there were revisions."""
    with for_reading(engine).connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _is_current(engine: Engine) -> bool:
    return revision(engine) == head()


def _migrate(engine: Engine, settings: Settings) -> None:
    # Alembic costs a third of a second, which only who has something to migrate need pay.
    from alembic import command
    from alembic.config import Config

    with _alone(engine, settings) as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        tables = set(inspect(connection).get_table_names())
        if "jobs" in tables and "alembic_version" not in tables:
            has_kinds = "kind" in {column["name"] for column in inspect(connection).get_columns("jobs")}
            command.stamp(config, "0002" if has_kinds else "0001")
        command.upgrade(config, "head")


@contextmanager
def _alone(engine: Engine, settings: Settings) -> Iterator[Connection]:
    """A transaction in which no other process migrates."""
    if engine.dialect.name == "sqlite":
        with (settings.data / "migrating.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with engine.begin() as connection:
                yield connection
        return
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        yield connection
