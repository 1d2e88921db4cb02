"""New values, all of them, for whatever the base has: what can be put in a place but not added to what is there.

    δ = new − base's

A BatchNorm's running variance is such a thing: two of them have a mean, but no difference that fits a third. Unlike the
sparse encoding this one says something on any base; strengths that come to 1 together give a mean of the new values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from merge_core import kernels
from merge_core.errors import NonFinite
from merge_core.patches.encoding import DeltaTensor, Difference, Encoding, Parts


class ReplacementTensor(DeltaTensor):
    """The new values, flat, in one part `values`."""

    def check(self) -> None:
        self.expect(values=((self.entry.elements,), (self.entry.dtype,)))
        if self.entry.dtype.kind != "float":
            self.refuse(f"stores {self.entry.dtype}, which nothing can be added to")

    def change(self, base: Tensor, start: int, stop: int) -> Tensor:
        return self.values(start, stop) - base.to(self.working.torch)

    def values(self, start: int, stop: int) -> Tensor:
        """The new values of some rows in the `working` format."""
        return self.read_flat("values", start, stop).to(self.working.torch)


class Replacement(Encoding):
    """Store the new values, and put them in place of whatever is there, changed or not."""

    name: ClassVar[str] = "replacement"
    title: ClassVar[str] = "New values for any base"
    paper: ClassVar[str] = "https://arxiv.org/abs/2302.12480"
    tensor: ClassVar[type[DeltaTensor]] = ReplacementTensor

    def takes(self, difference: Difference) -> bool:
        return difference.is_numeric

    def most_bytes(self, difference: Difference) -> int:
        return difference.info.nbytes

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        for start, _, tuned in difference.tuned_blocks():
            if (found := kernels.first_nonfinite(tuned)) >= 0:
                at = found + start * difference.grains.width
                detail = f"{difference.name} holds NaN or infinity at element {at:,}; only sparse stores it"
                raise NonFinite(difference.name, str(difference.tuned.path), detail)
            parts.write("values", difference.dtype, tuned)
        return {}
