"""Differences rounded to a few levels: n of them between a tensor's smallest and largest change, in the fewest bits.

    linear: level i = least + i · (most − least) / (n − 1)         code = round((δ − least) / (most − least) · (n − 1))
    log:    level i of each sign = least · (most / least)^(i / (m − 1)), m = (n − 1) // 2, and one level for zero

Linear is the quantisation of robust weight signatures; n counts levels, not bits. Log is as fine for small changes as
for large ones, in proportion; the papers' code has no level for zero there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from merge_core.dtypes import FLOAT32, STORED
from merge_core.patches.encoding import DeltaTensor, Difference, Encoding, Parts

MOST_LEVELS = 2**16
_UINT8 = STORED["U8"]
_GROUP = 8
"""Codes that fill whole bytes, however many bits one has."""
_WHOLE = (8, 16)
"""Bits of codes that are whole bytes themselves."""
_SMALLEST = float(np.finfo(np.float32).tiny)
_ENCODING_BYTES = 64
"""Bytes of memory per element while changes become codes, and codes bits."""
Codes = NDArray[np.int64]
Table = NDArray[np.float32]


class LevelsTensor(DeltaTensor):
    """One tensor of codes, bit after bit without gaps, the lowest bit of a code and of a byte first.

    Parts: `codes` (uint8) and `range`, the least and the largest change, or of log the `table` of its levels.
    """

    def check(self) -> None:
        count, scale = self.entry.settings.get("levels"), self.entry.settings.get("scale")
        if type(count) is not int or not 2 <= count <= MOST_LEVELS or scale not in ("linear", "log"):
            self.refuse(f"needs 2 to {MOST_LEVELS:,} levels and a scale, linear or log")
        self._count, self._bits = count, code_bits(count)
        codes = (-(-self.entry.elements * self._bits // 8),)
        if scale == "linear":
            self.expect(codes=(codes, [_UINT8]), range=((2,), [FLOAT32]))
        else:
            self.expect(codes=(codes, [_UINT8]), table=((count,), [FLOAT32]))

    def prepare(self) -> None:
        _ = self._table

    def change(self, base: Tensor, start: int, stop: int) -> Tensor:
        width = self.entry.grains.width
        first, count = start * width, (stop - start) * width
        begin = first * self._bits // 8
        packed = self.read("codes", begin, -(-(first + count) * self._bits // 8)).numpy()
        codes = unpack(packed, self._bits, first * self._bits % 8, count)
        if codes.size and int(codes.max()) >= self._count:
            self.refuse(f"has code {int(codes.max())}, but only {self._count} levels")
        return self.shaped(self._table[torch.from_numpy(codes)].to(self.working.torch), start, stop)

    @property
    def temporary(self) -> float:
        return 16 if self._bits in _WHOLE else 48

    @property
    def thread_bytes(self) -> int:
        return 16 * self._count

    @cached_property
    def _table(self) -> Tensor:
        """Code → change."""
        part = "table" if "table" in self.entry.parts else "range"
        stored = self.read(part, 0, self.entry.parts[part].rows)
        if not bool(torch.isfinite(stored).all()):
            self.refuse(f"has a {part} with NaN or infinity")
        if part == "table":
            return stored
        least, most = stored.tolist()
        if least > most:
            self.refuse(f"has a range from {least} down to {most}")
        return torch.from_numpy(linear_table(least, most, self._count))


class Levels(Encoding):
    """So many levels between the smallest and the largest change of each tensor; a constant change is exact."""

    name: ClassVar[str] = "levels"
    title: ClassVar[str] = "Levels (robust weight signatures)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2302.12480"
    tensor: ClassVar[type[DeltaTensor]] = LevelsTensor

    levels: int = Field(256, ge=2, le=MOST_LEVELS, description="how many; 256 take a byte, 16 half of one")
    scale: Literal["linear", "log"] = Field("linear", description="how they lie between the smallest and the largest")

    @model_validator(mode="after")
    def _has_signs(self) -> Levels:
        if self.scale == "log" and self.levels < 3:
            raise ValueError("log takes 3 levels at least: one for zero and one for each sign")
        return self

    def takes(self, difference: Difference) -> bool:
        return difference.is_numeric

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        least, most = self._extremes(difference)
        if least == most == 0:
            return None
        if self.scale == "linear":
            table = linear_table(least, most, self.levels)
            parts.write("range", FLOAT32, np.array([least, most], np.float32))
        else:
            table = log_table(least, most, self.levels)
            parts.write("table", FLOAT32, table)
        bits, left = code_bits(self.levels), np.empty(0, np.int64)
        for _, _, delta in difference.changes():
            codes = np.concatenate([left, self._codes(delta.numpy().astype(np.float64), table)])
            whole = codes.size // _GROUP * _GROUP
            parts.write("codes", _UINT8, pack(codes[:whole], bits))
            left = codes[whole:]
        parts.write("codes", _UINT8, pack(left, bits))
        return {"levels": self.levels, "scale": self.scale}

    def most_bytes(self, difference: Difference) -> int:
        table = 4 * self.levels if self.scale == "log" else 8
        return -(-difference.info.elements * code_bits(self.levels) // 8) + table

    def work_bytes(self, difference: Difference) -> int:
        rows = min(difference.block_rows, max(1, difference.grains.rows))
        return difference.block_bytes + rows * max(1, difference.grains.width) * _ENCODING_BYTES

    def _extremes(self, difference: Difference) -> tuple[float, float]:
        """The least and the largest change; of log the magnitudes, zeros left out. In float32."""
        least, most = math.inf, -math.inf
        for _, _, delta in difference.changes():
            found = delta.abs()[delta != 0] if self.scale == "log" else delta
            if found.numel():
                least, most = min(least, float(found.min())), max(most, float(found.max()))
        if least > most:
            return 0.0, 0.0
        least, most = float(np.float32(least)), float(np.float32(most))
        # One magnitude below all that float32 has must not take the proportions from the others.
        return (_SMALLEST if self.scale == "log" and least == 0 < most else least), most

    def _codes(self, delta: NDArray[np.float64], table: Table) -> Codes:
        if self.scale == "linear":
            least, most = float(table[0]), float(table[-1])
            if least == most:
                return np.zeros(delta.size, np.int64)
            places = (delta - least) / (most - least) * (self.levels - 1)
            return np.clip(np.rint(places), 0, self.levels - 1).astype(np.int64)
        size = (self.levels - 1) // 2
        magnitudes = table[1 : 1 + size].astype(np.float64)
        between = np.sqrt(magnitudes[:-1] * magnitudes[1:])
        codes = 1 + np.searchsorted(between, np.abs(delta)) + np.where(delta < 0, size, 0)
        return np.where(delta == 0, 0, codes)


def linear_table(least: float, most: float, count: int) -> Table:
    """Levels at equal distances, the first and the last exactly as given.

    >>> linear_table(-1.0, 2.0, 4)
    array([-1.,  0.,  1.,  2.], dtype=float32)
    """
    levels = least + (most - least) * (np.arange(count) / (count - 1))
    levels[-1] = most
    return levels.astype(np.float32)


def log_table(least: float, most: float, count: int) -> Table:
    """Zero, then magnitudes in equal proportions from `least` to `most`, then their negatives; 0 fills an even table.

    >>> log_table(1.0, 4.0, 7)
    array([ 0.,  1.,  2.,  4., -1., -2., -4.], dtype=float32)
    """
    size = (count - 1) // 2
    levels = np.zeros(count)
    if least > 0:
        proportion = math.log(most / least)
        magnitudes = [least * math.exp(proportion * i / max(1, size - 1)) for i in range(size)]
        magnitudes[-1] = most
        levels[1 : 1 + size], levels[1 + size : 1 + 2 * size] = magnitudes, np.negative(magnitudes)
    return levels.astype(np.float32)


def code_bits(count: int) -> int:
    """The fewest bits that tell so many levels apart."""
    return (count - 1).bit_length()


def pack(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """Codes of so many bits, one after the other, the lowest bit first; the last byte is filled with zeros.

    >>> pack(np.array([1, 2, 3]), 4).tolist()
    [33, 3]
    """
    if bits in _WHOLE:
        return codes.astype(f"<u{bits // 8}").view(np.uint8)
    digits = np.empty((codes.size, bits), np.uint8)
    for place in range(bits):
        digits[:, place] = codes >> place & 1
    return np.packbits(digits.reshape(-1), bitorder="little")


def unpack(packed: NDArray[np.uint8], bits: int, skipped: int, count: int) -> Codes:
    """So many codes again, without the first `skipped` bits.

    >>> unpack(np.array([33, 3], np.uint8), 4, 4, 2).tolist()
    [2, 3]
    """
    if bits in _WHOLE:
        return packed.view(f"<u{bits // 8}").astype(np.int64)
    digits = np.unpackbits(packed, bitorder="little")[skipped : skipped + count * bits].reshape(count, bits)
    codes = np.zeros(count, np.int64)
    for place in range(bits):
        codes |= digits[:, place].astype(np.int64) << place
    return codes
