"""Each request has an id, a line in the log that tells nothing private, and an answer whatever happens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.measures import REQUEST_SECONDS
from tests.conftest import method_recipe
from workers.jobs import JobStore
from workers.settings import Settings


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", model_roots=[models])


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings)

    @app.get("/broken/{what}")
    def broken(what: str) -> None:
        raise ZeroDivisionError(what)

    with TestClient(app) as client:
        yield client


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "app.requests")
    return caplog


def test_the_caller_s_id_is_taken_and_one_made_where_there_is_none(client: TestClient) -> None:
    assert client.get("/v1/merges", headers={"X-Request-ID": "a1.b-c"}).headers["X-Request-ID"] == "a1.b-c"
    made = {client.get("/v1/merges").headers["X-Request-ID"] for _ in range(3)}
    assert len(made) == 3 and all(each.startswith("req_") for each in made)


@pytest.mark.parametrize("given", ["", "x" * 101, "a b", '"', "<script>", "-", "é".encode()])
def test_an_id_that_is_no_id_is_replaced(client: TestClient, given: str | bytes) -> None:
    answer = client.get("/v1/merges", headers={"X-Request-ID": given})
    assert answer.status_code == 200 and answer.headers["X-Request-ID"].startswith("req_")


def test_problems_and_jobs_tell_the_id(client: TestClient, settings: Settings) -> None:
    mine = {"X-Request-ID": "mine"}
    problem = client.get("/v1/merges/nope", headers=mine)
    assert problem.status_code == 404 and problem.json()["request_id"] == "mine"
    job = client.post("/v1/merges", json=method_recipe("linear"), headers=mine).json()
    store = JobStore(settings)
    found = store.get(job["id"])
    assert found and found.request_id == "mine"
    lease = store.claim_next("w/1")
    assert lease and lease.request_id == "mine"
    store.close()


def test_a_line_names_the_route_and_nothing_private(client: TestClient, told: pytest.LogCaptureFixture) -> None:
    client.get("/v1/merges/mrg_private?token=secret")
    client.get("/no/such/route?token=secret")
    lines = [record for record in told.records if record.name == "app.requests"]
    assert [(line.method, line.route, line.status) for line in lines] == [  # type: ignore[attr-defined]
        ("GET", "/v1/merges/{job_id}", 404),
        ("GET", "unknown", 404),
    ]
    assert all(line.ms > 0 for line in lines)  # type: ignore[attr-defined]
    assert "secret" not in str([vars(line) for line in lines]) and "private" not in str([vars(line) for line in lines])


def test_what_nobody_expected_is_a_problem_with_an_id_and_a_traceback_in_the_log(
    client: TestClient, told: pytest.LogCaptureFixture
) -> None:
    answer = client.get("/broken/x", headers={"X-Request-ID": "mine"})
    assert answer.status_code == 500 and answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "internal-error" and answer.json()["request_id"] == "mine"
    assert "ZeroDivisionError" not in answer.text
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in told.records)


def test_durations_are_measured_by_route(client: TestClient) -> None:
    def count() -> float:
        samples = REQUEST_SECONDS.collect()[0].samples
        mine = {"method": "GET", "route": "/v1/merges/{job_id}", "status": "404"}
        return sum(each.value for each in samples if each.name.endswith("_count") and each.labels == mine)

    before = count()
    for name in ("a", "b"):
        client.get(f"/v1/merges/{name}")
    assert count() == before + 2


@pytest.mark.parametrize(
    "address",
    [
        *("/v1/merges/a%00b", "/v1/merges/a%00b/files/x", "/v1/merges?after=a%00", "/v1/api-keys/a%00"),
        *("/hub/api/models/merges/a%00b", "/hub/api/models?cursor=%00", "/hub/merges/x/resolve/main/%00"),
    ],
)
def test_no_name_with_a_nul_gets_as_far_as_the_database(client: TestClient, address: str) -> None:
    """PostgreSQL would not even compare it with others."""
    for verb in ("GET", "HEAD", "DELETE"):
        answer = client.request(verb, address)
        assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"
    assert "NUL" in client.get(address).json()["detail"]
