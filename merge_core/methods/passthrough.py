"""Passthrough: one model's tensors as they are, for stacking layers ("frankenmerges").

θ = s · θ₁
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import BaseUse, Block, Known, MergeMethod, PerModel, spread


class Passthrough(MergeMethod):
    """Copy one model, bit for bit where no scale is given.

    >>> Passthrough(scale=(0.5,)).merge(Block.of([[2.0, 4.0]]), {})
    tensor([1., 2.])
    """

    name: ClassVar[str] = "passthrough"
    title: ClassVar[str] = "Copy (layer stacking)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.15166"
    base: ClassVar[BaseUse] = "model"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    copies: ClassVar[bool] = True
    workspace: ClassVar[tuple[int, int]] = (1, 1)

    scale: PerModel = Field((1.0,), description="s: factor on the copied weights")

    @property
    def is_copy(self) -> bool:
        return self.scale == (1.0,)

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        return block.linear(spread(self.scale, 1))
