"""A model's layers from its input on, told from the names and shapes of its tensors.

A layer is what is numbered together and holds more than one weight of a convolution or linear map (a bottleneck block,
a transformer block), else a single such weight with what belongs to it: its bias, the norm beside it. `layer1.0` of a
ResNet is one, `features.3` of a VGG is one with the norm `features.4`, `conv1` with `bn1` is one. What stands outside
of numbered layers comes first, convolutions come before linear maps, and the head, which makes the labels, is none.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from merge_core.headers import TensorInfo
from merge_core.weights import is_embedding

RUNNING = ("running_mean", "running_var")
"""What a BatchNorm keeps besides its weight and bias."""
_HEAD = re.compile(r"(^|[._])(fc|heads?|lm_head|classifier|score|logits|predictions|qa_outputs|embed_out)([._]|$)")
_DIGITS = re.compile(r"(\d+)")


def layers(tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """The names of each layer's tensors, the layer nearest to the input first; numbers that are no floats left out."""
    floats = {name: info for name, info in tensors.items() if info.dtype.kind == "float"}
    weights = {name for name, info in floats.items() if _is_weight(info)}
    held = Counter(prefix for name in weights for prefix in _numbered(name))
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(floats, key=_natural):
        found[_layer_of(name, held)].append(name)
    whole = {layer: names for layer, names in found.items() if weights.intersection(names)}
    for layer in found.keys() - whole.keys():
        if (neighbour := _neighbour(layer, whole)) is not None:
            whole[neighbour] = sorted([*whole[neighbour], *found[layer]], key=_natural)
    convolved = {layer for layer, names in whole.items() if any(len(floats[name].shape) > 2 for name in names)}
    order = sorted(whole, key=lambda layer: (_is_numbered(layer), layer not in convolved, _natural(layer)))
    heads = {layer for layer in order if _HEAD.search(layer)}
    if not heads and order and order[-1] not in convolved and len(weights.intersection(whole[order[-1]])) == 1:
        heads = {order[-1]}
    return [whole[layer] for layer in order if layer not in heads]


def batch_norms(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """The tensors of BatchNorm modules, which are those that keep running statistics; counts left out."""
    modules = {_module(name) for name in tensors if name.rpartition(".")[2] in RUNNING}
    return {name for name, info in tensors.items() if _module(name) in modules and info.dtype.kind == "float"}


def _is_weight(info: TensorInfo) -> bool:
    """Whether a tensor is the weight of a convolution or a linear map."""
    dimensions = len(info.shape)
    return info.name.endswith("weight") and dimensions >= 2 and not (dimensions == 2 and is_embedding(info.name))


def _layer_of(name: str, held: Mapping[str, int]) -> str:
    prefixes = list(_numbered(name))
    return next((prefix for prefix in prefixes if held[prefix] > 1), prefixes[0] if prefixes else _module(name))


def _numbered(name: str) -> Iterator[str]:
    """Every beginning of a name that ends in a number, the longest first: `layer1.0.downsample.0`, `layer1.0`."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdecimal():
            yield ".".join(parts[:end])


def _neighbour(layer: str, whole: Mapping[str, list[str]]) -> str | None:
    """The layer that a module without a weight of its own belongs to: the one before it in its stack, or the one
    beside it with the same numbers in its name.
    """
    stack, _, number = layer.rpartition(".")
    if number.isdecimal():
        beside = [
            other for other in whole if other.rpartition(".")[0] == stack and other.rpartition(".")[2].isdecimal()
        ]
        before = [other for other in beside if int(other.rpartition(".")[2]) < int(number)]
        return max(before, key=_natural) if before else min(beside, key=_natural, default=None)
    numbers = _DIGITS.findall(layer)
    beside = [other for other in whole if _module(other) == _module(layer) and _DIGITS.findall(other) == numbers]
    return beside[0] if len(beside) == 1 and (numbers or _module(layer)) else None


def _is_numbered(layer: str) -> bool:
    return any(part.isdecimal() for part in layer.split("."))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _natural(name: str) -> list[tuple[int, str]]:
    """By numbers where there are numbers: `features.2` before `features.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]
