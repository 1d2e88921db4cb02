"""Several workers at one merge, over real HTTP: any of them may die, freeze or be told to stop at any moment."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import method_recipe, write_checkpoint
from tests.services import Job, Service, eventually, running_service
from workers.counters import JANITOR, take_turn
from workers.jobs import JobStore
from workers.settings import Settings
from workers.tables import Job as Row
from workers.tables import Unit

pytestmark = pytest.mark.xdist_group("service")
SHARED = {
    "WEIGHTSMITH_UNIT_BYTES": "100KB",
    "WEIGHTSMITH_ALONE_SECONDS": "0",
    "WEIGHTSMITH_KERNELS": "plain",
    "WEIGHTSMITH_THREADS": "1",
    "WEIGHTSMITH_LEASE_SECONDS": "120",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 3 MB in 24 tensors, each of which is a unit."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"model.layers.{i}.w": torch.randn(250, 250, generator=generator).bfloat16() for i in range(24)}
        write_checkpoint(folder / name, tensors, shards=2)
    return folder


@dataclass
class Watched:
    """A service and what its database says."""

    service: Service
    store: JobStore
    hasty: JobStore

    def units(self, job: Job) -> list[Unit]:
        with self.store.reading() as session:
            return list(session.scalars(select(Unit).where(Unit.job_id == job["id"])))

    def ended(self, job: Job) -> tuple[Job, list[Unit]]:
        """The job when it has ended, and its units."""
        return self.service.ended(job), self.units(job)

    def leader(self, job: Job) -> psutil.Process:
        with self.store.reading() as session:
            holder = session.scalars(select(Row.holder).where(Row.id == job["id"])).one()
        return psutil.Process(int(str(holder).partition("/")[2]))

    def assistants(self, job: Job) -> set[int]:
        """The processes that have units under leases of their own."""
        held = [unit for unit in self.units(job) if unit.state == "running" and unit.lease_until is not None]
        return {int(str(unit.holder).partition("/")[2]) for unit in held}

    @contextmanager
    def leader_waits(self, job: Job) -> Iterator[set[int]]:
        """Hold the leader back as soon as it has opened a phase, until another has come to assist; who it was."""
        eventually(lambda: self.units(job))
        leader = self.leader(job)
        for _ in range(20):
            eventually(lambda: self._suspended_outside_of_a_transaction(leader))
            with contextlib.suppress(AssertionError):
                came = eventually(lambda: self.assistants(job), 10)
                break
            leader.resume()
            time.sleep(0.05)  # it was held back before it had called anybody
        else:
            raise AssertionError("nobody came to assist")
        try:
            yield came
        finally:
            leader.resume()

    def _suspended_outside_of_a_transaction(self, process: psutil.Process) -> bool:
        """Inside of one it would keep everybody else from writing, and nobody could assist."""
        process.suspend()
        with contextlib.suppress(OperationalError), self.hasty.session():
            return True
        process.resume()
        return False


@contextmanager
def watched(tmp_path: Path, models: Path, **settings: str) -> Iterator[Watched]:
    here = Settings(data=tmp_path / "data")
    with closing(JobStore(here)) as store, closing(JobStore(here, patience=0.5)) as hasty:
        with store.session() as session:
            assert take_turn(session, JANITOR, 3600), "no rows are swept away while they are looked at"
        with running_service(tmp_path / "data", models, **SHARED | settings) as service:
            yield Watched(service, store, hasty)


def whole(models: Path, out: Path, recipe: dict[str, Any]) -> dict[str, str]:
    return {file.path: file.sha256 for file in merge(Recipe.from_data(recipe), out, roots=[models]).files}


@pytest.mark.faults
def test_workers_share_a_merge(models: Path, tmp_path: Path) -> None:
    recipe = method_recipe("ties-model", outputs={"max_shard_size": "1MB"})
    with watched(tmp_path, models, WEIGHTSMITH_WORKERS="2") as world:
        job = world.service.post(recipe)
        with world.leader_waits(job):
            pass
        job, units = world.ended(job)
        assert job["status"] == "succeeded", job["error"]
        assert job["attempt"] == 1 and job["progress"]["tensors_done"] == 24 and job["progress"]["fraction"] == 1.0
        assert world.service.files(job) == whole(models, tmp_path / "whole", recipe)
        assert world.service.artifacts() == [job["id"]]
        assert {unit.runs for unit in units} == {1} and {unit.state for unit in units} == {"done"}
        assert len({unit.holder for unit in units}) == 2
        assert {unit.phase.partition(" ")[0] for unit in units} == {"measuring", "merging"}


@pytest.mark.slow
def test_a_worker_that_joins_helps_and_one_that_is_stopped_hands_back(models: Path, tmp_path: Path) -> None:
    recipe = method_recipe("ties-model")
    with watched(tmp_path, models, WEIGHTSMITH_WORKERS="1") as world:
        job = world.service.post(recipe)
        with world.service.more_workers() as joined, world.leader_waits(job):
            joined.terminate()
            assert joined.wait(30) == 0
            assert world.assistants(job) == set()
        job, units = world.ended(job)
        assert job["status"] == "succeeded", job["error"]
        assert world.service.files(job) == whole(models, tmp_path / "whole", recipe)
        assert sum(unit.runs - 1 for unit in units) <= 1


def kill(pid: int) -> None:
    """`kill -9` of the worker that a child works for; its supervisor ends the child."""
    worker = psutil.Process(pid).parent()
    assert worker is not None
    worker.kill()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_each_death_repeats_at_most_the_unit_in_hand(models: Path, tmp_path: Path, seed: int) -> None:
    """`kill -9` of whoever is at it, leader or assistant, at random points."""
    chance = random.Random(seed)
    recipe = method_recipe("ties-model")
    settings = {"WEIGHTSMITH_WORKERS": "2", "WEIGHTSMITH_MAX_ATTEMPTS": "50"}
    deaths = 0
    with watched(tmp_path, models, **settings) as world:
        job = world.service.post(recipe)
        with world.leader_waits(job) as came:
            if seed == 1:
                kill(came.pop())
                deaths += 1
        while deaths < 3 and world.service.job(job)["status"] not in ("succeeded", "failed"):
            time.sleep(chance.uniform(0, 1.5))
            with contextlib.suppress(psutil.NoSuchProcess, IndexError, ValueError):
                at_it = {world.leader(job).pid} | world.assistants(job)
                kill(chance.choice(sorted(at_it)))
                deaths += 1
        ended, units = world.ended(job)
        assert ended["status"] == "succeeded", ended["error"]
        assert world.service.files(job) == whole(models, tmp_path / "whole", recipe)
        assert world.service.artifacts() == [job["id"]]
        assert sum(unit.runs - 1 for unit in units) <= deaths


@pytest.mark.slow
def test_a_frozen_assistant_holds_nobody_up(models: Path, tmp_path: Path) -> None:
    recipe = method_recipe("ties-model")
    with watched(tmp_path, models, WEIGHTSMITH_WORKERS="2", WEIGHTSMITH_LEASE_SECONDS="20") as world:
        job = world.service.post(recipe)
        with world.leader_waits(job) as came:
            psutil.Process(came.pop()).suspend()
        ended = world.service.ended(job)
        assert ended["status"] == "succeeded", ended["error"]
        assert world.service.files(job) == whole(models, tmp_path / "whole", recipe)


@pytest.mark.slow
def test_cancel_ends_all_workers_work(models: Path, tmp_path: Path) -> None:
    with watched(tmp_path, models, WEIGHTSMITH_WORKERS="2") as world:
        job = world.service.post(method_recipe("ties-model"))
        with world.leader_waits(job):
            pass
        started = time.monotonic()
        assert world.service.http.post(job["urls"]["cancel"]).status_code in (200, 202)
        assert world.service.ended(job)["status"] == "canceled"
        assert time.monotonic() - started < 2.0
        eventually(lambda: not world.assistants(job), 10)
        eventually(lambda: world.service.artifacts() == [])
