"""Jobs that name models by Hub id: accepted, refused and run by the service, with the owner's credential."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.main import create_app
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from tests.hub import Hub, running_hub
from tests.services import Service, eventually, running_service, takes_less_than
from workers.jobs import JobStore
from workers.settings import Settings
from workers.tasks import run_job

RECIPE: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "org/m0"}, {"model": "alice/m1@main"}],
    "parameters": {"weight": 0.5},
}
ONE: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": "org/m0"}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["m0", "m1"]):
        write_checkpoint(folder / name, mixed_tensors(seed), shards=2, config=CONFIG)
    return folder


@pytest.fixture
def hub(models: Path, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        hub.put("org/m0", models / "m0")
        hub.put("alice/m1", models / "m1", private=True)
        hub.put("org/gated", models / "m0", gated="auto")
        yield hub


@pytest.fixture
def settings(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    environment = {
        "WEIGHTSMITH_DATA": str(tmp_path / "data"),
        "WEIGHTSMITH_HUB_ENDPOINT": hub.endpoint,
        "WEIGHTSMITH_ENDPOINT_ALLOW": "localhost",
        "WEIGHTSMITH_HUB_MODE": "streamed",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings()


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


def keep(client: TestClient, name: str, token: str) -> None:
    answer = client.put(f"/v1/credentials/{name}", json={"kind": "hub-token", "token": token})
    assert answer.status_code == 204


def test_a_job_keeps_the_commits_it_was_accepted_with(
    client: TestClient, hub: Hub, models: Path, settings: Settings, tmp_path: Path
) -> None:
    keep(client, "hub", hub.alice.token)
    commits = {"org/m0": hub.repos["org/m0"].branches["main"], "alice/m1": hub.repos["alice/m1"].branches["main"]}

    answer = client.post("/v1/merges", json=RECIPE)
    for repo in commits:
        hub.put(repo, write_checkpoint(tmp_path / "new", mixed_tensors(7), shards=2, config=CONFIG))
    run_job(answer.json()["id"])

    assert answer.status_code == 202, answer.text
    told = answer.json()["resolved"]
    assert {each["repo"]: each["commit"] for each in told} == commits
    assert told[1] == {
        "path": "alice/m1",
        "revision": "main",
        "endpoint": hub.endpoint,
        "repo": "alice/m1",
        "commit": commits["alice/m1"],
        "inside": "",
    }
    job = client.get(answer.headers["Location"]).json()
    assert job["status"] == "succeeded", job
    assert job["progress"]["bytes_received"] > 0
    local = Recipe.from_data({**RECIPE, "models": [{"model": "m0"}, {"model": "m1"}]})
    expected = merge(local, tmp_path / "expected", roots=[models])
    lock = client.get(f"{answer.headers['Location']}/files/merge.lock.json").json()
    assert {name: each["blake3"] for name, each in lock["tensors"].items()} == expected.tensors
    assert [source["commit"] for source in lock["sources"]] == list(commits.values())
    provenance = client.get(f"{answer.headers['Location']}/manifest").json()["predicate"]
    assert all(commit in json.dumps(provenance) for commit in commits.values())


def test_a_credential_is_named_and_its_secret_kept_nowhere_else(
    client: TestClient, hub: Hub, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    keep(client, "mine", hub.alice.token)

    without = client.post("/v1/merges", json=RECIPE)
    answer = client.post("/v1/merges?hub_credential=mine", json=RECIPE)
    run_job(answer.json()["id"])

    assert without.json()["code"] == "model-not-found"
    assert client.get(answer.headers["Location"]).json()["status"] == "succeeded"
    store = JobStore(settings)
    job = store.get(answer.json()["id"])
    assert job is not None and job.hub == {"credential": "mine", "endpoint": None}
    with store.engine.connect() as database:
        tables = database.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'")).scalars().all()
        rows = [repr(row) for table in tables for row in database.execute(text(f"SELECT * FROM {table}"))]
    store.close()
    told = [answer.text, without.text, caplog.text, *rows]
    told += [file.read_bytes().decode(errors="replace") for file in settings.data.rglob("*") if file.is_file()]
    assert len(told) > 20
    assert not [text for text in told if hub.alice.token in text]


REFUSED: list[tuple[str, str, str, int, str]] = [
    ("org/nothing", "", "model-not-found", 422, "no repository"),
    ("alice/m1", "", "model-not-found", 422, "store a Hub token as a credential"),
    ("alice/m1", "?hub_credential=bob", "model-not-found", 422, "that this token may see"),
    ("org/gated", "?hub_credential=bob", "model-gated", 403, "ask for access on its page"),
    ("org/m0@nothing", "", "model-not-found", 422, "has no such revision"),
    ("org/m0/nothing", "", "model-not-found", 422, "no folder or file nothing"),
    ("org/m0", "?hub_credential=wrong", "hub-token-refused", 422, "does not take the token"),
    ("nowhere", "", "model-not-found", 422, "no Hub id (org/name)"),
    ("../org/m0", "", "path-not-allowed", 403, "outside"),
]


@pytest.mark.parametrize("what", ["/v1/merges", "/v1/merges?dry_run=true", "/v1/recipes:validate"])
def test_what_cannot_be_had_is_refused_where_it_is_asked_for(client: TestClient, hub: Hub, what: str) -> None:
    keep(client, "bob", hub.bob.token)
    keep(client, "wrong", "hf_" + 34 * "x")
    for model, query, code, status, says in REFUSED:
        path = what + (query.replace("?", "&") if "?" in what else query)

        answer = client.post(path, json={**ONE, "models": [{"model": model}]})

        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (status, code), problem
        assert says in problem["detail"], problem
        assert problem["errors"][0]["pointer"] == "#/models/0/model"
    assert client.get("/v1/merges").json()["data"] == []


def test_every_model_that_a_document_names_may_be_on_the_hub(client: TestClient, hub: Hub) -> None:
    keep(client, "hub", hub.alice.token)
    aligned = {"models": ["org/m0", "org/gone"], "alignment": {}}
    patched = {"operation": "apply", "model": "org/m0", "patches": [{"patch": "org/gone", "strength": 1}]}
    removed = {"operation": "remove", "model": "org/gone"}
    recipe = {**ONE, "models": [{"model": "org/m0+org/gone"}]}
    for kind, document, pointer in (
        ("alignments", aligned, "#/models/1"),
        ("patches", patched, "#/patches/0/patch"),
        ("patches", removed, "#/model"),
        ("merges", recipe, "#/models/0/model"),
    ):
        problem = client.post(f"/v1/{kind}", json=document).json()

        assert problem["code"] == "model-not-found", problem
        assert problem["detail"].split(": ", 1)[-1].startswith("org/gone") or "org/gone" in problem["detail"]
        assert problem["errors"][0]["pointer"] == pointer


def test_a_credential_or_hub_that_is_not_there(client: TestClient, hub: Hub) -> None:
    s3 = {"kind": "s3", "access_key_id": "a", "secret_access_key": "b"}
    client.put("/v1/credentials/s3", json=s3)

    missing = client.post("/v1/merges?hub_credential=gone", json=ONE).json()
    other = client.post("/v1/merges?hub_credential=s3", json=ONE).json()
    elsewhere = client.post("/v1/merges?hub_endpoint=https://elsewhere.example", json=ONE).json()

    assert missing["code"] == "credential-not-found"
    assert other["code"] == "invalid-recipe" and "of the kind hub-token" in other["detail"]
    assert elsewhere["code"] == "hub-not-allowed"


def test_a_hub_that_is_away(client: TestClient, hub: Hub) -> None:
    hub.fail("/api/models/", status=503, times=None)

    answer = client.post("/v1/merges", json=ONE)

    assert answer.status_code == 503
    assert answer.json()["code"] == "hub-unavailable" and answer.json()["retryable"]


def test_without_a_hub_there_are_only_folders(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSMITH_HUB_ENDPOINT", "")
    with TestClient(create_app(Settings())) as client:
        problem = client.post("/v1/merges", json=ONE).json()

    assert problem["code"] == "model-not-found"
    assert "Hub" not in problem["detail"]


def test_another_hub_that_is_allowed(
    client: TestClient, hub: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(tmp_path / "other") as other:
        other.put("team/model", models / "m0")
        monkeypatch.setenv("WEIGHTSMITH_HUB_ENDPOINT_ALLOW", other.endpoint)
        with TestClient(create_app(Settings())) as client:
            document = {**ONE, "models": [{"model": "team/model"}]}
            answer = client.post("/v1/merges", params={"hub_endpoint": other.endpoint}, json=document)
            assert answer.status_code == 202, answer.text
            run_job(answer.json()["id"])
            assert client.get(answer.headers["Location"]).json()["status"] == "succeeded"

    assert not hub.requests


# With a worker.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of 16 MB each, which take seconds to come at the rate of these tests."""
    folder = tmp_path_factory.mktemp("large")
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{i}.weight": torch.randn(1000, 1000, generator=generator).bfloat16() for i in range(8)}
        write_checkpoint(folder / f"m{seed}", tensors, shards=4)
    return folder


@contextmanager
def served(hub: Hub, large: Path, data: Path, mode: str) -> Iterator[Service]:
    """A service with a worker, and models that come slowly."""
    for name in ("m0", "m1"):
        hub.put(f"org/{name}", large / name)
    hub.fail("GET /objects", rate=1.5e6, times=None)
    with running_service(
        data,
        large,
        WEIGHTSMITH_HUB_ENDPOINT=hub.endpoint,
        WEIGHTSMITH_ENDPOINT_ALLOW="localhost",
        WEIGHTSMITH_HUB_MODE=mode,
        WEIGHTSMITH_LEASE_SECONDS="4",
    ) as service:
        yield service


SLOW: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "org/m0"}, {"model": "org/m1"}],
    "parameters": {"weight": 0.5},
}


def receives(service: Service, job: dict[str, Any]) -> bool:
    return bool(service.job(job)["progress"].get("bytes_received", 0) > 4e6)


@pytest.mark.slow
@pytest.mark.xdist_group("service")
@pytest.mark.parametrize("mode", ["streamed", "cached"])
def test_kill_9_in_a_download_and_a_revision_that_moved(
    hub: Hub, large: Path, tmp_path: Path, mode: str, models: Path
) -> None:
    with served(hub, large, tmp_path / "data", mode) as service:
        job = service.post(SLOW)
        eventually(lambda: receives(service, job))
        hub.put("org/m0", models / "m0")

        service.kill_worker()

        ended = service.ended(job)
        assert ended["status"] == "succeeded" and ended["attempt"] == 2, ended
        made = service.get(f"{job['urls']['files']}/merge.lock.json")
    expected = merge(
        Recipe.from_data({**SLOW, "models": [{"model": "m0"}, {"model": "m1"}]}), tmp_path / "expected", roots=[large]
    )
    assert {name: each["blake3"] for name, each in made["tensors"].items()} == expected.tensors


@pytest.mark.xdist_group("service")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["streamed", "cached"])
def test_cancel_in_a_download_takes_less_than_two_seconds(hub: Hub, large: Path, tmp_path: Path, mode: str) -> None:
    with served(hub, large, tmp_path / "data", mode) as service:

        def seconds_to_cancel() -> float:
            before = hub.sent("GET /objects")
            job = service.post(SLOW)
            eventually(lambda: hub.sent("GET /objects") > before + 2e6)
            eventually(lambda: service.job(job)["phase"] == "merging")
            began = time.monotonic()
            service.http.post(job["urls"]["cancel"]).raise_for_status()
            assert service.ended(job)["status"] == "canceled"
            took = time.monotonic() - began
            cache = service.data / "hub" / "cache"
            eventually(lambda: not [each for *_, names in os.walk(cache) for each in names if "incomplete" in each])
            eventually(lambda: not service.artifacts())
            return took

        takes_less_than(2.0, seconds_to_cancel)


@pytest.mark.slow
@pytest.mark.xdist_group("service")
def test_the_command_line_takes_hub_ids(hub: Hub, models: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(json.dumps(RECIPE))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WEIGHTSMITH_", "HF_"))}
    environment |= {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config"), "HF_ENDPOINT": hub.endpoint}
    environment |= {"WEIGHTSMITH_ENDPOINT_ALLOW": "localhost"}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app.cli", *arguments]
        path = {"PYTHONPATH": str(Path.cwd())}
        return subprocess.run(command, cwd=tmp_path, env=environment | path | more, capture_output=True, text=True)

    refused = run("plan", "recipe.yml")
    merged = run("merge", "recipe.yml", "out", HF_TOKEN=hub.alice.token)

    assert refused.returncode == 1 and "alice/m1@main: is no model here, and no repository" in refused.stderr
    assert merged.returncode == 0, merged.stderr
    assert hub.alice.token not in merged.stdout + merged.stderr
    local = Recipe.from_data({**RECIPE, "models": [{"model": "m0"}, {"model": "m1"}]})
    expected = merge(local, tmp_path / "expected", roots=[models])
    lock = json.loads((tmp_path / "out" / "merge.lock.json").read_text())
    assert {name: each["blake3"] for name, each in lock["tensors"].items()} == expected.tensors
