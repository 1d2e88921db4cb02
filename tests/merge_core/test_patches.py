"""Patches on what was merged: added before the one rounding, the same bytes however it is computed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from merge_core.errors import IncompatibleModels, NonFinite, RecipeError, WeightsmithError
from merge_core.merge import merge, plan_only
from merge_core.patches.encodings.dense import Dense
from merge_core.patches.encodings.levels import Levels
from merge_core.patches.encodings.sparse import Sparse
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, FORMS, kernels_in, mixed_tensors, write_checkpoint
from tests.merge_core.test_deltas import assert_same_bits, extract

TIES = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "m0"}, {"model": "m1"}],
    "parameters": {"weight": 1, "density": 0.4},
}
CHANGED = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.double"}


def changed(seed: int) -> dict[str, Tensor]:
    """The base, some of it otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.double() + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if name in CHANGED
        else tensor
        for name, tensor in mixed_tensors(0).items()
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and the patches `p`, `q` (dense) and `few` (16 levels)."""
    folder = tmp_path_factory.mktemp("stored")
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        write_checkpoint(folder / name, mixed_tensors(seed), shards=2, config=CONFIG)
    for name, seed, encoding in (("p", 5, Dense()), ("q", 6, Dense()), ("few", 7, Levels(levels=16))):
        (folder / f".{name}").mkdir()
        extract(folder / f".{name}", mixed_tensors(0), changed(seed), encoding).rename(folder / name)
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """A folder of its own for each test, which shares the files of `stored`."""
    return Path(shutil.copytree(stored, tmp_path / "models", copy_function=os.link))


def merged(folder: Path, keys: Mapping[str, Any] | list[Mapping[str, Any]], **how: Any) -> dict[str, Tensor]:
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    merge(Recipe.from_data(keys), out, roots=[folder], **how)
    return load_file(out / "model.safetensors")


def on_ties(*patches: tuple[str, float], **keys: Any) -> dict[str, Any]:
    return {**TIES, **keys, "patches": [{"patch": patch, "strength": strength} for patch, strength in patches]}


def test_a_patch_is_added_before_the_one_rounding(folder: Path) -> None:
    found = merged(folder, on_ties(("p", 0.5)))
    unrounded, plain = merged(folder, {**TIES, "out_dtype": "float32"}), merged(folder, TIES)
    base, tuned = mixed_tensors(0), changed(5)
    for name, tensor in plain.items():
        if name not in CHANGED:
            assert torch.equal(found[name], tensor), name
            continue
        working = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        start = plain[name] if working == torch.float64 else unrounded[name]
        wanted = start + 0.5 * (tuned[name].to(working) - base[name].to(working)).float().to(working)
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], wanted.to(tensor.dtype)), name
        assert not torch.equal(found[name], tensor)


def test_bytes_depend_on_no_block_thread_form_or_order(folder: Path) -> None:
    recipe = on_ties(("few", 0.7), ("p", -0.3), ("q", 1.0), scope="model")
    with kernels_in("plain"):
        wanted = merged(folder, recipe, threads=1, block_elements=1)
    for form in FORMS:
        with kernels_in(form):
            assert_same_bits(merged(folder, recipe, threads=2), wanted)
    turned = {**recipe, "patches": recipe["patches"][::-1]}
    assert_same_bits(merged(folder, turned), wanted)


def test_a_patched_stage_is_as_if_it_had_been_written(folder: Path) -> None:
    merge(Recipe.from_data(on_ties(("p", 1.0))), folder / "made", roots=[folder])
    last = {"merge_method": "linear", "models": [{"model": name} for name in ("made", "m2")]}
    documents = [on_ties(("p", 1.0), name="made"), {**last, "parameters": {"weight": 1}}]
    written = merged(folder, documents[1])
    (folder / "made").rename(folder / "elsewhere")
    assert_same_bits(merged(folder, documents), written)


def test_plan_and_lock_name_patches(folder: Path) -> None:
    recipe = Recipe.from_data(on_ties(("p", 0.5)))
    plan = plan_only(recipe, roots=[folder]).to_dict(steps=True)
    plain = plan_only(Recipe.from_data(TIES), roots=[folder]).to_dict(steps=True)
    assert plan["patches"] == [{"patch": "p", "strength": 0.5, "tensors": 3}]
    assert {name for name in plan if plan[name] != plain.get(name)} <= {
        "bytes_read",
        "peak_memory",
        "patches",
        "steps",
        "shards",
        "bytes_written",
    }
    assert {step["tensor"] for step in plan["steps"] if step["patches"] == {"p": 0.5}} == CHANGED
    assert plan["bytes_read"] > plain["bytes_read"]
    artifact = merge(recipe, folder / "out", roots=[folder])
    lock = json.loads((artifact.folder / "merge.lock.json").read_text())
    assert [source["model"] for source in lock["sources"]] == ["base", "m0", "m1", "p"]
    assert lock["sources"][-1]["files"][0]["path"] == "delta.safetensors"
    assert "`p` (patch, strength 0.5)" in (artifact.folder / "README.md").read_text()


def test_a_sparse_delta_is_a_patch_of_its_own_base(folder: Path) -> None:
    extract(folder / "x", mixed_tensors(0), changed(9), Sparse())
    copy = {"merge_method": "passthrough", "models": [{"model": "base"}], "patches": [{"patch": "x/delta"}]}
    assert_same_bits(merged(folder, copy), changed(9))
    with pytest.raises(IncompatibleModels, match="for its own base alone"):
        merged(folder, {**copy, "models": [{"model": "m0"}]})


@settings(max_examples=6)
@given(a=st.floats(-2, 2, width=32), b=st.floats(-2, 2, width=32))
def test_strengths_add_up(tmp_path_factory: pytest.TempPathFactory, a: float, b: float) -> None:
    folder = tmp_path_factory.mktemp("strengths")
    base = {"w": torch.linspace(-1, 1, 60).reshape(6, 10)}
    extract(folder / "x", base, {"w": base["w"].cos()}, Dense())
    write_checkpoint(folder / "m", base)

    def patch(model: str, strength: float, out: str) -> Tensor:
        patches = [{"patch": "x/delta", "strength": strength}]
        recipe = {"merge_method": "passthrough", "models": [{"model": model}], "patches": patches}
        merge(Recipe.from_data(recipe), folder / out, roots=[folder])
        return load_file(folder / out / "model.safetensors")["w"]

    patch("m", a, "first")
    twice, once = patch("first", b, "twice"), patch("m", a + b, "once")
    size = base["w"].abs() + (abs(a) + abs(b)) * (base["w"].cos() - base["w"]).abs()
    assert bool(((twice - once).abs() <= 4 * torch.finfo(torch.float32).eps * size).all())


@pytest.mark.parametrize(
    ("keys", "error", "why"),
    [
        ({"patches": [{"patch": "nowhere"}]}, WeightsmithError, "nowhere"),
        ({"patches": [{"patch": "m0"}]}, WeightsmithError, "no delta"),
        ({"patches": [{"patch": "p"}, {"patch": "p"}]}, RecipeError, "patches/1/patch: p is listed twice"),
        ({"patches": [{"patch": "p+q"}]}, RecipeError, "patches/0: .*not one file"),
        ({"patches": [{"patch": "p", "strenght": 1}]}, RecipeError, "did you mean strength"),
        ({"patches": [{"patch": "p", "strength": float("inf")}]}, RecipeError, "patches/0/strength"),
        ({"outputs": {"reversible": True}}, RecipeError, "outputs/reversible: there are no patches"),
        (
            {"outputs": {"kind": "delta", "reversible": True}, "patches": [{"patch": "p"}]},
            RecipeError,
            "outputs: .*leave reversible away",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    folder: Path, keys: dict[str, Any], error: type[WeightsmithError], why: str
) -> None:
    with pytest.raises(error, match=why):
        plan_only(Recipe.from_data({**TIES, **keys}), roots=[folder])


def test_a_patch_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    base = {"model.double": torch.zeros(3, dtype=torch.float64), "other": torch.zeros(2)}
    extract(folder / "x", base, {name: tensor + 1 for name, tensor in base.items()}, Dense())
    with pytest.raises(IncompatibleModels) as refused:
        plan_only(Recipe.from_data(on_ties(("x/delta", 1.0))), roots=[folder])
    assert {(problem.pointer, problem.tensor) for problem in refused.value.problems} == {
        ("#/patches/0/patch", "model.double"),
        ("#/patches/0/patch", "other"),
    }


def test_numbers_that_are_none_do_not_pass(folder: Path, stored: Path) -> None:
    shutil.rmtree(folder / "p")
    shutil.copytree(stored / "p", folder / "p")
    with (folder / "p" / "delta.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\xc0\x7f")
    with pytest.raises(NonFinite):
        merged(folder, on_ties(("p", 1.0)))


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_reversal_takes_the_patches_off_bit_for_bit(folder: Path, scope: str) -> None:
    recipe = on_ties(("p", 0.5), ("few", 1.0), outputs={"reversible": True}, scope=scope)
    artifact = merge(Recipe.from_data(recipe), folder / "out", roots=[folder])
    assert "reversal.safetensors" in {file.path for file in artifact.files}
    off = {"merge_method": "passthrough", "models": [{"model": "out+out/reversal.safetensors"}]}
    assert_same_bits(merged(folder, off), merged(folder, {**TIES, "scope": scope}))
    with pytest.raises(IncompatibleModels, match="for its own base alone"):
        merged(folder, {**off, "models": [{"model": "m0+out/reversal.safetensors"}]})


def test_a_killed_reversal_is_made_again(folder: Path) -> None:
    recipe = Recipe.from_data(on_ties(("p", 0.5), outputs={"reversible": True}))
    whole = merge(recipe, folder / "whole", roots=[folder])

    def killed(progress: Progress) -> None:
        if progress.phase.startswith("keeping"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, folder / "out", roots=[folder], report=killed)
    again = merge(recipe, folder / "out", roots=[folder])

    assert again.resumed_tensors == len(again.tensors)
    for file, other in zip(again.files, whole.files, strict=True):
        assert file.path == other.path
        if file.path.endswith(".safetensors"):
            assert file.sha256 == other.sha256


def test_a_reversal_nobody_wants_any_more_is_not_left(folder: Path) -> None:
    parts = folder / ".out.partial" / "parts"

    def killed() -> bool:
        if parts.exists() and any(parts.iterdir()):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        merge(
            Recipe.from_data(on_ties(("p", 0.5), outputs={"reversible": True})),
            folder / "out",
            roots=[folder],
            stop=killed,
        )
    assert parts.exists()
    artifact = merge(Recipe.from_data(on_ties(("p", 0.5))), folder / "out", roots=[folder])
    assert {path.name for path in (folder / "out").iterdir()} == {file.path for file in artifact.files}


def test_config_is_that_of_the_model_unless_shapes_are_not(folder: Path) -> None:
    base = {"w": torch.zeros(4, 2), "v": torch.zeros(3)}
    write_checkpoint(folder / "m", base, config={"model_type": "mine"})
    for name, tuned in (("same", base["w"] + 1), ("grown", torch.ones(5, 2))):
        delta = extract(folder / name, base, {**base, "w": tuned}, Sparse())
        (delta / "config.json").write_text(json.dumps({"model_type": name}))

    def config(delta: str, strength: float) -> str:
        copy = {"merge_method": "passthrough", "models": [{"model": "m"}]}
        merged(folder, {**copy, "patches": [{"patch": f"{delta}/delta", "strength": strength}]})
        made = max(folder.glob("out-*"), key=lambda path: int(path.name[4:]))
        return str(json.loads((made / "config.json").read_text())["model_type"])

    assert config("same", 1.0) == "mine"
    assert config("grown", 0.0) == "mine"
    assert config("grown", 1.0) == "grown"
    recipe = {"merge_method": "passthrough", "models": [{"model": "m"}], "patches": [{"patch": "grown/delta"}]}
    with pytest.raises(IncompatibleModels, match=r"patches/0/patch: .*cannot take back; write reversible: false"):
        plan_only(Recipe.from_data({**recipe, "outputs": {"reversible": True}}), roots=[folder])


def test_a_patch_of_no_strength_changes_nothing(folder: Path) -> None:
    found = merged(folder, on_ties(("p", 0.0), outputs={"reversible": True}))
    assert_same_bits(found, merged(folder, TIES))
