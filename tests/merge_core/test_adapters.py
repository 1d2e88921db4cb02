"""Adapters on models: the numbers for every option, the same bytes for any block, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.adapters import CONFIG_NAME, WEIGHTS_NAME
from merge_core.errors import (
    CheckpointError,
    IncompatibleModels,
    NonFinite,
    RecipeError,
    UnsafeFormat,
    WeightsmithError,
)
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, kernels_in, mixed_tensors, write_checkpoint

PREFIX = "base_model.model."
Q, UP, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(module: str, outputs: int, inputs: int, rank: int, *, seed: int = 1) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": noise(rank, inputs, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": noise(outputs, rank, seed=seed + 1),
    }


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **config}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


def run(folder: Path, out: Path, model: Any = "base+adapter", **keys: Any) -> dict[str, Tensor]:
    recipe = {"merge_method": "passthrough", "models": [{"model": model}], **keys}
    merge(Recipe.from_data(recipe), out, roots=[folder])
    return load_file(out / "model.safetensors")


def product(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
    up, down = (tensors[f"{PREFIX}{module}.{part}.weight"].double() for part in ("lora_B", "lora_A"))
    return up.flatten(1) @ down.flatten(1)


THREE = {**factors(Q, 24, 24, 4), **factors(UP, 40, 24, 4, seed=3), **factors(DOWN, 24, 40, 4, seed=5)}
EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": noise(4, 96),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": noise(24, 4, seed=2),
}
NORM = {f"{PREFIX}{Q}.lora_magnitude_vector": 2 + noise(24, seed=9)}
Oracle = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def added(tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> Oracle:
    def oracle(base: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{m}.weight": base[f"{m}.weight"] + s * product(m, tensors) for m, s in scales.items()}

    return oracle


def normed(base: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = base[f"{Q}.weight"] + 1.5 * product(Q, THREE)
    wanted = NORM[f"{PREFIX}{Q}.lora_magnitude_vector"].double()
    return {f"{Q}.weight": wanted[:, None] * weight / weight.norm(dim=1, keepdim=True)}


def embedded(base: dict[str, Tensor]) -> dict[str, Tensor]:
    down, up = (tensor.double() for tensor in EMBEDDING.values())
    return {"model.embed_tokens.weight": base["model.embed_tokens.weight"] + 1.5 * (up @ down).T}


SAVED = {f"{PREFIX}lm_head.weight": noise(96, 24), f"{PREFIX}model.norm.modules_to_save.weight": noise(24)}
OF_Q = factors(Q, 24, 24, 4)
CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any], Oracle]] = {
    "alpha over rank": (THREE, {}, added(THREE, {Q: 1.5, UP: 1.5, DOWN: 1.5})),
    "rank-stabilised": (THREE, {"use_rslora": True}, added(THREE, {Q: 3, UP: 3, DOWN: 3})),
    "patterns": (
        factors(Q, 24, 24, 2) | factors(UP, 40, 24, 4) | factors(DOWN, 24, 40, 8),
        {
            "rank_pattern": {"q_proj": 2, r".*\.2\.mlp\.down_proj": 8},
            "alpha_pattern": {"layers.(0|2).mlp.up_proj": 5, "proj": 1, "^model.layers.2.mlp.down_proj": 3},
        },
        added(
            factors(Q, 24, 24, 2) | factors(UP, 40, 24, 4) | factors(DOWN, 24, 40, 8),
            {Q: 6 / 2, UP: 5 / 4, DOWN: 3 / 8},
        ),
    ),
    "a named adapter": (
        {name.replace(".weight", ".default.weight"): tensor for name, tensor in OF_Q.items()},
        {},
        added(OF_Q, {Q: 1.5}),
    ),
    "stored in bfloat16": (
        {name: tensor.bfloat16() for name, tensor in OF_Q.items()},
        {},
        added({name: tensor.bfloat16() for name, tensor in OF_Q.items()}, {Q: 1.5}),
    ),
    "DoRA": (OF_Q | NORM, {"use_dora": True}, normed),
    "embedding": (EMBEDDING, {}, embedded),
    "replaced": (
        SAVED,
        {"modules_to_save": ["lm_head", "norm"]},
        lambda base: dict(zip(("lm_head.weight", "model.norm.weight"), SAVED.values(), strict=True)),
    ),
    "replaced, then added to": (
        OF_Q | {f"{PREFIX}{Q}.base_layer.weight": noise(24, 24, seed=8)},
        {},
        lambda base: {f"{Q}.weight": noise(24, 24, seed=8) + 1.5 * product(Q, OF_Q)},
    ),
    "a model stored in float64": (
        factors("model.double", 7, 5, 4),
        {},
        lambda base: {
            "model.double": base["model.double"] + 1.5 * product("model.double", factors("model.double", 7, 5, 4))
        },
    ),
}


@pytest.mark.parametrize("title", [title for title in CASES if "float64" not in title])
def test_an_adapter_on_its_base_agrees_with_a_float64_oracle(models: Path, tmp_path: Path, title: str) -> None:
    tensors, config, oracle = CASES[title]
    write_adapter(models / "adapter", tensors, **config)

    merged = run(models, tmp_path / "out", out_dtype="float32")

    base = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in mixed_tensors(0).items()
    }
    expected = base | oracle(base)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("title", ["bias", "lora_bias", "Conv1D", "square Conv1D", "convolution", "float64"])
def test_what_only_some_architectures_have(tmp_path: Path, title: str) -> None:
    base = {"h.0.c.weight": noise(6, 9, seed=4), "h.0.c.bias": noise(9, seed=5), "h.0.s.weight": noise(6, 6, seed=6)}
    base |= {"conv.weight": noise(5, 3, 2, 2, seed=7), "h.0.d.weight": noise(6, 9, seed=8).double()}
    tensors = factors("h.0.c", 9, 6, 2)
    config: dict[str, Any] = {"r": 2, "lora_alpha": 3, "fan_in_fan_out": True}
    expected = {"h.0.c.weight": base["h.0.c.weight"].double() + 1.5 * product("h.0.c", tensors).T}
    if title == "bias":
        tensors[f"{PREFIX}h.0.c.base_layer.bias"] = expected["h.0.c.bias"] = noise(9, seed=11)
    elif title == "lora_bias":
        tensors[f"{PREFIX}h.0.c.lora_B.bias"] = noise(9, seed=11)
        expected["h.0.c.bias"] = base["h.0.c.bias"] + 1.5 * noise(9, seed=11)
    elif title == "square Conv1D":
        tensors |= factors("h.0.s", 6, 6, 2, seed=3)
        expected["h.0.s.weight"] = base["h.0.s.weight"] + 1.5 * product("h.0.s", tensors).T
    elif title == "convolution":
        tensors |= {f"{PREFIX}conv.lora_A.weight": noise(2, 3, 2, 2), f"{PREFIX}conv.lora_B.weight": noise(5, 2, 1, 1)}
        expected["conv.weight"] = base["conv.weight"] + 1.5 * product("conv", tensors).reshape(5, 3, 2, 2)
    elif title == "float64":
        tensors |= factors("h.0.d", 6, 9, 2)
        expected["h.0.d.weight"] = base["h.0.d.weight"] + 1.5 * product("h.0.d", tensors)
    write_checkpoint(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", tensors, **config)

    merged = run(tmp_path, tmp_path / "out")

    for name, tensor in (base | expected).items():
        exact = 1e-12 if title == "float64" and name == "h.0.d.weight" else 1e-6
        assert merged[name].dtype == base[name].dtype
        torch.testing.assert_close(merged[name].double(), tensor.double(), rtol=exact, atol=exact, msg=name)


def test_blocks_threads_and_kernels_change_no_byte(tmp_path: Path) -> None:
    tensors = {
        "model.embed.weight": noise(5000, 96),
        "model.up.weight": noise(4000, 96),
        "h.turned.weight": noise(3000, 90),
    }
    write_checkpoint(tmp_path / "base", {name: tensor.bfloat16() for name, tensor in tensors.items()})
    parts = factors("model.up", 4000, 96, 5) | factors("h.turned", 90, 3000, 3)
    parts |= {
        f"{PREFIX}model.embed.lora_embedding_A": noise(4, 5000),
        f"{PREFIX}model.embed.lora_embedding_B": noise(96, 4),
    }
    parts[f"{PREFIX}model.up.lora_magnitude_vector"] = 1 + noise(4000).abs()
    write_adapter(tmp_path / "adapter", parts, rank_pattern={"up": 5, "turned": 3}, fan_in_fan_out=True)
    keys = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 0.7}}
    recipe = Recipe.from_data({**keys, "models": [{"model": "base+adapter"}]})

    def digests(name: str, threads: int, elements: int) -> Mapping[str, str]:
        return merge(recipe, tmp_path / name, roots=[tmp_path], threads=threads, block_elements=elements).tensors

    one = digests("one", 1, 2**20)
    assert one == digests("two", 2, 1) == digests("three", 2, 3 * 2**16)
    with kernels_in("plain"):
        assert one == digests("plain", 2, 2**17)


@pytest.mark.parametrize(
    "keys",
    [
        {
            "merge_method": "linear",
            "models": [{"model": "base+adapter"}, {"model": "m0+other"}],
            "parameters": {"weight": 1},
        },
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [
                {"model": "base+adapter"},
                {"model": {"model": "base", "lora": {"path": "other"}}},
                {"model": "m1"},
            ],
            "parameters": {"weight": 1, "density": 0.3},
        },
        {"merge_method": "slerp", "base_model": "base+adapter", "models": [{"model": "m0"}], "parameters": {"t": 0.4}},
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "base+adapter", "layer_range": [0, 2]}]},
                {"sources": [{"model": "m0+other", "layer_range": [1, 3]}]},
            ],
        },
    ],
    ids=["linear", "ties", "base of slerp", "slices"],
)
def test_a_merge_with_adapters_is_the_merge_of_the_models_they_make(
    models: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Unrounded models: float32 copies, for which a recipe says the dtype of its output."""
    write_adapter(models / "adapter", THREE)
    write_adapter(models / "other", factors(Q, 24, 24, 4, seed=20) | EMBEDDING)
    copies = {name: name.replace("+", "-") for name in ("base", "m0", "m1", "base+adapter", "base+other", "m0+other")}
    for name, copy in copies.items():
        run(models, tmp_path / "copies" / copy, name, out_dtype="float32")

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            if "lora" in value:
                return copies[f"{value['model']}+{value['lora']['path']}"]
            return {
                key: copies[item] if key in ("model", "base_model") and isinstance(item, str) else renamed(item)
                for key, item in value.items()
            }
        return [renamed(item) for item in value] if isinstance(value, list) else value

    streamed = merge(Recipe.from_data({**keys, "out_dtype": "bfloat16"}), tmp_path / "out", roots=[models])
    dense = merge(
        Recipe.from_data({**renamed(keys), "out_dtype": "bfloat16"}), tmp_path / "dense", roots=[tmp_path / "copies"]
    )

    stored_so = streamed.tensors.keys() - {"model.double"}  # which float32 copies do not hold
    assert stored_so and all(streamed.tensors[name] == dense.tensors[name] for name in stored_so)


def test_the_output_keeps_the_dtypes_of_the_base(models: Path, tmp_path: Path) -> None:
    write_adapter(models / "adapter", THREE | SAVED)
    merged = run(models, tmp_path / "out", merge_method="linear", parameters={"weight": 1})
    assert {name: tensor.dtype for name, tensor in merged.items()} == {
        name: tensor.dtype for name, tensor in mixed_tensors(0).items()
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.layers.1.q", "layers.1.q"),
        ("layers.1.q", "model.layers.1.q"),
        ("model.layers.1.q", "language_model.model.layers.1.q"),
        ("model.language_model.layers.1.q", "language_model.model.layers.1.q"),
        ("transformer.h.0.q", "h.0.q"),
    ],
)
def test_names_may_differ_before_the_layers(tmp_path: Path, theirs: str, ours: str) -> None:
    vision = {"vision.layers.0.other.weight": noise(3, 3)}
    write_checkpoint(tmp_path / "base", {f"{ours}.weight": torch.zeros(6, 6), "lm_head.weight": noise(7, 6), **vision})
    parts = factors(theirs, 6, 6, 4) | {f"{PREFIX}lm_head.weight": noise(7, 6, seed=4)}
    write_adapter(tmp_path / "adapter", parts)

    merged = run(tmp_path, tmp_path / "out")

    torch.testing.assert_close(merged[f"{ours}.weight"].double(), 1.5 * product(theirs, parts), rtol=1e-6, atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], noise(7, 6, seed=4))


def test_names_that_may_mean_two_tensors_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", {f"{part}.layers.0.q.weight": noise(6, 6) for part in ("text", "vision")})
    write_adapter(tmp_path / "adapter", factors("layers.0.q", 6, 6, 4))
    with pytest.raises(IncompatibleModels, match=r"may be for text.* or for vision"):
        run(tmp_path, tmp_path / "out")


def test_a_tied_head_follows_its_embedding(tmp_path: Path) -> None:
    embedding = noise(96, 24)
    for name, head in (("once", {}), ("twice", {"lm_head.weight": embedding.clone()})):
        tensors = {"model.embed_tokens.weight": embedding, "model.layers.0.q.weight": noise(6, 6), **head}
        write_checkpoint(tmp_path / name, tensors, config={**CONFIG, "tie_word_embeddings": True})
    write_adapter(tmp_path / "adapter", EMBEDDING)

    merged = [run(tmp_path, tmp_path / f"out-{name}", f"{name}+adapter") for name in ("once", "twice")]

    assert merged[0].keys() == merged[1].keys() == {"model.embed_tokens.weight", "model.layers.0.q.weight"}
    assert torch.equal(*(found["model.embed_tokens.weight"] for found in merged))
    write_adapter(tmp_path / "adapter", {f"{PREFIX}lm_head.weight": noise(96, 24)})
    for name in ("once", "twice"):
        with pytest.raises(IncompatibleModels, match=r"changes lm_head\.weight, which the base's config ties to"):
            run(tmp_path, tmp_path / "out", f"{name}+adapter")


def test_the_lock_has_the_adapter(models: Path, tmp_path: Path) -> None:
    write_adapter(models / "adapter", THREE)
    before, out = sorted(models.rglob("*")), tmp_path / "out"

    run(models, out)

    lock = json.loads((out / "merge.lock.json").read_text())
    (source,) = lock["sources"]
    assert source["model"] == "base+adapter"
    files = {file["path"] for file in source["files"]}
    assert {f"adapter/{WEIGHTS_NAME}", f"adapter/{CONFIG_NAME}", "config.json"} <= files
    assert "`base+adapter`" in (out / "README.md").read_text()
    assert sorted(models.rglob("*")) == before and sorted(tmp_path.iterdir()) == [models, out]


def test_another_scale_is_another_merge(models: Path) -> None:
    recipe = Recipe.from_data({"merge_method": "passthrough", "models": [{"model": "base+adapter"}]})
    plans = []
    for alpha in (6, 7):
        write_adapter(models / "other", THREE)
        if not (models / "adapter").exists():
            write_adapter(models / "adapter", THREE)
        config = json.loads((models / "adapter" / CONFIG_NAME).read_text())
        (models / "adapter" / CONFIG_NAME).write_text(json.dumps({**config, "lora_alpha": alpha}))
        plans.append(plan_only(recipe, roots=[models]).digest)
    assert plans[0] != plans[1]


ODD_FILES: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "other type": (THREE, {"peft_type": "LOHA"}, "only LORA"),
    "no type": (THREE, {"peft_type": None}, "only LORA"),
    "infinite alpha": (THREE, {"lora_alpha": math.inf}, "lora_alpha"),
    "alpha in a pattern": (THREE, {"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern"),
    "rank zero": (THREE, {"r": 0}, "r: "),
    "rank as text": (THREE, {"r": "4"}, "r: "),
    "wrong rank": (THREE, {"r": 8}, "of rank 4, but adapter_config.json says 8"),
    "wrong rank by pattern": (THREE, {"rank_pattern": {"q_proj": 2}}, "of rank 4, but adapter_config.json says 2"),
    "endless pattern": (THREE, {"alpha_pattern": {"(a+)+b": 2}}, "no plain one"),
    "endless alpha": (THREE, {"lora_alpha": 10**400}, "lora_alpha"),
    "rank zero by pattern": (factors(Q, 24, 24, 0), {"rank_pattern": {"q_proj": 0}}, "does not fit"),
    "PiSSA": (THREE, {"init_lora_weights": "pissa_niter_4"}, "changes the base model too"),
    "experts": (THREE, {"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "half a pair": (dict(list(THREE.items())[:1]), {}, "does not make a pair"),
    "two adapters": (
        factors(Q, 24, 24, 4) | {name.replace(".weight", ".b.weight"): t for name, t in factors(UP, 40, 24, 4).items()},
        {},
        "several adapters",
    ),
    "twice": (OF_Q | {name.removeprefix(PREFIX): t for name, t in OF_Q.items()}, {}, "twice"),
    "DoRA without norms": (THREE, {"use_dora": True}, "has no lora_magnitude_vector beside it"),
    "no part of LoRA": (OF_Q | {f"{PREFIX}{Q}.hada_w1_a": noise(4, 4)}, {}, "neither a factor"),
    "integers": ({name: t.int() for name, t in OF_Q.items()}, {}, "stored as int32"),
    "no matrices": ({name: t.flatten() for name, t in OF_Q.items()}, {}, "does not fit"),
    "nothing": ({}, {}, "holds no tensors"),
}


@pytest.mark.parametrize("title", ODD_FILES)
def test_an_adapter_that_cannot_be_used_is_refused_by_file(models: Path, tmp_path: Path, title: str) -> None:
    tensors, config, message = ODD_FILES[title]
    write_adapter(models / "adapter", tensors, **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        run(models, tmp_path / "out")
    assert caught.value.problems[0].pointer == "#/models/0/model"
    assert str(tmp_path) not in str(caught.value)


MISFITS: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "no such tensor": (factors("model.layers.7.self_attn.q_proj", 24, 24, 4), {}, "matches nothing in the base"),
    "a tensor less": (OF_Q | factors("model.extra", 24, 24, 4), {}, "has no model.extra.weight"),
    "other shape": (factors(Q, 24, 32, 4), {}, r"shape \[24, 32\], but .* is \[24, 24\]"),
    "larger vocabulary": ({f"{PREFIX}lm_head.weight": noise(98, 24)}, {}, "vocabularies that an adapter enlarges"),
    "integers": ({f"{PREFIX}model.steps.weight": noise(3)}, {}, "matches nothing"),
    "contradiction": (THREE, {"fan_in_fan_out": True}, "lora_B.weight is for .*, which is square"),
    "DoRA over columns": (
        EMBEDDING | {f"{PREFIX}model.embed_tokens.lora_magnitude_vector": noise(24)},
        {},
        r"magnitude_vector holds norms over columns of model.embed_tokens",
    ),
    "DoRA of other length": (
        OF_Q | {f"{PREFIX}{Q}.lora_magnitude_vector": noise(7)},
        {},
        "has 7 norms, but .* has 24 rows",
    ),
}


@pytest.mark.parametrize("title", MISFITS)
def test_an_adapter_for_another_base_is_refused_by_tensor(models: Path, tmp_path: Path, title: str) -> None:
    tensors, config, message = MISFITS[title]
    write_adapter(models / "adapter", tensors, **config)
    with pytest.raises(IncompatibleModels, match=message) as caught:
        run(models, tmp_path / "out")
    assert caught.value.problems[0].pointer == "#/models/0/model" and caught.value.problems[0].tensor


def test_references_that_cannot_be_followed(models: Path, tmp_path: Path) -> None:
    write_adapter(models / "adapter", THREE)
    (models / "pickled").mkdir()
    (models / "pickled" / CONFIG_NAME).write_text("{}")
    (models / "pickled" / "adapter_model.bin").write_bytes(b"")
    (models / "outside").symlink_to(tmp_path)
    refused: dict[str, tuple[type[WeightsmithError], str]] = {
        "base@main": (RecipeError, "a local folder has no revisions"),
        "base+adapter@v1": (RecipeError, "leave @v1 away"),
        "adapter+adapter": (RecipeError, "is an adapter, not a model"),
        "base+m0": (CheckpointError, "so it is no adapter"),
        "base+nowhere": (CheckpointError, "in none of"),
        "base+pickled": (UnsafeFormat, "is a pickle"),
        "base+outside": (CheckpointError, "outside the folders"),
        "base+m0/config.json": (CheckpointError, "is no folder"),
    }
    for model, (error, message) in refused.items():
        with pytest.raises(error, match=message):
            run(models, tmp_path / "out", model)


def test_nan_in_an_adapter_is_found_in_the_tensor_it_makes(models: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in THREE.items()}
    tensors[f"{PREFIX}{Q}.lora_A.weight"][0, 3] = math.nan
    write_adapter(models / "adapter", tensors)
    with pytest.raises(
        NonFinite, match=rf"{Q}.weight of base\+adapter holds NaN .*safetensors or adapter/{WEIGHTS_NAME}\)"
    ):
        run(models, tmp_path / "out", merge_method="linear", parameters={"weight": 1})
