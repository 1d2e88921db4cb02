"""What is kept of a job: events as pages and as streams, log, recipe, manifest, report."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from sqlalchemy import event

from app import watching
from app.events import line, stream
from app.main import create_app
from app.watching import Watch
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import method_recipe
from tests.services import running_service
from workers.jobs import JobStore, LeaseLost
from workers.problems import problem_of
from workers.queue import artifact_folder
from workers.settings import Settings
from workers.tables import Event

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", model_roots=[models])


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def store(settings: Settings) -> Iterator[JobStore]:
    store = JobStore(settings)
    yield store
    store.close()


@pytest.fixture
def finished(client: TestClient, store: JobStore, models: Path) -> dict[str, Any]:
    """A job whose merge was made here, as a worker would."""
    job = client.post("/v1/merges", json=method_recipe("linear", seed=7)).json()
    lease = store.claim(job["id"], "w/1")
    assert lease is not None
    store.heartbeat(lease, phase="merging", progress={"fraction": 0.5})
    store.tell(lease, "phase", {"phase": "merging"})
    store.tell(lease, "log", {"level": "info", "message": "two\nlines"})
    artifact = merge(Recipe.from_data(lease.recipe), artifact_folder(store.settings, job["id"]), roots=[models])
    files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in artifact.files]
    store.succeed(lease, files=files, warnings=[], progress={"fraction": 1.0})
    return dict(client.get(job["urls"]["self"]).json())


def read_stream(text: str) -> list[dict[str, Any]]:
    """Events as a browser reads them; what has no data is none."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(row.split(": ", 1) for row in block.split("\n") if row and not row.startswith(":"))
        if "data" in fields:
            found.append({**fields, "data": json.loads(fields["data"])})
    return found


def test_events_by_the_page(client: TestClient, finished: dict[str, Any]) -> None:
    found, path = [], f"{finished['urls']['events']}?limit=2"
    while path:
        answer = client.get(path)
        page = answer.json()
        found += page["data"]
        link = answer.headers.get("link")
        assert bool(link) == page["has_more"] and page["next"] == found[-1]["seq"]
        path = link.partition(">")[0].strip("<") if link else ""
    assert [each["event"] for each in found] == ["state", "state", "phase", "log", "state"]
    assert [each["seq"] for each in found] == [1, 2, 3, 4, 5]
    assert found[-1]["data"] == {"status": "succeeded"}
    rest = client.get(f"{finished['urls']['events']}?after={page['next']}").json()
    assert rest == {"data": [], "has_more": False, "next": 5}


def test_warnings_are_events(client: TestClient, store: JobStore) -> None:
    job = store.add({}, {}, ["first", "second"])
    assert [(each.kind, each.data) for each in store.events(job.id)][1:] == [
        ("warning", {"warning": "first"}),
        ("warning", {"warning": "second"}),
    ]
    assert store.claim(job.id, "w/1") and store.events(job.id)[-1].seq == 4


def test_a_stream_of_what_is_over(client: TestClient, finished: dict[str, Any]) -> None:
    answer = client.get(finished["urls"]["events"], headers=STREAM)
    assert answer.headers["content-type"].startswith("text/event-stream") and "retry: 2000" in answer.text
    found = read_stream(answer.text)
    assert [each["event"] for each in found] == ["state", "state", "phase", "log", "state", "progress", "done"]
    assert [each.get("id") for each in found] == ["1", "2", "3", "4", "5", None, None]
    assert found[-2]["data"] == {"status": "succeeded", "phase": "", "fraction": 1.0}
    assert found[-1]["data"] == {"status": "succeeded"}
    rest = client.get(finished["urls"]["events"], headers={**STREAM, "Last-Event-ID": "3"})
    assert [each.get("id") for each in read_stream(rest.text)] == ["4", "5", None, None]
    assert client.get(f"{finished['urls']['events']}?after=4", headers=STREAM).text.count("id: ") == 1
    over = client.get(finished["urls"]["events"], headers={**STREAM, "Last-Event-ID": "5"})
    assert over.status_code == 204, "a browser that hears this does not come again"
    odd = client.get(finished["urls"]["events"], headers={**STREAM, "Last-Event-ID": "no number"})
    assert len(read_stream(odd.text)) == 7
    assert client.head(finished["urls"]["events"], headers=STREAM).status_code == 200


def test_progress_that_comes_too_soon_is_told_when_its_second_has_come(store: JobStore) -> None:
    job = store.add({}, {})
    lease = store.claim(job.id, "w/1")
    assert lease is not None
    told: list[tuple[float, float]] = []

    async def hear() -> None:
        watch = Watch(store)
        async for piece in stream(store, watch, job.id, 2, 60):
            for each in read_stream(piece.decode()):
                told.append((time.monotonic(), each["data"].get("fraction")))
                store.heartbeat(lease, phase="merging", progress={"fraction": len(told) / 4})
            if len(told) == 3:
                break
        await watch.close()

    asyncio.run(hear())
    assert [fraction for _, fraction in told] == [None, 0.25, 0.5]
    assert all(1 <= later[0] - one[0] < 15 for one, later in itertools.pairwise(told)), told


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("", False),
        ("*/*", False),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream", True),
        ("text/event-stream, application/json;q=0.9", True),
        ("text/*;q=0.8, */*;q=0.1", True),
    ],
)
def test_what_the_caller_accepts(client: TestClient, finished: dict[str, Any], accept: str, streams: bool) -> None:
    answer = client.get(finished["urls"]["events"], headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("text/event-stream") == streams
    assert answer.headers["vary"] == "Accept"


def test_a_log_only_grows(client: TestClient, store: JobStore) -> None:
    job = client.post("/v1/merges", json=method_recipe("linear")).json()
    url = job["urls"]["logs"]
    first = client.get(url)
    assert first.headers["content-type"].startswith("text/plain") and first.text.endswith("state   queued\n")
    assert client.get(url, headers={"If-None-Match": first.headers["etag"]}).status_code == 304
    nothing = client.get(url, headers={"Range": f"bytes={len(first.content)}-"})
    assert nothing.status_code == 416 and nothing.headers["content-range"] == f"bytes */{len(first.content)}"
    lease = store.claim(job["id"], "w/1")
    assert lease
    store.tell(lease, "log", {"level": "warning", "message": "two\nlines"})
    store.fail(lease, problem_of("storage-failed", "no disk"))
    whole = client.get(url)
    rest = client.get(url, headers={"Range": f"bytes={len(first.content)}-"})
    assert rest.status_code == 206 and first.content + rest.content == whole.content
    assert rest.headers["content-range"] == f"bytes {len(first.content)}-{len(whole.content) - 1}/{len(whole.content)}"
    assert "log     warning: two\n    lines\n" in whole.text and whole.text.endswith("failed: no disk\n")
    assert re.fullmatch(r"(\d{4}-\d\d-\d\dT[\d:.]+\+00:00 .*\n(    .*\n)*)+", whole.text)
    assert client.get(url, headers={"Range": "bytes=0-1", "If-Range": first.headers["etag"]}).status_code == 200


def test_any_event_is_a_line() -> None:
    for data in ({}, {"status": "queued", "because": "retry"}, {"level": "info"}, {"x": 1}):
        for kind in ("state", "phase", "warning", "log", "other"):
            assert line(Event(job_id="", seq=1, at=0.0, kind=kind, data=data)).count("\n") == 1


def test_a_recipe_comes_back(client: TestClient) -> None:
    sent = [method_recipe("ties", name="one"), {**method_recipe("linear"), "models": [{"model": "one"}]}]
    for recipe in (method_recipe("linear"), sent):
        job = client.post("/v1/merges", json=recipe).json()
        text = client.get(job["urls"]["recipe"])
        assert text.headers["content-type"].startswith("application/yaml")
        documents = list(yaml.safe_load_all(text.text))
        told = client.get(job["urls"]["recipe"], headers={"Accept": "application/json"}).json()
        assert told == job["recipe"] == (documents if len(documents) > 1 else documents[0])
        again = client.post("/v1/merges", content=text.content, headers={"Content-Type": "application/yaml"})
        assert again.json()["recipe"] == job["recipe"]


def test_a_manifest_proves_what_was_made_of_what(
    client: TestClient, finished: dict[str, Any], store: JobStore, models: Path
) -> None:
    answer = client.get(finished["urls"]["manifest"])
    assert answer.headers["content-type"] == "application/vnd.in-toto+json"
    found = answer.json()
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert {each["name"]: each["digest"]["sha256"] for each in found["subject"]} == {
        file["path"]: file["sha256"] for file in client.get(finished["urls"]["files"]).json()["data"]
    }
    built = found["predicate"]["buildDefinition"]
    assert built["externalParameters"]["recipe"] == finished["recipe"] and built["internalParameters"]["seed"] == 7
    read = {each["name"]: each["digest"]["sha256"] for each in built["resolvedDependencies"]}
    assert {name.partition("/")[0] for name in read} == {"m0", "m1", "m2"}
    for name, digest in read.items():
        assert hashlib.sha256((models / name).read_bytes()).hexdigest() == digest
    assert found["predicate"]["runDetails"]["builder"]["version"]["weightsmith"]
    queued = client.post("/v1/merges", json=method_recipe("linear")).json()
    assert client.get(queued["urls"]["manifest"]).json()["code"] == "invalid-state"
    artifact_folder(store.settings, finished["id"]).rename(models.parent / "elsewhere")
    gone = client.get(finished["urls"]["manifest"])
    assert gone.status_code == 410 and gone.json()["code"] == "gone"
    assert client.get(finished["urls"]["report"]).json()["sources"] is None


def test_a_report_tells_how_it_went(client: TestClient, finished: dict[str, Any], store: JobStore) -> None:
    found = client.get(finished["urls"]["report"]).json()
    assert found["status"] == "succeeded" and found["attempts"] == 1 and found["seed"] == 7
    assert [phase["phase"] for phase in found["phases"]] == ["merging"] and found["phases"][0]["seconds"] >= 0
    assert found["planned"]["tensors"] == 20 and found["done"] == {"fraction": 1.0}
    assert {source["model"] for source in found["sources"]} == {"m0", "m1", "m2"}
    assert found["bytes"] == sum(file["size"] for file in client.get(finished["urls"]["files"]).json()["data"])
    failing = client.post("/v1/merges", json=method_recipe("linear")).json()
    lease = store.claim(failing["id"], "w/1")
    assert lease
    store.tell(lease, "phase", {"phase": "reading"})
    assert client.get(failing["urls"]["report"]).json()["phases"][0]["seconds"] is None
    store.fail(lease, problem_of("storage-failed", "no disk"))
    told = client.get(failing["urls"]["report"]).json()
    assert told["error"]["code"] == "storage-failed" and told["sources"] is None and told["phases"][0]["seconds"] >= 0


def test_the_tensors_that_a_job_writes_and_those_that_are_whole(client: TestClient, store: JobStore) -> None:
    job = client.post("/v1/merges", json=method_recipe("linear")).json()
    where = job["urls"]["tensors"]
    assert client.get(where).json() == {"names": [], "finished": []}
    lease = store.claim(job["id"], "w/1")
    assert lease is not None
    names = [f"model.layers.{layer}.ünd" for layer in range(30_000)]
    store.keep_order(lease, names)
    store.heartbeat(lease, phase="merging", progress={"tensors_finished": [[0, 7], [29_000, 30_000]]})
    assert client.get(where).json() == {"names": names, "finished": [[0, 7], [29_000, 30_000]]}
    store.keep_order(lease, names[:2])
    assert client.get(where).json()["names"] == names[:2], "another attempt may write others"
    store.fail(lease, problem_of("storage-failed", "no disk"))
    with pytest.raises(LeaseLost):
        store.keep_order(lease, names)
    assert client.delete(job["urls"]["self"]).status_code == 204
    assert store.order(job["id"]) == []


def test_the_service_tells_of_itself(client: TestClient, settings: Settings) -> None:
    client.post("/v1/merges", json=method_recipe("linear"))
    found = client.get("/v1/system").json()
    assert (found["queued"], found["running"], found["workers"]) == (1, 0, 0)
    assert found["limits"]["memory"] == settings.max_memory and found["methods"] > 10
    assert str(settings.data) not in json.dumps(found) and "sqlite" not in json.dumps(found)


def test_many_who_wait_cost_one_query(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait for however many jobs, the database is asked once each time, and never if nobody waits."""
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.02)
    jobs = [store.add({}, {}) for _ in range(5)]
    queries = []
    event.listen(store.engine, "before_cursor_execute", lambda *given: queries.append(given[2]))

    async def wait() -> None:
        watch = Watch(store)
        waits = [watch.changed(job.id, job.version, 20) for job in jobs for _ in range(40)]
        tasks = [asyncio.create_task(each) for each in waits]
        async with asyncio.timeout(60):
            while len(queries) < 4:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        assert len(queries) < len(tasks) / 2 and not any(task.done() for task in tasks)
        for job in jobs:
            store.cancel(job.id)
        found = await asyncio.gather(*tasks)
        assert {pulse.state for pulse in found if pulse} == {"canceled"} and None not in found
        async with asyncio.timeout(60):
            while watch._polling is not None:
                await asyncio.sleep(0.02)
        asked = len(queries)
        await asyncio.sleep(0.2)
        assert len(queries) == asked, "nobody waits, nothing is asked"
        stuck = asyncio.create_task(watch.changed(jobs[0].id, 2, 20))
        await asyncio.sleep(0.05)
        await watch.close()
        assert await stuck is None and await watch.changed(jobs[0].id, 0, 20) is None

    asyncio.run(wait())


def test_who_knows_nothing_yet_is_told_at_once(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_SECONDS", 60)
    job = store.add({}, {})

    async def ask() -> None:
        watch = Watch(store)
        waiting = asyncio.create_task(watch.changed(job.id, job.version, 60))
        await asyncio.sleep(0.05)
        for _ in range(3):
            assert await watch.changed(job.id, -1, 10) is not None
        assert not waiting.done()
        await watch.close()

    asyncio.run(ask())


@pytest.mark.xdist_group("service")
def test_a_job_is_heard_from_its_start_to_its_end(models: Path, tmp_path: Path) -> None:
    """Over real HTTP, with a real worker; the stream breaks off once and is taken up again, and nothing is missing."""
    with running_service(tmp_path / "data", models, WEIGHTSMITH_MAX_STREAM="60") as service:
        job = service.post(method_recipe("ties"))
        heard: list[dict[str, Any]] = []
        last = "0"
        while not heard or heard[-1]["event"] != "done":
            headers = {**STREAM, "Last-Event-ID": last}
            with service.http.stream("GET", job["urls"]["events"], headers=headers) as answer:
                assert answer.status_code == 200
                text = ""
                for piece in answer.iter_text():
                    text += piece
                    if last == "0" and "id: 2" in text:
                        break
            heard += read_stream(text[: text.rfind("\n\n") + 2])
            last = next(each["id"] for each in reversed(heard) if "id" in each)
        kept = [each for each in heard if "id" in each]
        page = service.get(f"{job['urls']['events']}?limit=1000")["data"]
        assert [int(each["id"]) for each in kept] == [each["seq"] for each in page]
        assert [each["data"]["status"] for each in kept if each["event"] == "state"] == [
            "queued",
            "running",
            "succeeded",
        ]
        assert [each["event"] for each in heard].count("done") == 1
        waited = service.http.post("/v1/merges?wait=60", json=method_recipe("linear"))
        assert waited.status_code == 202 and waited.json()["status"] == "succeeded"
        kinds = {each["event"] for each in service.get(waited.json()["urls"]["events"])["data"]}
        assert {"state"} <= kinds <= {"state", "phase", "log", "warning"}
        again = service.http.post(job["urls"]["retry"])
        assert again.status_code == 409
        store = JobStore(Settings(data=tmp_path / "data", model_roots=[models], lease_seconds=600))
        endless = store.add({}, {})
        assert store.claim(endless.id, "elsewhere/1")
        store.close()
        with service.http.stream("GET", f"/v1/merges/{endless.id}/events", headers=STREAM) as answer:
            pieces = answer.iter_text()
            assert "retry:" in next(pieces)
            service.process.terminate()
            assert "done" not in "".join(pieces), "the stream ends in order, for another to be opened where it was"
