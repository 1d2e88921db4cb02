"""Jobs as resources: keys that make a request safe to repeat, waiting, paging, labels, retry, delete."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.main import create_app
from tests.conftest import method_recipe
from workers.artifacts import open_artifacts
from workers.janitor import Janitor
from workers.jobs import JobKind, JobStore, Lease
from workers.problems import problem_of
from workers.queue import artifact_folder, partial_folder
from workers.settings import Settings
from workers.tables import IdempotencyKey

RECIPE = method_recipe("linear")
HOUR = 3600.0


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", model_roots=[models])


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def store(settings: Settings) -> Iterator[JobStore]:
    """The store as a worker sees it."""
    store = JobStore(settings)
    yield store
    store.close()


def post(client: TestClient, query: str = "", **headers: str) -> dict[str, Any]:
    answer = client.post(f"/v1/merges{query}", json=RECIPE, headers=headers)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def claimed(store: JobStore, job: dict[str, Any]) -> Lease:
    lease = store.claim(job["id"], "w/1")
    assert lease is not None
    return lease


# The same request twice.


def test_the_same_key_and_request_make_one_job(client: TestClient) -> None:
    key = {"Idempotency-Key": "a-key"}
    first = client.post("/v1/merges?label=a:b", json=RECIPE, headers=key)
    again = client.post("/v1/merges?label=a:b&wait=0", json=RECIPE, headers=key)
    assert first.status_code == again.status_code == 202
    assert "idempotency-replayed" not in first.headers and again.headers["idempotency-replayed"] == "true"
    assert again.json() == first.json() and again.headers["location"] == first.headers["location"]
    assert len(client.get("/v1/merges").json()["data"]) == 1


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/merges", method_recipe("ties"), "application/json"),
        ("/v1/merges?priority=1", RECIPE, "application/json"),
        ("/v1/merges", RECIPE, "application/yaml"),
        ("/v1/alignments", {"models": ["m0", "m1"]}, "application/json"),
    ],
)
def test_a_key_stands_for_one_request(client: TestClient, path: str, body: dict[str, Any], kind: str) -> None:
    key = {"Idempotency-Key": "a-key"}
    client.post("/v1/merges", json=RECIPE, headers=key)
    content = yaml.safe_dump(body) if "yaml" in kind else yaml.safe_dump(body, default_flow_style=True)
    answer = client.post(path, content=content, headers={**key, "Content-Type": kind})
    assert answer.status_code == 422 and answer.json()["code"] in ("idempotency-key-reused", "incompatible-models")
    assert len(client.get("/v1/merges").json()["data"]) == 1


def test_of_many_at_once_one_makes_the_job(client: TestClient) -> None:
    found: list[tuple[str, bool]] = []

    def send() -> None:
        answer = client.post("/v1/merges", json=RECIPE, headers={"Idempotency-Key": "k"})
        found.append((answer.json()["id"], "idempotency-replayed" in answer.headers))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job for job, _ in found}) == 1 and [replayed for _, replayed in found].count(False) == 1
    assert len(client.get("/v1/merges").json()["data"]) == 1


def test_a_refused_request_may_be_mended_under_its_key(client: TestClient) -> None:
    key = {"Idempotency-Key": "k"}
    assert client.post("/v1/merges", json={**RECIPE, "densty": 1}, headers=key).status_code == 422
    assert client.post("/v1/merges", json=RECIPE, headers=key).status_code == 202


def test_a_key_is_forgotten_after_a_day(client: TestClient, store: JobStore) -> None:
    first = post(client, **{"Idempotency-Key": "k"})
    with store.session() as session:
        session.execute(update(IdempotencyKey).values(created_at=time.time() - 25 * HOUR))
    assert post(client, **{"Idempotency-Key": "k"})["id"] != first["id"]


def test_a_key_whose_job_was_deleted_makes_no_other(client: TestClient) -> None:
    job = post(client, **{"Idempotency-Key": "k"})
    client.post(job["urls"]["cancel"])
    client.delete(job["urls"]["self"])
    answer = client.post("/v1/merges", json=RECIPE, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 410 and answer.json()["code"] == "gone"


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ü"])
def test_a_key_is_visible_ascii(client: TestClient, key: str) -> None:
    answer = client.post("/v1/merges", json=RECIPE, headers={"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == 422 and answer.json()["code"] == "invalid-request"


# What is asked beside the document.


def test_a_dry_run_is_the_plan_and_nothing_more(client: TestClient) -> None:
    answer = client.post("/v1/merges?dry_run=true", json=RECIPE, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 200
    assert answer.json() == client.post("/v1/recipes:validate", json=RECIPE).json()
    assert client.get("/v1/merges").json()["data"] == []
    assert client.post("/v1/merges?dry_run=true", json={**RECIPE, "densty": 1}).status_code == 422
    aligned = client.post("/v1/alignments?dry_run=true", json={"models": ["m0"], "alignment": {"too": 1}})
    assert aligned.status_code == 422


def test_labels_priority_and_deadline_are_shown(client: TestClient) -> None:
    plain, asked = post(client), post(client, "?label=team:vision&label=run/1:a%20b:c&priority=5&deadline=60")
    assert (plain["labels"], plain["priority"], plain["deadline_at"]) == ({}, 0, None)
    assert asked["labels"] == {"team": "vision", "run/1": "a b:c"} and asked["priority"] == 5
    assert asked["created_at"] < asked["deadline_at"]
    assert asked["recipe"] == plain["recipe"], "the document stays as it is"


@pytest.mark.parametrize(
    "query",
    [
        *("label=novalue", "label=:v", "label=a%00:v", "label=a:%0A", f"label={'a' * 64}:v", f"label=a:{'v' * 101}"),
        *("label=a:1&label=a:2", "&".join(f"label=a{i}:v" for i in range(33)), "priority=101", "deadline=0", "wait=61"),
    ],
)
def test_odd_options_are_refused(client: TestClient, query: str) -> None:
    answer = client.post(f"/v1/merges?{query}", json=RECIPE)
    assert answer.status_code == 422 and answer.json()["code"] == "invalid-request", answer.text
    assert answer.json()["errors"] and client.get("/v1/merges").json()["data"] == []


def test_lists_by_label_and_state_with_links(client: TestClient) -> None:
    for i in range(7):
        job = post(client, f"?label=batch:{i % 2}&label=all:yes")
        if i > 4:
            client.post(job["urls"]["cancel"])

    def ids(path: str) -> Iterator[str]:
        while path:
            answer = client.get(path)
            yield from (job["id"] for job in answer.json()["data"])
            link = answer.headers.get("link", "")
            assert answer.json()["has_more"] == bool(link)
            path = link.partition(";")[0].strip("<>")
            assert not link or ("limit=2" in path and link.endswith('rel="next"'))

    everything = list(ids("/v1/merges?limit=2"))
    assert len(everything) == len(set(everything)) == 7 and everything == sorted(everything, reverse=True)
    assert len(list(ids("/v1/merges?limit=2&label=batch:0&label=all:yes"))) == 4
    assert list(ids("/v1/merges?limit=2&label=batch:0&label=batch2:0")) == []
    assert len(list(ids("/v1/merges?limit=2&status=queued&status=canceled"))) == 7
    assert len(list(ids("/v1/merges?limit=2&status=queued&label=batch:1"))) == 2


# Waiting.


def test_a_job_that_is_known_is_not_sent_again(client: TestClient) -> None:
    job = post(client)
    answer = client.get(job["urls"]["self"])
    etag = answer.headers["etag"]
    for known in (etag, f"W/{etag}", f'"0", {etag}', "*"):
        same = client.get(job["urls"]["self"], headers={"If-None-Match": known})
        assert same.status_code == 304 and same.content == b"" and same.headers["etag"] == etag
    client.post(job["urls"]["cancel"])
    changed = client.get(job["urls"]["self"], headers={"If-None-Match": etag})
    assert changed.status_code == 200 and changed.headers["etag"] != etag and "retry-after" not in changed.headers
    assert answer.headers["retry-after"]


def test_waiting_ends_with_a_change(client: TestClient, store: JobStore) -> None:
    job = post(client)
    known = {"If-None-Match": client.get(job["urls"]["self"]).headers["etag"]}
    timer = threading.Timer(0.3, lambda: claimed(store, job))
    started = time.monotonic()
    timer.start()
    answer = client.get(f"{job['urls']['self']}?wait=30", headers=known)
    assert answer.status_code == 200 and answer.json()["status"] == "running"
    assert 0.2 < time.monotonic() - started < 15
    timer.join()
    at_once = time.monotonic()
    assert client.get(f"{job['urls']['self']}?wait=30", headers=known).status_code == 200, "it is news already"
    assert client.get(f"{job['urls']['self']}?wait=0").status_code == 200
    assert time.monotonic() - at_once < 15


def test_waiting_ends_with_the_time(client: TestClient) -> None:
    job = post(client)
    known = {"If-None-Match": client.get(job["urls"]["self"]).headers["etag"]}
    assert client.get(f"{job['urls']['self']}?wait=1", headers=known).status_code == 304
    preferred = client.get(job["urls"]["self"], headers={"Prefer": "respond-async, wait=1"})
    assert preferred.status_code == 200 and preferred.headers["preference-applied"] == "wait=1"


def test_a_post_that_waits_sees_the_end(client: TestClient, settings: Settings) -> None:
    def cancel() -> None:
        store = JobStore(settings)
        while not (jobs := store.page()):
            time.sleep(0.02)
        store.cancel(jobs[0].id)
        store.close()

    thread = threading.Thread(target=cancel)
    thread.start()
    answer = client.post("/v1/merges", json=RECIPE, headers={"Prefer": "wait=30"})
    thread.join()
    assert answer.status_code == 202 and answer.json()["status"] == "canceled"
    assert answer.headers["preference-applied"] == "wait=30" and "retry-after" not in answer.headers


def test_a_job_deleted_while_it_is_waited_for_is_not_found(client: TestClient, store: JobStore) -> None:
    job = post(client)

    def remove() -> None:
        store.cancel(job["id"])
        store.delete(job["id"])

    timer = threading.Timer(0.3, remove)
    timer.start()
    while (answer := client.get(f"{job['urls']['self']}?wait=20")).status_code == 200:
        assert answer.json()["status"] in ("queued", "canceled")
    timer.join()
    assert answer.status_code == 404


# Retry and delete.


def test_a_failed_job_may_be_tried_again(client: TestClient, store: JobStore) -> None:
    job = post(client, "?deadline=1000")
    for _ in range(2):
        store.release("w/") if claimed(store, job) else None
    store.fail(claimed(store, job), problem_of("storage-failed", "the disk went away"))
    failed = client.get(job["urls"]["self"]).json()
    assert failed["error"]["type"] == "/v1/problems/storage-failed" and failed["error"]["retryable"]
    assert failed["durations"]["queued"] >= 0 and failed["durations"]["running"] >= 0

    answer = client.post(job["urls"]["retry"])

    again = answer.json()
    assert answer.status_code == 202 and answer.headers["retry-after"]
    assert (again["status"], again["error"], again["attempt"]) == ("queued", None, 3)
    assert again["finished_at"] is None and again["deadline_at"] == job["deadline_at"]
    row = store.get(job["id"])
    assert row is not None and row.deaths == 0
    assert store.events(job["id"])[-1].data == {"status": "queued", "because": "retry"}
    assert claimed(store, job).attempt == 4


def test_a_deadline_that_has_passed_is_not_kept(client: TestClient, store: JobStore) -> None:
    job = post(client, "?deadline=1")
    time.sleep(1.1)
    store.end_late()
    assert client.get(job["urls"]["self"]).json()["error"]["code"] == "deadline-exceeded"
    assert client.post(job["urls"]["retry"]).json()["deadline_at"] is None
    client.post(job["urls"]["cancel"])
    assert client.post(f"{job['urls']['retry']}?deadline=50").json()["deadline_at"] > job["deadline_at"]


def test_only_failed_and_canceled_jobs_may_be_tried_again(client: TestClient, store: JobStore) -> None:
    job = post(client)
    assert client.post(job["urls"]["retry"]).json()["code"] == "invalid-state"
    client.post(job["urls"]["cancel"])
    assert client.post(job["urls"]["retry"]).status_code == 202
    lease = claimed(store, job)
    assert client.post(job["urls"]["retry"]).status_code == 409
    store.succeed(lease, files=[], warnings=[], progress={})
    assert client.post(job["urls"]["retry"]).status_code == 409


def test_delete_leaves_nothing(client: TestClient, store: JobStore) -> None:
    job, other = post(client, "?label=secret:name"), post(client)
    assert client.delete(job["urls"]["self"]).status_code == 409, "it is active"
    lease = claimed(store, job)
    folder, partial = artifact_folder(store.settings, job["id"]), partial_folder(store.settings, job["id"], 1)
    for made in (folder, partial):
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"x")
    store.succeed(lease, files=[{"path": "model.safetensors", "size": 1, "sha256": "0"}], warnings=[], progress={})

    answer = client.delete(job["urls"]["self"])

    assert answer.status_code == 204 and answer.content == b""
    assert list(store.settings.artifacts.iterdir()) == [] and store.events(job["id"]) == []
    for verb, path in itertools.product(("get", "delete"), [job["urls"]["self"]]):
        assert client.request(verb, path).status_code == 404
    for name in ("cancel", "retry"):
        assert client.post(job["urls"][name]).status_code == 404
    assert client.get(job["urls"]["files"]).status_code == 404
    assert [each["id"] for each in client.get("/v1/merges").json()["data"]] == [other["id"]]


def test_what_a_deleted_job_s_worker_still_writes_is_removed(
    client: TestClient, store: JobStore, settings: Settings
) -> None:
    job = post(client)
    client.post(job["urls"]["cancel"])
    client.delete(job["urls"]["self"])
    partial_folder(store.settings, job["id"], 1).mkdir()
    artifact_folder(store.settings, job["id"]).mkdir()
    Janitor(store, open_artifacts(settings)).sweep_now()
    assert list(store.settings.artifacts.iterdir()) == []


def test_jobs_of_all_kinds_have_the_same_routes(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    by_kind = [
        {
            (path.removeprefix(f"/v1/{kind.plural}"), *verbs)
            for path, verbs in paths.items()
            if f"/{kind.plural}" in path
        }
        for kind in JobKind
    ]
    by_kind[list(JobKind).index(JobKind.SEARCH)].remove(("/{job_id}/trials", "get"))  # which nothing else has
    assert all(routes == by_kind[0] for routes in by_kind) and ("/{job_id}/retry", "post") in by_kind[0]


# HEAD.


def test_head_is_get_without_the_body(client: TestClient) -> None:
    job = post(client)
    for path in ("/v1/merges", job["urls"]["self"], "/v1/methods", "/v1/problems", "/healthz", "/docs"):
        get, head = client.get(path), client.head(path)
        assert head.status_code == 200 and head.content == b"", path
        own = {"date": "", "x-request-id": ""}
        assert {**head.headers, **own} == {**get.headers, **own}
    assert client.head("/v1/merges/none").status_code == 404
    assert client.head(job["urls"]["cancel"]).status_code == 405
