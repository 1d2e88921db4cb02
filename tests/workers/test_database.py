"""The tables are what the migrations make, from nothing or from what an older version left."""

from __future__ import annotations

import itertools
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import URL, make_url, select, text, update
from sqlalchemy.exc import InternalError, OperationalError

from tests.services import Postgres
from workers.database import MIGRATIONS, DatabaseUnavailable, head, open_database, open_engine, revision
from workers.jobs import JobKind, JobStore
from workers.settings import Settings
from workers.tables import LOCAL_OWNER, Base, Job


def test_the_tables_are_what_the_migrations_make(tmp_path: Path, empty_database: dict[str, str]) -> None:
    engine = open_database(Settings(data=tmp_path, **empty_database))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    assert revision(engine) == head()
    engine.dispose()


@pytest.mark.parametrize("left_by", ["0001", "0002"])
def test_what_an_older_version_left_is_kept(tmp_path: Path, empty_database: dict[str, str], left_by: str) -> None:
    settings = Settings(data=tmp_path, **empty_database)
    engine = open_engine(settings.database, 5)
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, left_by)
        connection.execute(text("DROP TABLE alembic_version"))  # which there was not
        connection.execute(
            text(
                "INSERT INTO jobs (id, state, phase, recipe, plan, progress, warnings, files, attempt, deaths, owner,"
                " announced, announced_at, created_at) VALUES ('mrg_1', 'running', 'merging', '{}', '{}', '{}', '[]',"
                " '[]', 1, 0, 'w/1', 1, 0, 0)"
            )
        )
    engine.dispose()

    store = JobStore(settings)
    (job,) = store.page()
    assert (job.id, job.kind, job.owner, job.holder) == ("mrg_1", JobKind.MERGE, LOCAL_OWNER, "w/1")
    store.release("w/")
    assert [event.data for event in store.events("mrg_1")] == [{"status": "queued"}]
    store.close()


def test_many_processes_may_start_at_once(tmp_path: Path, empty_database: dict[str, str]) -> None:
    settings = {"data": str(tmp_path), **empty_database}
    program = f"from workers.jobs import *; JobStore(Settings(**{settings})).add({{}}, {{}})"
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait(300) for process in started] == [0] * 3
    store = JobStore(Settings(**settings))
    assert len(store.page()) == 3
    store.close()


def test_processes_claim_each_job_once(tmp_path: Path, database: dict[str, str]) -> None:
    """Twenty jobs, three processes that want all of them, and reapers between them: no job is taken twice."""
    settings = {"data": str(tmp_path), "lease_seconds": 60, **database}
    store = JobStore(Settings(**settings))
    jobs = [store.add({}, {}) for _ in range(20)]
    program = (
        f"import os\nfrom workers.jobs import *\nstore = JobStore(Settings(**{settings}))\n"
        "while lease := store.claim_next(f'w/{os.getpid()}'):\n"
        "    store.give_back_expired(); store.give_up(); store.end_late(); print(lease.job_id)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(3)
    ]
    taken = [process.communicate(timeout=300)[0].split() for process in started]
    assert [process.returncode for process in started] == [0] * 3
    assert sorted(itertools.chain(*taken)) == sorted(job.id for job in jobs)
    assert {job.attempt for job in store.page()} == {1}
    store.close()


def test_who_reads_and_then_writes_loses_nothing(tmp_path: Path, database: dict[str, str]) -> None:
    """Counted up by many threads, each of which reads first: with the row held, as PostgreSQL needs it said."""
    store = JobStore(Settings(data=tmp_path, **database))
    job = store.add({}, {})

    def count() -> None:
        for _ in range(10):
            with store.session() as session:
                found = session.scalars(select(Job).where(Job.id == job.id).with_for_update()).one()
                found.priority += 1

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(count) for _ in range(4)]:
            done.result()
    found = store.get(job.id)
    assert found is not None and found.priority == 40
    store.close()


def test_readers_do_not_wait_for_a_writer(tmp_path: Path, database: dict[str, str]) -> None:
    store = JobStore(Settings(data=tmp_path, **database), patience=1)
    job = store.add({}, {})
    with store.session() as session:
        session.execute(update(Job).values(priority=7))
        found = store.get(job.id)
        assert found is not None and found.priority == 0, "what is not committed is not read"
    assert [found.priority for found in store.page()] == [7]
    store.close()


@pytest.mark.xdist_group("postgres")
def test_what_only_reads_cannot_write(tmp_path: Path, postgres: Postgres) -> None:
    with postgres.database() as url:
        store = JobStore(Settings(data=tmp_path, database_url=url))
        with pytest.raises(InternalError, match="read-only transaction"), store.reading() as session:
            session.execute(update(Job).values(priority=7))
        store.close()


def test_a_writer_waits_as_long_as_it_is_willing_to(tmp_path: Path, database: dict[str, str]) -> None:
    stores = [JobStore(Settings(data=tmp_path, **database), patience=seconds) for seconds in (60, 60, 1)]
    first, patient, hasty = stores
    job = first.add({}, {})
    with first.session() as session:
        session.execute(update(Job).where(Job.id == job.id).values(priority=1))
        with pytest.raises(OperationalError):
            hasty.claim(job.id, "w/1")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(patient.claim, job.id, "w/1")
            time.sleep(0.5)
            assert not waiting.done()
            session.commit()
            assert waiting.result(60) is not None
    for store in stores:
        store.close()


@pytest.mark.xdist_group("postgres")
def test_dropped_connections_are_made_again(tmp_path: Path, postgres: Postgres) -> None:
    with postgres.database() as url:
        store = JobStore(Settings(data=tmp_path, database_url=url))
        job = store.add({}, {})
        assert postgres.drop_connections(url) > 0
        assert store.get(job.id) is not None, "a connection is tried before it is used"
        with pytest.raises(OperationalError), store.session() as session:
            session.execute(update(Job).values(priority=7))
            postgres.drop_connections(url)
        found = store.get(job.id)
        assert found is not None and found.priority == 0, "what was not committed did not happen"
        store.close()


SECRET = "p@ss/wörd:1"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"mysql://me:{quote(SECRET, '')}@host/db", r"mysql://, which is not known here; it is like postgresql://"),
        (f"postgresql+asyncpg://me:{quote(SECRET, '')}@host/db", "not known here"),
        ("nonsense", "DATABASE_URL is no URL; it is like"),
        (
            f"postgresql://me:{quote(SECRET, '')}@127.0.0.1:1/db",
            r"postgresql://me:\*\*\*@127.0.0.1:1/db .*refused",
        ),
        (f"postgresql://me@127.0.0.1:1/db?password={quote(SECRET, '')}", "refused"),
        ("sqlite:////nowhere/at/all", "unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_in_words(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(DatabaseUnavailable, match=said) as raised:
        JobStore(Settings(data=tmp_path, database_url=url))
    told = "".join(traceback.format_exception(raised.value))
    assert SECRET not in told and quote(SECRET, "") not in told


def test_a_new_database_is_waited_for_while_somebody_writes_in_it(tmp_path: Path) -> None:
    """The switch to the write-ahead log is refused at once where somebody else has the lock."""
    writer = sqlite3.connect(tmp_path / "new.db", isolation_level=None, check_same_thread=False)
    writer.execute("BEGIN EXCLUSIVE")
    url = f"sqlite:///{tmp_path / 'new.db'}"
    with pytest.raises(OperationalError, match="locked"):
        open_engine(url, 0.1).connect()
    release = threading.Timer(0.3, writer.rollback)
    release.start()
    with open_engine(url, 30).connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
    release.join()
    writer.close()


def test_a_driver_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(DatabaseUnavailable, match=r"pip install 'weightsmith\[postgres\]'"):
        JobStore(Settings(data=tmp_path, database_url="postgresql://host/db"))


@pytest.mark.xdist_group("postgres")
def test_a_socket_and_a_password_with_odd_characters(tmp_path: Path, postgres: Postgres) -> None:
    with postgres.database() as url:
        made = make_url(url)
        postgres.run(f"CREATE ROLE \"o'dd\" SUPERUSER LOGIN PASSWORD '{SECRET}'")
        through = URL.create(
            "postgresql",
            "o'dd",
            SECRET,
            database=made.database,
            query={"host": str(postgres.sockets), "port": str(made.port)},
        )
        store = JobStore(Settings(data=tmp_path, database_url=through.render_as_string(hide_password=False)))
        assert store.page() == []
        store.close()
        postgres.run('DROP ROLE "o\'dd"')
