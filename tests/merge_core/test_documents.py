"""Recipes of several documents: a stage merged on the way is the stage written to disk and merged again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_core import merged
from merge_core.errors import IncompatibleModels, NonFinite, RecipeError
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe
from tests.conftest import METHOD_RECIPES, kernels_in, method_recipe


def output(**keys: Any) -> dict[str, Any]:
    """A merge of the stage `one` with `m2`."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "one"}, {"model": "m2"}],
        "parameters": {"weight": 0.5},
        **keys,
    }


def written(recipe: Recipe, models: Path) -> dict[str, str]:
    """The tensors' digests where each stage is written among the models before it is read."""
    for stage in recipe.stages:
        merge(alone(stage), models / str(stage.name), roots=[models])
    return dict(merge(alone(recipe), models.parent / "written", roots=[models]).tensors)


def alone(recipe: Recipe) -> Recipe:
    """The recipe's own document."""
    return Recipe.from_data(recipe.model_dump(mode="json", exclude_unset=True))


@pytest.mark.parametrize("title", METHOD_RECIPES)
def test_a_stage_by_any_method_is_what_it_would_be_on_disk(models: Path, tmp_path: Path, title: str) -> None:
    recipe = Recipe.from_data([method_recipe(title, name="one", dtype="bfloat16", seed=7), output()])

    staged = merge(recipe, tmp_path / "staged", roots=[models], threads=3, block_elements=1000)

    assert staged.tensors == written(recipe, models)


@pytest.mark.parametrize(
    ("title", "form"),
    [(title, "compiled") for title in ("ties", "ties-paper", "dare_ties", "slerp", "linear", "passthrough")]
    + [pytest.param(title, "plain", marks=pytest.mark.slow) for title in ("ties-paper", "slerp")],
)
def test_any_method_reads_stages_of_stages(models: Path, tmp_path: Path, title: str, form: str) -> None:
    last = method_recipe(title)
    last["models"] = [{"model": "two"}, {"model": "one"}, {"model": "m2"}][: len(last["models"])]
    documents = [
        last,
        output(name="two", merge_method="ties", parameters={"weight": 1, "density": 0.3}, scope="model"),
        method_recipe("dare_linear", name="one", dtype="float16"),
    ]
    recipe = Recipe.from_text(yaml.safe_dump_all(documents))
    assert [stage.name for stage in recipe.stages] == ["one", "two"]

    with kernels_in(form):
        digests = [
            merge(recipe, tmp_path / f"out{blocks}", roots=[models], threads=threads, block_elements=blocks).tensors
            for blocks, threads in ((1, 1), (500, 3), (10**6, 2))
        ]

    assert digests[0] == digests[1] == digests[2] == written(recipe, models)


@pytest.mark.parametrize("title", ["widen", "ties"])
def test_what_was_forgotten_of_a_stage_is_measured_again(models: Path, tmp_path: Path, title: str) -> None:
    documents = [method_recipe(title, name="one"), output(scope="model", merge_method="ties")]
    recipe = Recipe.from_data(documents)
    remembered = merge(recipe, tmp_path / "remembered", roots=[models]).tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged, "_MOST_NUMBERS", 0)
        assert merge(recipe, tmp_path / "forgotten", roots=[models]).tensors == remembered


def test_what_stages_are_made_of_is_told(models: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_data([method_recipe("ties", name="one", dtype="bfloat16"), output()])
    plan = plan_only(recipe, roots=[models])
    artifact = merge(recipe, tmp_path / "out", roots=[models])

    lock = json.loads((artifact.folder / "merge.lock.json").read_text())
    assert [source["model"] for source in lock["sources"]] == ["base", "m0", "m1", "m2"]
    assert all(len(source["files"]) == 3 for source in lock["sources"])
    assert [document.get("name") for document in lock["recipe"]] == ["one", None]
    text = (artifact.folder / "mergekit_config.yml").read_text()
    assert Recipe.from_text(text).to_data() == recipe.to_data() == list(yaml.safe_load_all(text))
    assert text in (artifact.folder / "README.md").read_text()
    assert json.loads((artifact.folder / "config.json").read_text())["num_hidden_layers"] == 3
    told = plan.to_dict()
    assert told["models"] == ["base", "one", "m2"] and told["stages"][0]["models"] == ["base", "m0", "m1", "m2"]
    alone = plan_only(Recipe.from_data(output(models=[{"model": "m1"}, {"model": "m2"}])), roots=[models])
    assert plan.input_bytes > alone.input_bytes and plan.digest != alone.digest


def test_what_is_wrong_in_a_stage_is_told_with_its_name(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "m0" / "model-00001-of-00002.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16 and tensor.numel() > 100)
    tensors[name] = torch.full_like(tensors[name], 3e4)
    save_file(tensors, models / "m0" / "model-00001-of-00002.safetensors")
    stage = {"merge_method": "linear", "models": [{"model": "m0"}], "name": "one", "dtype": "float16"}
    large = Recipe.from_data([{**stage, "parameters": {"weight": 9, "normalize": False}}, output()])
    with pytest.raises(NonFinite, match=f"{name} of stage one becomes NaN or infinity"):
        merge(large, tmp_path / "out", roots=[models])
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, models / "m0" / "model-00001-of-00002.safetensors")
    with pytest.raises(NonFinite, match=f"{name} of m0 holds NaN"):
        merge(Recipe.from_data([{**stage, "parameters": {"weight": 1}}, output()]), tmp_path / "out", roots=[models])


REFUSED: list[tuple[list[dict[str, Any]], str, str]] = [
    ([method_recipe("ties", name="one"), method_recipe("ties", name="one"), output()], "#/1/name", "already"),
    ([method_recipe("ties"), output()], "#/1/name", "only one document may have no name"),
    (
        [output(name="two"), output(name="one", models=[{"model": "two"}]), output()],
        "#/0/models/0/model",
        "→ two → one",
    ),
    ([output(name="one"), output()], "#/0/models/0/model", "one → one"),
    ([method_recipe("ties", name="one", limits={"threads": 1}), output()], "#/0/limits", "whole merge"),
    ([method_recipe("ties", name="one", merge_method="tise"), output()], "#/0/merge_method", "did you mean ties"),
    ([method_recipe("ties", name="one", parameters={}), output()], "#/0/models/0/parameters/weight", "no weight"),
    (
        [output(models=[{"model": "one@main"}]), method_recipe("ties", name="one")],
        "#/0/models/0/model",
        "one is a stage",
    ),
    ([[], output()], "#/0", "mapping"),
]


@pytest.mark.parametrize(("documents", "pointer", "detail"), REFUSED)
def test_documents_that_make_no_sense_are_refused(
    models: Path, documents: list[dict[str, Any]], pointer: str, detail: str
) -> None:
    with pytest.raises(RecipeError, match=detail) as error:
        plan_only(Recipe.from_data(documents), roots=[models])
    assert error.value.problems[0].pointer == pointer


def test_shapes_are_refused_with_the_number_of_the_document(models: Path) -> None:
    piece = {"sources": [{"model": "m0", "layer_range": [0, 2]}]}
    short = {"merge_method": "passthrough", "slices": [piece], "name": "one"}
    with pytest.raises(IncompatibleModels, match="one has 2 layers") as error:
        plan_only(Recipe.from_data([short, output()]), roots=[models])
    assert error.value.problems[0].pointer == "#/1/models/0"


def test_one_document_may_have_a_name_and_a_stage_may_go_unused(models: Path) -> None:
    assert Recipe.from_data([output(name="one", models=[{"model": "m0"}])]).stages == ()
    recipe = Recipe.from_data([method_recipe("ties", name="idle"), method_recipe("linear", name="last")])
    assert recipe.name == "last" and recipe.warnings == ("stage idle is not made: nothing uses it",)
