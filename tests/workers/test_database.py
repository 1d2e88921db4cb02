"""The tables are what the migrations make, from nothing or from what an older version left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import text

from workers.database import MIGRATIONS, head, open_database, open_engine, revision
from workers.jobs import JobKind, JobStore
from workers.settings import Settings
from workers.tables import LOCAL_OWNER, Base


def test_the_tables_are_what_the_migrations_make(tmp_path: Path) -> None:
    engine = open_database(Settings(data=tmp_path))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    assert revision(engine) == head()
    engine.dispose()


@pytest.mark.parametrize("left_by", ["0001", "0002"])
def test_what_an_older_version_left_is_kept(tmp_path: Path, left_by: str) -> None:
    settings = Settings(data=tmp_path)
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


def test_many_processes_may_start_at_once(tmp_path: Path) -> None:
    program = f"from workers.jobs import *; JobStore(Settings(data={str(tmp_path)!r})).add({{}}, {{}})"
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(60) for process in started] == [0] * 4
    store = JobStore(Settings(data=tmp_path))
    assert len(store.page()) == 4
    store.close()
