"""After a sweep nothing is on the disk that no row names, and nothing is gone that one does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import DeclarativeBase

from merge_core.shards import unfinished
from workers import janitor
from workers.artifacts import open_artifacts
from workers.counters import take_turn
from workers.janitor import DAY, Janitor, created
from workers.jobs import JobStore, new_id
from workers.settings import Settings
from workers.tables import Event, IdempotencyKey, Job, Unit


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(Settings(data=tmp_path / "data", keep_days=7))
    yield store
    store.close()


def sweep(store: JobStore) -> None:
    Janitor(store, open_artifacts(store.settings)).sweep_now()


def later(store: JobStore, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Sweep as it will be done then."""
    now = time.time() + seconds
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now)
        sweep(store)


def job_in(store: JobStore, state: str) -> Job:
    """A job in a state, with a finished folder and two unfinished ones."""
    job = store.add({}, {})
    if state != "queued":
        lease = store.claim(job.id, "w/1")
        assert lease
        if state == "succeeded":
            store.succeed(lease, files=[{"path": "x", "size": 5}], warnings=[], progress={})
        elif state == "failed":
            store.fail(lease, {"code": "x"})
        elif state in ("canceling", "canceled"):
            store.cancel(job.id)
            if state == "canceled":
                store.confirm_cancel(lease)
    for name in (job.id, f".{job.id}.1.partial", f".{job.id}.2.partial"):
        (store.settings.artifacts / name).mkdir()
        (store.settings.artifacts / name / "x").write_text("hello")
    return job


def folders(store: JobStore) -> set[str]:
    return {path.name for path in store.settings.artifacts.iterdir()}


KEPT: dict[str, Callable[[str], set[str]]] = {
    "queued": lambda job: {job, f".{job}.1.partial", f".{job}.2.partial"},
    "running": lambda job: {job, f".{job}.1.partial", f".{job}.2.partial"},
    "canceling": lambda job: {job, f".{job}.1.partial", f".{job}.2.partial"},
    "succeeded": lambda job: {job},
    "failed": lambda job: set(),
    "canceled": lambda job: set(),
}
"""What is left of a job in each state."""


def test_in_every_state_a_job_keeps_what_it_needs_and_no_more(store: JobStore) -> None:
    jobs = {state: job_in(store, state) for state in KEPT}
    sweep(store)
    assert folders(store) == set().union(*(KEPT[state](job.id) for state, job in jobs.items()))
    sweep(store)
    assert folders(store) == set().union(*(KEPT[state](job.id) for state, job in jobs.items()))


def test_what_no_row_names_goes_unless_it_is_young_or_not_ours(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = new_id("mrg_")
    mine = {orphan, f".{orphan}.3.partial"}
    others = {"lost+found", "mrg_notes", ".keep", "README"}
    for name in mine | others:
        (store.settings.artifacts / name).mkdir()
    sweep(store)
    assert folders(store) == mine | others, "another process may just be making it"
    later(store, monkeypatch, 3600)
    assert folders(store) == others


def test_what_a_worker_is_still_at_is_left_to_it(store: JobStore) -> None:
    job = job_in(store, "failed")
    left = store.settings.artifacts / f".{job.id}.1.partial"
    (left / "x").unlink()
    with unfinished(left):
        sweep(store)
        assert folders(store) == {left.name}
    sweep(store)
    assert folders(store) == set()


def test_deleted_jobs_take_their_files_along(store: JobStore) -> None:
    job = job_in(store, "succeeded")
    with store.session() as session:
        session.execute(update(Job).values(deleted_at=time.time()))
    sweep(store)
    assert folders(store) == set()
    assert store.get(job.id) is None


def test_artifacts_expire(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(store, "succeeded")
    later(store, monkeypatch, 6.9 * DAY)
    assert folders(store) == {job.id}
    later(store, monkeypatch, 7.1 * DAY)
    found = store.get(job.id)
    assert folders(store) == set() and found
    assert found.state == "succeeded" and found.stored_bytes == 0 and found.expires_at
    told = store.events(job.id)[-1]
    later(store, monkeypatch, 7.2 * DAY)
    assert "expired" in told.data["message"] and store.events(job.id)[-1].seq == told.seq, "told once"


def test_they_are_kept_for_ever_unless_somebody_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(Settings(data=tmp_path / "data"))
    job = job_in(store, "succeeded")
    later(store, monkeypatch, 9999 * DAY)
    assert folders(store) == {job.id}
    store.close()


def test_another_store_is_swept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    store = JobStore(Settings(data=tmp_path / "data", artifact_store=str(kept)))
    good, bad = (job_in(store, state) for state in ("succeeded", "failed"))
    orphan = new_id("mrg_")
    for name in (good.id, bad.id, orphan):
        (kept / name).mkdir(parents=True)
    sweep(store)
    assert {path.name for path in kept.iterdir()} == {good.id, orphan}
    assert folders(store) == set(), "what the store has need not be here too"
    later(store, monkeypatch, 3600)
    assert {path.name for path in kept.iterdir()} == {good.id}
    store.close()


def rows(store: JobStore, table: type[DeclarativeBase]) -> int:
    with store.session() as session:
        return session.scalars(select(func.count()).select_from(table)).one()


def test_old_rows_go(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, active = job_in(store, "succeeded"), job_in(store, "running")
    with store.session() as session:
        for job in (ended, active):
            session.add(Unit(job_id=job.id, phase="merging", number=0))
        key: dict[str, Any] = {"owner": "local", "digest": "", "job_id": ended.id}
        session.add(IdempotencyKey(key="old", created_at=time.time() - 1.1 * DAY, **key))
        session.add(IdempotencyKey(key="new", created_at=time.time() - 0.9 * DAY, **key))
    events = rows(store, Event)
    sweep(store)
    assert rows(store, Unit) == 1 and rows(store, IdempotencyKey) == 1 and rows(store, Event) == events
    later(store, monkeypatch, 31 * DAY)
    assert [event.kind for event in store.events(ended.id)] == []
    assert len(store.events(active.id)) == 2, "a job that goes on keeps what happened to it"


def test_hashes_that_nobody_asked_for_in_a_month_go(store: JobStore) -> None:
    hashes = store.settings.cache / "sha256"
    hashes.mkdir(parents=True)
    now = time.time()
    for name, days in (("old", 31), ("used", 29)):
        (hashes / name).touch()
        os.utime(hashes / name, (now - days * DAY, now - 60 * DAY))
    sweep(store)
    assert [path.name for path in hashes.iterdir()] == ["used"]


def test_one_sweeps_at_a_time(store: JobStore) -> None:
    with store.session() as session:
        assert take_turn(session, "x", 60) and not take_turn(session, "x", 60)
        assert take_turn(session, "y", -1) and take_turn(session, "y", -1), "its time is over"
    first, second = (Janitor(store, open_artifacts(store.settings)) for _ in range(2))
    with first._alone() as mine, second._alone() as theirs:
        assert mine and not theirs


def test_a_sweep_of_many_costs_little_of_the_time(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes again the later the longer it took."""
    times = iter([0.0, 7.0, 7.0, 500.0, 800.0, 808.0, 808.0])
    monkeypatch.setattr(janitor, "time", SimpleNamespace(time=time.time, monotonic=lambda: next(times)))
    swept: list[None] = []
    lazy = Janitor(store, open_artifacts(store.settings))
    monkeypatch.setattr(lazy, "sweep_now", lambda: swept.append(None))
    for _ in range(3):
        lazy.sweep()
    assert len(swept) == 2


def test_ids_tell_when_they_were_made() -> None:
    assert created(new_id("mrg_")) == pytest.approx(time.time(), abs=5)
