"""What is accepted fits: promises of disk are made one after the other, and end with their jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sqlalchemy import select

from merge_core.errors import InsufficientStorage
from merge_core.progress import Progress
from tests.conftest import write_checkpoint
from workers import reservations
from workers.celery_app import make_celery
from workers.jobs import JobStore
from workers.queue import Queue
from workers.settings import Settings
from workers.tables import Job
from workers.tasks import Keeper, run_job

MB = 10**6
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(Settings(data=tmp_path / "data", disk_reserve=10 * MB))  # type: ignore[arg-type]
    yield store
    store.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A disk that is as free as the test says."""
    said = {"free": 100 * MB}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000 * MB, 0, said["free"]))
    return said


def test_two_that_do_not_fit_together_are_not_both_accepted(store: JobStore, disk: dict[str, int]) -> None:
    store.add({}, {}, reserved_bytes=60 * MB)
    with pytest.raises(InsufficientStorage) as refused:
        store.add({}, {}, reserved_bytes=31 * MB)
    assert "needs 0.031 GB; 0.100 GB are free, of which 0.060 GB are promised" in str(refused.value)
    assert "0.010 GB are given to none" in str(refused.value)
    store.add({}, {}, reserved_bytes=30 * MB)
    assert len(store.page()) == 2


def test_of_many_at_once_no_more_are_accepted_than_fit(store: JobStore, disk: dict[str, int]) -> None:
    """Whatever process and thread they come from."""
    results: list[bool] = []

    def submit() -> None:
        mine = JobStore(store.settings)
        try:
            mine.add({}, {}, reserved_bytes=20 * MB)
            results.append(True)
        except InsufficientStorage:
            results.append(False)
        finally:
            mine.close()

    threads = [threading.Thread(target=submit) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 6 + [True] * 4


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
def test_a_promise_ends_with_its_job(store: JobStore, disk: dict[str, int], end: str) -> None:
    job = store.add({}, {}, reserved_bytes=90 * MB)
    if end == "cancel":
        store.cancel(job.id)
    else:
        lease = store.claim(job.id, "w/1")
        assert lease
        if end == "fail":
            store.fail(lease, {"code": "x"})
        else:
            store.succeed(lease, files=[], warnings=[], progress={})
    store.add({}, {}, reserved_bytes=90 * MB)


def test_what_is_written_already_is_not_counted_twice(store: JobStore, disk: dict[str, int]) -> None:
    job = store.add({}, {}, reserved_bytes=60 * MB)
    lease = store.claim(job.id, "w/1")
    assert lease
    folder = store.settings.artifacts / f".{job.id}.1.partial"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 50 * MB)
    disk["free"] = 50 * MB
    with pytest.raises(InsufficientStorage):
        store.add({}, {}, reserved_bytes=31 * MB)
    store.add({}, {}, reserved_bytes=29 * MB)
    # The same after it was handed back, and by the job's own measure.
    store.release("w/", died=False)
    assert store.claim(job.id, "v/1")
    with store.session() as session:
        reservations.check(session, store.settings, job.id)


def test_a_job_is_not_begun_where_others_filled_the_disk_meanwhile(store: JobStore, disk: dict[str, int]) -> None:
    first, second = (store.add({}, {}, reserved_bytes=40 * MB) for _ in range(2))
    disk["free"] = 60 * MB
    with store.session() as session:
        reservations.check(session, store.settings, first.id)
    assert store.claim(first.id, "w/1") and store.claim(second.id, "v/1")
    with pytest.raises(InsufficientStorage), store.session() as session:
        reservations.check(session, store.settings, second.id)


def test_a_submitted_job_reserves_what_its_plan_writes(store: JobStore) -> None:
    plan = {"bytes_written": 5000, "bytes_beside": 300, "tensors": 2}
    Queue(store, make_celery(store.settings)).submit({}, plan)
    with store.session() as session:
        assert session.scalars(select(Job.reserved_bytes)).one() == reservations.needed(plan) > 5300 + 2 * 512


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 120 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED, a full disk: only root can mount one here ({mounted.stderr.decode().strip()})")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_in_the_middle_fails_the_job_and_keeps_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"layers.{i}.w": torch.ones(500_000) for i in range(20)}
    write_checkpoint(tmp_path / "models" / "m", tensors)
    settings = Settings(data=small / "data", model_roots=[tmp_path / "models"], disk_reserve=0)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    store = JobStore(settings)
    recipe = {"merge_method": "linear", "models": [{"model": "m"}], "parameters": {"weight": 1}}
    store.add({**recipe, "outputs": {"max_shard_size": "2MB"}}, {}, reserved_bytes=40 * MB)
    tell = Keeper.report

    def report(keeper: Keeper, progress: Progress) -> None:
        tell(keeper, progress)
        if progress.tensors_done == 1 and not (small / "ballast").exists():
            left = shutil.disk_usage(small).free - 2**20
            descriptor = os.open(small / "ballast", os.O_CREAT | os.O_WRONLY)
            os.posix_fallocate(descriptor, 0, left)
            os.close(descriptor)

    monkeypatch.setattr(Keeper, "report", report)

    run_job("")

    (job,) = store.page()
    assert (small / "ballast").exists(), "it was full"
    assert job.state == "failed" and job.error and job.error["code"] == "insufficient-storage", job.error
    assert list(settings.artifacts.iterdir()) == []
    store.close()
