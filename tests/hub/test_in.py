"""Models named by Hub ids: what they mean, what is read for a plan, and merges of them in both modes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr

from merge_core.errors import Canceled, CheckpointError, InsufficientStorage, UnsafeFormat
from merge_core.merge import merge, plan_only
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from merge_core.snapshots import Roots
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from tests.hub import Entry, Hub, User, running_hub
from tests.services import eventually
from workers.artifacts import open_artifacts
from workers.hub import ranges, streamed
from workers.hub.client import HubClient
from workers.hub.errors import HubGated, HubLied, HubNotAllowed, HubNotFound, HubTokenRefused, HubUnavailable
from workers.hub.opening import open_library
from workers.hub.resolve import HubLibrary, Place
from workers.janitor import Janitor
from workers.jobs import JobStore
from workers.settings import Settings

MODES = pytest.mark.parametrize("mode", ["cached", "streamed"])
RECIPE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [{"model": "org/m0"}, {"model": "org/m1", "parameters": {"weight": 0.5}}],
    "parameters": {"weight": 1.0, "density": 0.4},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `m0`, `m1`, in two shards each."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "m0", "m1"]):
        write_checkpoint(folder / name, mixed_tensors(seed), shards=2, config=CONFIG)
    return folder


@pytest.fixture
def hub(models: Path, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        for name in ("base", "m0", "m1"):
            hub.put(f"org/{name}", models / name)
        yield hub


class Service:
    """What a service has of a Hub: settings, and a library for each job."""

    def __init__(self, hub: Hub, data: Path, **settings: Any) -> None:
        allowed = {"hub_endpoint": hub.endpoint, "endpoint_allow": ["localhost", "127.0.0.1"]}
        self.settings = Settings(data=data, **{**allowed, **settings})

    def library(
        self, *, user: User | None = None, pinned: Any = None, stop: Any = ranges.never, endpoint: str | None = None
    ) -> HubLibrary:
        token = None if user is None else SecretStr(user.token)
        made = open_library(
            self.settings, lambda: HubClient.of(self.settings, endpoint, token), pinned=pinned, stop=stop
        )
        assert made is not None
        return made

    def roots(self, **how: Any) -> Roots:
        return Roots([self.settings.data / "models"], self.library(**how))

    def refused(self, model: str, **how: Any) -> CheckpointError:
        recipe = Recipe.from_data({"merge_method": "passthrough", "models": [{"model": model}]})
        with pytest.raises(CheckpointError) as caught:
            plan_only(recipe, roots=self.roots(**how))
        assert [each.pointer for each in caught.value.problems] == ["#/models/0/model"]
        return caught.value


@pytest.fixture
def service(hub: Hub, tmp_path: Path) -> Service:
    return Service(hub, tmp_path / "data")


def local(data: dict[str, Any]) -> Recipe:
    return Recipe.from_data(json.loads(json.dumps(data).replace('"org/', '"')))


# What a name means.


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("org/name", Place("org/name", "")),
        ("org/name/sub/folder", Place("org/name", "sub/folder")),
        ("org/name/delta.safetensors", Place("org/name", "delta.safetensors")),
        *(
            (path, None)
            for path in ("name", "/org/name", "org/../name", "../org/name", "org//name", "org/na me", "./a/b")
        ),
        *(
            (path, None)
            for path in ("org/name/..", "org/a--b", "org/a\nb", "org/a\\b", "org/" + "a" * 97, "~/models/a")
        ),
    ],
)
def test_what_looks_like_a_hub_id(path: str, place: Place | None) -> None:
    assert Place.of(path) == place


@MODES
def test_a_merge_of_hub_ids_has_the_bytes_of_the_same_files_here(
    hub: Hub, models: Path, tmp_path: Path, mode: str
) -> None:
    service = Service(hub, tmp_path / "data", hub_mode=mode)

    there = merge(Recipe.from_data(RECIPE), tmp_path / "there", roots=service.roots())

    here = merge(local(RECIPE), tmp_path / "here", roots=[models])
    assert there.tensors == here.tensors
    assert not [warning for warning in there.warnings if "as the Hub says" in warning]
    lock = json.loads((there.folder / "merge.lock.json").read_text())
    for source in lock["sources"]:
        repo = source["model"]
        assert source["commit"] == hub.repos[repo].branches["main"]
        assert {file["path"]: file["sha256"] for file in source["files"]}.items() <= hub.sha256(repo).items()
    assert not hub.leaks
    weights = [file for file in service.settings.hub_folder.rglob("*.safetensors") if file.is_file()]
    on_disk = sum(
        file.stat().st_blocks * 512 for file in weights if "snapshots" in file.parts and "cache" not in file.parts
    )
    assert on_disk < 100_000


def test_a_branch_a_tag_a_commit_and_a_pull_request_are_revisions(hub: Hub, service: Service, models: Path) -> None:
    first = hub.repos["org/m0"].branches["main"]
    second = hub.put("org/m0", models / "m1", revision="dev")
    hub.repos["org/m0"].tags["v1.0"] = first
    hub.repos["org/m0"].pull_requests["refs/pr/7"] = second
    library = service.library()

    for revision, commit in (
        (None, first),
        ("main", first),
        ("dev", second),
        ("v1.0", first),
        (first, first),
        ("refs/pr/7", second),
    ):
        found = library.find("org/m0", revision)
        assert found is not None
        assert found[0].commit == commit
    assert [each["commit"] for each in library.resolved] == [first, first, second, first, first, second]


@MODES
def test_a_revision_that_moved_is_still_the_commit_that_it_was(
    hub: Hub, models: Path, tmp_path: Path, mode: str
) -> None:
    service = Service(hub, tmp_path / "data", hub_mode=mode)
    accepted = service.roots()
    plan_only(Recipe.from_data(RECIPE), roots=accepted)
    pinned = json.loads(json.dumps(accepted.library.resolved))  # type: ignore[union-attr]
    hub.put("org/m0", write_checkpoint(tmp_path / "new", mixed_tensors(9), shards=2, config=CONFIG))

    for data in (tmp_path / "data", tmp_path / "another-machine"):
        worker = Service(hub, data, hub_mode=mode)
        made = merge(Recipe.from_data(RECIPE), tmp_path / data.name / "out", roots=worker.roots(pinned=pinned))
        assert made.tensors == merge(local(RECIPE), tmp_path / f"{data.name}-here", roots=[models]).tensors


def test_a_subfolder_and_a_file_are_models_too(hub: Hub, service: Service, models: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    for name in ("base", "m0"):
        write_checkpoint(both / "variants" / name, mixed_tensors(int(name == "m0")), config=CONFIG)
    hub.put("org/both", both)
    recipe = Recipe.from_data(
        {
            "merge_method": "linear",
            "models": [
                {"model": "org/both/variants/base"},
                {"model": {"model": {"path": "org/both", "subfolder": "variants/m0", "revision": "main"}}},
                {"model": "org/both/variants/m0/model.safetensors"},
            ],
            "parameters": {"weight": 1.0},
        }
    )

    plan = plan_only(recipe, roots=service.roots())

    assert [str(model) for model in plan.models] == [
        "org/both/variants/base",
        "org/both/variants/m0@main",
        "org/both/variants/m0/model.safetensors",
    ]


def test_one_commit_by_two_names_is_in_the_lock_twice(hub: Hub, service: Service, tmp_path: Path) -> None:
    recipe = {**RECIPE, "base_model": "org/m0@main", "models": [{"model": "org/m0"}, {"model": "org/m1"}]}

    made = merge(Recipe.from_data(recipe), tmp_path / "out", roots=service.roots())

    lock = json.loads((made.folder / "merge.lock.json").read_text())
    commits = {source["model"]: source["commit"] for source in lock["sources"]}
    main = hub.repos["org/m0"].branches["main"]
    assert commits == {"org/m0@main": main, "org/m0": main, "org/m1": hub.repos["org/m1"].branches["main"]}


def test_a_snapshot_that_nobody_named_for_long_goes(hub: Hub, service: Service) -> None:
    library = service.library()
    kept, old = (library.find(name, None) for name in ("org/m0", "org/m1"))
    assert kept is not None and old is not None
    os.utime(old[0].folder, (0, 0))
    store = JobStore(service.settings)

    Janitor(store, open_artifacts(service.settings)).sweep_now()

    store.close()
    assert kept[0].folder.exists() and not old[0].folder.parent.exists()
    assert service.library().find("org/m1", None) is not None


# What is wrong is said where it is known.


def test_who_may_not_is_told_so(hub: Hub, service: Service, models: Path) -> None:
    hub.put("alice/private", models / "m0", private=True)
    hub.put("org/gated", models / "m0", gated="manual")

    missing, private = service.refused("org/nothing"), service.refused("alice/private")
    assert isinstance(missing, HubNotFound) and isinstance(private, HubNotFound)
    assert "org/nothing: is no model here, and no repository" in str(missing)
    assert "store a Hub token" in str(private)
    assert isinstance(service.refused("alice/private", user=hub.bob), HubNotFound)
    assert isinstance(service.refused("org/gated"), HubGated)
    assert isinstance(service.refused("org/gated", user=hub.bob), HubGated)
    assert isinstance(service.refused("org/m0", user=User("nobody", "hf_" + "x" * 34)), HubTokenRefused)
    for user, model in ((hub.alice, "alice/private"), (hub.reader, "alice/private")):
        assert service.library(user=user).find(model, None) is not None
    hub.repos["org/gated"].granted.add("bob")
    assert service.library(user=hub.bob).find("org/gated", None) is not None
    assert isinstance(service.refused("org/gated", user=hub.alice), HubGated), "a snapshot is there, but not for her"


def test_a_revision_or_folder_that_is_not_there(service: Service) -> None:
    assert "has no such revision" in str(service.refused("org/m0@nothing"))
    assert "has no folder or file nothing" in str(service.refused("org/m0/nothing"))


def test_pickles_only(hub: Hub, service: Service) -> None:
    hub.put("org/old", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04" + bytes(100)})

    assert isinstance(error := service.refused("org/old"), UnsafeFormat)
    assert str(error).startswith("org/old/pytorch_model.bin: is a pickle")


@pytest.mark.parametrize("told", ["../../../etc/passwd", "/etc/passwd", "a/../../b", "a\\..\\b"])
def test_a_tree_that_leads_out_of_itself(hub: Hub, service: Service, tmp_path: Path, told: str) -> None:
    hub.repos["org/m0"].files()["config.json"].told_path = told

    assert isinstance(service.refused("org/m0"), HubLied)


@pytest.mark.parametrize("change", [-1, 1, 10**6, 10**13])
def test_a_file_of_another_length_than_listed(hub: Hub, service: Service, change: int) -> None:
    name, entry = next((name, each) for name, each in hub.repos["org/m0"].files().items() if name.endswith("s"))
    entry.told_size = entry.size + change

    error = service.refused("org/m0")

    assert str(error).startswith(f"org/m0/{name}: ")


def test_a_small_file_with_other_bytes_than_listed(hub: Hub, service: Service) -> None:
    hub.fail(r"resolve-cache/.*/config\.json", flip=3, times=None)

    assert "config.json: came with other bytes" in str(service.refused("org/m0"))


def test_a_hub_that_is_not_there_or_not_allowed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Service(hub, tmp_path / "data", hub_endpoint="http://127.0.0.1:9")
    assert isinstance(away.refused("org/m0"), HubUnavailable)
    with pytest.raises(HubNotAllowed):
        HubClient.of(Service(hub, tmp_path / "data").settings, "https://elsewhere.example")
    inside = Service(hub, tmp_path / "inside", endpoint_allow=[])
    assert isinstance(inside.refused("org/m0"), HubNotAllowed), "the CDN is at an address that nobody allowed"


def test_a_hub_that_speaks_otherwise(hub: Hub, service: Service) -> None:
    hub.fail("/api/models/", status=200, times=None)

    assert isinstance(service.refused("org/m0"), HubLied)


def test_a_full_disk_is_said_to_be(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("workers.hub.resolve.os.truncate", full)
    recipe = Recipe.from_data({"merge_method": "passthrough", "models": [{"model": "org/m0"}]})

    with pytest.raises(InsufficientStorage):
        plan_only(recipe, roots=service.roots())
    assert not list(service.settings.hub_folder.rglob("*.safetensors"))


def test_a_busy_hub_is_asked_again(hub: Hub, service: Service) -> None:
    hub.fail("GET /org/m0/resolve", status=503, times=2)
    hub.fail("GET /objects", status=429, headers={"Retry-After": "1"}, times=1)

    began = time.monotonic()
    assert service.library().find("org/m0", None) is not None
    assert time.monotonic() - began > 0.9


# What is read.


def test_a_plan_reads_a_snapshot_once(hub: Hub, service: Service) -> None:
    plan_only(Recipe.from_data(RECIPE), roots=service.roots())
    first = len(hub.requests)
    plan_only(Recipe.from_data(RECIPE), roots=service.roots())

    assert len(hub.requests) - first == 3, "the listings alone"
    assert hub.sent("objects") < 3 * 2 * ranges_of_headers()


def ranges_of_headers() -> int:
    return 2**16


def test_a_folder_of_that_name_is_taken_first(hub: Hub, service: Service, models: Path) -> None:
    write_checkpoint(service.settings.data / "models" / "org" / "m0", mixed_tensors(1), config=CONFIG)

    plan_only(Recipe.from_data({"merge_method": "passthrough", "models": [{"model": "org/m0"}]}), roots=service.roots())

    assert not hub.requests


# What goes wrong on the way.


@MODES
def test_a_merge_outlives_a_bad_network(
    hub: Hub, models: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_FIRST_PAUSE", 0.01)
    service = Service(hub, tmp_path / "data", hub_mode=mode)
    roots = service.roots()
    plan_only(Recipe.from_data(RECIPE), roots=roots)
    for cut in (0, 1, 1000, 3000):
        hub.fail("GET /objects", cut=cut)
    hub.fail("/resolve/", status=503)
    hub.fail("GET /objects", status=429, headers={"Retry-After": "1"})
    hub.expire_links()

    made = merge(Recipe.from_data(RECIPE), tmp_path / "there", roots=roots)

    assert made.tensors == merge(local(RECIPE), tmp_path / "here", roots=[models]).tensors


@MODES
def test_other_bytes_than_the_hub_lists_make_no_merge(hub: Hub, tmp_path: Path, mode: str) -> None:
    service = Service(hub, tmp_path / "data", hub_mode=mode)
    roots = service.roots()
    plan_only(Recipe.from_data(RECIPE), roots=roots)
    entry = next(each for name, each in hub.repos["org/m1"].files().items() if "00001" in name)
    hub.fail(f"GET /objects/{entry.sha256}", flip=entry.size - 3, times=None)

    with pytest.raises(HubLied) as caught:
        merge(Recipe.from_data(RECIPE), tmp_path / "there", roots=roots)

    assert f"org/m1/{entry.path}: came with other bytes" in str(caught.value)
    assert not (tmp_path / "there").exists()


@MODES
def test_a_merge_is_canceled_while_it_waits_for_bytes(hub: Hub, tmp_path: Path, mode: str) -> None:
    service = Service(hub, tmp_path / "data", hub_mode=mode)
    canceled = threading.Event()
    roots = service.roots(stop=canceled.is_set)
    plan_only(Recipe.from_data(RECIPE), roots=roots)
    held, canceled_at = hub.fail("GET /objects", seconds=600, times=None), list[float]()

    def cancel() -> None:
        eventually(lambda: held.seen)
        canceled_at.append(time.monotonic())
        canceled.set()

    canceling = threading.Thread(target=cancel)
    canceling.start()

    with pytest.raises(Canceled):
        merge(Recipe.from_data(RECIPE), tmp_path / "there", roots=roots, stop=canceled.is_set)

    assert time.monotonic() - canceled_at[0] < 2.0
    canceling.join()


def test_a_hub_that_stays_away_ends_the_merge(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "PATIENCE", 1.0)
    service = Service(hub, tmp_path / "data", hub_mode="streamed")
    roots = service.roots()
    plan_only(Recipe.from_data(RECIPE), roots=roots)
    roots.library.supply._patience = 1.0  # type: ignore[union-attr]
    hub.fail("GET /objects", status=503, times=None)

    with pytest.raises(HubUnavailable):
        merge(Recipe.from_data(RECIPE), tmp_path / "there", roots=roots)


# What it costs.


def seventy_billion() -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama 3 of 70 billion parameters."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128_256, 8192)}
    for layer in range(80):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (8192, 8192) for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (1024, 8192) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (28_672, 8192) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (8192, 28_672)}
        shapes |= {f"{at}.{name}_layernorm.weight": (8192,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (8192,), "lm_head.weight": (128_256, 8192)}


def put_sparse(hub: Hub, repo: str, shapes: dict[str, tuple[int, ...]], small: dict[str, bytes], shards: int) -> int:
    """Put a repo whose weights are true headers and holes; how many bytes it has."""
    hub.put(repo, small)
    commit, names, total = hub.repos[repo].commits[hub.repos[repo].branches["main"]], list(shapes), 0
    files, weight_map = dict(commit.files), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names[number * len(names) // shards : (number + 1) * len(names) // shards]:
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            at, weight_map[name] = at + size, file
        raw = json.dumps(header).encode()
        sha256 = hashlib.sha256(f"{repo} {file}".encode()).hexdigest()
        hub.content(sha256).write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(hub.content(sha256), 8 + len(raw) + at)
        files[file] = Entry(file, 8 + len(raw) + at, sha256, sha256[:40], True)
        total += at
    hub.repos[repo].commits[commit.sha] = replace(commit, files=files)
    hub.put(repo, {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()})
    return total


def test_a_plan_of_seventy_billion_parameters_reads_less_than_20_mb(hub: Hub, service: Service) -> None:
    config = {"num_hidden_layers": 80, "vocab_size": 128_256, "hidden_size": 8192, "tie_word_embeddings": False}
    small = {"config.json": json.dumps(config).encode(), "tokenizer.json": os.urandom(9_085_657)}
    for repo in ("big/base", "big/tuned"):
        total = put_sparse(hub, repo, seventy_billion(), small, 30)
    recipe = {"merge_method": "task_arithmetic", "base_model": "big/base", "parameters": {"weight": 1.0}}

    plan = plan_only(Recipe.from_data({**recipe, "models": [{"model": "big/tuned"}]}), roots=service.roots())

    assert total > 140e9 and plan.input_bytes == 2 * total
    assert hub.sent() < 2 * 20e6
    used = sum(file.stat().st_blocks * 512 for file in service.settings.hub_folder.rglob("*") if file.is_file())
    assert used < 2 * 20e6


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of 12 MB each in three shards, which take many chunks."""
    folder = tmp_path_factory.mktemp("large")
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{i}.weight": torch.randn(1000, 1000, generator=generator).bfloat16() for i in range(6)}
        write_checkpoint(folder / f"m{seed}", tensors, shards=3)
    return folder


def put_large(hub: Hub, large: Path, scope: str = "tensor") -> tuple[dict[str, Any], int]:
    for name in ("m0", "m1"):
        hub.put(f"org/{name}", large / name)
    recipe = {"merge_method": "ties", "base_model": "org/m0", "models": [{"model": "org/m1"}], "scope": scope}
    size = sum(entry.size for name in ("m0", "m1") for entry in hub.repos[f"org/{name}"].files().values())
    return {**recipe, "parameters": {"weight": 1.0, "density": 0.3}, "limits": {"threads": 2}}, size


def test_what_is_streamed_comes_once_in_large_pieces_and_nothing_stays(
    tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "MOST_WINDOW", 2**24)
    with running_hub(tmp_path / "hub") as hub:
        recipe, size = put_large(hub, large)
        service = Service(hub, tmp_path / "data", hub_mode="streamed")
        roots = service.roots()
        last: list[Progress] = []

        made = merge(Recipe.from_data(recipe), tmp_path / "out", roots=roots, report=last.append)

        gets = [each for each in hub.asked("GET /objects") if each.range not in (None, "bytes=0-65535")]
        assert last[-1].bytes_received == sum(each.sent for each in gets)
        assert sum(each.sent for each in gets) < 1.1 * size, "a tensor is measured and merged in what came once"
        assert sum(each.sent for each in gets) / len(gets) > 2**18, "neighbours come together"
        assert len(hub.asked("GET /org/.*safetensors")) < 24, "a link serves many ranges"
    assert made.tensors == merge(local(recipe), tmp_path / "here", roots=[large]).tensors
    stored = [file for file in (tmp_path / "data").rglob("*") if file.is_file()]
    assert sum(file.stat().st_blocks * 512 for file in stored) < 200_000


def test_passes_over_a_whole_model_are_streamed_as_often(
    tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "LEAST_WINDOW", 2**22)
    monkeypatch.setattr(streamed, "MOST_WINDOW", 2**22)
    with running_hub(tmp_path / "hub") as hub:
        recipe, _ = put_large(hub, large, scope="model")
        service = Service(hub, tmp_path / "data", hub_mode="streamed")

        made = merge(Recipe.from_data(recipe), tmp_path / "out", roots=service.roots())

    assert made.tensors == merge(local(recipe), tmp_path / "here", roots=[large]).tensors


def test_the_cache_is_shared_kept_small_and_proved_once(tmp_path: Path, large: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        recipe, size = put_large(hub, large)
        service = Service(hub, tmp_path / "data", hub_mode="cached", hub_cache_bytes=size // 2)
        expected = merge(local(recipe), tmp_path / "here", roots=[large]).tensors

        made = merge(Recipe.from_data(recipe), tmp_path / "out", roots=service.roots())

        assert made.tensors == expected
        blobs = list((service.settings.hub_folder / "cache").glob("models--*/blobs/*"))
        assert 0 < sum(blob.stat().st_size for blob in blobs) <= size // 2
        assert not [blob for blob in blobs if blob.name.endswith(".incomplete")]

        whole = Service(hub, tmp_path / "another", hub_mode="auto", hub_cache_bytes=2 * size)
        first = merge(Recipe.from_data(recipe), tmp_path / "first", roots=whole.roots())
        sent = hub.sent("/objects/")
        again = merge(Recipe.from_data(recipe), tmp_path / "again", roots=whole.roots())
        assert first.tensors == again.tensors == expected
        assert hub.sent("/objects/") == sent, "what is in the cache is not asked for again"


def test_a_file_that_went_bad_in_the_cache_is_fetched_anew(hub: Hub, models: Path, tmp_path: Path) -> None:
    service = Service(hub, tmp_path / "data", hub_mode="cached")
    merge(Recipe.from_data(RECIPE), tmp_path / "one", roots=service.roots())
    cache = service.settings.hub_folder / "cache"
    for mark in (cache / ".proved").iterdir():
        mark.unlink()
    blob = max(cache.glob("models--*/blobs/*"), key=lambda each: each.stat().st_size)
    blob.write_bytes(bytes(blob.stat().st_size))

    with pytest.raises(HubLied):
        merge(Recipe.from_data(RECIPE), tmp_path / "two", roots=service.roots())
    made = merge(Recipe.from_data(RECIPE), tmp_path / "three", roots=service.roots())

    assert made.tensors == merge(local(RECIPE), tmp_path / "here", roots=[models]).tensors
