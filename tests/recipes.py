"""Plans published recipes on stub checkpoints, and compares with what mergekit is known to do with them.

    python -m tests.recipes FOLDER

FOLDER holds `index.json` with `recipes`, each with `file`, `expect` (accept, reject, or anything else: not compared),
`kind`, `ignored_keys` and `params_unused_by_method`, and the files. A stub has headers only, of a family that the
models' names tell and of the depth that the recipe reads. Prints a line per recipe and last `N passed, N failed, N
skipped`; exits with 1 if one failed.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from merge_core import merge
from merge_core.errors import WeightsmithError
from merge_core.published import Published, read_published
from merge_core.recipe import Recipe, referenced_models

DEPTH, HIDDEN, VOCABULARY = 32, 64, 1000
KINDS_OF_OTHER_TOOLS = ("moe",)


def _llama(depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(depth):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{i}.self_attn.{name}.weight", (HIDDEN, HIDDEN)
        for name, shape in (("gate_proj", (128, HIDDEN)), ("up_proj", (128, HIDDEN)), ("down_proj", (HIDDEN, 128))):
            yield f"model.layers.{i}.mlp.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _qwen(depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _llama(depth)
    for i in range(depth):
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"model.layers.{i}.self_attn.{name}.bias", (HIDDEN,)


def _neox(depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gpt_neox.embed_in.weight", (VOCABULARY, HIDDEN)
    for i in range(depth):
        layer = f"gpt_neox.layers.{i}"
        yield f"{layer}.attention.query_key_value.weight", (3 * HIDDEN, HIDDEN)
        yield f"{layer}.attention.dense.weight", (HIDDEN, HIDDEN)
        yield f"{layer}.mlp.dense_h_to_4h.weight", (4 * HIDDEN, HIDDEN)
        yield f"{layer}.mlp.dense_4h_to_h.weight", (HIDDEN, 4 * HIDDEN)
        yield f"{layer}.input_layernorm.weight", (HIDDEN,)
    yield "gpt_neox.final_layer_norm.weight", (HIDDEN,)
    yield "embed_out.weight", (VOCABULARY, HIDDEN)


FAMILIES = {"pythia": _neox, "neox": _neox, "qwen": _qwen, "": _llama}


def write_stub(folder: Path, family: str, depth: int) -> Path:
    """A checkpoint that is all holes but for its header, with a config and a small tokenizer."""
    folder.mkdir(parents=True)
    header, end = {}, 0
    for name, shape in FAMILIES[family](depth):
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {"num_hidden_layers": depth, "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCABULARY)}
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for token, i in list(vocabulary.items())[:3]
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    of_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(of_config))
    return folder


def write_adapter_stub(folder: Path, family: str) -> Path:
    """A LoRA adapter of rank 2 on the first linear weight of the layers."""
    name, shape = next((name, shape) for name, shape in FAMILIES[family](1) if ".0." in name and len(shape) == 2)
    module = name.removesuffix(".weight")
    folder.mkdir(parents=True)
    factors = {
        f"base_model.model.{module}.lora_A.weight": torch.zeros(2, shape[1]),
        f"base_model.model.{module}.lora_B.weight": torch.zeros(shape[0], 2),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _family(recipe: Recipe) -> str:
    names = str(recipe.to_data()).lower()
    return next(family for family in FAMILIES if family in names)


def _depth(recipe: Recipe) -> int:
    """As many layers as any slice of any document reads."""
    pieces = [piece for document in (*recipe.stages, recipe) for piece in document.slices or []]
    return max((source.layer_range[1] for piece in pieces for source in piece.sources), default=DEPTH)


def plan_on_stubs(recipe: Recipe, scratch: Path) -> None:
    """Plan with every model stubbed, wherever the recipe says that it is. Raises `WeightsmithError`."""
    family, depth, stubs = _family(recipe), _depth(recipe), dict[str, Path]()
    named = [ref for document in (*recipe.stages, recipe) for ref in referenced_models(document)]
    adapters = {ref.adapter for ref in named}

    def stub(path: str, roots: Any) -> Path:
        if path not in stubs:
            folder = scratch / f"model-{len(stubs)}"
            stubs[path] = write_adapter_stub(folder, family) if path in adapters else write_stub(folder, family, depth)
        return stubs[path]

    with patch.object(merge, "locate", stub):
        merge.plan_only(recipe)


def run_case(folder: Path, case: Mapping[str, Any], scratch: Path) -> str | None:
    """What differs from what is expected: empty if nothing does; None where nothing is."""
    text = (folder / case["file"]).read_bytes()
    if case["kind"] in KINDS_OF_OTHER_TOOLS:
        return _refused_by_name(text)
    if case["expect"] not in ("accept", "reject"):
        return None
    try:
        published = read_published(text)
        lenient = Recipe.from_data(_lenient(published))
        plan_on_stubs(lenient, scratch)
    except WeightsmithError as error:
        return "" if case["expect"] == "reject" else f"refused: {error}"
    if case["expect"] == "reject":
        return "accepted, though mergekit refuses it"
    wanted = {*case["ignored_keys"], *case["params_unused_by_method"]} - (
        {"name"} if case["kind"] == "multi" else set()
    )
    told = {each.pointer for each in published.ignored}
    missing = [key for key in wanted if not any(pointer.endswith("/" + key.split(".")[-1]) for pointer in told)]
    return f"not told that these are ignored: {', '.join(missing)}" if missing else ""


def _lenient(published: Published) -> Any:
    """Filters that match nothing in a stub are told, not refused: mergekit reads past them too."""
    data = published.recipe.to_data()
    if isinstance(data, list):
        return [{**document, "unknown_keys": "warn"} for document in data]
    return {**data, "unknown_keys": "warn"}


def _refused_by_name(text: bytes) -> str:
    try:
        read_published(text)
    except WeightsmithError as error:
        return "" if "mixture of experts" in str(error) else f"refused, but not by its name: {error}"
    return "accepted, though it is a recipe for another tool"


def main(folder: Path) -> int:
    """Run every recipe of a folder, print a line each and the count; 1 if any failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in json.loads((folder / "index.json").read_text())["recipes"]:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                wrong = run_case(folder, case, Path(scratch))
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
        outcome = "skipped" if wrong is None else "failed" if wrong else "passed"
        counts[outcome] += 1
        print(f"{outcome}  {case['file']}{f'  ({wrong})' if wrong else ''}")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
