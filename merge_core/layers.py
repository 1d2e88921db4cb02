"""Where layers stand in the names of tensors: `model.layers.0.mlp.up_proj.weight` is in the stack `model.layers.`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from merge_core.headers import TensorInfo

_LAYER = re.compile(r"^(|.*?\.)(0|[1-9]\d*)\.(.+)$")


def stacks(names: Iterable[str]) -> dict[str, dict[int, int]]:
    """Prefix → each number that follows it → its place among them: `model.layers.` → {0: 0, 1: 1, 2: 2}."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if layer := _LAYER.match(name):
            found[layer[1]].add(int(layer[2]))
    return {prefix: {number: i for i, number in enumerate(sorted(numbers))} for prefix, numbers in found.items()}


def layer_of(name: str) -> tuple[str, int, str] | None:
    """The stack of a tensor in a layer, the layer's number, and what follows it; None outside of layers.

    >>> layer_of("model.layers.3.mlp.up_proj.weight")
    ('model.layers', 3, 'mlp.up_proj.weight')
    """
    layer = _LAYER.match(name)
    return None if layer is None else (layer[1].removesuffix("."), int(layer[2]), layer[3])


def place_of(name: str, stacks: Mapping[str, Mapping[int, int]]) -> float:
    """A tensor's place in the layers of its stack, 0 the first and 1 the last; 0 outside of them."""
    if (layer := _LAYER.match(name)) is None:
        return 0.0
    numbers = stacks[layer[1]]
    return numbers[int(layer[2])] / (len(numbers) - 1) if len(numbers) > 1 else 1.0


def in_stack(name: str, prefix: str) -> bool:
    """Whether a tensor is in one of the layers of the stack `prefix`."""
    layer = _LAYER.match(name)
    return layer is not None and layer[1] == prefix


def by_layer(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[int, dict[str, TensorInfo]]:
    """Layer number → what follows it in a name → the tensor: 0 → `mlp.up_proj.weight` → …"""
    found: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if (layer := _LAYER.match(name)) and layer[1] == prefix:
            found[int(layer[2])][layer[3]] = info
    return found
