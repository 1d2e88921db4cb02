"""Merges on read through the Hub's protocol: they are on no disk, and have the bytes of those that are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from huggingface_hub import snapshot_download

from app import views as module
from app.errors import HttpProblem
from app.main import create_app
from app.views import MOST_READERS, Views, _Blocks
from merge_core.artifact import LOCK_NAME
from merge_core.merge import merge
from merge_core.merged import MergedWeights
from merge_core.recipe import Recipe
from merge_core.views import VIEW_LOCK_NAME, plan_view, prepare_view
from tests.app.test_hub import LLAMA, SAME_WEIGHTS, run_client, served, tiny_llama
from tests.conftest import write_checkpoint
from tests.services import eventually, sha256_of
from workers.jobs import JobKind, JobStore
from workers.keys import USUAL, KeyRing
from workers.queue import artifact_folder
from workers.settings import VIEWS_AT_ONCE, Settings

LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("m0", "m1")],
    "outputs": {"max_shard_size": 10_000},
}
WHOLE: dict[str, Any] = LINEAR | {"outputs": {}}
TIES: dict[str, Any] = {
    "merge_method": "ties",
    "scope": "model",
    "base_model": "base",
    "models": [{"model": name} for name in ("m0", "m1", "m2")],
    "parameters": {"weight": 1, "density": 0.3},
}
ALIGNED: dict[str, Any] = LINEAR | {"alignment": {"to": "first"}}


@dataclass
class Shop:
    """A service with models, and workers that are asked for."""

    url: str
    app: FastAPI
    settings: Settings
    store: JobStore
    keys: dict[str, str]

    @property
    def endpoint(self) -> str:
        return f"{self.url}/hub"

    def ask(self, verb: str, path: str, owner: str = "ann", **more: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.keys[owner]}", **more.pop("headers", {})}
        return httpx2.request(verb, f"{self.url}{path}", headers=headers, timeout=60, trust_env=False, **more)

    def posted(self, recipe: Any, owner: str = "ann") -> str:
        answer = self.ask("POST", "/v1/views", owner, json=recipe)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def prepared(self, recipe: Any) -> str:
        """A view that is ready, as by a worker."""
        view = self.posted(recipe)
        lease = self.store.claim(view, "w/1")
        assert lease is not None
        out = artifact_folder(self.settings, view)
        artifact = prepare_view(Recipe.from_data(recipe), out, roots=self.settings.roots)
        files = [vars(file) for file in artifact.files]
        self.store.succeed(lease, files=files, warnings=artifact.warnings, progress={})
        return view

    def read(self, view: str, file: str, begin: int, end: int) -> httpx2.Response:
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        return self.ask("GET", f"/hub/views/{view}/resolve/main/{file}", headers=headers)


@contextmanager
def open_shop(folder: Path) -> Iterator[Shop]:
    settings = Settings(data=folder / "data", model_roots=[folder / "models"], auth="keys", threads=2)
    store = JobStore(settings)
    app = create_app(settings)
    with served(app) as url:
        keys = {name: KeyRing(store).create(name, USUAL)[1] for name in ("ann", "ben")}
        yield Shop(url, app, settings, store, keys)
    store.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        write_checkpoint(folder / "models" / name, tiny_llama(seed), config=LLAMA)
    return folder


@pytest.fixture(scope="module")
def shop(world: Path) -> Iterator[Shop]:
    with open_shop(world) as shop:
        yield shop


def merged(recipe: Any, shop: Shop, out: Path) -> dict[str, str]:
    """What a job would make: sha256 by file."""
    merge(Recipe.from_data(recipe), out, roots=shop.settings.roots)
    return sha256_of(out)


STAGED = [TIES | {"name": "one"}, LINEAR | {"models": [{"model": "one"}], "parameters": {"weight": 1}}]


@pytest.mark.parametrize("recipe", [LINEAR, TIES, ALIGNED, STAGED], ids=["linear", "ties", "aligned", "staged"])
def test_a_snapshot_of_a_view_is_the_merge(shop: Shop, tmp_path: Path, recipe: Any) -> None:
    expected = merged(recipe, shop, tmp_path / "out")
    view = shop.prepared(recipe)
    assert not list(artifact_folder(shop.settings, view).glob("model*.safetensors"))

    found = snapshot_download(
        f"views/{view}", endpoint=shop.endpoint, token=shop.keys["ann"], cache_dir=tmp_path / "hub"
    )

    own = {LOCK_NAME, VIEW_LOCK_NAME, "README.md", "prepared.jsonl"}  # a view has another card, and no digests yet
    got = sha256_of(Path(found))
    assert {name: got[name] for name in got.keys() - own} == {name: expected[name] for name in expected.keys() - own}


@pytest.mark.slow  # that a Hub's client gets the files is the same law; this is what it is for
def test_transformers_loads_a_model_that_is_on_no_disk(shop: Shop, tmp_path: Path) -> None:
    recipe = LINEAR | {"out_dtype": "bfloat16"}
    merged(recipe, shop, tmp_path / "out")
    snippet = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained('views/{shop.prepared(recipe)}')\n"
    )
    checks = SAME_WEIGHTS.replace("FOLDER", repr(str(tmp_path / "out")))
    said = run_client(shop, tmp_path, sys.executable, "-c", snippet + checks)  # type: ignore[arg-type]
    assert said.strip().endswith(f"equal: {len(tiny_llama(0))}")


def test_a_view_is_read_once_it_is_prepared_and_by_its_owner(shop: Shop) -> None:
    view = shop.posted(LINEAR)
    path = f"/hub/views/{view}/resolve/main/config.json"
    waits = shop.ask("GET", path)
    assert waits.status_code == 503 and waits.json()["code"] == "preparing" and int(waits.headers["Retry-After"]) > 0
    assert shop.ask("GET", path, "ben").status_code == 404

    assert shop.ask("POST", f"/v1/views/{view}/cancel").json()["status"] == "canceled"
    assert shop.ask("GET", path).json()["code"] == "invalid-state"
    assert shop.ask("DELETE", f"/v1/views/{view}").status_code == 204
    assert shop.ask("GET", path).status_code == 404

    ready = shop.prepared(LINEAR)
    assert shop.ask("GET", "/hub/api/models?author=views").json()[0]["id"] == f"views/{ready}"
    assert shop.ask("GET", "/hub/api/models?author=views", "ben").json() == []


def test_a_view_survives_the_service(world: Path, shop: Shop) -> None:
    view = shop.prepared(TIES)
    first = shop.read(view, "model.safetensors", 5000, 9000).content
    with open_shop(world) as other:
        assert other.read(view, "model.safetensors", 5000, 9000).content == first


def test_only_what_is_asked_for_is_computed_and_only_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = MergedWeights.make
    monkeypatch.setattr(MergedWeights, "make", lambda self, *args: made.append(args[0].name) or make(self, *args))
    view = shop.prepared(WHOLE)

    head = shop.ask("HEAD", f"/hub/views/{view}/resolve/main/model.safetensors")
    size = int(head.headers["Content-Length"])
    header = shop.read(view, "model.safetensors", 0, 4096)
    assert header.status_code == 206 and header.headers["Content-Range"] == f"bytes 0-4095/{size}" and made == []
    assert head.headers["ETag"] == header.headers["ETag"]

    for _ in range(2):
        assert len(shop.read(view, "model.safetensors", size - 8, size).content) == 8
    assert made == ["model.norm.weight"]
    known = shop.ask(
        "GET", f"/hub/views/{view}/resolve/main/model.safetensors", headers={"If-None-Match": head.headers["ETag"]}
    )
    assert known.status_code == 304 and made == ["model.norm.weight"]


def test_others_are_answered_while_blocks_are_computed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait for blocks, no other route's threads are theirs; more readers than may be are sent away."""
    view = shop.prepared(WHOLE)
    go, make = threading.Event(), MergedWeights.make

    def slowly(self: MergedWeights, *args: Any) -> Any:
        assert go.wait(60)
        return make(self, *args)

    monkeypatch.setattr(MergedWeights, "make", slowly)
    with ThreadPoolExecutor(60) as readers:
        asked = [readers.submit(shop.read, view, "model.safetensors", 4096 + i, 30_000) for i in range(50)]
        try:
            eventually(lambda: sum(each.done() for each in asked) == 50 - MOST_READERS)
            assert shop.ask("GET", "/v1/methods").status_code == 200
            assert shop.ask("GET", "/v1/views").status_code == 200
        finally:
            go.set()
        answers = [each.result() for each in asked]
    codes = {answer.status_code for answer in answers}
    assert codes == {206, 503}
    assert {answer.json()["code"] for answer in answers if answer.status_code == 503} == {"too-many-readers"}
    assert eventually(lambda: shop.read(view, "model.safetensors", 4096, 30_000).status_code == 206)


def test_what_is_too_large_for_many_is_read_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BY_READERS", 1)
    view = shop.prepared(WHOLE)
    job, views = shop.store.get(view), Views(shop.app.state.queue)
    assert job is not None
    alone = views.read(job, "model.safetensors", 4096, 5000)
    with pytest.raises(HttpProblem, match="all the memory"):
        views.read(job, "model.safetensors", 4096, 5000)
    assert len(b"".join(alone)) == 5000 - 4096
    assert len(b"".join(views.read(job, "model.safetensors", 4096, 5000))) == 5000 - 4096
    views.close()


def test_more_views_than_are_open_at_a_time(shop: Shop) -> None:
    recipes = [WHOLE | {"seed": seed} for seed in range(VIEWS_AT_ONCE + 2)]
    views = [shop.prepared(recipe) for recipe in recipes]
    for _ in range(2):
        for view in views:
            assert shop.read(view, "model.safetensors", 4090, 5000).status_code == 206


def test_a_view_whose_sources_changed_is_gone(tmp_path: Path) -> None:
    for seed, name in enumerate(["m0", "m1"]):
        write_checkpoint(tmp_path / "models" / name, tiny_llama(seed), config=LLAMA)
    with open_shop(tmp_path) as shop:
        view = shop.prepared(WHOLE)
        assert shop.read(view, "model.safetensors", 4096, 5000).status_code == 206
        write_checkpoint(tmp_path / "models" / "m1", tiny_llama(7), config=LLAMA)
        answer = shop.read(view, "model.safetensors", 4096, 5000)
        assert answer.status_code == 410 and "cannot be computed any more" in answer.json()["detail"]
        with open_shop(tmp_path) as other:
            answer = other.read(view, "model.safetensors", 4096, 5000)
            assert answer.status_code == 410 and "make a new view" in answer.json()["detail"]
        (tmp_path / "models" / "m1" / "model.safetensors").unlink()
        assert shop.read(view, "model.safetensors", 4096, 5000).status_code == 410
        assert shop.ask("GET", f"/hub/views/{view}/resolve/main/config.json").status_code == 200
        (artifact_folder(shop.settings, view) / "config.json").unlink()
        assert shop.ask("GET", f"/hub/views/{view}/resolve/main/config.json").status_code == 410


@pytest.mark.parametrize(
    ("keys", "pointer"),
    [
        ({"outputs": {"kind": "delta"}, "base_model": "base"}, "#/outputs/kind"),
        ({"outputs": {"hub": {"repo": "a/b"}}}, "#/outputs/hub"),
    ],
)
def test_what_cannot_be_read_before_it_is_made_is_refused(shop: Shop, keys: dict[str, Any], pointer: str) -> None:
    answer = shop.ask("POST", "/v1/views", json=LINEAR | keys)
    assert answer.status_code == 422 and answer.json()["errors"][0]["pointer"] == pointer


def test_a_view_takes_no_disk_for_its_weights(shop: Shop) -> None:
    plan = plan_view(Recipe.from_data(LINEAR), roots=shop.settings.roots)
    job = shop.store.get(shop.posted(LINEAR))
    assert job is not None and job.kind == JobKind.VIEW
    assert job.plan["digest"] == plan.plan.digest and job.plan["bytes_written"] == plan.plan.output_bytes
    assert job.reserved_bytes < 3 * 2**20


def test_blocks_are_kept_as_long_as_there_is_room() -> None:
    made: list[str] = []

    def make(place: str, size: int) -> Future[bytes]:
        made.append(place)
        future: Future[bytes] = Future()
        future.set_result(bytes(size))
        return future

    blocks = _Blocks(100)
    for place, size in [
        ("a", 60),
        ("a", 60),
        ("b", 30),
        ("a", 60),
        ("c", 30),
        ("a", 60),
        ("b", 30),
        ("d", 101),
        ("d", 101),
    ]:
        assert len(blocks.get(place, lambda: make(place, size)).result()) == size  # noqa: B023
    assert made == ["a", "b", "c", "b", "d", "d"]


def test_a_block_that_is_being_computed_is_computed_once() -> None:
    blocks, future = _Blocks(100), Future[bytes]()
    first = blocks.get("a", lambda: future)
    assert blocks.get("a", Future) is first
    future.set_exception(ValueError())
    again: Future[bytes] = Future()
    assert blocks.get("a", lambda: again) is again


def test_a_reader_that_never_reads_gives_its_place_back(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_READERS", 1)
    job = shop.store.get(shop.prepared(WHOLE))
    assert job is not None
    views = Views(shop.app.state.queue)
    for _ in range(3):
        views.read(job, "model.safetensors", 0, 10).close()  # type: ignore[attr-defined]
        next(views.read(job, "model.safetensors", 0, 10_000))
    views.close()
