"""Convolutions and linear layers in a row, with or without residual blocks: MLPs, VGG, ResNets.

The channels between two layers may stand in any order. All layers that write to one skip path share an order; a
depthwise convolution keeps the order of its input; grouped convolutions and GroupNorm permit permutations of whole
groups and inside groups. Where a convolution is flattened, each channel moves together with its pixels.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from merge_core.alignment.families.draft import MOST_BLOCKS, Draft, Module, Shape, is_norm, natural, pattern
from merge_core.alignment.spec import Axis
from merge_core.headers import clip
from merge_core.weights import is_embedding

_SHORTCUT = re.compile(r"(?i)^(downsample|shortcut|skip\w*|conv_shortcut|res_?conv|projection_shortcut)$")
_BESIDE = re.compile(
    r"(?i)(^|[._])(se|att\w*|squeeze|excit\w*|fuse|branch\w*|inception\w*|dense(block|layer)\d*)([._]|$)"
)
_TRANSPOSED = re.compile(r"(?i)(^|[._])(deconv\w*|decod\w*|generator|\w*transpose\w*|up\w*)([._\d]|$)")
_LAYER_NORM = re.compile(r"(?i)layer_?norm|(^|_)ln(_|\d|$)")
_GROUP_NORM = re.compile(r"(?i)group_?norm|(^|_)gn(_|\d|$)")
_MOST_UNTOLD = 8
_PLACES: tuple[tuple[int, frozenset[str]], ...] = (
    (-2, frozenset({"in", "input", "first", "stem", "embedder"})),
    (
        2,
        frozenset(
            {"out", "output", "final", "last", "logits", "score", "predict", "predictor", "prediction", "decoder"}
        ),
    ),
    (-1, frozenset({"features", "backbone", "encoder", "conv", "body"})),
    (1, frozenset({"fc", "linear", "lin", "dense", "classifier", "head"})),
)
"""Words that say where a layer stands, whatever the alphabet says."""


@dataclass(eq=False)
class _Channels:
    """What stands between layers: so many elements in one order. Without a name, in the order that they have.

    `split`: they fall into so many groups; `alike`: every group is arranged in the same way; `after`: the groups are
    those of other channels.
    """

    size: int
    name: str | None
    split: int = 1
    alike: bool = False
    after: _Channels | None = None

    @property
    def groups(self) -> str:
        return self.after.groups if self.after else f"{self.name}.groups"


@dataclass(eq=False)
class _Layer:
    """A convolution or a linear layer, and the norms of what it reads and what it writes."""

    module: Module
    shape: tuple[int, ...]
    before: list[Module] = field(default_factory=list)
    after: list[Module] = field(default_factory=list)

    @property
    def is_convolution(self) -> bool:
        return len(self.shape) > 2


class Network:
    """A network of convolutions and linear layers that is walked from its input to its output."""

    def __init__(self, draft: Draft, config: Mapping[str, Any]) -> None:
        self.draft, self.config = draft, config
        self.layers: dict[str, _Layer] = {}
        self.norms: list[Module] = []
        self._uses: list[tuple[Module, str, int, _Channels, int]] = []
        self._flat: bool = False
        self._numbers: dict[str, list[int]] = {}
        self._alike: dict[tuple[str, str], list[_Layer]] = {}
        self._beside: dict[tuple[str, str], list[_Layer]] = {}
        self._outside: dict[int, list[_Layer]] = {}

    def place(self) -> None:
        """Put the symmetries into the draft."""
        draft = self.draft
        self._sort_modules()
        blocks = self._blocks()
        if not draft.is_refused:
            self._pair_norms(blocks)
        if not draft.is_refused:
            self._walk(blocks)
        if not draft.is_refused:
            self._write()

    def _sort_modules(self) -> None:
        draft = self.draft
        for module in draft.modules.values():
            shape = draft.weight(module)
            unknown = module.parameters.keys() - {"weight", "bias"}
            if 0 in shape:
                draft.refuse_module(module, "a layer without elements")
            elif not unknown and self._is_layer(module, shape):
                self.layers[module.path] = _Layer(module, shape)
                is_unclear = _TRANSPOSED.search(module.path) if len(shape) > 2 else is_embedding(module.path)
                if is_unclear or _BESIDE.search(module.path):
                    draft.refuse_module(module, "the names do not say how the layers around it are connected")
            elif all(
                len(draft.shapes[tensor]) == 1 or kind == "num_batches_tracked"
                for kind, tensor in module.parameters.items()
            ):
                self.norms.append(module)
            else:
                draft.refuse_module(module, "its role in a network of convolutions or linear layers is not known")

    def _is_layer(self, module: Module, shape: Shape) -> bool:
        """Whether a module has the weight of a convolution or a linear layer, and a bias for each of its outputs."""
        bias = module.parameters.get("bias")
        return (
            len(shape) >= 2
            and module.parameters["weight"].endswith(".weight")
            and (bias is None or self.draft.shapes[bias] == shape[:1])
            and not is_norm(module.path)
        )

    def _blocks(self) -> dict[str, str]:
        """Layer or norm → the residual block that it is in, for those that are in one.

        Where a block has a layer on its skip path, those that stand in the same place are blocks as well.
        """
        paths = [*self.layers, *(norm.path for norm in self.norms)]
        found = set()
        for path in paths:
            words = path.split(".")
            for place, word in enumerate(words):
                if _SHORTCUT.search(word):
                    found.add(pattern(".".join(words[:place])))
        depths = {each.count(".") + 1 for each in found}
        blocks: dict[str, str] = {}
        for path in paths:
            words = path.split(".")
            for count in depths:
                if len(words) > count and pattern(above := ".".join(words[:count])) in found:
                    blocks[path] = above
        if not found:
            self._refuse_nested()
        if "" in found or any(not self.layers[path].is_convolution for path in blocks if path in self.layers):
            self.draft.refuse(
                next(iter(self.draft.shapes)), "residual blocks of linear layers: what they add up is not known"
            )
        return blocks

    def _refuse_nested(self) -> None:
        """Several layers in numbered parts may or may not add their input: the names do not say."""
        inside: dict[str, list[str]] = {}
        for path in self.layers:
            above = path.rpartition(".")[0]
            while above:
                if above[-1].isdecimal():
                    inside.setdefault(above, []).append(path)
                above = above.rpartition(".")[0]
        for above, paths in inside.items():
            if len(paths) > 1:
                what = (
                    f"{clip(above)} has several layers; whether it adds its input to what they give is not in the names"
                )
                self.draft.refuse_module(self.layers[paths[0]].module, what)

    def _pair_norms(self, blocks: Mapping[str, str]) -> None:
        """Give every norm to the layer that it follows or, in blocks that begin with a norm, to the one it precedes."""
        for path, each in self.layers.items():
            parent, word = each.module.parent, each.module.word
            if word.isdecimal() and str(int(word)) == word:
                self._numbers.setdefault(parent, []).append(int(word))
                self._alike.setdefault((parent.rpartition(".")[0], word), []).append(each)
            else:
                self._beside.setdefault((parent, _number(word)), []).append(each)
            if path not in blocks:
                size = each.shape[0] if each.is_convolution else -each.shape[1]
                self._outside.setdefault(size, []).append(each)
        for numbers in self._numbers.values():
            numbers.sort()
        pairs = [(norm, self._layer_of(norm)) for norm in self.norms]
        first = any(
            layer is not None and norm.path in blocks and _length(self.draft, norm) != layer.shape[0]
            for norm, layer in pairs
        )
        row: list[Module] | None
        for norm, layer in pairs:
            if norm.path not in blocks and (layer is None or first):
                row = self._row_by_size(norm)
            elif layer is None:
                row = None
            else:
                row = layer.before if first and not _is_skip(norm.path) else layer.after
            if row is None:
                self.draft.refuse_module(norm, "which layer it follows cannot be told from the names")
            else:
                row.append(norm)

    def _layer_of(self, norm: Module) -> _Layer | None:
        """The layer that a norm belongs to by its name: bn1 to conv1, 4 in a sequence to the layer before it."""
        word, size = norm.word, _length(self.draft, norm)
        if word.isdecimal():
            numbers = self._numbers.get(norm.parent, [])
            if earlier := bisect_left(numbers, int(word)):
                number = str(numbers[earlier - 1])
                return self.layers[f"{norm.parent}.{number}" if norm.parent else number]
            beside = self._alike.get((norm.parent.rpartition(".")[0], word), [])
            return beside[0] if len(beside) == 1 else None
        found = self._beside.get((norm.parent, _number(word)), [])
        exact = [each for each in found if each.shape[0] == size] or found
        return exact[0] if len(exact) == 1 else next((each for each in exact if each.is_convolution), None)

    def _row_by_size(self, norm: Module) -> list[Module] | None:
        """The norms of the only layer outside of blocks that has as many channels: after it where it writes them,
        before it where it is linear and reads them.
        """
        size = _length(self.draft, norm)
        stem, head = self._outside.get(size, []), self._outside.get(-size, [])
        if len(stem) + len(head) != 1:
            return None
        return stem[0].after if stem else head[0].before

    def _in_order(self, layers: Sequence[_Layer]) -> list[_Layer]:
        """Layers from input to output: by numbers and words in their names, else by sizes if only one order fits."""
        ordered = sorted(layers, key=lambda each: (not each.is_convolution, _place(each.module.path)))
        unclear = [
            (one, other)
            for one, other in pairwise(ordered)
            if one.is_convolution == other.is_convolution and not _is_told(one.module.path, other.module.path)
        ]
        if not unclear:
            return ordered
        orders = list(_orders(ordered))
        if len(orders) == 1:
            return orders[0]
        one, other = unclear[0]
        what = f"neither names nor sizes say whether it comes before or after {clip(other.module.path)}"
        self.draft.refuse_module(one.module, what)
        return []

    def _walk(self, blocks: Mapping[str, str]) -> None:
        outside = [layer for path, layer in self.layers.items() if path not in blocks]
        ordered = self._in_order(outside)
        if not ordered and not self.draft.is_refused and self.layers:
            first = next(iter(self.layers.values()))
            self._refuse(first, "residual blocks without a layer before them")
        if not ordered:
            return
        stem = [each for each in ordered if each.is_convolution] if blocks else []
        current: _Channels | None = None
        for layer in stem:
            current = self._step(layer, current)
        inside: dict[str, list[_Layer]] = {}
        for path, block in blocks.items():
            if path in self.layers:
                inside.setdefault(block, []).append(self.layers[path])
        if inside and current is None:
            self.draft.refuse_module(
                next(iter(inside.values()))[0].module, "residual blocks without a layer before them"
            )
            return
        for block in sorted(inside, key=natural):
            assert current is not None
            current = self._step_through(block, inside[block], current)
        rest = ordered[len(stem) :]
        for layer in rest:
            current = self._step(layer, current, is_last=layer is rest[-1])

    def _step_through(self, block: str, layers: Sequence[_Layer], current: _Channels) -> _Channels:
        """Walk through a residual block; what comes out of it."""
        skip = [each for each in layers if _is_skip(each.module.path)]
        body = self._in_order([each for each in layers if each not in skip])
        if not body or len(skip) > 1:
            self.draft.refuse_module(layers[0].module, f"how the layers of {clip(block)} are connected is not known")
            return current
        out = current
        if skip:
            out = self._step(skip[0], current)
        inner = current
        for layer in body[:-1]:
            inner = self._step(layer, inner, in_block=True)
        self._step(body[-1], inner, out=out)
        return out

    def _step(
        self,
        layer: _Layer,
        current: _Channels | None,
        *,
        out: _Channels | None = None,
        is_last: bool = False,
        in_block: bool = False,
    ) -> _Channels:
        """Walk through a layer; its output channels, which are `out` if that is given."""
        written, read = layer.shape[:2]
        name = layer.module.path
        found = out or _Channels(written, None if is_last else name)
        if found.size != written:
            self._refuse(layer, f"writes {written} channels to a skip path of {found.size}")
            return found
        if current is not None:
            for norm in layer.before:
                self._use_norm(norm, current)
            times, left = divmod(read, current.size)
            groups, rest = divmod(current.size, read)
            is_flattened = self._flat and not layer.is_convolution
            if not left and times == 2 and is_flattened:
                self._refuse(layer, f"reads two numbers for each of {current.size} channels: pixels, or two averages")
            elif not left and times and (times == 1 or is_flattened):
                self._use(layer.module, "weight", 1, current, times)
            elif layer.is_convolution and not rest and read == 1 and written == current.size and out is None:
                found = current
            elif layer.is_convolution and not rest and not in_block:
                what = f"reads {read} of {current.size} channels: in groups, or halved or rearranged before it"
                self._refuse(layer, f"{what}, the names do not say")
            elif layer.is_convolution and not rest and written % groups == 0 and out is None:
                self._group(layer, current, found, groups)
            else:
                self._refuse(layer, f"reads {read} channels, but {current.size} come before it")
                return found
        self._use(layer.module, "weight", 0, found)
        self._use(layer.module, "bias", 0, found)
        for norm in layer.after:
            self._use_norm(norm, found)
        self._flat = layer.is_convolution
        return found

    def _group(self, layer: _Layer, current: _Channels, found: _Channels, groups: int) -> None:
        """A grouped convolution: whole groups change places; inside, its inputs all in the same way."""
        if current.split != 1 or current.name is None or groups > MOST_BLOCKS:
            self._refuse(layer, "a grouped convolution of channels that already fall into groups")
            return
        current.split, current.alike = groups, True
        found.split, found.after = groups, current
        self._use(layer.module, "weight", 1, _Channels(current.size // groups, f"{current.name}.inside"))

    def _use_norm(self, norm: Module, channels: _Channels) -> None:
        if _length(self.draft, norm) != channels.size:
            self.draft.refuse_module(norm, f"{channels.size} channels come before it")
        statistics = "running_mean" in norm.parameters
        if (
            not statistics
            and not _LAYER_NORM.search(norm.word)
            and (self._has_convolutions or _GROUP_NORM.search(norm.word))
        ):
            groups = next((self.config[key] for key in ("num_groups", "norm_num_groups") if key in self.config), None)
            if type(groups) is not int or not 0 < groups <= MOST_BLOCKS or channels.size % groups:
                what = "it may be a GroupNorm; the config does not say of how many groups (num_groups)"
                self.draft.refuse_module(norm, f"without running statistics {what}")
            elif groups not in (1, channels.size) and channels.split != groups:
                if channels.split != 1:
                    self.draft.refuse_module(norm, "a GroupNorm of channels that fall into other groups")
                channels.split = groups
        for kind in norm.parameters:
            if kind != "num_batches_tracked":
                self._use(norm, kind, 0, channels)

    @property
    def _has_convolutions(self) -> bool:
        return any(layer.is_convolution for layer in self.layers.values())

    def _use(self, module: Module, kind: str, number: int, channels: _Channels, times: int = 1) -> None:
        if kind in module.parameters:
            self._uses.append((module, kind, number, channels, times))

    def _refuse(self, layer: _Layer, why: str) -> None:
        self.draft.refuse_module(layer.module, why)

    def _write(self) -> None:
        """Put the axes into the draft, now that every channel's groups are known."""
        for module, kind, number, channels, times in self._uses:
            tensor = module.parameters[kind]
            if channels.name is not None:
                self.draft.put(tensor, number, self.draft.repeated(self._axis(channels), times))
            if kind.startswith("running_"):
                self.draft.unmeasured.add(tensor)

    def _axis(self, channels: _Channels) -> Axis:
        draft, name = self.draft, channels.name
        assert name is not None
        if channels.split == 1:
            return draft.permutation(name, channels.size)
        size = channels.size // channels.split
        if channels.alike:
            return draft.blocks(channels.groups, [draft.permutation(f"{name}.inside", size)] * channels.split)
        inner = [draft.permutation(f"{name}.{group}", size) for group in range(channels.split)]
        return draft.blocks(channels.groups, inner)


def _length(draft: Draft, norm: Module) -> int:
    """How many channels a norm has."""
    return next((draft.shapes[tensor][0] for tensor in norm.parameters.values() if draft.shapes[tensor]), 0)


def _is_skip(path: str) -> bool:
    return any(_SHORTCUT.search(word) for word in path.split("."))


def _number(word: str) -> str:
    found = re.search(r"\d+$", word)
    return found[0] if found else ""


def _place(path: str) -> tuple[tuple[int, tuple[tuple[int, int, str], ...]], ...]:
    return tuple((_rank(word), natural(word)) for word in path.split("."))


def _rank(word: str) -> int:
    parts = set(re.split(r"[_\d]+", word.lower()))
    return next((rank for rank, words in _PLACES if words & parts), 0)


def _is_told(one: str, other: str) -> bool:
    """Whether names say that one layer comes before another: they differ first in a number, or in a telling word."""
    for mine, theirs in zip(one.split("."), other.split("."), strict=False):
        if mine != theirs:
            return _rank(mine) != _rank(theirs) or (pattern(mine) == pattern(theirs) and "#" in pattern(mine))
    return False


def _orders(layers: Sequence[_Layer]) -> Iterator[list[_Layer]]:
    """The first two orders of layers in which each reads as many elements as the one before it writes."""
    found = 0
    stack: list[list[_Layer]] = [[each] for each in layers] if len(layers) <= _MOST_UNTOLD else []
    while stack and found < 2:
        row = stack.pop()
        if len(row) == len(layers):
            found += 1
            yield row
        stack.extend([*row, each] for each in layers if each not in row and each.shape[1] == row[-1].shape[0])


def place(draft: Draft, config: Mapping[str, Any]) -> None:
    """Put the symmetries of a network of convolutions and linear layers into a draft."""
    Network(draft, config).place()
