"""The new values of what changed, and where: lossless, bit for bit.

Training in bfloat16 by reinforcement leaves 70 % of the weights and more as they were (https://arxiv.org/abs/2505.11711).
Of each tensor the smallest is stored: the changed values behind a bitmap (a bit per element) or behind an index
(32 bits per changed element), or all values, where nearly all changed. A tensor that did not change is not there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_core.dtypes import STORED, DType
from merge_core.patches.encoding import Bits, DeltaTensor, Difference, Encoding, Parts, bits

_BYTE = STORED["U8"]
_RUN = 2**17
"""Numbers of an index, or bits of a bitmap, that are looked through at once."""
_RUN_BYTES = 48
"""Bytes of memory for each of them."""


def _index_format(elements: int) -> DType:
    return STORED["U32"] if elements <= 2**32 else STORED["I64"]


class SparseTensor(DeltaTensor):
    """`values`, the new ones in order, and `bitmap` (the lowest bit first) or `index`; neither where all are there."""

    replaces: ClassVar[bool] = True

    def check(self) -> None:
        elements, own = self.entry.elements, (self.entry.dtype,)
        count = self.entry.parts["values"].elements if "values" in self.entry.parts else 0
        if "bitmap" in self.entry.parts:
            self.expect(values=((count,), own), bitmap=((-(-elements // 8),), (_BYTE,)))
        elif "index" in self.entry.parts:
            self.expect(values=((count,), own), index=((count,), (_index_format(elements),)))
        else:
            self.expect(values=((elements,), own))
        if count > elements or (count == 0 and not self._is_all):
            self.refuse(f"stores {count:,} values of {elements:,}")
        if not self._is_all and not self.entry.is_same_kind:
            self.refuse("stores some values only, but the base's tensor is another in shape or format")
        self._finding = threading.Lock()

    @property
    def _is_all(self) -> bool:
        return set(self.entry.parts) == {"values"}

    def prepare(self) -> None:
        if not self._is_all:
            with self._finding:
                _ = self._before

    @property
    def thread_bytes(self) -> int:
        return 16 * min(self.entry.grains.size, self.entry.grains.rows) * self.entry.grains.width

    @cached_property
    def _before(self) -> NDArray[np.int64]:
        """How many values come before each grain, and how many there are."""
        grain = self.entry.grains.size * self.entry.grains.width
        before = np.zeros(self.entry.grains.count + 1, np.int64)
        for positions in self._bitmap_positions() if "bitmap" in self.entry.parts else self._index_positions():
            if len(positions):
                first = 1 + positions[0] // grain
                counts = np.bincount(positions // grain - (first - 1))
                before[first : first + len(counts)] += counts
        count = self.entry.parts["values"].elements
        before = np.cumsum(before)
        if before[-1] != count:
            self.refuse(f"marks {before[-1]:,} changed elements, but stores {count:,} values")
        return before

    def _bitmap_positions(self) -> Iterator[NDArray[np.int64]]:
        count = self.entry.parts["bitmap"].elements
        for start in range(0, count, _RUN // 8):
            packed = self.read("bitmap", start, min(start + _RUN // 8, count)).numpy()
            positions = np.flatnonzero(np.unpackbits(packed, bitorder="little")) + 8 * start
            if len(positions) and positions[-1] >= self.entry.elements:
                self.refuse(f"marks element {positions[-1]:,}, but the tensor has {self.entry.elements:,}")
            yield positions

    def _index_positions(self) -> Iterator[NDArray[np.int64]]:
        count, last = self.entry.parts["index"].elements, -1
        for start in range(0, count, _RUN):
            positions = self._index(start, min(start + _RUN, count))
            if positions[0] <= last or (np.diff(positions) <= 0).any():
                self.refuse("has an index that does not rise from each number to the next")
            last = int(positions[-1])
            if last >= self.entry.elements:
                self.refuse(f"has an index of {last:,}, but the tensor has {self.entry.elements:,} elements")
            yield positions

    def _index(self, start: int, stop: int) -> NDArray[np.int64]:
        return bits(self.read("index", start, stop)).astype(np.int64)

    def _changed(self, begin: int, end: int) -> tuple[NDArray[np.int64], Bits]:
        """Which of the elements `begin` to `end` changed, from `begin` on, and their new values."""
        self.prepare()
        grain = self.entry.grains.size * self.entry.grains.width
        first, last = begin // grain, -(-end // grain)
        if "bitmap" in self.entry.parts:
            from_bit = first * grain
            byte = from_bit // 8
            packed = self.read("bitmap", byte, -(-end // 8)).numpy()
            marks = np.unpackbits(packed, bitorder="little")[from_bit - 8 * byte : end - 8 * byte]
            at = int(self._before[first]) + int(np.count_nonzero(marks[: begin - from_bit]))
            positions = np.flatnonzero(marks[begin - from_bit :])
        else:
            low, high = int(self._before[first]), int(self._before[last])
            index = self._index(low, high)
            inside = slice(*np.searchsorted(index, [begin, end]))
            at, positions = low + inside.start, index[inside] - begin
        return positions, bits(self.read("values", at, at + len(positions)))

    def replaced(self, base: Tensor | None, start: int, stop: int) -> Tensor:
        width = self.entry.grains.width
        if self._is_all:
            return self.read_flat("values", start, stop)
        assert base is not None
        rows = base.clone(memory_format=torch.contiguous_format)
        positions, values = self._changed(start * width, stop * width)
        bits(rows)[positions] = values
        return self.shaped(rows, start, stop)

    def change(self, base: Tensor, start: int, stop: int) -> Tensor:
        working = self.working.torch
        return self.replaced(base, start, stop).to(working) - base.to(working)


class Sparse(Encoding):
    """Store the new value of every element whose bits changed. Base and delta give the very bits of the tuned model.

    NaN, infinities and the sign of zero are bits like any other; integer buffers are stored too, and a tensor in
    another shape or number format than the base's, or that the base lacks, is stored whole.
    """

    name: ClassVar[str] = "sparse"
    title: ClassVar[str] = "New values of what changed (lossless)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.11711"
    tensor: ClassVar[type[DeltaTensor]] = SparseTensor

    def takes(self, difference: Difference) -> bool:
        return True

    def most_bytes(self, difference: Difference) -> int:
        return difference.info.nbytes

    def work_bytes(self, difference: Difference) -> int:
        return difference.block_bytes + 10 * difference.block_elements + _RUN_BYTES * _RUN

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        if not difference.is_same_kind:
            self._write_all(difference, parts)
            return {}
        left = np.empty(0, np.bool_)
        for _, _, base, tuned in difference.blocks():
            old, new = bits(base), bits(tuned)
            marks = old != new
            parts.write("values", difference.dtype, new[marks])
            marks = np.concatenate([left, marks])
            whole = len(marks) // 8 * 8
            parts.write("bitmap", _BYTE, np.packbits(marks[:whole], bitorder="little"))
            left = marks[whole:]
        parts.write("bitmap", _BYTE, np.packbits(left, bitorder="little"))
        count, elements, itemsize = parts.count("values"), difference.info.elements, difference.dtype.itemsize
        if count == 0:
            parts.drop("values")
            parts.drop("bitmap")
            return None
        bitmap, index = -(-elements // 8), count * _index_format(elements).itemsize
        if elements * itemsize <= count * itemsize + min(bitmap, index):
            parts.drop("values")
            parts.drop("bitmap")
            self._write_all(difference, parts)
        elif index < bitmap:
            self._write_index(parts, elements)
        return {}

    @staticmethod
    def _write_all(difference: Difference, parts: Parts) -> None:
        parts.write("values", difference.dtype, np.empty(0, np.uint8))
        for _, _, tuned in difference.tuned_blocks():
            parts.write("values", difference.dtype, tuned)

    @staticmethod
    def _write_index(parts: Parts, elements: int) -> None:
        """The bitmap as an index."""
        stored = _index_format(elements)
        for start in range(0, parts.count("bitmap"), _RUN // 8):
            marks = np.unpackbits(parts.read("bitmap", start, _RUN // 8), bitorder="little")
            positions = np.flatnonzero(marks) + 8 * start
            parts.write("index", stored, positions.astype(f"u{stored.itemsize}"))
        parts.drop("bitmap")
