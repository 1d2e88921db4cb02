"""WiSE-FT (Wortsman et al., 2022): interpolate between a model and its fine-tune, for robustness.

θ = (1 − α) θ₀ + α θ₁
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Known, MergeMethod


class WiseFT(MergeMethod):
    """Go a part of the way from the base (α = 0) to its fine-tune (α = 1), every weight alike.

    >>> WiseFT(alpha=0.25).merge(Block.of([[4.0, 8.0]], base=[0.0, 4.0]), {})
    tensor([1., 5.])
    """

    name: ClassVar[str] = "wise_ft"
    title: ClassVar[str] = "WiSE-FT"
    paper: ClassVar[str] = "https://arxiv.org/abs/2109.01903"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    workspace: ClassVar[tuple[int, int]] = (2, 4)

    alpha: float = Field(0.5, description="α: 0 is the base, 1 the fine-tune; half way is what the paper advises")

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        return block.linear((1 - self.alpha, self.alpha), with_base=True)
