"""That the chaos test sees what it is to see; `make chaos` is the test itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from tests.chaos import audit
from tests.chaos.faults import FAULTS, KillChild, KillWorker
from tests.chaos.merges import CASES, references, write_fine_tunes
from tests.chaos.run import Run
from tests.chaos.schedule import Moment, Planned, Wave, draw
from tests.chaos.world import World
from workers.jobs import JobState, JobStore
from workers.settings import Settings
from workers.tables import Job, Unit


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(Settings(data=tmp_path / "data"))
    audit.install(store.engine)
    yield store
    store.close()


def wrong(store: JobStore, job: Job, *, takeovers: int = 0, retries: int = 0) -> list[str]:
    found = audit.moves(store.engine)
    return list(audit.violations(found, {job.id: takeovers}, {job.id: retries}))


def test_an_ordinary_life_has_nothing_wrong(store: JobStore) -> None:
    job = store.add({}, {})
    lease = store.claim(job.id, "w/1")
    assert lease is not None
    store.succeed(lease, files=[], warnings=[], progress={})
    moves = audit.moves(store.engine)
    assert [(move.before, move.after) for move in moves] == [("queued", "running"), ("running", "succeeded")]
    assert all(abs(move.at - time.time()) < 60 for move in moves)
    assert wrong(store, job) == []


def test_a_finished_job_that_moves_is_seen(store: JobStore) -> None:
    job = store.add({}, {})
    store.cancel(job.id)
    with store.session() as session:
        session.execute(update(Job).where(Job.id == job.id).values(state=JobState.RUNNING))
    assert wrong(store, job) == [f"{job.id} moved from canceled to running"]


def test_a_result_written_twice_is_seen(store: JobStore) -> None:
    job = store.add({}, {})
    with store.session() as session:
        session.add(Unit(job_id=job.id, phase="merging", number=0))
    for result in ({"a": 1}, {"a": 2}):
        with store.session() as session:
            session.execute(update(Unit).values(state="done", result=result, runs=1))
    assert wrong(store, job) == [f"{job.id}: unit merging/0 was done and became done"]


def test_more_attempts_than_faults_are_seen(store: JobStore) -> None:
    job = store.add({}, {})
    for _ in range(3):
        assert store.claim(job.id, "w/1")
        store.release("w/")
    assert wrong(store, job, takeovers=1) == [f"{job.id} was begun 3 times, where faults explain 2"]
    assert wrong(store, job, takeovers=2) == []


def _world(folder: Path) -> World:
    return World(folder / "world", folder / "models", folder / "data", "filesystem", "sqlite", is_small_disk=False)


def test_a_seed_tells_all(tmp_path: Path) -> None:
    world = _world(tmp_path)
    waves = draw(7, 50, CASES, FAULTS, world)
    assert list(map(str, waves)) == list(map(str, draw(7, 50, CASES, FAULTS, world)))
    assert sum(len(wave.cases) for wave in waves) == 50
    happens = {type(planned.fault) for wave in waves for planned in wave.faults}
    assert happens == {kind for kind in FAULTS if kind.fits(world)}, "each has its turn"


@pytest.mark.slow
@pytest.mark.xdist_group("service")
def test_a_little_chaos(tmp_path: Path) -> None:
    """A job whose worker is killed, child first."""
    case = next(case for case in CASES if case.title == "model stock")
    write_fine_tunes(tmp_path / "models")
    wanted = references(tmp_path / "models", tmp_path / "references", [case])
    kills = (Planned(KillChild(), Moment("fraction", 0.2), 1), Planned(KillWorker(), Moment("fraction", 0.6), 2))
    world = _world(tmp_path)
    with world.running():
        outcome = Run(world, wanted).go([Wave((case,), kills)])
    assert outcome.wrong == [] and outcome.ends == {"succeeded": 1}
    assert len(outcome.recoveries) == 2
