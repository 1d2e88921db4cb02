"""Whose turn it is: priority, then whoever has the least running, then age; and never past a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from workers.jobs import JobStore, Lease, LeaseLost
from workers.settings import Settings
from workers.tables import Job


@pytest.fixture
def store(tmp_path: Path, database: dict[str, str]) -> Iterator[JobStore]:
    store = JobStore(Settings(data=tmp_path / "data", lease_seconds=60, max_attempts=3, **database))
    yield store
    store.close()


def taken(store: JobStore, count: int) -> list[str]:
    """The recipes of the next jobs, in the order in which workers take them."""
    leases = [store.claim_next(f"w{i}/1") for i in range(count)]
    assert all(leases)
    return [str(lease.recipe) for lease in leases if lease]


def test_the_highest_priority_first_then_the_oldest(store: JobStore) -> None:
    for name, priority in [("a", 0), ("b", -5), ("c", 7), ("d", 0), ("e", 7)]:
        store.add(name, {}, priority=priority)  # type: ignore[arg-type]
    assert taken(store, 5) == ["c", "e", "a", "d", "b"]
    assert store.claim_next("w/1") is None


def test_owners_take_turns(store: JobStore) -> None:
    """A thousand jobs of one do not keep another waiting; within a priority only."""
    for i in range(4):
        store.add(f"many{i}", {}, owner="many")  # type: ignore[arg-type]
    for i in range(2):
        store.add(f"few{i}", {}, owner="few")  # type: ignore[arg-type]
    store.add("urgent", {}, owner="many", priority=1)  # type: ignore[arg-type]
    assert taken(store, 7) == ["urgent", "few0", "many0", "few1", "many1", "many2", "many3"]


def test_many_workers_take_every_job_once(store: JobStore) -> None:
    jobs = {store.add({}, {}, owner=f"o{i % 3}", priority=i % 2).id for i in range(24)}
    found: list[Lease] = []

    def work(name: str) -> None:
        while lease := store.claim_next(name):
            found.append(lease)

    threads = [threading.Thread(target=work, args=(f"w{i}/1",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.job_id for lease in found) == sorted(jobs)


def test_what_kills_its_workers_is_passed_over(store: JobStore) -> None:
    deadly = store.add("deadly", {}, priority=9)  # type: ignore[arg-type]
    store.add("good", {})  # type: ignore[arg-type]
    for i in range(3):
        assert store.claim(deadly.id, f"w{i}/1")
        store.release(f"w{i}/")
    assert taken(store, 1) == ["good"]


def test_no_job_outlives_its_deadline(store: JobStore) -> None:
    queued, running, canceling = (store.add({}, {}, deadline_at=time.time() + 1000) for _ in range(3))
    lease = store.claim(running.id, "w/1")
    assert lease and store.claim(canceling.id, "v/1")
    store.cancel(canceling.id)
    assert store.end_late() == [], "not before its time"
    with store.session() as session:
        session.execute(update(Job).values(deadline_at=time.time() - 1))

    assert store.claim_next("x/1") is None
    assert sorted(store.end_late()) == sorted([queued.id, running.id])

    for job in (queued, running):
        found = store.get(job.id)
        assert found and found.state == "failed" and found.error and found.error["code"] == "deadline-exceeded"
        assert found.finished_at and store.events(job.id)[-1].data["error"] == found.error
    with pytest.raises(LeaseLost):
        store.heartbeat(lease, phase="merging", progress={})
    left = store.get(canceling.id)
    assert left and left.state == "canceling", "somebody wanted it stopped, and so it ends"
    assert store.end_late() == []
