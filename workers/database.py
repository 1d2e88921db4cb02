"""The database: SQLite in the data folder, or what a URL names; its tables are brought up to date when it is opened."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text

from workers.settings import Settings

MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x77656967
"""The number of PostgreSQL's advisory lock under which one process migrates."""


def open_database(settings: Settings, *, patience: float = 30.0) -> Engine:
    """An engine whose tables are as `workers.tables` says. On SQLite a writer waits `patience` seconds for others."""
    engine = open_engine(settings.database, patience)
    if not _is_current(engine):
        _migrate(engine, settings)
    return engine


def open_engine(url: str | URL, patience: float) -> Engine:
    """An engine for SQLite (write-ahead log) or PostgreSQL (by psycopg)."""
    url = make_url(url)
    if url.get_backend_name() != "sqlite":
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": patience})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


def head() -> str:
    """The newest revision: the migrations' names begin with their numbers."""
    return max(path.stem.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def revision(engine: Engine) -> str | None:
    """The revision that the database's tables are at; None: it is empty, or from before there were revisions."""
    with engine.connect() as connection:
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
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        yield connection
