"""Modules are told from the names of tensors; every tensor is made once, by the module that holds it or as a copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_core.errors import RecipeError, WeightsmithError
from merge_core.merge import merge, plan_only
from merge_core.modules import find_modules, names_of_modules
from merge_core.plan import Plan
from merge_core.recipe import Recipe
from tests.conftest import method_recipe, write_checkpoint

CONFIG = {
    "text_config": {"num_hidden_layers": 2, "vocab_size": 8, "layer_types": ["full", "sliding"]},
    "vision_config": {"num_hidden_layers": 3},
    "tie_word_embeddings": False,
}


@pytest.fixture
def eyes(tmp_path: Path) -> Path:
    """`v0` and `v1`, which see: a text decoder, a vision tower, a projector and a head."""
    for seed in (0, 1):
        names = ["model.language_model.embed_tokens.weight", "model.multi_modal_projector.linear_1.weight"]
        names += [f"model.language_model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
        names += ["model.language_model.norm.weight", "model.vision_tower.patch_embedding.weight"]
        names += [f"model.vision_tower.encoder.layers.{i}.fc1.weight" for i in range(3)]
        names += ["model.vision_tower.post_layernorm.weight", "lm_head.weight"]
        draws = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(8, 4, generator=draws) for name in names}
        write_checkpoint(tmp_path / "models" / f"v{seed}", tensors, config=CONFIG)
    return tmp_path / "models"


def linear(**modules: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "modules": modules, "parameters": {"weight": 0.5}}


def both(**keys: Any) -> dict[str, Any]:
    return {"models": [{"model": "v0"}, {"model": "v1"}], **keys}


def piece(model: str, first: int, last: int) -> dict[str, Any]:
    return {"sources": [{"model": model, "layer_range": [first, last]}]}


def planned(models: Path, recipe: dict[str, Any]) -> Plan:
    return plan_only(Recipe.from_data(recipe), roots=[models])


def test_a_model_has_the_modules_that_its_names_say(eyes: Path) -> None:
    tensors = [step.name for step in planned(eyes, linear(default=both())).steps]
    assert names_of_modules(tensors) == [
        "default",
        "text_decoder",
        "vision_tower",
        "multi_modal_projector",
        "model.language_model.layers",
        "model.vision_tower.encoder.layers",
    ]
    found = find_modules(["text_decoder", "vision_tower", "encoder", "model.language_model", "default"], tensors)
    held = {name: [tensor for tensor in tensors if module.holds(tensor)] for name, module in found.items()}
    assert len(held["text_decoder"]) == 5 and "lm_head.weight" in held["text_decoder"]
    assert len(held["vision_tower"]) == 5 and len(held["encoder"]) == 3 and len(held["model.language_model"]) == 4
    assert held["default"] == ["model.multi_modal_projector.linear_1.weight"]
    assert names_of_modules(["model.layers.0.w", "lm_head.weight"]) == ["default", "model.layers"]


def test_modules_models_and_slices_agree_where_they_mean_the_same(models: Path, tmp_path: Path) -> None:
    entries = [{"model": "base"}, {"model": "m0"}, {"model": "m1"}]
    sources = [{**entry, "layer_range": [0, 3]} for entry in entries]
    ways = [
        {"models": entries},
        {"slices": [{"sources": sources}]},
        {"modules": {"default": {"models": entries}}},
        {"modules": {"default": {"slices": [{"sources": sources}]}}},
        {"modules": {"model.layers": {"slices": [{"sources": sources}]}, "default": {"models": entries}}},
    ]
    shared = {key: value for key, value in method_recipe("ties").items() if key != "models"}
    made = [
        merge(Recipe.from_data({**shared, **way}), tmp_path / str(i), roots=[models]).tensors
        for i, way in enumerate(ways)
    ]
    assert made[0] == made[1] == made[2] == made[3] == made[4]


def test_each_module_is_made_its_own_way(eyes: Path, tmp_path: Path) -> None:
    modules = {
        "text_decoder": both(parameters={"weight": [{"filter": "norm", "value": 1}, {"value": [1, 3]}]}),
        "vision_tower": {"slices": [piece("v0", 0, 3), piece("v1", 1, 3)], "parameters": {"weight": 2}},
    }
    plan = planned(eyes, linear(**modules))
    names = [step.name for step in plan.steps]
    assert len(names) == len(set(names)) == 11 + 2 and plan.left_out == ()
    by_name = plan.by_name
    assert by_name["model.multi_modal_projector.linear_1.weight"].reason == "in no module of the recipe"
    layers = [by_name[f"model.language_model.layers.{i}.mlp.up_proj.weight"].method for i in range(2)]
    assert [getattr(method, "weight", None) for method in layers] == [(1.0, 1.0), (3.0, 3.0)]
    folder = merge(Recipe.from_data(linear(**modules)), tmp_path / "out", roots=[eyes]).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 5 and config["text_config"] == CONFIG["text_config"]
    alone = planned(eyes, linear(text_decoder={"slices": [piece("v0", 1, 2)]}))
    assert alone.config_edits[0].section == "text_config"
    assert alone.config_edits[0].values == {"num_hidden_layers": 1, "layer_types": ["sliding"]}


REFUSED = [
    (linear(text_decodr=both()), "#/modules/text_decodr", "it has default, text_decoder, vision_tower"),
    (linear(**{"vision_tower": both(), "model.vision_tower.encoder": both()}), "#/modules", "both hold"),
    (linear(vision_tower={}), "#/modules/vision_tower", "exactly one of models and slices"),
    (linear(vision_tower=both(slices=[piece("v0", 0, 1)])), "#/modules/vision_tower", "exactly one of"),
    (linear(vision_tower=both()) | {"models": [{"model": "v0"}]}, "", "exactly one of models, slices and"),
    (linear(vision_tower=both(modles=[])), "#/modules/vision_tower/modles", "did you mean models"),
    (
        linear(vision_tower={"slices": [piece("v0", 0, 4)]}),
        "#/modules/vision_tower/slices/0/sources/0/layer_range",
        "3",
    ),
    (linear(multi_modal_projector={"slices": [piece("v0", 0, 1)]}), "", "numbered layers"),
    (linear(default=both(parameters={"wieght": 1})), "#/modules/default/parameters/wieght", "did you mean weight"),
    ({"merge_method": "linear", "slices": [piece("v0", 0, 9)], "parameters": {"weight": 1}}, "", "is not in it"),
    (linear() | {"modules": {}}, "", "exactly one of"),
]


@pytest.mark.parametrize(("recipe", "pointer", "detail"), REFUSED)
def test_modules_that_make_no_sense_are_refused(eyes: Path, recipe: dict[str, Any], pointer: str, detail: str) -> None:
    with pytest.raises(WeightsmithError, match=detail) as error:
        planned(eyes, recipe)
    if pointer:
        assert error.value.problems[0].pointer == pointer


def test_text_decoder_of_a_model_without_others_is_refused(models: Path) -> None:
    entries = {"models": [{"model": "m0"}]}
    with pytest.raises(RecipeError, match=r"it has default, model\.layers"):
        planned(models, linear(text_decoder=entries))


ODD: list[tuple[Any, float]] = [
    ("0.25", 0.25),
    (" 0.25 ", 0.25),
    (True, 1.0),
    ([0.25], 0.25),
    (["0.25"], 0.25),
    ({"value": 0.25}, 0.25),
    ([{"filter": "*", "value": [0.25]}, {"value": 2}], 0.25),
    ({"filter": "nothing has this", "value": 1}, 0.5),
    ([], 0.5),
    ([{"value": []}], 0.5),
]


@pytest.mark.parametrize(("written", "meant"), ODD)
def test_odd_values_mean_what_mergekit_means(models: Path, written: Any, meant: float) -> None:
    recipe = linear(default={"models": [{"model": "m0", "parameters": {"weight": written}}, {"model": "m1"}]})
    method = planned(models, recipe | {"unknown_keys": "warn"}).by_name["lm_head.weight"].method
    assert getattr(method, "weight", None) == (meant, 0.5)


def test_a_slice_of_no_layers_is_none(models: Path) -> None:
    stack = [piece("m0", 1, 1), piece("m1", 0, 2)]
    recipe = {"merge_method": "passthrough", "slices": stack, "models": [], "modules": {}, "dtype": "torch.float16"}
    plan = planned(models, recipe)
    assert plan.config_edits[0].values == {"num_hidden_layers": 2}
    assert str(plan.models[plan.by_name["model.embed_tokens.weight"].sources[0].model]) == "m0"
    with pytest.raises(RecipeError, match="from one layer on to a later one"):
        planned(models, {"merge_method": "passthrough", "slices": [piece("m0", 2, 1)]})
