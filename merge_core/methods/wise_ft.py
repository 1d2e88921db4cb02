"""WiSE-FT (Wortsman et al., 2022): interpolate between a model and its fine-tune, for robustness.

θ = (1 − α) θ₀ + α θ₁        by Fisher: θ = Σᵢ cᵢ fᵢ ⊙ θᵢ / Σᵢ cᵢ fᵢ, c = (1 − α, α), f = max(F, floor)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Given, Known, MergeMethod


class WiseFT(MergeMethod):
    """Go a part of the way from the base (α = 0) to its fine-tune (α = 1), every weight alike, or each more towards the
    model for which it matters more.

    >>> WiseFT(alpha=0.25).merge(Block.of([[4.0, 8.0]], base=[0.0, 4.0]), {})
    tensor([1., 5.])
    >>> block = Block.of([[4.0, 8.0]], base=[0.0, 4.0], base_fisher=[[1.0, 1.0]], fisher=[[1.0, 3.0]])
    >>> WiseFT(by_fisher=True).merge(block, {})
    tensor([2., 7.])
    """

    name: ClassVar[str] = "wise_ft"
    title: ClassVar[str] = "WiSE-FT"
    paper: ClassVar[str] = "https://arxiv.org/abs/2109.01903"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    workspace: ClassVar[tuple[int, int]] = (2, 8)
    statistics: ClassVar[Mapping[str, Given]] = {
        "base_fisher": Given("F₀: Fisher information of the base's weights", required=False, partial=True),
        "fisher": Given("F₁: Fisher information of the fine-tune's weights", required=False, partial=True),
    }

    alpha: float = Field(0.5, description="α: 0 is the base, 1 the fine-tune; half way is what the paper advises")

    by_fisher: bool = Field(
        False,
        description="weigh every element by the given Fisher information; tensors that a file lacks are interpolated "
        "plainly",
        examples=[True],
    )
    fisher_floor: float = Field(1e-6, gt=0, description="the least Fisher information that counts")

    def needs(self, statistic: str, model: int) -> bool:
        return self.by_fisher

    @property
    def is_fused(self) -> bool:
        return not self.by_fisher

    def merge(self, block: Block, known: Known) -> Tensor:
        if self.by_fisher and all(map(block.has_numbers, self.statistics)):
            base = block.numbers("base_fisher").clamp(min=self.fisher_floor) * (1 - self.alpha)
            tuned = block.numbers("fisher").clamp(min=self.fisher_floor) * self.alpha
            return (block.base * base + block.models[0] * tuned) / (base + tuned)
        return block.linear((1 - self.alpha, self.alpha), with_base=True)
