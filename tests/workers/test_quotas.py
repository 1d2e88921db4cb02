"""Quotas: nobody gets more than they may, however many ask at once, and whoever waits is not forgotten."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.cli import main
from app.main import create_app
from tests.conftest import method_recipe
from workers import quotas
from workers.celery_app import make_celery
from workers.jobs import JobStore, Lease
from workers.keys import USUAL, KeyRing
from workers.queue import Queue
from workers.quotas import UNLIMITED, QuotaExceeded, QuotaTooSmall
from workers.settings import Settings
from workers.tables import LOCAL_OWNER, Job

PLAN = {"bytes_read": 600, "bytes_written": 400}
MakeStore = Callable[..., JobStore]


@pytest.fixture
def stores(tmp_path: Path, database: dict[str, str]) -> Iterator[MakeStore]:
    """Makes stores on one database, with limits for everybody."""
    made: list[JobStore] = []

    def make(**limits: int) -> JobStore:
        settings = Settings(data=tmp_path / "data", lease_seconds=60, redeliver_seconds=0.001, **database)
        limited = settings.model_copy(update={f"quota_{name}": limit for name, limit in limits.items()})
        made.append(JobStore(limited))
        return made[-1]

    yield make
    for store in made:
        store.close()


def limit(store: JobStore, owner: str, **changed: int | None) -> None:
    with store.session() as session:
        quotas.set_limits(session, owner, changed)


def used(store: JobStore, owner: str) -> dict[str, int]:
    with store.reading() as session:
        return quotas.used(session, owner)


def refused(store: JobStore, owner: str = "ann", **fields: Any) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as error:
        store.add({}, PLAN, owner=owner, **fields)
    return error.value


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """What so many threads come to that begin together."""
    start, found = threading.Barrier(count), []

    def run(i: int) -> None:
        start.wait()
        try:
            found.append(act(i))
        except QuotaExceeded as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    return found


def test_nobody_has_limits_unless_they_are_set(stores: MakeStore) -> None:
    store = stores()
    for _ in range(3):
        store.add({}, PLAN, owner="ann", reserved_bytes=10**6)
    with store.reading() as session:
        assert set(quotas.limits(session, store.settings, "ann").values()) == {None}


@pytest.mark.parametrize(
    ("limits", "fields", "name"),
    [
        ({"queued_jobs": 3}, {}, "queued_jobs"),
        ({"daily_bytes": 3999}, {}, "daily_bytes"),
        ({"disk_bytes": 399}, {"reserved_bytes": 100}, "disk_bytes"),
    ],
)
def test_of_many_at_once_as_many_come_in_as_may(
    stores: MakeStore, limits: dict[str, int], fields: dict[str, int], name: str
) -> None:
    store = stores(**limits)
    found = at_once(8, lambda i: store.add({}, PLAN, owner="ann", **fields))
    over = [each for each in found if isinstance(each, QuotaExceeded)]
    assert len(found) - len(over) == 3 and {each.limit for each in over} == {name}
    assert used(store, "ann")["queued_jobs"] == 3
    store.add({}, PLAN, owner="ben", **fields)


def test_waiting_helps_or_does_not(stores: MakeStore) -> None:
    store = stores(queued_jobs=1, job_bytes=5000, daily_bytes=2500, disk_bytes=1000)
    first = store.add({}, PLAN, owner="ann", reserved_bytes=700)
    again = refused(store)
    assert (again.limit, again.used, again.allowed) == ("queued_jobs", 1, 1)
    assert again.retryable and again.retry_after > 0 and not isinstance(again, QuotaTooSmall)
    store.cancel(first.id)
    full = refused(store, reserved_bytes=1001)
    assert isinstance(full, QuotaTooSmall) and full.limit == "disk_bytes" and "delete" in str(full)
    store.cancel(store.add({}, PLAN, owner="ann", reserved_bytes=1000).id)
    spent = refused(store)
    assert (spent.limit, spent.used, spent.asked) == ("daily_bytes", 2000, 1000)
    assert 86_000 < spent.retry_after <= 86_401, "when the first is a day old"
    with store.session() as session:
        session.execute(update(Job).where(Job.id == first.id).values(created_at=time.time() - 90_000))
    store.add({}, PLAN, owner="ann")
    for size, name in ((5001, "job_bytes"), (2501, "daily_bytes")):
        with pytest.raises(QuotaTooSmall) as error:
            store.add({}, {"bytes_read": size}, owner="ann")
        assert error.value.limit == name and not error.value.retryable
    assert used(store, "ann")["daily_bytes"] == 2000


def test_a_retry_is_a_job_that_waits(stores: MakeStore) -> None:
    store = stores(queued_jobs=1, disk_bytes=1000)
    first = store.add({}, PLAN, owner="ann", reserved_bytes=700)
    store.cancel(first.id)
    second = store.add({}, PLAN, owner="ann", reserved_bytes=100)
    with pytest.raises(QuotaExceeded):
        store.retry(first.id)
    found = store.get(first.id)
    assert found is not None and found.state == "canceled"
    lease = store.claim_next("w/1")
    assert lease is not None and lease.job_id == second.id
    store.succeed(lease, files=[{"path": "a", "size": 400, "sha256": ""}], warnings=[], progress={})
    with pytest.raises(QuotaTooSmall):
        store.retry(first.id)
    store.delete(second.id)
    assert store.retry(first.id)


def test_what_is_stored_counts_until_it_is_deleted(stores: MakeStore) -> None:
    store = stores(disk_bytes=1000)
    store.add({}, PLAN, owner="ann", reserved_bytes=900)
    lease = store.claim_next("w/1")
    assert lease is not None and used(store, "ann") == {
        **{"running_jobs": 1, "queued_jobs": 0, "daily_bytes": 1000, "disk_bytes": 900}
    }
    store.succeed(lease, files=[{"path": "a", "size": 600, "sha256": ""}], warnings=[], progress={})
    assert used(store, "ann")["disk_bytes"] == 600
    store.add({}, PLAN, owner="ann", reserved_bytes=400)
    assert refused(store, reserved_bytes=1).used == 1000
    with store.session() as session:
        session.execute(update(Job).where(Job.id == lease.job_id).values(deleted_at=time.time()))
    store.add({}, PLAN, owner="ann", reserved_bytes=600)


def test_an_owner_s_limits_come_before_the_service_s(stores: MakeStore) -> None:
    store = stores(queued_jobs=1)
    limit(store, "ann", queued_jobs=2, daily_bytes=10**6)
    limit(store, "ben", queued_jobs=UNLIMITED)
    store.add({}, PLAN, owner="ann")
    store.add({}, PLAN, owner="ann")
    assert refused(store).allowed == 2
    for _ in range(4):
        store.add({}, PLAN, owner="ben")
        store.add({}, PLAN, owner=LOCAL_OWNER)
    limit(store, "ann", queued_jobs=None)
    assert refused(store).allowed == 1
    limit(store, LOCAL_OWNER, queued_jobs=0)
    assert isinstance(refused(store, LOCAL_OWNER), QuotaTooSmall)
    with pytest.raises(ValueError, match="there is no limit 'jobs'"):
        limit(store, "ann", jobs=1)


def test_a_job_over_the_limit_waits_while_others_run(stores: MakeStore) -> None:
    store = stores(running_jobs=2)
    for i in range(4):
        store.add({}, {}, owner="ann", priority=9 - i)
    store.add({}, {}, owner="ben")
    taken = [store.claim_next(f"w{i}/1") for i in range(5)]
    owners = [lease.owner for lease in taken if lease]
    assert owners == ["ann", "ann", "ben"] and taken[3:] == [None, None]
    first = taken[0]
    assert first is not None
    store.succeed(first, files=[], warnings=[], progress={})
    after = store.claim_next("w9/1")
    assert after is not None and after.owner == "ann" and store.claim_next("w9/2") is None


def test_workers_at_once_start_no_more_than_may_run(stores: MakeStore) -> None:
    """On PostgreSQL none of them sees what the others start, until the owner's row makes them wait."""
    store = stores(running_jobs=2)
    for _ in range(10):
        store.add({}, {}, owner="ann")
    for round_ in range(3):
        at_once(6, lambda i, round_=round_: store.claim_next(f"w{round_}.{i}/1"))
        assert 1 <= used(store, "ann")["running_jobs"] <= 2
    while store.claim_next("w/1"):
        pass
    assert used(store, "ann")["running_jobs"] == 2, "and no fewer, once they ask one after the other"


def test_whoever_waited_for_a_place_is_announced_when_there_is_one(stores: MakeStore) -> None:
    """Their messages were taken in vain by workers that had to leave them; no time of waiting grows from that."""
    store = stores(running_jobs=1)
    queue = Queue(store, make_celery(store.settings))
    jobs = [store.add({}, {}, owner="ann") for _ in range(3)]
    lease: Lease | None = store.claim_next("w/1")
    assert lease is not None
    time.sleep(0.01)
    for _ in range(5):
        queue.reap()
    assert store.overdue() == []
    waiting = [store.get(job.id) for job in jobs[1:]]
    assert [job.announced for job in waiting if job] == [0, 0]
    store.succeed(lease, files=[], warnings=[], progress={})
    assert store.overdue() == [job.id for job in jobs[1:]]


def test_over_http(models: Path, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "data", model_roots=[models], auth="keys", quota_queued_jobs=1)
    store = JobStore(settings)
    secret = KeyRing(store).create("ann", USUAL)[1]

    def said(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(main, ["owners", *arguments, "--data", str(settings.data)])
        assert result.exit_code == status, result.output
        return result.output

    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {secret}"}) as client:
        assert client.post("/v1/merges", json=method_recipe("linear")).status_code == 202
        over = client.post("/v1/merges", json=method_recipe("linear"))
        assert over.status_code == 429 and int(over.headers["retry-after"]) > 0
        body = over.json()
        assert (body["code"], body["limit"], body["used"], body["allowed"]) == ("quota-exceeded", "queued_jobs", 1, 1)
        assert body["retryable"] and "1 jobs wait already" in body["detail"]
        told = client.get("/v1/quota").json()
        assert told["owner"] == "ann" and told["limits"]["queued_jobs"] == 1 and told["limits"]["job_bytes"] is None
        assert told["used"]["queued_jobs"] == 1 and told["used"]["daily_bytes"] > 0 < told["used"]["disk_bytes"]
        said("limit", "ann", "--queued-jobs", "none", "--job-bytes", "1kB")
        never = client.post("/v1/merges", json=method_recipe("linear"))
        assert never.status_code == 403 and never.json()["code"] == "quota" and "retry-after" not in never.headers
        said("limit", "ann", "--job-bytes", "usual")
        assert client.post("/v1/merges", json=method_recipe("linear")).status_code == 202
    assert "ann  running_jobs 0 of any, queued_jobs 2 of any" in said("list")
    assert "say which limit" in said("limit", "ann", status=2)
    assert "is no limit" in said("limit", "ann", "--queued-jobs", "-3", status=2)
    store.close()
