"""What is merged while things break: documents of every kind on made models, and what the library makes of each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_core.adapters import CONFIG_NAME, WEIGHTS_NAME
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import method_recipe, write_checkpoint
from workers.jobs import JobKind
from workers.kinds import WORK

HIDDEN, INNER, LAYERS, WORDS = 256, 1024, 4, 2048
DEEP = 1200
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": LAYERS,
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """A document to be sent, and how it ends where nothing breaks: well (`code` is None) or with that problem."""

    title: str
    document: Any
    kind: JobKind = JobKind.MERGE
    code: str | None = None


FIRST_LAYER = {"model": "deep", "layer_range": [0, 1]}
MISPLACED = [{"model": "base"}, {"model": "shuffled"}]
SHARDS = {"max_shard_size": "3MB"}
CASES = (
    Case("linear", method_recipe("linear")),
    Case("ties", method_recipe("ties", outputs=SHARDS)),
    Case("ties, whole model", method_recipe("ties-model")),
    Case("pcb, whole model", method_recipe("pcb", scope="model", outputs=SHARDS)),
    Case("dare", method_recipe("dare_ties", seed=3)),
    Case("sce", method_recipe("sce")),
    Case("model stock", method_recipe("model_stock", outputs=SHARDS)),
    Case("breadcrumbs", method_recipe("breadcrumbs")),
    Case("slerp", method_recipe("slerp")),
    Case(
        "two documents",
        [
            {"name": "first", **method_recipe("ties")},
            {
                "merge_method": "slerp",
                "base_model": "base",
                "models": [{"model": "base"}, {"model": "first"}],
                "parameters": {"t": 0.5},
            },
        ],
    ),
    Case("an adapter", method_recipe("ties", models=[{"model": "base+adapter"}, {"model": "m1"}])),
    Case("patches", method_recipe("dare_ties", patches=[{"patch": "delta", "strength": 0.5}])),
    # One layer is merged and all are hashed, which takes its time when that is done.
    Case(
        "a slice", {"merge_method": "passthrough", "slices": [{"sources": [{"model": "deep", "layer_range": [0, 1]}]}]}
    ),
    Case("aligned", method_recipe("linear", models=MISPLACED, alignment={"to": "first"})),
    Case("a difference", method_recipe("ties", outputs={"kind": "delta"})),
    Case("an alignment", {"models": ["base", "shuffled"], "alignment": {"to": "first"}}, JobKind.ALIGNMENT),
    Case(
        "a patch applied",
        {"operation": "apply", "model": "m1", "patches": [{"patch": "delta", "strength": 0.5}]},
        JobKind.PATCH,
    ),
    Case(
        "a signature",
        {"operation": "extract", "base_model": "base", "clean": "m0", "corrupted": ["m1"], "layers": 3},
        JobKind.PATCH,
    ),
    Case(
        "not a number",
        method_recipe("ties", models=[{"model": "m0"}, {"model": "poisoned"}]),
        code="non-finite",
    ),
)


def write_models(folder: Path) -> None:
    """A base, three fine-tunes, one with its neurons elsewhere, one with a NaN at its end, one with very many layers,
    an adapter and a delta.
    """
    write_fine_tunes(folder)
    write_checkpoint(folder / "shuffled", _shuffled(_tensors(5)), shards=2, config=CONFIG)
    poisoned = _tensors(6)
    poisoned["lm_head.weight"][-1, -1] = float("nan")
    write_checkpoint(folder / "poisoned", poisoned, shards=2, config=CONFIG)
    _write_deep(folder / "deep")
    _write_adapter(folder / "adapter")
    difference = {"merge_method": "linear", "base_model": "base", "models": [{"model": "m2"}]}
    recipe = Recipe.from_data(
        {**difference, "parameters": {"weight": 1}, "outputs": {"kind": "delta", "encoding": "sign"}}
    )
    merge(recipe, folder / "delta", roots=[folder])


def write_fine_tunes(folder: Path) -> None:
    """A base and three fine-tunes, which are all that most cases take."""
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        write_checkpoint(folder / name, _tensors(seed), shards=2, config=CONFIG)


def references(models: Path, scratch: Path, cases: Sequence[Case] = CASES) -> Mapping[str, Mapping[str, str]]:
    """The sha256 of every file of every case that ends well, as the library makes them here, undisturbed."""
    found = {}
    for i, case in enumerate(cases):
        if case.code is None:
            work = WORK[case.kind]()
            document = work.document.from_data(case.document)
            artifact = work.run(
                document,
                scratch / str(i),
                roots=[models],
                partial=None,
                memory=None,
                threads=None,
                cache=scratch / "cache",
                device="cpu",
                report=lambda progress: None,
                stop=lambda: False,
            )
            found[case.title] = {file.path: file.sha256 for file in artifact.files}
    return found


def _tensors(seed: int) -> dict[str, Tensor]:
    origin, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        start = 0.05 * torch.randn(shape, generator=origin)
        return (start + 0.005 * torch.randn(shape, generator=own) * (seed > 0)).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(WORDS, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": weight(HIDDEN, HIDDEN) for name in "qkvo"}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": weight(INNER, HIDDEN) for name in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = weight(HIDDEN, INNER)
        tensors |= {f"{prefix}{name}_layernorm.weight": weight(HIDDEN) for name in ("input", "post_attention")}
    return tensors | {"model.norm.weight": weight(HIDDEN), "lm_head.weight": weight(WORDS, HIDDEN)}


def _shuffled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(1))
    found = dict(tensors)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp."
        for name in ("gate", "up"):
            found[f"{prefix}{name}_proj.weight"] = tensors[f"{prefix}{name}_proj.weight"][order].contiguous()
        found[f"{prefix}down_proj.weight"] = tensors[f"{prefix}down_proj.weight"][:, order].contiguous()
    return found


def _write_deep(folder: Path) -> None:
    """Zeros, in a file that takes no place on the disk."""
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(DEEP):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (3 * INNER, HIDDEN)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": DEEP, "tie_word_embeddings": True}))


def _write_adapter(folder: Path) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(9)
    factors = {}
    for layer in range(LAYERS):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        factors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(8, HIDDEN, generator=generator)
        factors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(HIDDEN, 8, generator=generator)
    save_file(factors, folder / WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
