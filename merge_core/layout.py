"""Where every output tensor will lie: file names, headers and offsets, known before any arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_core.dtypes import DType

INDEX_NAME = "model.safetensors.index.json"
DATA_ALIGNMENT = 4096
"""Where the first tensor begins, so that most can be written past the page cache as they are."""


@dataclass(frozen=True)
class Slot:
    """One output tensor: `begin` is its first byte's offset in the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardLayout:
    """One output file: its whole header and the tensors behind it, in file order."""

    file: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(slot.nbytes for slot in self.slots)


def lay_out(
    tensors: Sequence[Slot],
    max_shard_size: int,
    metadata: Mapping[str, str],
    *,
    stem: str = "model",
    alignment: int = DATA_ALIGNMENT,
) -> tuple[ShardLayout, ...]:
    """Cut the tensors, in their order, into files of at most `max_shard_size` bytes of data (one tensor is never cut).
    The first of each begins at a multiple of `alignment`.

    Inside a file wider number formats come first, so that every tensor stays aligned for readers that map the file.
    """
    groups: list[list[Slot]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return tuple(_shard(_file_name(stem, i, len(groups)), group, metadata, alignment) for i, group in enumerate(groups))


def index_json(shards: Sequence[ShardLayout]) -> str:
    """The index of a sharded checkpoint."""
    weight_map = {slot.name: shard.file for shard in shards for slot in shard.slots}
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )


def _file_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _shard(file: str, tensors: Sequence[Slot], metadata: Mapping[str, str], alignment: int) -> ShardLayout:
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": tensor.dtype.name,
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % alignment)
    header = len(text).to_bytes(8, "little") + text
    begin = len(header)
    slots = []
    for tensor in ordered:
        slots.append(Slot(tensor.name, tensor.dtype, tensor.shape, begin))
        begin += tensor.nbytes
    return ShardLayout(file, header, tuple(slots))
