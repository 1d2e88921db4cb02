"""ExPO (Zheng et al., 2024): go on past an aligned model, in the direction it came from.

θ = θ₀ + (1 + α) (θ₁ − θ₀)
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Known, MergeMethod


class ExPO(MergeMethod):
    """Exaggerate what alignment did: the base is the model before it (SFT), the other the one after (DPO, RLHF).

    >>> ExPO(alpha=0.5).merge(Block.of([[3.0, 1.0]], base=[1.0, 1.0]), {})
    tensor([4., 1.])
    """

    name: ClassVar[str] = "expo"
    title: ClassVar[str] = "ExPO extrapolation"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.16792"
    count: ClassVar[tuple[int, int | None]] = (1, 1)

    alpha: float = Field(
        description="α: how far past the model to go; 0 is the model itself, −1 the base", examples=[0.3]
    )

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        return block.combination((1 + self.alpha,))
