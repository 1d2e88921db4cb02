"""Merges that were published on a Hub, proved from their locks; and merges on read of models that are there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from merge_core.artifact import LOCK_NAME
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from tests.hub import Hub
from tests.hub.test_in_service import RECIPE, client, hub, keep, models, settings  # noqa: F401 — fixtures
from tests.merge_core.test_verify import Q, change, vouch
from workers.tasks import run_job


def made(client: TestClient, kind: str, document: Any) -> Any:  # noqa: F811
    answer = client.post(f"/v1/{kind}", json=document)
    assert answer.status_code == 202, answer.text
    run_job(answer.json()["id"])
    job = client.get(answer.headers["Location"]).json()
    assert job["status"] == "succeeded", job
    return job


@pytest.fixture
def published(client: TestClient, hub: Hub, tmp_path: Path) -> Path:  # noqa: F811
    """A merge of models on the Hub, which is there too, as `alice/merged`; its models have moved on since."""
    keep(client, "hub", hub.alice.token)
    job = made(client, "merges", RECIPE)
    folder = tmp_path / "published"
    folder.mkdir()
    for file in client.get(job["urls"]["files"]).json()["data"]:
        (folder / file["path"]).write_bytes(client.get(file["url"]).content)
    hub.put("alice/merged", folder)
    for repo in ("org/m0", "alice/m1"):
        hub.put(repo, write_checkpoint(tmp_path / "new", mixed_tensors(7), shards=2, config=CONFIG))
    return folder


def verified(client: TestClient, **keys: Any) -> Any:  # noqa: F811
    job = made(client, "verify", {"model": "alice/merged", "all": True, **keys})
    return client.get(job["urls"]["report"]).json()["verification"]


def test_a_published_merge_is_proved_at_the_commits_of_its_lock(client: TestClient, published: Path) -> None:  # noqa: F811
    found = verified(client)
    assert found["outcome"] == "agrees", (found["tensors"][:1], found["notes"])
    assert {each["outcome"] for each in found["tensors"]} == {"agrees"} and len(found["tensors"]) > 10
    assert {each["outcome"] for each in found["sources"]} == {"agrees"}
    assert {each["path"] for each in found["files"] if each["outcome"] != "agrees"} <= {
        "README.md",
        "mergekit_config.yml",
    }


def test_a_forged_merge_differs(client: TestClient, hub: Hub, published: Path) -> None:  # noqa: F811
    change(published, Q, 1.0)
    vouch(published)
    hub.put("alice/merged", published)
    found = verified(client)
    assert found["outcome"] == "differs"
    assert [each["tensor"] for each in found["tensors"] if each["outcome"] == "differs"] == [Q]


def test_what_has_no_lock_is_refused(client: TestClient, published: Path) -> None:  # noqa: F811
    answer = client.post("/v1/verify", json={"model": "org/m0"})
    assert answer.status_code == 422 and LOCK_NAME in answer.json()["detail"]
    assert answer.json()["errors"][0]["pointer"] == "#/model"


def test_a_view_of_models_on_a_hub(client: TestClient, hub: Hub, models: Path, tmp_path: Path) -> None:  # noqa: F811
    keep(client, "hub", hub.alice.token)
    view = made(client, "views", RECIPE)
    local = Recipe.from_data({**RECIPE, "models": [{"model": "m0"}, {"model": "m1"}]})
    merge(local, tmp_path / "out", roots=[models])
    weights = client.get(f"/hub/views/{view['id']}/resolve/main/model.safetensors").content
    ours, theirs = (
        data[8 + int.from_bytes(data[:8], "little") :]
        for data in (weights, (tmp_path / "out" / "model.safetensors").read_bytes())
    )
    assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest()  # headers tell the recipe
