"""The HTTP surface, without a worker: what is accepted, what is refused and how, and how files are served."""

from __future__ import annotations

import email.policy
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from app.main import create_app
from merge_core import kernels
from merge_core.merge import merge
from merge_core.methods import METHODS
from merge_core.published import MAX_CARD_BYTES
from merge_core.recipe import Recipe
from tests.conftest import METHOD_RECIPES, method_recipe, mixed_tensors
from workers.artifacts import FolderStore
from workers.jobs import JobStore
from workers.queue import artifact_folder
from workers.settings import Settings
from workers.tasks import run_job


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", model_roots=[models])


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


def test_a_recipe_becomes_a_job(client: TestClient) -> None:
    answer = client.post("/v1/merges", json=method_recipe("ties"))

    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/merges/{job['id']}" and answer.headers["retry-after"]
    assert job["status"] == "queued" and job["plan"]["tensors"] == 20 and job["recipe"]["merge_method"] == "ties"
    assert client.get(answer.headers["location"]).json() == job


@pytest.mark.parametrize("kind", ["application/json", "application/yaml"])
def test_a_recipe_of_several_documents_is_a_list(client: TestClient, kind: str) -> None:
    documents = [method_recipe("ties", name="one"), {**method_recipe("linear"), "models": [{"model": "one"}]}]
    text = json.dumps(documents) if "json" in kind else yaml.safe_dump_all(documents)
    answer = client.post("/v1/merges", content=text, headers={"Content-Type": kind})
    assert answer.status_code == 202, answer.text
    job = client.get(answer.headers["Location"]).json()
    assert [document.get("name") for document in job["recipe"]] == ["one", None]
    assert [stage["name"] for stage in job["plan"]["stages"]] == ["one"]
    validated = client.post("/v1/recipes:validate", content=text, headers={"Content-Type": kind}).json()
    assert validated["recipe"] == job["recipe"]


@pytest.mark.parametrize(
    "kind", ["application/yaml", "text/yaml", "application/x-yaml; charset=utf-8", "application/json"]
)
def test_yaml_and_json_are_accepted(client: TestClient, kind: str) -> None:
    recipe = method_recipe("linear")
    text = json.dumps(recipe) if "json" in kind else yaml.safe_dump(recipe)
    answer = client.post("/v1/merges", content=text, headers={"Content-Type": kind})
    assert answer.status_code == 202, answer.text


def test_validation_gives_the_plan_and_makes_no_job(client: TestClient) -> None:
    answer = client.post("/v1/recipes:validate?steps=true", json=method_recipe("ties-paper"))
    assert answer.status_code == 200
    plan = answer.json()["plan"]
    assert (
        plan["scope"] == "model"
        and plan["passes"] == (3 if kernels.are_compiled() else 4)
        and len(plan["steps"]) == plan["tensors"]
    )
    assert client.get("/v1/merges").json()["data"] == []


PROBLEMS: list[tuple[dict[str, Any], int, str, str]] = [
    (method_recipe("ties", merge_method="tise"), 422, "invalid-recipe", "#/merge_method"),
    (method_recipe("ties", densty=1), 422, "invalid-recipe", "#/densty"),
    (method_recipe("ties", parameters={}), 422, "invalid-recipe", "#/models/0/parameters/weight"),
    (method_recipe("ties", models=[{"model": "nowhere"}]), 422, "model-not-found", "#/models/0/model"),
    (method_recipe("ties", models=[{"model": "../data"}]), 403, "path-not-allowed", "#/models/0/model"),
    (method_recipe("ties", models=[{"model": "/etc"}]), 403, "path-not-allowed", "#/models/0/model"),
    (method_recipe("ties", base_model="/etc/passwd"), 403, "path-not-allowed", "#/base_model"),
    (method_recipe("ties", models=[{"model": "../../nowhere"}]), 403, "path-not-allowed", "#/models/0/model"),
    (method_recipe("ties", models=[{"model": "\ud800"}]), 422, "invalid-recipe", "#/models/0/model"),
    (method_recipe("ties", models=[{"model": "a\0b"}]), 422, "invalid-recipe", "#/models/0/model"),
    (method_recipe("ties", models=[{"model": "x" * 5000}]), 422, "model-not-found", "#/models/0/model"),
    (method_recipe("ties", limits={"memory": "1TB"}), 422, "invalid-recipe", "#/limits/memory"),
    (method_recipe("ties", tokenizer_source="union"), 422, "bad-checkpoint", "#/base_model"),
]


def test_a_published_recipe_is_told_what_has_no_effect(client: TestClient) -> None:
    card = "# Card\n```yaml\nmerge_method: linear\nmodels: [{model: a, weight: 1}]\nparameters: {weight: 1}\n```\n"

    answer = client.post("/v1/recipes:import", content=card)

    assert answer.status_code == 200 and answer.json()["found_in"] == "model card"
    assert [each["pointer"] for each in answer.json()["ignored"]] == ["#/models/0/weight"]
    assert answer.json()["recipe"] == Recipe.from_text(answer.json()["yaml"]).to_data()
    refused = client.post("/v1/recipes:import", content="experts: []")
    assert refused.status_code == 422 and "mixture of experts" in refused.json()["detail"]


HOSTILE_CARDS: dict[str, tuple[bytes, int]] = {
    "too large": (b"x" * (MAX_CARD_BYTES + 1), 413),
    "nothing": (b"", 422),
    "not text": (b"\xff\xfe\x00merge_method", 422),
    "fences without end": (b"```yaml\nmerge_method: [\n" * 50_000, 422),
    "deep": (b"merge_method: " + b"[" * 3000, 422),
    "an alias that expands": (b"a: &a [x]\nb: &b [*a, *a]\nmerge_method: *b", 422),
    "an object": (b"merge_method: !!python/object/apply:os.system ['true']", 422),
    "a long number": (b"merge_method: linear\nseed: " + b"9" * 5000, 422),
    "twice": (b"merge_method: linear\nmerge_method: ties", 422),
}


@pytest.mark.parametrize("title", HOSTILE_CARDS)
def test_hostile_cards_are_refused_in_words(client: TestClient, title: str) -> None:
    card, status = HOSTILE_CARDS[title]
    answer = client.post("/v1/recipes:import", content=card)
    assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/merges", "/v1/recipes:validate"])
@pytest.mark.parametrize(
    ("recipe", "status", "code", "pointer"), PROBLEMS, ids=[f"{code}{pointer}" for _, _, code, pointer in PROBLEMS]
)
def test_problems(
    client: TestClient, settings: Settings, path: str, recipe: dict[str, Any], status: int, code: str, pointer: str
) -> None:
    answer = client.post(path, content=json.dumps(recipe))

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (
        body["status"] == status
        and body["code"] == code
        and body["type"].endswith(code)
        and body["title"]
        and body["detail"]
    )
    assert pointer in [place.get("pointer") for place in body["errors"]]
    assert str(settings.data) not in answer.text and str(settings.roots[0]) not in answer.text
    assert client.get("/v1/merges").json()["data"] == []


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"\xff\xfe\x00", "application/json", 422),
        (b"", "application/json", 422),
        (b"[" * 3000, "application/json", 422),
        (b"a: &x 1\nb: *x", "application/yaml", 422),
        (b"{}", "application/xml", 415),
        (b"x" * 300_000, "application/yaml", 413),
    ],
)
def test_hostile_bodies(client: TestClient, body: bytes, kind: str, status: int) -> None:
    answer = client.post("/v1/merges", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_packed_body_is_refused(client: TestClient) -> None:
    packed = gzip.compress(json.dumps(method_recipe("linear")).encode())
    for path in ("/v1/merges", "/v1/recipes:validate", "/v1/recipes:import"):
        answer = client.post(path, content=packed, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 415 and "Content-Encoding" in answer.json()["detail"]


@pytest.mark.parametrize(
    "path",
    ["/v1/merges/mrg_none", "/v1/merges/mrg_none/files", "/v1/merges/mrg_none/files/x", "/v1/methods/x", "/nowhere"],
)
def test_what_is_not_there_is_a_problem_too(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404 and answer.json()["code"] == "not-found"
    assert client.post("/v1/merges/mrg_none/cancel").status_code == 404
    assert client.delete("/v1/merges").json()["code"] == "method-not-allowed"


def test_cancel(client: TestClient) -> None:
    job = client.post("/v1/merges", json=method_recipe("linear")).json()
    first = client.post(job["urls"]["cancel"])
    assert first.status_code == 200 and first.json()["status"] == "canceled"
    assert client.post(job["urls"]["cancel"]).status_code == 200
    refused = client.get(job["urls"]["files"])
    assert refused.status_code == 409 and refused.json()["code"] == "invalid-state"


def test_patches_are_jobs_too(
    client: TestClient, settings: Settings, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTSMITH_DATA", str(settings.data))
    monkeypatch.setenv("WEIGHTSMITH_MODEL_ROOTS", str(models))
    extract = {"operation": "extract", "base_model": "base", "clean": "m0", "corrupted": ["m1", "m2"], "layers": 1}
    answer = client.post("/v1/patches", json=extract)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["id"].startswith("pat_") and answer.headers["location"] == f"/v1/patches/{job['id']}"
    assert job["plan"]["operation"] == "extract" and job["plan"]["tensors"] == 4

    run_job(job["id"])

    done = client.get(answer.headers["location"]).json()
    assert done["status"] == "succeeded", done["error"]
    assert done["progress"]["fraction"] == 1
    file, *_ = client.get(done["urls"]["files"]).json()["data"]
    content = client.get(file["url"]).content
    assert file["path"] == "delta.safetensors" and hashlib.sha256(content).hexdigest() == file["sha256"]
    (models / "signature.safetensors").write_bytes(content)
    apply = {"operation": "apply", "model": "m0", "patches": [{"patch": "signature.safetensors", "strength": 0.5}]}
    planned = client.post("/v1/patches", json=apply).json()
    assert planned["plan"]["patches"] == [{"patch": "signature.safetensors", "strength": 0.5, "tensors": 4}]
    refused = client.post("/v1/patches", json={**apply, "model": "old", "layers": 3})
    assert refused.status_code == 422 and refused.json()["errors"][0]["pointer"] == "#/layers"
    assert client.get(f"/v1/merges/{job['id']}").status_code == 404


def test_alignments_are_jobs_of_their_own(client: TestClient) -> None:
    spec = {name: [None] * len(tensor.shape) for name, tensor in mixed_tensors(0).items()}
    for layer in range(3):
        spec[f"model.layers.{layer}.mlp.up_proj.weight"] = [f"P{layer}", None]
        spec[f"model.layers.{layer}.mlp.down_proj.weight"] = [None, f"P{layer}"]
    answer = client.post("/v1/alignments", json={"models": ["m0", "m1"], "alignment": {"to": "first", "spec": spec}})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["id"].startswith("aln_") and answer.headers["location"] == f"/v1/alignments/{job['id']}"
    assert job["plan"]["permutations"] == [{"size": 40, "count": 3}] and job["plan"]["matched_with"] == "m0"
    assert client.get(job["urls"]["self"]).json() == job
    assert client.get("/v1/merges").json()["data"] == [] and len(client.get("/v1/alignments").json()["data"]) == 1
    for path in (f"/v1/merges/{job['id']}", f"/v1/merges/{job['id']}/files", f"/v1/patches/{job['id']}"):
        assert client.get(path).status_code == 404
    assert client.post(f"/v1/merges/{job['id']}/cancel").status_code == 404
    assert client.post(job["urls"]["cancel"]).json()["status"] == "canceled"
    refused = client.post("/v1/alignments", json={"models": ["m0", "m1"], "alignment": {"too": "first"}})
    assert refused.status_code == 422 and refused.json()["errors"][0]["pointer"] == "#/alignment/too"


def test_paging(client: TestClient) -> None:
    ids = [client.post("/v1/merges", json=method_recipe("linear")).json()["id"] for _ in range(3)]
    client.post(f"/v1/merges/{ids[0]}/cancel")
    page = client.get("/v1/merges?limit=2").json()
    assert [job["id"] for job in page["data"]] == ids[:0:-1] and page["has_more"]
    rest = client.get(f"/v1/merges?limit=2&after={page['next']}").json()
    assert [job["id"] for job in rest["data"]] == ids[:1] and not rest["has_more"] and rest["next"] is None
    assert [job["id"] for job in client.get("/v1/merges?status=canceled").json()["data"]] == ids[:1]
    assert client.get("/v1/merges?limit=0").json()["code"] == "invalid-request"


def test_methods_come_from_the_registry(client: TestClient) -> None:
    listed = client.get("/v1/methods").json()["data"]
    assert {(method["name"], method["semantics"]) for method in listed} == {
        (name, semantics) for name, meanings in METHODS.items() for semantics in meanings
    }
    ties = client.get("/v1/methods/ties").json()["data"][0]
    assert ties["parameters"]["properties"]["lambda"]["default"] == 1.0 and "weight" in ties["per_model"]
    assert {title.partition("-")[0] for title in METHOD_RECIPES} == set(METHODS)


def test_health(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    checks = client.get("/readyz").json()["checks"]
    assert {name: check["status"] for name, check in checks.items()} == {
        "database": "ok",
        "broker": "ok",
        "disk": "ok",
        "workers": "warning",
    }


def test_not_ready_without_a_broker(models: Path, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "data", model_roots=[models], redis_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(settings)) as client:
        answer = client.get("/readyz")
        assert answer.status_code == 503 and answer.json()["checks"]["broker"]["status"] == "failing"
        assert "broker: cannot be reached" in answer.json()["detail"]
        job = client.post("/v1/merges", json=method_recipe("linear"))
        assert job.status_code == 202, "the job waits in the database"


@pytest.fixture
def finished(client: TestClient, settings: Settings, models: Path) -> dict[str, Any]:
    """A job whose merge was made here, as a worker would."""
    job = client.post("/v1/merges", json=method_recipe("linear")).json()
    store = JobStore(settings)
    lease = store.claim(job["id"], "w/1")
    assert lease is not None
    artifact = merge(Recipe.from_data(lease.recipe), artifact_folder(settings, job["id"]), roots=[models])
    store.succeed(lease, files=[vars(file) for file in artifact.files], warnings=[], progress={})
    store.close()
    return dict(client.get(job["urls"]["self"]).json())


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_files_whole_and_in_part(
    client: TestClient, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The same answers whether the store is a folder of this machine or is read through a network."""
    if where == "elsewhere":
        monkeypatch.setattr(FolderStore, "local", lambda *_: None)
    files = {file["path"]: file for file in client.get(finished["urls"]["files"]).json()["data"]}
    assert {"model.safetensors", "config.json", "merge.lock.json", "README.md", "mergekit_config.yml"} == files.keys()
    for file in files.values():
        whole = client.get(file["url"])
        assert hashlib.sha256(whole.content).hexdigest() == file["sha256"] and len(whole.content) == file["size"]
    file = files["model.safetensors"]
    data, url, etag = client.get(file["url"]).content, file["url"], f'"{file["sha256"]}"'

    head = client.head(url)
    assert head.status_code == 200 and head.content == b"" and head.headers["etag"] == etag
    assert head.headers["content-length"] == str(file["size"]) and head.headers["accept-ranges"] == "bytes"
    part = client.get(url, headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == data[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{file['size']}" and part.headers["etag"] == etag
    assert client.get(url, headers={"Range": "bytes=-5"}).content == data[-5:]
    assert client.get(url, headers={"Range": "bytes=5-"}).content == data[5:]
    assert client.get(url, headers={"Range": "bytes=0-1", "If-Range": etag}).status_code == 206
    assert client.get(url, headers={"Range": "bytes=0-1", "If-Range": '"other"'}).status_code == 200
    several = client.get(url, headers={"Range": "bytes=0-1,4-5"})
    assert several.status_code == 206 and several.headers["content-type"].startswith("multipart/byteranges")
    kind = b"Content-Type: " + several.headers["content-type"].encode() + b"\r\n\r\n"
    parts = email.message_from_bytes(kind + several.content, policy=email.policy.HTTP).get_payload()
    assert [part["Content-Range"] for part in parts] == [f"bytes {n}-{n + 1}/{file['size']}" for n in (0, 4)]
    assert [part.get_payload(decode=True) for part in parts] == [data[:2], data[4:6]]
    assert client.get(url, headers={"Range": "bytes=2-4,0-3"}).content == data[:5], "what overlaps is one part"
    assert (
        client.get(url, headers={"Range": "bytes=" + ",".join(f"{3 * n}-{3 * n}" for n in range(99))}).content == data
    )
    assert client.get(url, headers={"If-None-Match": etag}).status_code == 304
    assert client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get(url, headers=[("If-None-Match", '"other"'), ("If-None-Match", etag)]).status_code == 304
    assert client.get(url, headers={"If-Match": '"other"', "If-None-Match": "*"}).status_code == 412
    assert client.get(url, headers={"If-Match": etag}).status_code == 200
    assert client.get(url, headers={"Range": "bytes=0-1,999999999-"}).content == data[:2]
    assert client.get(url, headers={"Range": "bytes=999999999-", "If-Range": '"other"'}).status_code == 200
    assert client.head(url, headers={"Range": "bytes=0-1"}).status_code == 200


@pytest.mark.parametrize("range_", ["bytes=999999999-", "bytes=-0"])
def test_a_range_that_is_not_there(client: TestClient, finished: dict[str, Any], range_: str) -> None:
    answer = client.get(f"{finished['urls']['files']}/config.json", headers={"Range": range_})
    assert answer.status_code == 416 and answer.json()["code"] == "range-not-satisfiable"
    assert answer.headers["content-range"].startswith("bytes */")


@pytest.mark.parametrize(
    "range_", ["lines=0-1", "bytes=abc", "bytes=", "bytes=--5", "bytes=-", "bytes=5-2", "bytes=0-1,5-2"]
)
def test_a_range_that_makes_no_sense_is_ignored(client: TestClient, finished: dict[str, Any], range_: str) -> None:
    answer = client.get(f"{finished['urls']['files']}/config.json", headers={"Range": range_})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "path", ["..%2f..%2fjobs.sqlite", "%2e%2e%2fjobs.sqlite", "%2fetc%2fpasswd", "%2e", "journal.jsonl", ""]
)
def test_only_listed_files_are_served(client: TestClient, finished: dict[str, Any], path: str) -> None:
    answer = client.get(f"{finished['urls']['files']}/{path}")
    assert answer.status_code == 404


def test_a_finished_job_cannot_be_canceled(client: TestClient, finished: dict[str, Any]) -> None:
    answer = client.post(finished["urls"]["cancel"])
    assert answer.status_code == 409 and answer.json()["code"] == "invalid-state"
