"""Coverage is proved from names, and what cannot be is refused from headers alone."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge_core import kernels
from merge_core.errors import (
    IncompatibleModels,
    InsufficientStorage,
    MemoryLimitExceeded,
    RecipeError,
    WeightsmithError,
)
from merge_core.merge import merge, plan_only
from merge_core.plan import Plan
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, METHOD_RECIPES, method_recipe, mixed_tensors, write_checkpoint


def planned(models: Path, recipe: dict[str, Any]) -> Plan:
    return plan_only(Recipe.from_data(recipe), roots=[models])


def parameters_of(plan: Plan, tensor: str) -> dict[str, Any]:
    method = plan.by_name[tensor].method
    assert method is not None
    return method.model_dump(by_alias=True)


@pytest.mark.parametrize("title", METHOD_RECIPES)
def test_every_tensor_of_the_base_is_in_the_output_once(models: Path, title: str) -> None:
    plan = planned(models, method_recipe(title))

    assert sorted(step.name for step in plan.steps) == sorted(mixed_tensors(0))
    laid_out = [slot.name for shard in plan.shards for slot in shard.slots]
    assert sorted(laid_out) == sorted(mixed_tensors(0))
    assert plan.left_out == ()
    copied = {step.name: step.reason for step in plan.steps if step.method is None}
    assert {"model.steps", "model.mask", "model.nothing"} <= copied.keys()


def test_a_plan_reads_no_weights(models: Path) -> None:
    """The files' data is gone, only their headers stand; the sizes are those that the headers say."""
    for shard in models.glob("*/*.safetensors"):
        size, header = shard.stat().st_size, shard.read_bytes()[: 8 + int.from_bytes(shard.read_bytes()[:8], "little")]
        shard.write_bytes(header)
        os.truncate(shard, size)
    plan = planned(models, method_recipe("ties-paper"))
    assert plan.output_bytes > 0 and plan.passes == (3 if kernels.are_compiled() else 4)


def test_precedence_source_then_slice_then_recipe_then_default(models: Path) -> None:
    plan = planned(
        models,
        {
            "merge_method": "ties",
            "base_model": "base",
            "slices": [
                {
                    "sources": [
                        {"model": "m0", "layer_range": [0, 2], "parameters": {"weight": 0.7}},
                        {"model": "m1", "layer_range": [0, 2]},
                        {"model": "base", "layer_range": [0, 2]},
                    ],
                    "parameters": {"weight": 0.4, "lambda": 0.5},
                },
                {"sources": [{"model": "m1", "layer_range": [2, 3]}, {"model": "base", "layer_range": [2, 3]}]},
            ],
            "parameters": {"weight": 0.1, "lambda": 0.9},
        },
    )
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight"
    assert parameters_of(plan, first) | {"weight": (0.7, 0.4), "lambda": 0.5, "density": (1.0, 1.0)} == parameters_of(
        plan, first
    )
    assert parameters_of(plan, last) | {"weight": (0.1,), "lambda": 0.9} == parameters_of(plan, last)
    assert parameters_of(plan, "model.embed_tokens.weight")["weight"] == (0.7, 0.4), "embeddings follow the first slice"
    assert parameters_of(plan, "lm_head.weight")["weight"] == (0.1,), "the head follows the last slice"


def test_gradients_run_over_the_layers_and_start_outside_them(models: Path) -> None:
    t = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": [0.25, 0.75]}]
    plan = planned(models, method_recipe("slerp", parameters={"t": t}))

    attention = [parameters_of(plan, f"model.layers.{i}.self_attn.q_proj.weight")["t"] for i in range(3)]
    assert attention == [0.0, 0.5, 1.0]
    assert [parameters_of(plan, f"model.layers.{i}.mlp.up_proj.weight")["t"] for i in range(3)] == [1.0, 0.5, 0.0]
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert parameters_of(plan, outside)["t"] == 0.25


def test_slices_renumber_layers_and_the_config_follows(models: Path, tmp_path: Path) -> None:
    layers = {**CONFIG, "layer_types": ["full", "sliding", "full"], "architectures": ["A", "B", "C"]}
    for name in ("m0", "m1"):
        (models / name / "config.json").write_text(json.dumps(layers))
    ranges = [("m0", [0, 3]), ("m1", [1, 3])]
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": model, "layer_range": span}]} for model, span in ranges],
    }

    merge(Recipe.from_data(recipe), tmp_path / "out", roots=[models])

    out, zero, one = load_file(tmp_path / "out" / "model.safetensors"), mixed_tensors(1), mixed_tensors(2)
    assert len({name.split(".")[2] for name in out if name.startswith("model.layers.")}) == 5
    for made, (source, layer) in enumerate([(zero, 0), (zero, 1), (zero, 2), (one, 1), (one, 2)]):
        for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            assert torch.equal(out[f"model.layers.{made}.{rest}"], source[f"model.layers.{layer}.{rest}"])
    assert torch.equal(out["model.embed_tokens.weight"], zero["model.embed_tokens.weight"])
    assert torch.equal(out["lm_head.weight"], one["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["full", "sliding", "full", "sliding", "full"]
    assert config["architectures"] == ["A", "B", "C"]


def test_entries_per_layer_come_from_each_layer_s_model(models: Path, tmp_path: Path) -> None:
    for name, kinds in [("m0", "abc"), ("m1", "xyz")]:
        nested = {
            "model_type": "vision",
            "text_config": {**CONFIG, "layer_types": list(kinds), "eos_token_id": [1, 2, 3]},
        }
        (models / name / "config.json").write_text(json.dumps(nested))
    slices = [
        {"sources": [{"model": "m1", "layer_range": [1, 3]}]},
        {"sources": [{"model": "m0", "layer_range": [0, 2]}]},
    ]
    merge(Recipe.from_data({"merge_method": "passthrough", "slices": slices}), tmp_path / "out", roots=[models])
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["layer_types"] == ["y", "z", "a", "b"] and text["num_hidden_layers"] == 4
    assert text["eos_token_id"] == [1, 2, 3]

    (models / "m0" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(IncompatibleModels, match="m0 has no entry of layer_types for layer 0"):
        planned(models, {"merge_method": "passthrough", "slices": slices})


def _slices(*names: str) -> dict[str, Any]:
    pieces = [{"sources": [{"model": name, "layer_range": [i, i + 1]}]} for i, name in enumerate(names)]
    return {"merge_method": "passthrough", "slices": pieces}


def test_slices_neither_lose_nor_invent_a_head(models: Path) -> None:
    tensors = mixed_tensors(2)
    del tensors["lm_head.weight"]
    _replace(models / "m1", tensors, tie_word_embeddings=True)

    lent = planned(models, _slices("m0", "m1"))
    assert lent.by_name["lm_head.weight"].sources[0].info.name == "model.embed_tokens.weight"
    with pytest.raises(IncompatibleModels, match=r"m0 has a head of its own, lm_head\.weight, which m1 ties"):
        planned(models, _slices("m1", "m0"))


def test_over_a_whole_model_the_models_stand_in_one_order(models: Path) -> None:
    def piece(layer: int, *names: str) -> dict[str, Any]:
        return {"sources": [{"model": name, "layer_range": [layer, layer + 1]} for name in (*names, "base")]}

    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "scope": "model",
        "slices": [piece(0, "m0", "m1"), piece(1, "m1", "m0")],
        "parameters": {"weight": 1, "density": 0.5},
    }
    with pytest.raises(RecipeError, match=r"in the same order, but .* has base, m0, m1 and .* has base, m1, m0"):
        planned(models, recipe)


def test_layer_numbers_are_written_one_way_only(models: Path) -> None:
    tensors = mixed_tensors(1)
    _replace(models / "m0", {**tensors, "model.layers.00.input_layernorm.weight": torch.ones(24)})
    plan = planned(models, _slices("m0", "m0"))
    assert "model.layers.00.input_layernorm.weight" in plan.by_name


def test_thousands_of_tensors_are_planned_in_seconds(tmp_path: Path) -> None:
    entries = {f"block{i}.w": {"dtype": "U8", "shape": [1, 1], "data_offsets": [i, i + 1]} for i in range(5_000)}
    header = json.dumps(entries).encode()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(5_000))
    (tmp_path / "m" / "config.json").write_text('{"tie_word_embeddings": true}')
    started = time.process_time()
    planned(tmp_path, {"merge_method": "passthrough", "models": [{"model": "m"}]})
    assert time.process_time() - started < 10


def test_a_listed_base_has_no_delta_and_needs_no_weight(models: Path) -> None:
    plan = planned(
        models,
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "base"}, {"model": "m0", "parameters": {"weight": 0.5}}],
        },
    )
    assert len(plan.by_name["lm_head.weight"].sources) == 1


def test_an_average_counts_the_base_only_where_it_has_a_weight(models: Path) -> None:
    entries = [{"model": "m0", "parameters": {"weight": 1}}]
    without = planned(models, {"merge_method": "linear", "base_model": "base", "models": entries})
    with_weight = planned(
        models, {"merge_method": "linear", "base_model": "base", "models": entries, "parameters": {"weight": 1}}
    )
    assert len(without.by_name["lm_head.weight"].sources) == 1
    assert len(with_weight.by_name["lm_head.weight"].sources) == 2


def test_an_optional_base_is_subtracted_and_no_model(models: Path) -> None:
    recipe = {"merge_method": "nuslerp", "models": [{"model": "m0"}, {"model": "m1"}], "parameters": {"weight": 1}}
    alone, based = planned(models, recipe), planned(models, recipe | {"base_model": "base"})
    listed = planned(models, recipe | {"base_model": "base", "models": [*recipe["models"], {"model": "base"}]})

    assert alone.by_name["lm_head.weight"].base is None
    for plan in (based, listed):
        step = plan.by_name["lm_head.weight"]
        assert step.base is not None and str(plan.models[step.base.model]) == "base"
        assert [str(plan.models[source.model]) for source in step.sources] == ["m0", "m1"]
    with pytest.raises(RecipeError, match="nuslerp takes exactly 2 models besides the base, not 1"):
        planned(models, recipe | {"base_model": "m0"})


def test_a_base_is_a_model_where_none_needs_a_weight(models: Path) -> None:
    plan = planned(models, {"merge_method": "karcher", "base_model": "base", "models": [{"model": "m0"}]})
    assert [str(plan.models[source.model]) for source in plan.by_name["lm_head.weight"].sources] == ["base", "m0"]


def test_excluded_tensors_are_the_base_s(models: Path, tmp_path: Path) -> None:
    merge(
        Recipe.from_data(method_recipe("linear", base_model="base", exclude=["lm_head"])),
        tmp_path / "out",
        roots=[models],
    )
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], mixed_tensors(0)["lm_head.weight"]
    )


def _without(models: Path, name: str, tensor: str) -> None:
    tensors = mixed_tensors(1)
    del tensors[tensor]
    _replace(models / name, tensors)


def _replace(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    for file in folder.iterdir():
        file.unlink()
    write_checkpoint(folder, tensors, config={**CONFIG, **config})


def test_a_missing_tensor_is_named(models: Path) -> None:
    _without(models, "m1", "model.norm.weight")
    with pytest.raises(IncompatibleModels, match=r"m1 lacks model\.norm\.weight, which base has") as refused:
        planned(models, method_recipe("ties"))
    assert refused.value.problems[0].tensor == "model.norm.weight"
    assert refused.value.problems[0].pointer == "#/models/1"


def test_a_shape_mismatch_is_named(models: Path) -> None:
    _replace(models / "m2", {**mixed_tensors(1), "lm_head.weight": torch.zeros(97, 24, dtype=torch.bfloat16)})
    with pytest.raises(IncompatibleModels, match=r"lm_head\.weight is \[97, 24\] in m2 but \[96, 24\] in base"):
        planned(models, method_recipe("ties"))


def test_a_layer_count_mismatch_is_one_sentence(models: Path) -> None:
    _replace(models / "m0", {name: tensor for name, tensor in mixed_tensors(1).items() if "layers.2" not in name})
    with pytest.raises(IncompatibleModels) as refused:
        planned(models, method_recipe("ties"))
    assert str(refused.value) == "models/0: m0 has 2 layers in model.layers.*, but base has 3"


def test_what_only_a_fine_tune_has_is_said_to_be_left_out(models: Path) -> None:
    _replace(models / "m0", {**mixed_tensors(1), "model.rotary.inv_freq": torch.ones(4)})
    plan = planned(models, method_recipe("ties"))
    assert plan.left_out == ("model.rotary.inv_freq: only m0 has it, base has not",)


def _untie(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def test_a_tied_head_is_stored_once_and_its_equality_checked(models: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        _replace(models / name, _untie(mixed_tensors(seed)), tie_word_embeddings=True)
    recipe = Recipe.from_data(method_recipe("dare_linear"))

    artifact = merge(recipe, tmp_path / "out", roots=[models])
    assert "lm_head.weight" not in artifact.tensors

    _replace(models / "m1", mixed_tensors(2), tie_word_embeddings=True)
    with pytest.raises(IncompatibleModels, match=r"m1: the config ties lm_head\.weight to model\.embed_tokens\.weight"):
        merge(recipe, tmp_path / "other", roots=[models])


def test_a_head_of_its_own_is_not_lost(models: Path) -> None:
    tensors = mixed_tensors(0)
    del tensors["lm_head.weight"]
    _replace(models / "base", tensors, tie_word_embeddings=True)
    with pytest.raises(IncompatibleModels, match=r"m0 has a head of its own, lm_head\.weight"):
        planned(models, method_recipe("ties"))


def test_a_fine_tune_that_ties_its_head_lends_its_embedding(models: Path) -> None:
    tensors = mixed_tensors(1)
    del tensors["lm_head.weight"]
    _replace(models / "m0", tensors, tie_word_embeddings=True)
    plan = planned(models, method_recipe("ties"))
    assert plan.by_name["lm_head.weight"].sources[0].info.name == "model.embed_tokens.weight"


REFUSED: list[tuple[dict[str, Any], str]] = [
    (method_recipe("ties", base_model=None), "ties needs a base_model"),
    (
        method_recipe("slerp", models=[{"model": "m0"}, {"model": "m1"}]),
        "slerp takes exactly 1 model besides the base, not 2",
    ),
    (
        method_recipe("passthrough", models=[{"model": "m0"}, {"model": "m1"}]),
        "passthrough takes exactly 1 model, not 2",
    ),
    (method_recipe("ties", parameters={}), "m0 has no weight for"),
    (method_recipe("slerp", parameters={}), "slerp needs t"),
    (method_recipe("ties", parameters={"weight": 1, "density": 2}), "density"),
    (method_recipe("linear", parameters={"weight": 0}), "the weights sum to zero"),
    (
        method_recipe("ties", parameters={"weight": [{"filter": "atention", "value": 1}, {"value": 1}]}),
        "no tensor's name contains 'atention'",
    ),
    (method_recipe("ties", exclude=["lm_haed"]), "no tensor's name contains 'lm_haed'"),
    (method_recipe("ties-model", parameters={"weight": 1, "density": [0.1, 0.2]}), "density must be one value"),
    (method_recipe("ties", models=[{"model": "nowhere"}]), "nowhere: is in none of this service's model folders"),
    (method_recipe("ties", models=[{"model": "m0+adapter"}]), "is in none of this service's model folders"),
    (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "m0", "layer_range": [2, 5]}]}]},
        "m0 has 3 layers, so layer_range [2, 5] is not in it",
    ),
    (
        {
            "merge_method": "ties",
            "base_model": "base",
            "slices": [{"sources": [{"model": "m0", "layer_range": [0, 3]}]}],
        },
        "the base base is not among the sources",
    ),
]


@pytest.mark.parametrize(("recipe", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_refused_in_words(models: Path, recipe: dict[str, Any], says: str) -> None:
    with pytest.raises(WeightsmithError) as refused:
        planned(models, recipe)
    assert says in str(refused.value)


def test_dead_filters_can_be_listed_instead(models: Path) -> None:
    weight = [{"filter": "atention", "value": 1}, {"value": 1}]
    plan = planned(models, method_recipe("ties", parameters={"weight": weight}, unknown_keys="warn"))
    assert plan.warnings == ("parameters/weight: no tensor's name contains 'atention'; ignored",)


def test_quantised_models_are_refused_but_can_be_stacked(models: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    (models / "m0" / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleModels, match="m0 is quantised"):
        planned(models, method_recipe("ties"))
    assert planned(models, method_recipe("passthrough")).steps


def _sparse_checkpoint(folder: Path, shape: list[int]) -> None:
    """A header that describes a huge tensor over a file without a single written block."""
    size = 2 * shape[0] * shape[1]
    header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / "model.safetensors", 8 + len(header) + size)


def test_a_full_disk_is_known_before_a_weight_is_read(tmp_path: Path) -> None:
    _sparse_checkpoint(tmp_path / "huge", [2**20, 2**20])
    recipe = Recipe.from_data({"merge_method": "passthrough", "models": [{"model": "huge"}]})
    with pytest.raises(InsufficientStorage, match=r"the output needs 2,199\.02 GB"):
        merge(recipe, tmp_path / "out", roots=[tmp_path])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge"]


def test_two_tensors_are_measured_at_once_where_there_is_room(models: Path) -> None:
    recipe = Recipe.from_data(method_recipe("ties"))
    roomy = plan_only(recipe, roots=[models]).memory
    tight = plan_only(recipe, roots=[models], memory=roomy.peak - 1).memory

    assert (roomy.ahead, tight.ahead) == (2, 1)
    assert tight == replace(roomy, ahead=1, peak=tight.peak) and tight.peak < roomy.peak


def test_a_row_that_fits_in_no_memory_is_refused(tmp_path: Path) -> None:
    _sparse_checkpoint(tmp_path / "wide", [2, 2**28])
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "wide"}],
        "parameters": {"weight": 1},
        "limits": {"memory": "512MiB"},
    }
    with pytest.raises(MemoryLimitExceeded, match=r"raise limits\.memory") as refused:
        planned(tmp_path, recipe)
    assert refused.value.problems[0].tensor == "w"


def test_recipe_problems_come_before_model_problems(models: Path) -> None:
    _without(models, "m1", "model.norm.weight")
    with pytest.raises(RecipeError, match="has no weight"):
        planned(models, method_recipe("ties", parameters={}))


def test_a_base_alone_is_copied_where_nothing_is_added_to_it(models: Path) -> None:
    plan = planned(models, method_recipe("task_arithmetic", models=[{"model": "base"}]))
    assert all(step.method is None for step in plan.steps)
    assert any("only the base takes part" in warning for warning in plan.warnings)
