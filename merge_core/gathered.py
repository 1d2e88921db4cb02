"""A model whose tensors of the vocabulary have other rows than are stored, gathered while streaming.

A row is one of the model's own or of another's, zeros, the mean of the rows that models have for a token, or, where it
is padding, the mean of the model's other rows.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_core.cards import Card
from merge_core.dtypes import FLOAT32, FLOAT64, DType
from merge_core.headers import Shard, TensorInfo
from merge_core.statistics import Grains
from merge_core.weights import Companions, Weights

ZERO, MEAN, PADDING = -1, -2, -3
"""What an output row may be besides a stored one: see `RowMap.models`."""
_AT_ONCE = 64
"""Rows that are computed together."""


@dataclass
class Gathered(Weights):
    """A model whose tensors of the vocabulary have the output's rows, with the output's `config` and files."""

    inner: Weights
    config: Mapping[str, Any]
    files: Companions
    row_maps: Mapping[str, RowMap] = field(default_factory=dict)
    notes: Sequence[str] = ()
    read: Mapping[str, Path] = field(default_factory=dict)
    planning_bytes: int = 0

    def __post_init__(self) -> None:
        self.path, self.origins = self.inner.path, self.inner.origins
        self.tensors = {
            name: self.row_maps[name].made if name in self.row_maps else info
            for name, info in self.inner.tensors.items()
        }

    @property
    def shards(self) -> Mapping[str, Shard]:  # type: ignore[override]
        return self.inner.shards

    @property
    def companions(self) -> Companions:
        return self.files

    @property
    def cards(self) -> Mapping[str, Card]:
        return self.inner.cards

    @property
    def settings(self) -> Mapping[str, Path]:
        return {**self.inner.settings, **self.read}

    def format(self, info: TensorInfo) -> DType:
        return self.inner.format(self._stored(info))

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        if (row_map := self.row_maps.get(info.name)) is None:
            return self.inner.rows(info, start, stop, space)
        size = self.row_bytes(info) * (stop - start)
        buffer = torch.empty(size, dtype=torch.uint8) if space is None else space[:size]
        row_map.gather(start, stop, buffer)
        return buffer.view(info.dtype.torch).reshape(stop - start, *info.shape[1:])

    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        if (row_map := self.row_maps.get(info.name)) is None:
            return self.inner.place(info)
        first = row_map.first_of_run
        if first is None or (place := self.inner.place(row_map.info)) is None:
            return None
        return place[0], place[1] + first * self.row_bytes(row_map.info)

    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        return self.inner.ranges(self._stored(info))

    def temporary(self, info: TensorInfo) -> float:
        row_map = self.row_maps.get(info.name)
        stored = max(source.temporary(theirs) for source, theirs in self._sources(info))
        return stored if row_map is None or row_map.first_of_run is not None else max(1.0, stored)

    def prepare(self, info: TensorInfo, pool: Executor | None) -> None:
        if (row_map := self.row_maps.get(info.name)) is None:
            return self.inner.prepare(info, pool)
        for source, theirs in row_map.sources.values():
            source.prepare(theirs, pool)
        return row_map.prepare()

    def thread_bytes(self, info: TensorInfo) -> int:
        means = 3 * 8 * _AT_ONCE * math.prod(info.shape[1:]) if info.name in self.row_maps else 0
        return means + sum(source.thread_bytes(theirs) for source, theirs in self._sources(info))

    def always_read(self) -> Iterable[str]:
        return self.inner.always_read()

    def is_whole(self, info: TensorInfo) -> bool:
        return any(source.is_whole(theirs) for source, theirs in self._sources(info))

    def _stored(self, info: TensorInfo) -> TensorInfo:
        return self.inner.tensors[info.name]

    def _sources(self, info: TensorInfo) -> Iterable[tuple[Weights, TensorInfo]]:
        row_map = self.row_maps.get(info.name)
        return [(self.inner, info)] if row_map is None else row_map.sources.values()

    def descriptor(self, file: str) -> int:
        return self.inner.descriptor(file)

    def close(self) -> None:
        self.inner.close()


@dataclass
class RowMap:
    """Where each output row of one model's tensor comes from: `models` (an index into `sources`, or what it is
    instead of a stored row) and `rows`.
    """

    own: int
    models: NDArray[np.int16]
    rows: NDArray[np.int32]
    having: NDArray[np.int32]
    sources: Mapping[int, tuple[Weights, TensorInfo]]

    def __post_init__(self) -> None:
        self._computing = threading.Lock()
        self._padding: Tensor | None = None
        first = int(self.rows[0]) if self.size else 0
        is_run = bool((self.models == self.own).all() and (self.rows == np.arange(first, first + self.size)).all())
        self.first_of_run = first if is_run else None
        self.made = replace(self.info, shape=(self.size, *self.info.shape[1:]), dtype=self._dtype())

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def info(self) -> TensorInfo:
        """The model's own tensor as it is stored."""
        return self.sources[self.own][1]

    def _dtype(self) -> DType:
        """As the model stores the tensor, unless means or rows in another format would have to be rounded to that."""
        used = {self.own, *np.unique(self.models).tolist()}
        stored = {info.dtype for model, (_, info) in self.sources.items() if model in used}
        if self.info.dtype.kind != "float" or (len(stored) == 1 and used.isdisjoint((MEAN, PADDING))):
            return self.info.dtype
        return FLOAT64 if FLOAT64 in stored else FLOAT32

    def prepare(self) -> None:
        """Compute the one row that costs a pass over all."""
        if (self.models == PADDING).any():
            self._mean_row()

    def gather(self, start: int, stop: int, buffer: Tensor) -> None:
        """Put rows `start` to `stop` into `buffer` (uint8), read by runs."""
        size = Weights.row_bytes(self.made)
        models, rows = self.models[start:stop], self.rows[start:stop]
        breaks = np.flatnonzero((models[1:] != models[:-1]) | (models[1:] >= 0) & (rows[1:] != rows[:-1] + 1)) + 1
        for first, last in itertools.pairwise([0, *breaks.tolist(), stop - start]):
            space, model = buffer[first * size : last * size], int(models[first])
            if model >= 0:
                self._read(model, int(rows[first]), last - first, space)
            elif model == MEAN:
                for begin in range(first, last, _AT_ONCE):
                    end = min(begin + _AT_ONCE, last)
                    self._put(self._mean_of_models(start + begin, start + end), buffer[begin * size : end * size])
            elif model == PADDING:
                for i in range(first, last):
                    self._put(self._mean_row(), buffer[i * size : (i + 1) * size])
            else:
                space.zero_()

    def _read(self, model: int, row: int, count: int, space: Tensor) -> None:
        source, info = self.sources[model]
        if info.dtype is self.made.dtype:
            source.rows(info, row, row + count, space)
            return
        size = Weights.row_bytes(self.made)
        for begin in range(0, count, _AT_ONCE):
            end = min(begin + _AT_ONCE, count)
            self._put(source.rows(info, row + begin, row + end), space[begin * size : end * size])

    def _put(self, rows: Tensor, space: Tensor) -> None:
        space.view(self.made.dtype.torch).copy_(rows.reshape(-1))

    def _mean_of_models(self, start: int, stop: int) -> Tensor:
        """The mean of some tokens' rows over the models that have them, in float64."""
        total = torch.zeros(stop - start, math.prod(self.info.shape[1:]), dtype=torch.float64)
        having = self.having[:, start:stop]
        for model, rows in enumerate(having):
            for first, last in _runs(np.flatnonzero(rows >= 0)):
                breaks = np.flatnonzero(rows[first + 1 : last] != rows[first : last - 1] + 1) + first + 1
                for begin, end in itertools.pairwise([first, *breaks.tolist(), last]):
                    source, info = self.sources[model]
                    found = source.rows(info, int(rows[begin]), int(rows[begin]) + end - begin)
                    total[begin:end] += found.to(torch.float64).reshape(end - begin, -1)
        return total / torch.from_numpy((having >= 0).sum(0)).unsqueeze(1)

    def _mean_row(self) -> Tensor:
        """The mean of all rows that are not padding, in float64, summed in an order that nothing else changes."""
        with self._computing:
            if self._padding is None:
                width, grain = math.prod(self.info.shape[1:]), Grains.of(self.info.shape).size
                total = torch.zeros(width, dtype=torch.float64)
                for start in range(0, self.size, grain):
                    total += _folded(self._in_float64(start, min(start + grain, self.size), width))
                self._padding = total / max(1, int((self.models != PADDING).sum()))
            return self._padding

    def _in_float64(self, start: int, stop: int, width: int) -> Tensor:
        """Rows without rounding, those of padding as zeros."""
        models, size = self.models[start:stop], Weights.row_bytes(self.made)
        buffer = torch.zeros((stop - start) * size, dtype=torch.uint8)
        for first, last in _runs(np.flatnonzero(models >= 0)):
            self.gather(start + first, start + last, buffer[first * size : last * size])
        rows = buffer.view(self.made.dtype.torch).reshape(-1, width).to(torch.float64)
        for first, last in _runs(np.flatnonzero(models == MEAN)):
            rows[first:last] = self._mean_of_models(start + first, start + last)
        return rows


def _runs(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers, as first and end."""
    if not len(numbers):
        return
    breaks = np.flatnonzero(numbers[1:] != numbers[:-1] + 1) + 1
    for first, last in itertools.pairwise([0, *breaks.tolist(), len(numbers)]):
        yield int(numbers[first]), int(numbers[last - 1]) + 1


def _folded(rows: Tensor) -> Tensor:
    """The sum of rows, by halves."""
    while len(rows) > 1:
        half = len(rows) // 2
        rows = torch.cat([rows[:half] + rows[half : 2 * half], rows[2 * half :]])
    return rows[0]
