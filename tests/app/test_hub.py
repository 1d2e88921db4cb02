"""Finished merges through the Hub's protocol, as the Hub's own client and transformers read them, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi import FastAPI
from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from app.hub import BAD_KEY
from app.main import create_app
from app.repos import Repo, RepoFile
from merge_core.artifact import Artifact
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.app.faulty import Answer, Asked, faulty_server
from tests.conftest import method_recipe, write_checkpoint
from tests.services import served, sha256_of
from tests.test_docs import ROOT
from workers.artifacts import FolderStore
from workers.jobs import JobStore
from workers.keys import USUAL, KeyRing, Scope
from workers.queue import artifact_folder
from workers.settings import Settings


def tiny_llama(seed: int, *, hidden: int = 16, layers: int = 2, vocabulary: int = 40) -> dict[str, torch.Tensor]:
    """The tensors of a Llama, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": weight(hidden, hidden) for name in "qkvo"}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": weight(2 * hidden, hidden) for name in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = weight(hidden, 2 * hidden)
        tensors |= {f"{layer}.{name}_layernorm.weight": weight(hidden) for name in ("input", "post_attention")}
    return tensors | {"model.norm.weight": weight(hidden), "lm_head.weight": weight(vocabulary, hidden)}


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@dataclass
class Shop:
    """A service with a finished merge of ann's, sharded."""

    url: str
    app: FastAPI
    store: JobStore
    merged: Artifact
    job: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return f"{self.url}/hub"

    @property
    def repo(self) -> str:
        return f"merges/{self.job}"

    def key(self, owner: str, *scopes: Scope) -> str:
        return KeyRing(self.store).create(owner, scopes or USUAL)[1]

    def api(self, owner: str = "ann") -> HfApi:
        return HfApi(self.endpoint, token=self.keys[owner])

    def get(self, path: str, owner: str = "ann", **more: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.keys[owner]}", **more.pop("headers", {})}
        verb, url = more.pop("verb", "GET"), f"{self.endpoint}{path}"
        return httpx2.request(verb, url, headers=headers, timeout=60, trust_env=False, **more)

    def snapshot(self, folder: Path, **more: Any) -> Path:
        found = snapshot_download(self.repo, endpoint=self.endpoint, token=self.keys["ann"], cache_dir=folder, **more)
        return Path(found)


def finish(settings: Settings, store: JobStore, owner: str = "ann", recipe: dict[str, Any] | None = None) -> str:
    """A merge that succeeded, as by a worker."""
    document = Recipe.from_data(
        recipe or method_recipe("linear", out_dtype="bfloat16", outputs={"max_shard_size": 10_000})
    )
    job = store.add(document.to_data(), {}, owner=owner)
    lease = store.claim(job.id, "w/1")
    assert lease is not None
    artifact = merge(document, artifact_folder(settings, job.id), roots=settings.roots)
    store.succeed(lease, files=[vars(file) for file in artifact.files], warnings=[], progress={})
    return job.id


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        write_checkpoint(folder / "models" / name, tiny_llama(seed), config=LLAMA)
    settings = Settings(data=folder / "data", model_roots=[folder / "models"], auth="keys")
    store = JobStore(settings)
    job = finish(settings, store)
    app = create_app(settings)
    with served(app) as url:
        merged = Artifact(artifact_folder(settings, job), (), {}, ())
        shop = Shop(url, app, store, merged, job)
        shop.keys = {name: shop.key(name) for name in ("ann", "ben")} | {"narrow": shop.key("ann", Scope.MERGES_READ)}
        yield shop
    store.close()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_snapshot_is_the_artifact(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Whether the store is a folder of this machine or is read through a network."""
    if where == "elsewhere":
        monkeypatch.setattr(FolderStore, "local", lambda *_: None)
    folder = shop.snapshot(tmp_path)
    assert sha256_of(folder) == sha256_of(shop.merged.folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    commit = sha256_of(folder)["merge.lock.json"][:40]
    assert folder.name == commit
    assert shop.snapshot(tmp_path / "again", revision=commit).name == commit
    checked = shop.api().verify_repo_checksums(shop.repo, local_dir=folder)
    assert checked.checked_count == len(sha256_of(folder)) and not checked.mismatches and not checked.missing_paths


def test_a_file_may_be_fetched_from_where_it_is_kept(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from S3, where the key does not go."""

    def bucket(asked: Asked) -> Answer:
        data = (shop.merged.folder / asked.path.strip("/")).read_bytes()
        start, _, end = asked.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        last = int(end or len(data) - 1)
        status = 206 if "range" in asked.headers else 200
        return Answer(status, data[int(start) : last + 1], {"Content-Range": f"bytes {start}-{last}/{len(data)}"})

    with faulty_server(bucket) as other:
        monkeypatch.setattr("app.repos.JobRepo.link", lambda self, path: f"{other.url}/{path}")
        assert sha256_of(shop.snapshot(tmp_path)) == sha256_of(shop.merged.folder)
        files = HfFileSystem(endpoint=shop.endpoint, token=shop.keys["ann"], skip_instance_cache=True)
        assert files.read_bytes(f"{shop.repo}/config.json", start=2, end=9) == _bytes(shop, "config.json")[2:9]
    assert len(other.asked) > 4 and not any(shop.keys["ann"] in str(asked.headers) for asked in other.asked)


def _bytes(shop: Shop, name: str) -> bytes:
    return (shop.merged.folder / name).read_bytes()


def test_the_hub_s_client_reads_parts_and_headers(shop: Shop) -> None:
    api, name = shop.api(), sorted(path.name for path in shop.merged.folder.glob("*.safetensors"))[0]
    files = HfFileSystem(endpoint=shop.endpoint, token=shop.keys["ann"], skip_instance_cache=True)
    assert {path.rpartition("/")[2] for path in files.ls(shop.repo, detail=False)} == sha256_of(
        shop.merged.folder
    ).keys()
    for revision in ("", "@main", f"@{api.model_info(shop.repo).sha}"):
        with files.open(f"{shop.repo}{revision}/{name}", "rb", block_size=64) as stream:
            stream.seek(100)
            assert stream.read(50) == _bytes(shop, name)[100:150]
    found = api.get_safetensors_metadata(shop.repo)
    assert found.parameter_count == {"BF16": sum(tensor.numel() for tensor in tiny_llama(0).values())}
    assert len(found.files_metadata) > 1
    data = json.loads(_bytes(shop, "model.safetensors.index.json"))
    assert dict(found.weight_map) == data["weight_map"]


def test_a_merge_is_described_as_the_hub_describes_models(shop: Shop) -> None:
    api, sizes = shop.api(), {path.name: path.stat().st_size for path in shop.merged.folder.iterdir()}
    digests = sha256_of(shop.merged.folder)
    found = api.model_info(shop.repo, files_metadata=True, securityStatus=True)
    assert (found.id, found.author, found.private, found.gated) == (shop.repo, "merges", True, False)
    assert found.sha == digests["merge.lock.json"][:40] and found.last_modified and found.created_at
    assert found.siblings is not None and found.tags is not None and found.card_data is not None
    assert {each.rfilename: each.size for each in found.siblings} == sizes
    assert {each.rfilename: each.lfs and each.lfs.sha256 for each in found.siblings} == digests
    assert found.library_name == "transformers" and {"merge", "linear", "safetensors"} <= set(found.tags)
    assert found.card_data.tags == ["merge", "mergekit", "weightsmith", "linear"]
    assert found.used_storage == sum(sizes.values()) and found.security_repo_status is not None
    assert api.model_info(shop.repo, revision=found.sha).siblings is not None
    few = api.model_info(shop.repo, expand=["sha", "downloads", "gguf"])
    assert few.sha == found.sha and few.downloads == 0 and few.siblings is None and few.gguf is None
    (branch,) = api.list_repo_refs(shop.repo, include_pull_requests=True).branches
    assert (branch.name, branch.target_commit) == ("main", found.sha)
    (commit,) = api.list_repo_commits(shop.repo, formatted=False)
    assert (commit.commit_id, commit.authors) == (found.sha, ["ann"])
    paths = api.get_paths_info(shop.repo, ["config.json", "nothing"], expand=True)
    assert [(each.path, each.last_commit and each.last_commit.oid) for each in paths] == [("config.json", found.sha)]
    assert api.file_exists(shop.repo, "config.json") and not api.file_exists(shop.repo, "nothing")
    assert api.revision_exists(shop.repo, "main") and not api.revision_exists(shop.repo, "refs/pr/1")
    api.auth_check(shop.repo)
    assert api.whoami()["name"] == "ann"


def test_headers_are_those_that_clients_look_for(shop: Shop) -> None:
    digest, size = sha256_of(shop.merged.folder)["config.json"], len(_bytes(shop, "config.json"))
    path = f"/{shop.repo}/resolve/main/config.json"
    for verb in ("GET", "HEAD"):
        answer = shop.get(path, verb=verb)
        assert answer.status_code == 200 and len(answer.content) == (size if verb == "GET" else 0)
        assert answer.headers["etag"] == answer.headers["x-linked-etag"] == f'"{digest}"'
        assert answer.headers["x-linked-size"] == answer.headers["content-length"] == str(size)
        assert answer.headers["x-repo-commit"] == sha256_of(shop.merged.folder)["merge.lock.json"][:40]
    part = shop.get(path, headers={"Range": "bytes=3-5"})
    assert part.status_code == 206 and part.content == _bytes(shop, "config.json")[3:6]
    assert shop.get(path, headers={"If-None-Match": f'"{digest}"'}).status_code == 304
    assert shop.get(path, headers={"Range": f"bytes={size}-"}).status_code == 416
    assert shop.get(f"/{shop.repo}/resolve/refs%2Fheads%2Fmain/config.json").content == _bytes(shop, "config.json")


def test_what_is_not_there_is_said_as_the_hub_says_it(shop: Shop, tmp_path: Path) -> None:
    api = shop.api()
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (RepositoryNotFoundError, "merges/<id", lambda: api.model_info("merges/mrg_nothing")),
        (RepositoryNotFoundError, "'gpt2'", lambda: api.model_info("gpt2")),
        (RepositoryNotFoundError, "'a/b'", lambda: api.dataset_info("a/b")),
        (RepositoryNotFoundError, "'a/b'", lambda: api.hf_hub_download("a/b", "config.json", cache_dir=tmp_path)),
        (RevisionNotFoundError, "has no revision 'v2'", lambda: api.model_info(shop.repo, revision="v2")),
        (RevisionNotFoundError, "'refs/pr/1'", lambda: list(api.list_repo_tree(shop.repo, revision="refs/pr/1"))),
        (EntryNotFoundError, "has no 'sub'", lambda: list(api.list_repo_tree(shop.repo, "sub"))),
        (EntryNotFoundError, "'model.bin'", lambda: api.hf_hub_download(shop.repo, "model.bin", cache_dir=tmp_path)),
        (HfHubHTTPError, "read-only", lambda: api.create_repo("merges/new")),
        (HfHubHTTPError, "read-only", lambda: api.delete_repo(shop.repo)),
    ]
    for error, words, asks in wrong:
        with pytest.raises(error) as refused:
            asks()
        assert words in str(refused.value)
    with pytest.raises(RemoteEntryNotFoundError) as missing:
        api.hf_hub_download(shop.repo, "generation_config.json", cache_dir=tmp_path)
    assert missing.value.response.headers["x-repo-commit"] == api.model_info(shop.repo).sha
    assert list(tmp_path.rglob(".no_exist/*/generation_config.json")), "the client need not ask again"


def test_a_merge_is_its_owner_s(shop: Shop) -> None:
    for api in (shop.api("ben"), HfApi(shop.endpoint, token=False)):
        with pytest.raises(RepositoryNotFoundError) as missing:
            api.model_info(shop.repo)
        assert missing.value.response.status_code == (404 if api.token else 401)
        with pytest.raises(RepositoryNotFoundError):
            api.get_hf_file_metadata(url=f"{shop.endpoint}/{shop.repo}/resolve/main/config.json")
    assert [each.id for each in shop.api("ben").list_models(author="merges")] == []
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(shop.endpoint, token="wsk_unknown").model_info(shop.repo)
    assert not isinstance(refused.value, RepositoryNotFoundError) and refused.value.response.status_code == 401
    assert refused.value.response.headers["x-error-message"] == BAD_KEY
    with pytest.raises(HfHubHTTPError, match="lacks the scope files:read"):
        shop.api("narrow").model_info(shop.repo)
    with pytest.raises(HfHubHTTPError) as unknown:
        HfApi(shop.endpoint, token="wsk_unknown").whoami()
    assert unknown.value.response.status_code == 401


def test_every_problem_stays_one_and_is_said_twice(shop: Shop) -> None:
    """For clients of the Hub and for those of ours; in headers only what headers may hold."""
    for path, verb in [("/merges/x", "GET"), ("/api/models/merges/é…", "GET"), ("/api/repos/create", "POST")]:
        answer = shop.get(path, verb=verb)
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert problem["error"] == problem["detail"] and problem["status"] == answer.status_code
        assert answer.headers["x-error-message"].isascii()
    head = shop.get(f"/{shop.repo}/resolve/main/nothing", verb="HEAD")
    assert head.status_code == 404 and head.headers["x-error-code"] == "EntryNotFound" and not head.content
    for body in (b"paths", b"{", b'{"paths": 1}', b'{"paths": [1]}', b"[" * 10_000, b"\xff"):
        path = f"/api/models/{shop.repo}/paths-info/main"
        answer = shop.get(path, verb="POST", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422 and "paths" in answer.json()["detail"]


def test_finished_merges_are_listed_newest_first_page_by_page(shop: Shop) -> None:
    settings: Settings = shop.app.state.settings
    made = [finish(settings, shop.store, "cid") for _ in range(3)][::-1]
    shop.store.add(method_recipe("linear"), {}, owner="cid")
    shop.keys["cid"] = shop.key("cid")
    api = shop.api("cid")
    assert [each.id for each in api.list_models(author="merges", limit=2)] == [f"merges/{job}" for job in made[:2]]
    first = shop.get("/api/models?author=merges&limit=2", "cid")
    second = shop.get(first.links["next"]["url"].removeprefix(shop.endpoint), "cid")
    assert [each["id"] for each in first.json() + second.json()] == [f"merges/{job}" for job in made]
    assert "next" not in second.links and "siblings" not in first.json()[0]
    (found,) = api.list_models(author="merges", search=made[1].lower(), full=True)
    assert found.id == f"merges/{made[1]}" and found.siblings and found.tags
    assert list(api.list_models(author="patches")) == list(api.list_models(author="nobody")) == []
    assert next(iter(api.list_models(author="merges", cardData=True, limit=1))).card_data is not None


class Computed(Repo):
    """Files that lie nowhere and whose sha256 nobody knows: each byte of a file is its place."""

    def __init__(self, name: str, count: int) -> None:
        self.id, self.title, self.commit, self.created_at, self.made_at = f"views/{name}", "a view", "a" * 40, 0.0, 0.0
        names = sorted([*(f"part/{i % 3}/{i:05d}.bin" for i in range(count)), "model.safetensors"])
        self.files = {path: RepoFile(path, 1000, hashlib.sha256(path.encode()).hexdigest()) for path in names}

    def read(self, path: str, start: int, end: int) -> Iterator[bytes]:
        yield bytes(i % 256 for i in range(start, end))


class Views:
    """One view, everybody's."""

    def find(self, name: str, owner: str) -> Repo | None:
        return Computed(name, 2500) if name == "one" else None

    def page(self, owner: str, limit: int, before: str | None) -> Sequence[Repo]:
        return []


def test_anything_that_gives_ranges_can_be_shown(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that nobody has whole, in folders, more than a page of them."""
    monkeypatch.setitem(shop.app.state.shelves, "views", Views())
    api, expected = shop.api(), Computed("one", 2500)
    assert api.list_repo_files("views/one") == list(expected.files)
    tree = list(api.list_repo_tree("views/one", recursive=True, expand=True))
    assert [each.path for each in tree] == sorted([*expected.files, "part", "part/0", "part/1", "part/2"])
    assert [each.path for each in api.list_repo_tree("views/one")] == ["model.safetensors", "part"]
    assert [each.path for each in api.list_repo_tree("views/one", "part/1")] == [
        path for path in expected.files if path.startswith("part/1/")
    ]
    path = api.hf_hub_download("views/one", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == bytes(i % 256 for i in range(1000))
    part = shop.get("/views/one/resolve/main/part/0/00000.bin", headers={"Range": "bytes=5-6,300-301"})
    assert part.status_code == 206 and b"\x05\x06" in part.content and bytes([300 % 256, 301 % 256]) in part.content
    (info,) = api.get_paths_info("views/one", "model.safetensors")
    assert info.lfs is None and info.size == 1000  # type: ignore[union-attr]


SAME_WEIGHTS = """
import pathlib, torch
from safetensors.torch import load_file
state, files = model.state_dict(), {}
for path in pathlib.Path(FOLDER).glob("*.safetensors"):
    files |= load_file(path)
assert files.keys() == state.keys()
for name, tensor in files.items():
    assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 40)
print("equal:", len(files))
"""


def shown(shop: Shop, pattern: str) -> str:
    """What the docs show, with this service's address, key and merge in place of its own."""
    (found,) = re.findall(pattern, (ROOT / "docs" / "hub.md").read_text(), re.DOTALL | re.MULTILINE)
    ours = {"http://127.0.0.1:8000": shop.url, "wsk_…": shop.keys["ann"], "merges/mrg_01M7ZD…": shop.repo}
    for theirs, here in ours.items():
        found = found.replace(theirs, here)
    return str(found)


def run_client(shop: Shop, home: Path, *command: str) -> str:
    """A program of somebody's own, whose Hub is ours and who has nothing but a key."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WEIGHTSMITH_"))}
    environment = kept | {"HF_ENDPOINT": shop.endpoint, "HF_HOME": str(home), "HF_TOKEN": shop.keys["ann"]}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=home)
    assert found.returncode == 0, found.stdout + found.stderr
    assert shop.keys["ann"] not in found.stdout + found.stderr
    return found.stdout


def test_transformers_loads_a_merge_as_the_docs_say(shop: Shop, tmp_path: Path) -> None:
    snippet = shown(shop, r"```python\n([^`]*HF_ENDPOINT.*?)```")
    checks = SAME_WEIGHTS.replace("FOLDER", repr(str(shop.merged.folder)))
    said = run_client(shop, tmp_path, sys.executable, "-c", snippet + checks)
    assert said.strip().endswith(f"equal: {len(tiny_llama(0))}")


def test_the_hf_command_downloads_a_merge_as_the_docs_say(shop: Shop, tmp_path: Path) -> None:
    exported, command = shown(shop, r"^(export HF_ENDPOINT=[^\n]* HF_TOKEN=[^\n]*\nhf download [^\n]*)").split("\n")
    assert exported == f"export HF_ENDPOINT={shop.endpoint} HF_TOKEN={shop.keys['ann']}", "as `run_client` sets them"
    program, *arguments = command.split()
    run_client(shop, tmp_path, str(Path(sys.executable).parent / program), *arguments)
    digests = sha256_of(shop.merged.folder)
    got = {name: hashlib.sha256((tmp_path / "merged" / name).read_bytes()).hexdigest() for name in digests}
    assert got == digests


def test_without_keys_none_is_asked_for(shop: Shop, tmp_path: Path) -> None:
    """On loopback, whatever token the client has for another Hub."""
    settings = shop.app.state.settings.model_copy(update={"auth": "auto"})
    with served(create_app(settings, host="127.0.0.1")) as url:
        job = finish(settings, shop.store, "local")
        for token in ("hf_of_another_hub", False):
            api = HfApi(f"{url}/hub", token=token)
            assert Path(api.hf_hub_download(f"merges/{job}", "config.json", cache_dir=tmp_path)).is_file()
            with pytest.raises(RepositoryNotFoundError):
                api.model_info(shop.repo)
