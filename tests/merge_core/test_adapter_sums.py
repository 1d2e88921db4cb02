"""Adapters merged with one another: exact, without cross terms, and an adapter again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_core.adapters import CONFIG_NAME, WEIGHTS_NAME, Adapter
from merge_core.errors import IncompatibleModels, RecipeError
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe
from tests.conftest import kernels_in
from tests.merge_core.test_adapters import (
    DOWN,
    EMBEDDING,
    NORM,
    OF_Q,
    PREFIX,
    SAVED,
    THREE,
    UP,
    Q,
    factors,
    run,
    write_adapter,
)


def sum_of(models: Path, out: Path, weights: Mapping[str, Any], **keys: Any) -> Path:
    listed = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
    merge(Recipe.from_data({"merge_method": "linear", "models": listed, **keys}), out, roots=[models])
    return out


def deltas(folder: Path) -> dict[str, Tensor]:
    """s·B·A of every module in float64, read from the files alone."""
    adapter, tensors = Adapter.open(folder), load_file(folder / WEIGHTS_NAME)
    found = {}
    for module, one in adapter.modules.items():
        delta = one.scale * tensors[one.up.name].double().flatten(1) @ tensors[one.down.name].double().flatten(1)
        found[module] = delta.T if one.is_embedding else delta
    return found


@pytest.fixture
def adapters(models: Path) -> Path:
    """Three adapters of different ranks, scales, formats and modules."""
    write_adapter(models / "one", THREE | EMBEDDING)
    two = factors(Q, 24, 24, 2, seed=11) | factors(UP, 40, 24, 8, seed=12)
    write_adapter(models / "two", two, use_rslora=True, rank_pattern={"up_proj": 8}, r=2, alpha_pattern={"q_proj": 3})
    three = factors(DOWN, 24, 40, 3, seed=13) | factors(UP, 40, 24, 3, seed=14)
    write_adapter(models / "three", {name: tensor.bfloat16() for name, tensor in three.items()}, r=3, lora_alpha=4.5)
    return models


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({}, (0.5, -0.25, 0.75)),
        ({"parameters": {"normalize": False}}, (0.5, -0.25, 0.75)),
        ({"merge_method": "task_arithmetic", "parameters": {"lambda": 2}}, (1.0, -0.5, 1.5)),
        ({"merge_method": "task_arithmetic", "parameters": {"lambda": 2, "normalize": True}}, (1.0, -0.5, 1.5)),
    ],
    ids=["average", "sum", "arithmetic", "arithmetic, normalised"],
)
def test_the_sum_has_no_cross_terms(adapters: Path, tmp_path: Path, keys: dict[str, Any], shares: Any) -> None:
    weights = dict(zip(("one", "two", "three"), (0.5, -0.25, 0.75), strict=True))

    out = sum_of(adapters, tmp_path / "out", weights, **keys)

    expected: dict[str, Tensor] = {}
    for name, share in zip(weights, shares, strict=True):
        for module, delta in deltas(adapters / name).items():
            expected[module] = expected.get(module, 0) + share * delta
    found = deltas(out)
    assert found.keys() == expected.keys()
    for module, delta in found.items():
        torch.testing.assert_close(delta, expected[module], rtol=1e-6, atol=1e-7, msg=module)
    assert Adapter.open(out).modules[UP].rank == 4 + 8 + 3


def test_merged_then_applied_is_applied_then_merged(adapters: Path, tmp_path: Path) -> None:
    weights = {"one": 0.5, "two": -0.25, "three": 0.75}
    sum_of(adapters, adapters / "sum", weights)
    listed = [{"model": f"base+{name}", "parameters": {"weight": weight}} for name, weight in weights.items()]

    applied = run(adapters, tmp_path / "applied", "base+sum", out_dtype="float32")
    merged = run(adapters, tmp_path / "merged", merge_method="linear", models=listed, out_dtype="float32")

    for name, tensor in merged.items():
        torch.testing.assert_close(applied[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_equal_scales_and_weights_of_one_copy_every_bit(models: Path, tmp_path: Path) -> None:
    write_adapter(models / "one", {name: tensor.bfloat16() for name, tensor in OF_Q.items()})
    write_adapter(models / "two", {name: tensor.bfloat16() for name, tensor in factors(Q, 24, 24, 4, seed=9).items()})

    out = sum_of(models, tmp_path / "out", {"one": 1, "two": -1}, parameters={"normalize": False})

    (down, a), (up, b) = load_file(out / WEIGHTS_NAME).items()
    theirs = [load_file(models / name / WEIGHTS_NAME) for name in ("one", "two")]
    assert torch.equal(a, torch.cat([tensors[down] for tensors in theirs]))
    assert torch.equal(b, torch.cat([theirs[0][up], -theirs[1][up]], dim=1))
    config = json.loads((out / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 12, ["q_proj"])


def test_what_is_written_is_an_adapter(adapters: Path, tmp_path: Path) -> None:
    out = sum_of(adapters, tmp_path / "out", {"one": 1, "two": 1})

    assert {path.name for path in out.iterdir()} == {
        WEIGHTS_NAME,
        CONFIG_NAME,
        "README.md",
        "mergekit_config.yml",
        "merge.lock.json",
    }
    config = json.loads((out / CONFIG_NAME).read_text())
    modules = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in load_file(out / WEIGHTS_NAME)}
    assert set(config["target_modules"]) == {"q_proj"} or set(config["target_modules"]) == modules
    assert "library_name: peft" in (out / "README.md").read_text()
    lock = json.loads((out / "merge.lock.json").read_text())
    assert [[file["path"] for file in source["files"]] for source in lock["sources"]] == [
        [WEIGHTS_NAME, CONFIG_NAME]
    ] * 2


def test_weights_go_by_module_and_layer(adapters: Path, tmp_path: Path) -> None:
    weights = {"one": [{"filter": "q_proj", "value": 0}, {"value": [1, 2, 3]}], "two": 0}

    found = deltas(sum_of(adapters, tmp_path / "out", weights, parameters={"normalize": False}))

    one = deltas(adapters / "one")
    for module, share in {Q: 0.0, UP: 1.0, DOWN: 3.0, "model.embed_tokens": 1.0}.items():
        torch.testing.assert_close(found[module], share * one[module], rtol=1e-6, atol=1e-7)


def test_blocks_threads_and_kernels_change_no_byte(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, factors("model.layers.0.q", 5000, 3000, 24 + seed, seed=seed), r=24 + seed)
    recipe = Recipe.from_data(
        {"merge_method": "linear", "models": [{"model": "one"}, {"model": "two"}], "parameters": {"weight": 0.3}}
    )

    def digests(name: str, threads: int, elements: int) -> Mapping[str, str]:
        return merge(recipe, tmp_path / name, roots=[tmp_path], threads=threads, block_elements=elements).tensors

    one = digests("a", 1, 2**20)
    assert one == digests("b", 2, 1)
    with kernels_in("plain"):
        assert one == digests("c", 2, 2**17)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "method": ({"merge_method": "ties"}, RecipeError, "name their base: base\\+adapter", "#/merge_method"),
    "base": ({"base_model": "one"}, RecipeError, "leave base_model away", "#/base_model"),
    "exclude": ({"exclude": ["q_proj"]}, RecipeError, "no base", "#/exclude"),
    "a model among them": (
        {"models": [{"model": "m0"}, {"model": "one"}]},
        RecipeError,
        "write the model it is for before it: base\\+one",
        "#/models/1/model",
    ),
    "zero sum": (
        {"parameters": {"weight": 0}},
        RecipeError,
        "sum to zero",
        "#/parameters",
    ),
    "dead filter": (
        {"parameters": {"weight": [{"filter": "k_proj", "value": 1}, {"value": 1}]}},
        RecipeError,
        "no module's name contains 'k_proj'",
        "#/parameters/weight",
    ),
    "shape": ({"models": [{"model": "one"}, {"model": "shape"}]}, IncompatibleModels, "takes", "#/models/1"),
    "saved": ({"models": [{"model": "one"}, {"model": "saved"}]}, IncompatibleModels, "base\\+saved", "#/models/1"),
    "DoRA": ({"models": [{"model": "one"}, {"model": "dora"}]}, IncompatibleModels, "magnitude", "#/models/1"),
    "layers": ({"models": [{"model": "one"}, {"model": "layers"}]}, IncompatibleModels, "name layers", "#/models/1"),
    "Conv1D": ({"models": [{"model": "one"}, {"model": "turned"}]}, IncompatibleModels, "fan_in_fan_out", "#/models/1"),
}


@pytest.mark.parametrize("title", REFUSED)
def test_what_is_no_sum_is_refused(adapters: Path, title: str) -> None:
    write_adapter(adapters / "shape", factors(Q, 24, 32, 4))
    write_adapter(adapters / "saved", OF_Q | SAVED)
    write_adapter(adapters / "dora", OF_Q | NORM)
    write_adapter(adapters / "layers", factors("layers.0.self_attn.q_proj", 24, 24, 4))
    write_adapter(adapters / "turned", OF_Q, fan_in_fan_out=True)
    keys, error, message, pointer = REFUSED[title]
    whole = {"merge_method": "linear", "models": [{"model": "one"}, {"model": "two"}], "parameters": {"weight": 1}}
    with pytest.raises(error, match=message) as caught:
        plan_only(Recipe.from_data({**whole, **keys}), roots=[adapters])
    assert caught.value.problems[0].pointer == pointer  # type: ignore[attr-defined]


def test_bases_of_different_names_are_told(models: Path) -> None:
    for name in ("one", "two"):
        write_adapter(models / name, OF_Q, base_model_name_or_path=f"org/{name}")
    recipe = Recipe.from_data(
        {"merge_method": "linear", "models": [{"model": "one"}, {"model": "two"}], "parameters": {"weight": 1}}
    )
    assert "org/one, org/two" in plan_only(recipe, roots=[models]).warnings[0]
