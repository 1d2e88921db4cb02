"""All numbers of a difference, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.dtypes import OUTPUT
from merge_core.patches.encoding import DeltaTensor, Difference, Encoding, FactorDType, Parts


class DenseTensor(DeltaTensor):
    """δ, flat, in one part `values`."""

    def check(self) -> None:
        self.expect(values=((self.entry.elements,), tuple(OUTPUT.values())))

    def change(self, base: Tensor, start: int, stop: int) -> Tensor:
        return self.read_flat("values", start, stop).to(self.working.torch)


class Dense(Encoding):
    """Store δ whole, rounded once; for small tensors that other encodings leave."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "All numbers of the difference"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.04089"
    tensor: ClassVar[type[DeltaTensor]] = DenseTensor

    dtype: FactorDType = Field("float32", description="number format of the difference")

    def takes(self, difference: Difference) -> bool:
        return difference.is_numeric

    def most_bytes(self, difference: Difference) -> int:
        return difference.info.elements * OUTPUT[self.dtype].itemsize

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        stored = OUTPUT[self.dtype]
        is_changed = False
        for _, _, delta in difference.changes():
            is_changed = is_changed or bool(delta.any())
            parts.write("values", stored, difference.fitted(delta, stored))
        if is_changed:
            return {}
        parts.drop("values")
        return None
