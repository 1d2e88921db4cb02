"""What a pass over the inputs can know: statistics that add up over disjoint grains, in any order, to the same bits.

Counts are integers, so any order gives the same sum. Floating-point sums follow the grain rule (`GrainSums`). A
statistic is small, merges with `add`, and crosses workers as arrays (`save_statistics`).
"""

from __future__ import annotations

import functools
import io
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRAIN_ELEMENTS = 2**16
LANES = 1024
Counters = NDArray[np.int64]
Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Grains:
    """How one output tensor is cut into grains of whole rows: a function of its shape only.

    A 1-D tensor counts each element as a row of one; a 0-d tensor is one row.

    >>> Grains.of((1000, 3, 100))
    Grains(rows=1000, width=300, size=218)
    >>> Grains.of((1000, 3, 100)).count
    5
    """

    rows: int
    width: int
    size: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Self:
        rows = shape[0] if shape else 1
        width = math.prod(shape[1:])
        return cls(rows, width, max(1, GRAIN_ELEMENTS // max(1, width)))

    @property
    def count(self) -> int:
        return -(-self.rows // self.size)

    def row_range(self, first: int, last: int) -> tuple[int, int]:
        """Rows of the grains `first` to `last` (exclusive)."""
        return first * self.size, min(last * self.size, self.rows)


Arrays = dict[str, NDArray[Any]]


class Statistic(Protocol):
    """Adds up over disjoint sets of grains, in any order, to the same value; arrays hold all of it."""

    def add(self, other: Self) -> None: ...

    def to_arrays(self) -> Arrays: ...

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self: ...


@dataclass
class Counts:
    """Integer counts of any shape: histograms, sign votes."""

    values: Counters

    def add(self, other: Self) -> None:
        self.values += other.values

    def to_arrays(self) -> Arrays:
        return {"values": self.values}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        return cls(arrays["values"])


def counted(found: dict[str, Statistic], name: str, shape: tuple[int, ...]) -> Counts:
    """The counts of that name, zero at first."""
    if name not in found:
        found[name] = Counts(np.zeros(shape, np.int64))
    return cast(Counts, found[name])


@dataclass
class Largest:
    """The largest of integers that are not negative."""

    values: Counters

    def add(self, other: Self) -> None:
        np.maximum(self.values, other.values, out=self.values)

    def to_arrays(self) -> Arrays:
        return {"values": self.values}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        return cls(arrays["values"])


@dataclass
class RowValues:
    """Numbers of single rows, which are not added up: tensor → `[rows, ...]`, 0 where none were put."""

    rows: dict[str, Sums] = field(default_factory=dict)

    def put(self, tensor: str, rows: int, start: int, values: Sums) -> None:
        """Keep the values of some rows of a tensor that has `rows`."""
        if tensor not in self.rows:
            self.rows[tensor] = np.zeros((rows, *values.shape[1:]))
        self.rows[tensor][start : start + len(values)] = values

    def add(self, other: Self) -> None:
        for tensor, values in other.rows.items():
            if tensor in self.rows:
                self.rows[tensor] += values
            else:
                self.rows[tensor] = values

    def to_arrays(self) -> Arrays:
        return dict(self.rows)

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        return cls(dict(arrays))


class GrainSums:
    """Floating-point sums with one meaning, whatever the blocks: float64 by the grain rule. An array of them at once.

    Inside a grain by lanes (`grain_sums`); over grains by the binary tree of grain indices; over tensors in name order.
    """

    def __init__(self) -> None:
        self.trees: dict[str, _Tree] = {}

    def put(self, tensor: str, grains: int, index: int, value: Sums) -> None:
        if tensor not in self.trees:
            self.trees[tensor] = _Tree(grains, value.shape)
        self.trees[tensor].put((0, index), value)

    def add(self, other: Self) -> None:
        for tensor, tree in other.trees.items():
            mine = self.trees.setdefault(tensor, _Tree(tree.grains, tree.sums.shape[1:]))
            for node, place in tree.nodes.items():
                mine.put(node, tree.sums[place])

    def total(self) -> Sums:
        """The whole sums; every grain of every tensor must have been put, and at least one."""
        roots = [self.trees[tensor].root() for tensor in sorted(self.trees)]
        return functools.reduce(operator.add, roots)

    def to_arrays(self) -> Arrays:
        arrays: Arrays = {}
        for tensor, tree in self.trees.items():
            nodes = [(tree.grains, 0), *tree.nodes]
            arrays[f"nodes {tensor}"] = np.array(nodes, np.int64)
            arrays[f"sums {tensor}"] = tree.sums[list(tree.nodes.values())]
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        sums = cls()
        for name, nodes in arrays.items():
            kind, _, tensor = name.partition(" ")
            if kind == "nodes":
                values = arrays[f"sums {tensor}"]
                tree = sums.trees[tensor] = _Tree(int(nodes[0, 0]), values.shape[1:])
                for (level, index), value in zip(nodes[1:].tolist(), values, strict=True):
                    tree.put((level, index), value)
        return sums


class _Tree:
    """Partial sums of one tensor, O(log n) of them: node `(level, index)` is the sum of the grains `index·2^level` to
    `(index+1)·2^level`.

    They lie in one array, used again and again: small arrays kept between the blocks' large ones would keep the heap
    from shrinking.
    """

    def __init__(self, grains: int, shape: tuple[int, ...]) -> None:
        self.grains = grains
        self.nodes: dict[tuple[int, int], int] = {}
        self.sums: Sums = np.empty((32, *shape))
        self._free = list(range(32))

    def put(self, node: tuple[int, int], value: Sums) -> None:
        if not self._free:
            self._free = list(range(len(self.sums), 2 * len(self.sums)))
            self.sums = np.concatenate([self.sums, np.empty_like(self.sums)])
        place = self._free.pop()
        self.sums[place] = value
        level, index = node
        while (sibling := self.nodes.pop((level, index ^ 1), None)) is not None:
            left, right = (sibling, place) if index & 1 else (place, sibling)
            self.sums[place] = self.sums[left] + self.sums[right]
            self._free.append(sibling)
            level, index = level + 1, index >> 1
        self.nodes[level, index] = place

    def root(self) -> Sums:
        count, level = self.grains, 0
        while count > 1:
            if count & 1 and (last := self.nodes.pop((level, count - 1), None)) is not None:
                self._free.append(last)
                self.put((level + 1, count >> 1), self.sums[last])
            count, level = (count + 1) >> 1, level + 1
        root: Sums = self.sums[self.nodes[level, 0]].copy()
        return root


def grain_sums(values: Tensor, grain_elements: int) -> Sums:
    """Sum each grain of a flat run of whole grains: `[sums, elements]` → `[grains, sums]`, float64.

    Element i of a grain is added to lane i mod `LANES`, front to back; then the second half of the lanes is added to
    the first until one is left. The result depends on the grain alone; the last grain may be short.
    """
    elements = values.shape[-1]
    whole = elements // grain_elements * grain_elements
    sums = []
    if whole:
        sums.append(lane_sums(values[..., :whole].reshape(len(values), -1, grain_elements)))
    if whole < elements:
        sums.append(lane_sums(values[..., whole:].unsqueeze(1)))
    found: Sums = torch.cat(sums, dim=1).T.cpu().numpy()
    return found


def lane_sums(values: Tensor) -> Tensor:
    """Sum over the last dimension, whole, as `grain_sums` does a grain: `[..., elements]` → `[...]`, float64.

    >>> lane_sums(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist()
    [6.0, 15.0]
    """
    used = 1 << max(0, values.shape[-1] - 1).bit_length()  # lanes that get nothing add nothing
    lanes = values.new_zeros((*values.shape[:-1], min(used, LANES)), dtype=torch.float64)
    for part in torch.split(values, LANES, dim=-1):
        lanes[..., : part.shape[-1]] += part
    while (half := lanes.shape[-1] // 2) > 0:
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def add_up(totals: dict[str, Statistic], found: Mapping[str, Statistic]) -> None:
    """Add one block's statistics to the totals, by name."""
    for name, statistic in found.items():
        if name in totals:
            totals[name].add(statistic)
        else:
            totals[name] = statistic


_KINDS: Mapping[str, type[Statistic]] = {kind.__name__: kind for kind in (Counts, Largest, RowValues, GrainSums)}


def save_statistics(found: Mapping[str, Statistic]) -> bytes:
    """Statistics by name as bytes, which cross workers."""
    parts = [(name, statistic, statistic.to_arrays()) for name, statistic in found.items()]
    told = [[name, type(statistic).__name__, list(arrays)] for name, statistic, arrays in parts]
    space = io.BytesIO()
    arrays = [array for _, _, arrays in parts for array in arrays.values()]
    np.savez(space, np.frombuffer(json.dumps(told).encode(), np.uint8), *arrays, allow_pickle=False)
    return space.getvalue()


def load_statistics(data: bytes) -> dict[str, Statistic]:
    """What `save_statistics` saved."""
    with np.load(io.BytesIO(data), allow_pickle=False) as saved:
        arrays = iter([saved[f"arr_{number}"] for number in range(len(saved.files))])
    told = json.loads(next(arrays).tobytes())
    return {name: _KINDS[kind].from_arrays({part: next(arrays) for part in parts}) for name, kind, parts in told}
