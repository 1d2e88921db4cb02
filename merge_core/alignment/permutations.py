"""Permutations that were found: a small file that can be stored, read, undone, chained, and applied row by row."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_core.alignment.spec import Indexed, Indices, PermutationSpec
from merge_core.checkpoint import Checkpoint
from merge_core.dtypes import STORED
from merge_core.errors import CheckpointError, IncompatibleModels, Problem, RecipeError
from merge_core.files import WrittenFile, write_whole
from merge_core.headers import MAX_TENSORS, TensorInfo, clip, is_usable_name, read_metadata
from merge_core.layout import Slot, lay_out
from merge_core.weights import Derived, Weights

FORMAT, VERSION = "weightsmith-permutations", "1"
_SEPARATOR = "::"
_MOST_BYTES = 2**30
_ALIGNMENT = 8
_ONE_FILE = 2**62
_PIECE = 2**18
_GAP = 2**14
_GAP_ROWS = 16
"""What is read in passing rather than skipped, in bytes and in rows: another read costs as much."""
_WORTH_A_READ = 512
"""Bytes of a row that is read alone rather than in passing."""
_SORTING_BYTES = 40
"""Memory per row for finding out which rows are read together."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Permutations:
    """The permutations of one or more models of one spec, by the models' names; `provenance` is plain data about how
    they were found.
    """

    spec: PermutationSpec
    models: Mapping[str, Indexed]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def identity(cls, spec: PermutationSpec, models: Sequence[str]) -> Self:
        """Those that change nothing."""
        return cls(spec, {model: spec.identity() for model in models})

    def inverse(self) -> Permutations:
        """Those that undo these."""
        undone = {model: self.spec.inverse(indexed) for model, indexed in self.models.items()}
        return Permutations(self.spec, undone, {"inverse_of": dict(self.provenance)})

    def then(self, second: Permutations) -> Permutations:
        """Those that do these first and then the second ones, of the same spec and models.

        Raises `IncompatibleModels`.
        """
        if second.spec != self.spec or second.models.keys() != self.models.keys():
            detail = "permutations can only be chained with others of the same spec and the same models"
            raise IncompatibleModels(detail, [Problem(detail)])
        chained = {model: self.spec.then(self.models[model], second.models[model]) for model in self.models}
        return Permutations(self.spec, chained, {"first": dict(self.provenance), "then": dict(second.provenance)})

    def moved(self, model: str) -> dict[str, int]:
        """How many elements of each permutation of a model change their place."""
        return {name: int((index != np.arange(len(index))).sum()) for name, index in self.models[model].items()}

    def save(self, path: Path) -> WrittenFile:
        """Write them as one safetensors file, whole or not at all. Raises `StorageFailed`, `InsufficientStorage`."""
        vectors = {
            f"{number}{_SEPARATOR}{name}": index.astype("<i4")
            for number, indexed in enumerate(self.models.values())
            for name, index in indexed.items()
        }
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "spec": json.dumps(self.spec.to_data()),
            "models": json.dumps(list(self.models)),
            "provenance": json.dumps(self.provenance),
        }
        slots = [Slot(name, STORED["I32"], index.shape) for name, index in vectors.items()]
        (layout,) = lay_out(slots, _ONE_FILE, metadata, alignment=_ALIGNMENT)
        return write_whole(path, layout.header + b"".join(index.tobytes() for index in vectors.values()))

    @classmethod
    def open(cls, path: str | Path, *, roots: Sequence[Path] | None = None) -> Self:
        """Read what `save` wrote. Raises `CheckpointError` for a file that lies in any way."""
        with Checkpoint.open(path, roots=roots) as stored:
            shard, *others = stored.shards.values()
            file = shard.path
            if others:
                raise CheckpointError(stored.path, "holds no permutations: it is a model in several files")
            metadata = read_metadata(file, roots)
            if metadata.get("format") != FORMAT:
                raise CheckpointError(file, "holds no permutations")
            if metadata.get("version") != VERSION:
                said = clip(metadata.get("version"))
                raise CheckpointError(file, f"holds permutations of version {said}; this program reads {VERSION}")
            if shard.size > _MOST_BYTES:
                raise CheckpointError(file, f"has {shard.size:,} bytes of permutations; at most {_MOST_BYTES:,}")
            models, provenance = (_json(file, metadata, key) for key in ("models", "provenance"))
            if not isinstance(models, list) or not all(
                isinstance(name, str) and is_usable_name(name) for name in models
            ):
                raise CheckpointError(file, "has no list of model names")
            if len(set(models)) < len(models):
                raise CheckpointError(file, "names a model twice")
            if not isinstance(provenance, dict):
                raise CheckpointError(file, "has a provenance that is no JSON object")
            try:
                spec = PermutationSpec.from_data(_json(file, metadata, "spec"))
                spec.check()
            except (RecipeError, IncompatibleModels) as error:
                raise CheckpointError(file, f"has a spec that is wrong: {clip(error.problems[0].detail)}") from None
            if (count := len(models) * len(spec.permutations)) > MAX_TENSORS:
                raise CheckpointError(file, f"names {count:,} vectors; at most {MAX_TENSORS:,} are read")
            wanted = {
                f"{number}{_SEPARATOR}{name}": size
                for number in range(len(models))
                for name, size in spec.permutations.items()
            }
            if odd := sorted(wanted.keys() ^ stored.tensors.keys()):
                what = "lacks" if odd[0] in wanted else "holds"
                raise CheckpointError(file, f"{what} {clip(odd[0])}, unlike its spec says", tensor=odd[0])
            vectors = {name: _vector(stored, name, size) for name, size in wanted.items()}
        found = {
            model: {name: vectors[f"{number}{_SEPARATOR}{name}"] for name in spec.permutations}
            for number, model in enumerate(models)
        }
        return cls(spec, found, provenance)


def _json(file: Path, metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        raise CheckpointError(file, f"has metadata {key!r} that is no JSON") from None


def _vector(stored: Checkpoint, name: str, size: int) -> Indices:
    """One index vector, checked to name every element once."""
    info = stored.tensors[name]
    if info.dtype.name != "I32" or info.shape != (size,):
        what = f"stores {clip(name)} as {info.dtype} {list(info.shape)}; expected int32 [{size}]"
        raise CheckpointError(stored.path, what, tensor=name)
    index = stored.rows(info, 0, size).numpy().astype(np.int64)
    if size and (index.min() < 0 or index.max() >= size or (np.bincount(index, minlength=size) != 1).any()):
        raise CheckpointError(stored.path, f"stores {clip(name)}, which is no permutation", tensor=name)
    return index


class Permuted(Derived):
    """A model with its neurons in another order. Names, shapes and formats stay.

    It can be planned before the permutations are known: then every axis that a permutation stands on counts as moved.
    Rows can be read after `arrange`. Raises `IncompatibleModels` if the spec does not fit the model.
    """

    def __init__(self, inner: Weights, spec: PermutationSpec, indexed: Indexed | None = None) -> None:
        super().__init__(inner)
        spec.check({name: info.shape for name, info in inner.tensors.items()})
        self.spec, self._indexed = spec, indexed
        self._indices = functools.lru_cache(maxsize=64)(self._find_indices)

    def arrange(self, indexed: Indexed) -> None:
        """Take these permutations."""
        self._indexed = indexed
        self._indices.cache_clear()

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        if not self._is_moved(info):
            return self.inner.rows(info, start, stop, space)
        first, *others = self._indices(info.name)
        return gather(self.inner, info, range(start, stop) if first is None else first[start:stop], others, space)

    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        return None if self._is_moved(info) else self.inner.place(info)

    def temporary(self, info: TensorInfo) -> float:
        first, *others = self.spec.axes[info.name] or (None,)
        copies = min(2, sum(axis is not None for axis in others)) * info.dtype.itemsize
        if first is not None:
            copies += info.dtype.itemsize * self.inner.is_whole(info)
            copies += math.ceil(_SORTING_BYTES * info.rows / max(1, info.elements))
        return self.inner.temporary(info) + copies

    def thread_bytes(self, info: TensorInfo) -> int:
        first, *_ = self.spec.axes[info.name] or (None,)
        pieces = 0 if first is None else 2 * max(_PIECE, _GAP_ROWS * self.row_bytes(info))
        return self.inner.thread_bytes(info) + pieces

    def _is_moved(self, info: TensorInfo) -> bool:
        """Whether rows or columns of a tensor lie elsewhere than in the model, as far as is known."""
        if self._indexed is None:
            return any(axis is not None for axis in self.spec.axes[info.name])
        return any(index is not None for index in self._indices(info.name))

    def _find_indices(self, tensor: str) -> tuple[Indices | None, ...]:
        assert self._indexed is not None, "the permutations are not known yet"
        return self.spec.indices(tensor, self._indexed)


def gather(
    weights: Weights,
    info: TensorInfo,
    rows: Indices | range,
    others: Sequence[Indices | None],
    space: Tensor | None = None,
) -> Tensor:
    """These rows of a tensor, one behind the other, with its other axes rearranged (None: as they are).

    They are put into `space` (uint8, large enough) if it is given.
    """
    size, shape = Weights.row_bytes(info), (len(rows), *info.shape[1:])
    out = torch.empty(size * len(rows), dtype=torch.uint8) if space is None else space[: size * len(rows)]
    if not out.numel():
        return out.view(info.dtype.torch).reshape(shape)
    turns = [(axis, index) for axis, index in enumerate(others, 1) if index is not None]
    stored = torch.empty_like(out) if turns else out
    if isinstance(rows, range):
        read = _bytes(weights.rows(info, rows.start, rows.stop, stored))
        if read.data_ptr() != stored.data_ptr():
            stored.copy_(read)
    else:
        _gather_rows(weights, info, rows, stored.view(-1, size))
    # Numbers are moved as integers of their size, and by `gather`: `index_select` takes three times as long.
    integers = _INTEGERS[info.dtype.itemsize]
    values = stored.view(integers).reshape(shape)
    for axis, index in turns:
        sources = torch.from_numpy(index).view([-1 if each == axis else 1 for each in range(len(shape))])
        target = out.view(integers).reshape(shape) if axis == turns[-1][0] else None
        values = torch.gather(values, axis, sources.expand(shape), out=target)
    return out.view(info.dtype.torch).reshape(shape)


def _gather_rows(weights: Weights, info: TensorInfo, rows: Indices, out: Tensor) -> None:
    """Put the bytes of these rows into `out`, `[rows, bytes of a row]`."""
    size = out.shape[1]
    if weights.is_whole(info):
        torch.index_select(_bytes(weights.rows(info, 0, info.rows)).view(-1, size), 0, torch.from_numpy(rows), out=out)
        return
    place = weights.place(info)
    if place is not None and size >= _WORTH_A_READ:
        _read_rows(weights, info, place, rows, memoryview(out.numpy()).cast("B"))  # type: ignore[arg-type]
        return
    order = np.argsort(rows, kind="stable")
    for places in _reads(rows[order], order, size):
        first, last = int(rows[places[0]]), int(rows[places[-1]]) + 1
        read = _bytes(weights.rows(info, first, last)).view(-1, size)
        out[torch.from_numpy(places)] = read[torch.from_numpy(rows[places] - first)]


def _read_rows(weights: Weights, info: TensorInfo, place: tuple[int, int], rows: Indices, out: memoryview) -> None:
    """Read rows from where they lie, as many at once as lie behind one another."""
    (descriptor, offset), size = place, Weights.row_bytes(info)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate([[0], breaks])
    offsets = (offset + rows[starts] * size).tolist()
    bounds = (np.append(starts, len(rows)) * size).tolist()
    for begin, end, at in zip(bounds, bounds[1:], offsets, strict=False):
        done = begin
        while done < end:
            count = os.preadv(descriptor, [out[done:end]], at + done - begin)
            if count == 0:
                raise weights.ends_inside(info)
            done += count


def _bytes(rows: Tensor) -> Tensor:
    return rows.reshape(-1).view(torch.uint8)


def _reads(ascending: Indices, order: Indices, size: int) -> list[NDArray[np.int64]]:
    """Where rows go, by the reads that get them: rows that lie close to one another are read together, in pieces."""
    gap, most = max(_GAP_ROWS, _GAP // size), max(_GAP_ROWS, _PIECE // size)
    breaks = np.flatnonzero(np.diff(ascending) > gap) + 1
    found = []
    for run, places in zip(np.split(ascending, breaks), np.split(order, breaks), strict=True):
        pieces = (run - run[0]) // most
        found += np.split(places, np.flatnonzero(np.diff(pieces)) + 1)
    return found
