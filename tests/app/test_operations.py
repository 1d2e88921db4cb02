"""What those who run the service see: metrics and readiness tell the truth, cheaply."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import String, cast, insert, inspect, literal, select, update

from app.cli import main
from app.main import create_app
from workers import alive, database
from workers.jobs import JobKind, JobStore
from workers.settings import Settings
from workers.supervisor import Supervisor
from workers.tables import Job


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data")


@pytest.fixture
def store(settings: Settings) -> Iterator[JobStore]:
    store = JobStore(settings)
    yield store
    store.close()


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


def metrics(client: TestClient) -> dict[tuple[Any, ...], float]:
    """Each sample by its name, without the prefix, and the values of its labels in the order of their names."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name.removeprefix("weightsmith_"), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_are_what_happened(client: TestClient, store: JobStore) -> None:
    ties, linear, lost, patch = (
        store.add({}, {"method": "ties"}, reserved_bytes=7),
        store.add({}, {"method": "linear"}),
        store.add({}, {"method": "ties"}),
        store.add({}, {}, kind=JobKind.PATCH),
    )
    queued = [store.add({}, {}, reserved_bytes=100) for _ in range(3)]
    leases = [store.claim(job.id, "w/1") for job in (ties, linear, lost, patch)]
    assert all(leases)
    first, second, _, last = leases
    assert first and second and last
    store.succeed(first, files=[], warnings=[], progress={})
    store.fail(second, {"code": "x"})
    store.succeed(last, files=[], warnings=[], progress={})
    store.cancel(queued[0].id)
    store.count_phases(JobKind.MERGE, {"merging": 1.5, "measuring": 0.5})
    store.count_phases(JobKind.MERGE, {"merging": 2.0})
    with store.session() as session:
        session.execute(update(Job).where(Job.id == lost.id).values(lease_until=time.time() - 1))
    alive.report(store, "worker-1", device="cuda:0")

    assert metrics(client)["running",] == 1
    store.give_back_expired()
    found = metrics(client)

    assert {key: value for key, value in found.items() if key[0] in ("merges_total", "jobs_total")} == {
        ("merges_total", "ties", "succeeded"): 1,
        ("merges_total", "linear", "failed"): 1,
        ("merges_total", "", "canceled"): 1,
        ("jobs_total", "merge", "succeeded"): 1,
        ("jobs_total", "merge", "failed"): 1,
        ("jobs_total", "merge", "canceled"): 1,
        ("jobs_total", "patch", "succeeded"): 1,
    }
    assert found["lease_expired_total",] == 1
    assert found["queue_depth",] == 3 and found["running",] == 0 and found["queue_oldest_seconds",] > 0
    assert found["disk_reserved_bytes",] == 200 and found["disk_free_bytes",] > 0
    assert found["workers", "cuda:0"] == 1
    assert found["merge_phase_seconds_sum", "merge", "merging"] == 3.5
    assert found["merge_phase_seconds_count", "merge", "merging"] == 2


def test_requests_are_measured(client: TestClient) -> None:
    client.get("/v1/merges")
    name = "http_request_duration_seconds_count"
    assert metrics(client)[name, "GET", "/v1/merges", "200"] >= 1


def test_no_metric_names_a_job_or_an_owner(client: TestClient, store: JobStore) -> None:
    job = store.add({}, {"method": "ties"}, owner="somebody")
    lease = store.claim_next("w/1")
    assert lease
    store.fail(lease, {"code": "x"})
    client.get(f"/v1/merges/{job.id}")
    assert job.id not in (text := client.get("/metrics").text) and "somebody" not in text


def test_a_scrape_costs_the_same_after_100_000_jobs(client: TestClient, store: JobStore) -> None:
    """By CPU time of the least of several scrapes; the many jobs are there at once, as after a year."""

    def cost() -> float:
        costs = []
        for _ in range(7):
            started = time.process_time()
            client.get("/metrics")
            costs.append(time.process_time() - started)
        return min(costs)

    store.add({}, {"method": "ties"}, reserved_bytes=5)
    few = cost()
    ended = {
        **{"kind": "merge", "owner": "local", "state": "succeeded", "phase": "", "version": 3, "events": 3},
        **{"recipe": {}, "plan": {}, "labels": {}, "progress": {}, "warnings": [], "files": [], "priority": 0},
        **{"reserved_bytes": 0, "stored_bytes": 1, "attempt": 1, "deaths": 0, "announced": 1, "announced_at": 0.0},
        "created_at": 0.0,
    }
    numbers = select(literal(1).label("number")).cte(recursive=True)
    numbers = numbers.union_all(select(numbers.c.number + 1).where(numbers.c.number < 100_000))
    columns = {each.name: each for each in inspect(Job).columns} | {"id": "mrg_many" + cast(numbers.c.number, String)}
    with store.engine.begin() as connection:
        connection.execute(insert(Job).values({**ended, "id": "mrg_one"}))
        copies = select(*columns.values()).join(numbers, literal(True)).where(Job.id == "mrg_one")
        connection.execute(insert(Job).from_select(list(columns), copies))
    assert cost() < 3 * few + 0.01
    assert metrics(client)["queue_depth",] == 1 and metrics(client)["disk_reserved_bytes",] == 5


def readiness(client: TestClient) -> tuple[int, dict[str, Any]]:
    answer = client.get("/readyz")
    return answer.status_code, answer.json()


def test_a_worker_that_reported_is_seen_and_one_that_fell_silent_is_not(client: TestClient, store: JobStore) -> None:
    assert readiness(client)[1]["checks"]["workers"]["status"] == "warning", "jobs are taken all the same"
    alive.report(store, "worker-1", device="cpu")
    assert readiness(client)[1]["checks"]["workers"] == {"status": "ok", "detail": "1 reported lately"}
    later = time.time() + 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        assert readiness(client)[1]["checks"]["workers"]["status"] == "warning"
    alive.take_leave(store, "worker-1")
    assert readiness(client)[1]["checks"]["workers"]["status"] == "warning"


def test_not_ready_where_the_disk_is_full(tmp_path: Path) -> None:
    with TestClient(create_app(Settings(data=tmp_path / "data", disk_reserve="1000TB"))) as client:  # type: ignore[arg-type]
        status, body = readiness(client)
    assert status == 503 and body["code"] == "not-ready" and "disk: " in body["detail"]
    assert [name for name, check in body["checks"].items() if check["status"] == "failing"] == ["disk"]


def test_not_ready_with_another_version_s_tables(client: TestClient, store: JobStore) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    status, body = readiness(client)
    assert status == 503 and "revision 9999" in body["checks"]["database"]["detail"]


def test_not_ready_where_nothing_can_be_written(client: TestClient, settings: Settings) -> None:
    with sqlite3.connect(settings.data / "jobs.sqlite", isolation_level=None) as lock:
        lock.execute("BEGIN IMMEDIATE")
        status, body = readiness(client)
        lock.execute("ROLLBACK")
    assert status == 503 and body["checks"]["database"]["status"] == "failing"
    assert readiness(client)[0] == 200


def test_tables_may_be_made_before_anything_starts(settings: Settings) -> None:
    for _ in range(2):
        made = CliRunner().invoke(main, ["migrate", "--data", str(settings.data)])
        assert made.exit_code == 0 and f"tables at revision {database.head()}" in made.output
    with TestClient(create_app(settings)) as client:
        assert client.get("/readyz").status_code == 200


def test_a_file_is_touched_as_long_as_all_workers_live(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which a container without HTTP is known to be well."""
    file = tmp_path / "alive"
    monkeypatch.setattr(alive, "REPORT_SECONDS", 0)
    supervisor = Supervisor(settings.model_copy(update={"alive_file": file, "workers": 2}))
    running = dict.fromkeys(supervisor.workers, False)
    monkeypatch.setattr(type(supervisor.workers[0]), "is_running", property(running.__getitem__))
    for how_many, is_touched in ((0, False), (1, False), (2, True)):
        for worker in supervisor.workers[:how_many]:
            running[worker], worker.name = True, f"worker-{id(worker)}"
        supervisor._report()
        assert file.exists() == is_touched
    supervisor._store.close()
