"""BitDelta: of each change its sign, and how large they are on average (Liu et al., 2024).

    δ' = α sign(δ)        α = mean |δ|

α is what the paper starts its distillation from; it minimises ‖δ − δ'‖. The sign of 0 is plus, as in the official code.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from merge_core.dtypes import STORED
from merge_core.patches.encoding import DeltaTensor, Difference, Encoding, Parts
from merge_core.statistics import GrainSums, grain_sums

_BYTE = STORED["U8"]


class SignTensor(DeltaTensor):
    """`signs`, a bit per element, the lowest first, 1 for plus; α is the entry's `scale`."""

    def check(self) -> None:
        self.expect(signs=((-(-self.entry.elements // 8),), (_BYTE,)))
        scale = self.entry.settings.get("scale")
        if not isinstance(scale, int | float) or not abs(scale) <= sys.float_info.max:
            self.refuse("has a scale that is no finite number")

    def change(self, base: Tensor, start: int, stop: int) -> Tensor:
        width = self.entry.grains.width
        begin, end = start * width, stop * width
        packed = self.read("signs", begin // 8, -(-end // 8)).numpy()
        plus = np.unpackbits(packed, bitorder="little")[begin % 8 :][: end - begin]
        scale = float(self.entry.settings["scale"])
        values = torch.tensor([-scale, scale], dtype=self.working.torch)
        return self.shaped(values[torch.from_numpy(plus).to(torch.int64)], start, stop)

    @property
    def temporary(self) -> float:
        return 10.0


class Sign(Encoding):
    """Store one bit of each element of a matrix; other numbers are stored as `dense`."""

    name: ClassVar[str] = "sign"
    title: ClassVar[str] = "One bit of each change (BitDelta)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.10193"
    tensor: ClassVar[type[DeltaTensor]] = SignTensor

    def takes(self, difference: Difference) -> bool:
        return difference.is_numeric and len(difference.info.shape) > 1

    def most_bytes(self, difference: Difference) -> int:
        return -(-difference.info.elements // 8)

    def work_bytes(self, difference: Difference) -> int:
        return difference.block_bytes + 10 * difference.block_elements

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        grains, sums, left = difference.grains, GrainSums(), np.empty(0, np.bool_)
        for start, _, delta in difference.changes():
            found = grain_sums(delta.abs().to(torch.float64).unsqueeze(0), grains.size * grains.width)
            for index, value in enumerate(found):
                sums.put(difference.name, grains.count, start // grains.size + index, value)
            marks = np.concatenate([left, (delta >= 0).numpy()])
            whole = len(marks) // 8 * 8
            parts.write("signs", _BYTE, np.packbits(marks[:whole], bitorder="little"))
            left = marks[whole:]
        parts.write("signs", _BYTE, np.packbits(left, bitorder="little"))
        scale = float(sums.total()[0]) / difference.info.elements
        if scale == 0:
            parts.drop("signs")
            return None
        return {"scale": scale}
