"""Synthetic checkpoints shaped like Llama models: a base, and fine-tunes whose deltas really move bfloat16 weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHARD_BYTES = 500_000_000
STEP = 5e-3 * 0.02
"""Standard deviation of a fine-tune's changes; at 1e-3 most bfloat16 weights of this size would not move at all."""
_CHUNK = 2**22


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions."""

    layers: int
    hidden: int = 2048
    intermediate: int = 5632
    key_value: int = 256
    vocabulary: int = 32000

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, in storage order."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            before = f"model.layers.{layer}."
            found |= {
                f"{before}self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{before}self_attn.k_proj.weight": (self.key_value, self.hidden),
                f"{before}self_attn.v_proj.weight": (self.key_value, self.hidden),
                f"{before}self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{before}mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{before}mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{before}mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{before}input_layernorm.weight": (self.hidden,),
                f"{before}post_attention_layernorm.weight": (self.hidden,),
            }
        head = {"lm_head.weight": (self.vocabulary, self.hidden)} if self.layers else {}
        return found | {"model.norm.weight": (self.hidden,)} | head

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": max(1, self.key_value // 64),
            "vocab_size": self.vocabulary,
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
        }


SHAPES = {
    "0.1": Shape(2, 1024, 2816, 256, 32000),
    "small": Shape(4),
    "large": Shape(22),
    "8": Shape(32, 4096, 14336, 1024, 128256),
    "embedding": Shape(0, 4096, 0, 0, 500_000),
}


def build(folder: Path, shape: Shape, models: int) -> list[Path]:
    """The base and so many fine-tunes below `folder`, unless they are there: names `base`, `m0`, `m1`, …"""
    paths = [folder / name for name in ["base", *(f"m{i}" for i in range(models))]]
    if not all((path / "config.json").is_file() for path in paths):
        layouts = list(zip(*(_layout(path, shape) for path in paths), strict=True))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_write, layouts, range(len(layouts))))
        for path in paths:
            (path / "config.json").write_text(json.dumps(shape.config))
    return paths


def build_sparse(folder: Path, shape: Shape, models: int) -> list[Path]:
    """The same with files that are all holes: zeros that take no space."""
    paths = [folder / name for name in ["base", *(f"m{i}" for i in range(models))]]
    for path in paths:
        for file, header, size in _layout(path, shape):
            with file.open("wb") as opened:
                opened.write(header)
                opened.truncate(len(header) + size)
    return paths


def _write(files: Sequence[tuple[Path, bytes, int]], number: int) -> None:
    """One shard of the base and of every fine-tune."""
    draws = [np.random.Generator(np.random.SFC64([number, model])) for model in range(len(files))]
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path, _, _ in files]
        for file, (_, header, _) in zip(opened, files, strict=True):
            file.write(header)
        for start in range(0, files[0][2] // 2, _CHUNK):
            count = min(_CHUNK, files[0][2] // 2 - start)
            base = _bfloat16(draws[0].standard_normal(count, np.float32) * np.float32(0.02))
            opened[0].write(base.tobytes())
            wide = (base.astype(np.uint32) << 16).view(np.float32)
            for file, draw in zip(opened[1:], draws[1:], strict=True):
                file.write(_bfloat16(wide + draw.standard_normal(count, np.float32) * np.float32(STEP)).tobytes())


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _layout(folder: Path, shape: Shape) -> list[tuple[Path, bytes, int]]:
    """Each shard's path, header and data size; the index is written."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dimensions in shape.tensors.items():
        nbytes = 2 * math.prod(dimensions)
        if groups[-1] and filled + nbytes > SHARD_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = dimensions
        filled += nbytes
    weight_map, files = {}, []
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor, dimensions in group.items():
            nbytes = 2 * math.prod(dimensions)
            entries[tensor] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [at, at + nbytes]}
            at += nbytes
            weight_map[tensor] = name
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        files.append((folder / name, len(text).to_bytes(8, "little") + text, at))
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files
