"""Models that lie elsewhere: planned from stand-ins, merged from a supply, to the bytes of those that lie here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_core.align import AlignmentDocument, align
from merge_core.errors import CheckpointError, CheckpointNotFound, PathNotAllowed
from merge_core.execute import Execution
from merge_core.merge import merge, plan_only
from merge_core.patching import Patch, patch
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from merge_core.snapshots import OpenFile, Roots
from tests.conftest import method_recipe, write_checkpoint
from tests.snapshots import COMMIT, WINDOW, FolderLibrary

MODES = pytest.mark.parametrize("in_files", [True, False], ids=["files", "ranges"])
RECIPE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "m0"}, {"model": "m1", "parameters": {"weight": 0.5}}],
    "parameters": {"weight": 1.0, "density": 0.4},
}


def elsewhere(data: Any) -> Any:
    """The same recipe with `org/` before its models."""
    if isinstance(data, dict):
        return {key: _named(key, value) for key, value in data.items()}
    return [elsewhere(value) for value in data] if isinstance(data, list) else data


def _named(key: str, value: Any) -> Any:
    if key in ("model", "base_model", "patch", "clean") and isinstance(value, str):
        return "+".join(f"org/{part}" for part in value.split("+"))
    return elsewhere(value)


@pytest.fixture
def library(models: Path, tmp_path: Path, request: pytest.FixtureRequest) -> FolderLibrary:
    return FolderLibrary(models, tmp_path / "snapshots", in_files=getattr(request, "param", False))


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes()[_header(file) :] for file in folder.glob("*.safetensors")}


def _header(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


@MODES
@pytest.mark.parametrize(
    "title", ["ties", "ties-model", *(pytest.param(title, marks=pytest.mark.slow) for title in ("linear", "low_rank"))]
)
def test_what_lies_elsewhere_is_merged_to_the_same_bytes(
    models: Path, tmp_path: Path, title: str, in_files: bool
) -> None:
    library = FolderLibrary(models, tmp_path / "snapshots", in_files=in_files)
    recipe = method_recipe(title)

    here = merge(Recipe.from_data(recipe), tmp_path / "here", roots=[models])
    there = merge(Recipe.from_data(elsewhere(recipe)), tmp_path / "there", roots=Roots([models], library))

    assert weights_of(there.folder) == weights_of(here.folder)
    assert there.tensors == here.tensors
    assert not library.supply.is_open


@MODES
def test_adapters_and_deltas_lie_elsewhere_too(models: Path, tmp_path: Path, in_files: bool) -> None:
    library = FolderLibrary(models, tmp_path / "snapshots", in_files=in_files)
    outputs = {"kind": "delta", "encoding": "dense"}
    delta = {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "m0"}], "outputs": outputs}
    merge(Recipe.from_data(delta), models / "delta", roots=[models])
    recipe: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "base+delta"}, {"model": "m1"}]}
    recipe |= {"parameters": {"weight": 0.5}}
    patched = {"operation": "apply", "model": "m2", "patches": [{"patch": "delta", "strength": 0.5}]}
    roots = Roots([models], library)

    for name, made in (("merge", recipe), ("delta", delta)):
        here = merge(Recipe.from_data(made), tmp_path / "here" / name, roots=[models])
        there = merge(Recipe.from_data(elsewhere(made)), tmp_path / "there" / name, roots=roots)
        assert there.tensors == here.tensors
    here = patch(Patch.from_data(patched), tmp_path / "here" / "patched", roots=[models])
    there = patch(Patch.from_data(elsewhere(patched)), tmp_path / "there" / "patched", roots=roots)

    assert there.tensors == here.tensors


@MODES
def test_permutations_are_found_of_what_lies_elsewhere(models: Path, tmp_path: Path, in_files: bool) -> None:
    library = FolderLibrary(models, tmp_path / "snapshots", in_files=in_files)
    for seed, name in enumerate(["one", "two"]):
        generator = torch.Generator().manual_seed(seed)
        layers = {f"{i}.weight": torch.randn(12, 12, generator=generator) for i in range(3)}
        write_checkpoint(models / name, layers)
    keys = {"alignment": {"spec": {"0.weight": ["P", None], "1.weight": ["Q", "P"], "2.weight": [None, "Q"]}}}
    here, there = {"models": ["one", "two"], **keys}, {"models": ["org/one", "org/two"], **keys}

    one = align(AlignmentDocument.from_data(here), tmp_path / "here", roots=[models])
    other = align(AlignmentDocument.from_data(there), tmp_path / "there", roots=Roots([models], library))

    first, second = (json.loads((made.folder / "report.json").read_text())["models"] for made in (one, other))
    assert first["two"]["l2"] == second["org/two"]["l2"]
    assert weights_of(one.folder) == weights_of(other.folder)


def test_a_plan_reads_no_weights(models: Path, library: FolderLibrary) -> None:
    plan = plan_only(Recipe.from_data(elsewhere(RECIPE)), roots=Roots([models], library))

    assert plan.memory.window == WINDOW
    assert not library.supply.reads


def test_the_window_counts_in_the_plans_memory(models: Path, tmp_path: Path, library: FolderLibrary) -> None:
    limits = {"limits": {"memory": "512MiB", "threads": 1}}
    recipe = {**RECIPE, "merge_method": "task_arithmetic", "parameters": {"weight": 1.0}}  # which measures nothing
    here = plan_only(Recipe.from_data({**recipe, **limits}), roots=[models])
    there = plan_only(Recipe.from_data({**elsewhere(recipe), **limits}), roots=Roots([models], library))

    assert here.memory.peak + WINDOW <= there.memory.peak <= 512 * 2**20


def test_a_folder_of_that_name_goes_before_a_repository(models: Path, tmp_path: Path, library: FolderLibrary) -> None:
    shutil.copytree(models / "base", models / "org" / "base")
    data = {"merge_method": "passthrough", "models": [{"model": "org/base"}]}

    plan_only(Recipe.from_data(data), roots=Roots([models], library))
    assert not library.found
    plan_only(Recipe.from_data({**data, "models": [{"model": "org/base@main"}]}), roots=Roots([models], library))
    assert list(library.found) == [("org/base", "main")]


def test_anywhere_is_below_no_folder_and_in_the_library_too(
    models: Path, library: FolderLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models / "m0")
    recipe = Recipe.from_data({**RECIPE, "base_model": "../base", "models": [{"model": "org/m0"}]})

    plan = plan_only(recipe, roots=Roots(library=library, anywhere=True))

    assert [str(model) for model in plan.models] == ["../base", "org/m0"]


def test_what_is_nowhere_is_said_to_be(models: Path, library: FolderLibrary) -> None:
    def refused(name: str, roots: Any) -> CheckpointError:
        with pytest.raises(CheckpointNotFound) as caught:
            plan_only(Recipe.from_data({"merge_method": "linear", "models": [{"model": name}]}), roots=roots)
        return caught.value

    found = refused("nowhere", Roots([models], library))
    assert "and no Hub id (org/name)" in str(found)
    assert found.problems[0].pointer == "#/models/0/model"
    assert "Hub" not in str(refused("nowhere", [models]))
    assert "alone has revisions" in str(refused("nowhere@main", Roots([models], library)))


def test_problems_name_files_as_the_recipe_does(models: Path, library: FolderLibrary) -> None:
    shard = next((models / "m0").glob("*00002*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"more")
    recipe = Recipe.from_data(elsewhere({**RECIPE, "models": [{"model": "m0"}]}))

    with pytest.raises(CheckpointError) as caught:
        plan_only(recipe, roots=Roots([models], library))

    assert str(caught.value).startswith(f"org/m0/{shard.name}: has bytes that no tensor owns")
    assert caught.value.problems[0].pointer == "#/models/0/model"
    assert str(library.snapshots) not in str(caught.value)


def test_a_snapshot_is_no_way_out_of_the_folders(models: Path, tmp_path: Path, library: FolderLibrary) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    _, folder = library.find("org/m0", None) or (None, Path())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret" / "config.json")

    with pytest.raises(PathNotAllowed):
        plan_only(Recipe.from_data(elsewhere(RECIPE)), roots=Roots([models], library))


@MODES
def test_the_lock_names_commits_and_proves_files(models: Path, tmp_path: Path, in_files: bool) -> None:
    library = FolderLibrary(models, tmp_path / "snapshots", in_files=in_files)
    recipe = {**RECIPE, "base_model": "org/base", "models": [{"model": "m0"}, {"model": "org/m1@v2"}]}

    made = merge(Recipe.from_data(recipe), tmp_path / "out", roots=Roots([models], library))

    lock = json.loads((made.folder / "merge.lock.json").read_text())
    here = merge(
        Recipe.from_data({**RECIPE, "models": [{"model": "m0"}, {"model": "m1"}]}), tmp_path / "x", roots=[models]
    )
    local = json.loads((here.folder / "merge.lock.json").read_text())
    assert {source["model"]: source["commit"] for source in lock["sources"]} == {
        "org/base": COMMIT,
        "m0": None,
        "org/m1@v2": COMMIT,
    }
    assert [source["files"] for source in lock["sources"]] == [source["files"] for source in local["sources"]]
    assert any("as the Hub says" in warning for warning in lock["warnings"]) is not in_files


def test_the_supply_hears_what_will_be_read_in_the_order_of_the_merge(
    models: Path, tmp_path: Path, library: FolderLibrary
) -> None:
    made = merge(Recipe.from_data(elsewhere(RECIPE)), tmp_path / "out", roots=Roots([models], library), threads=1)

    supply = library.supply
    order = list(dict.fromkeys(name for name, _ in supply.expected))
    assert set(order) == set(made.tensors)
    assert supply.finished == order
    expected = {(file, at) for _, ranges in supply.expected for file, begin, end in ranges for at in (begin, end - 1)}
    read = {(file, at) for file, begin, end in supply.reads for at in (begin, end - 1)}
    assert all((file, begin) in read for _, ranges in supply.expected for file, begin, end in ranges if begin < end)
    assert {file for file, _ in read} == {file for file, _ in expected}


def test_the_progress_counts_what_came_over_the_network(models: Path, tmp_path: Path, library: FolderLibrary) -> None:
    last: list[Progress] = []

    merge(Recipe.from_data(elsewhere(RECIPE)), tmp_path / "out", roots=Roots([models], library), report=last.append)

    assert last[-1].bytes_received == sum(end - begin for _, begin, end in library.supply.reads) > 0


def test_a_merge_goes_on_over_other_stand_ins_of_the_same_commit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(self: Execution) -> None:
        if self.progress.tensors_done == 8:
            raise Killed

    recipe = Recipe.from_data(elsewhere(RECIPE))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        tick = Execution._tick
        patched.setattr(Execution, "_tick", lambda self: (tick(self), kill(self))[0])
        library = FolderLibrary(models, tmp_path / "snapshots")
        merge(recipe, tmp_path / "out", roots=Roots([models], library))

    again = FolderLibrary(models, tmp_path / "elsewhere")
    made = merge(recipe, tmp_path / "out", roots=Roots([models], again))

    assert made.resumed_tensors
    expected = {name for name, _ in again.supply.expected}
    assert len(expected) == len(made.tensors) - made.resumed_tensors, "what is there is not fetched again"
    here = merge(Recipe.from_data(RECIPE), tmp_path / "here", roots=[models])
    assert made.tensors == here.tensors


def test_an_open_file_is_open_for_as_long_as_anybody_has_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    one = OpenFile(os.open(tmp_path / "file", os.O_RDONLY))
    number, other = int(one), one
    del one
    assert os.pread(other, 5, 0) == b"bytes"

    del other

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
