"""Model soups: a weighted average of models (Wortsman et al., 2022).

θ = Σᵢ wᵢ θᵢ / Σᵢ wᵢ
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from merge_core.kernels.plain import ZERO_SUM
from merge_core.method import BaseUse, Block, Known, MergeMethod, PerModel, spread


class Linear(MergeMethod):
    """Average the models with given weights; equal weights are a uniform soup.

    >>> Linear(weight=(3.0, 1.0)).merge(Block.of([[1.0, 2.0], [5.0, 6.0]]), {})
    tensor([2., 3.])
    """

    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "Weighted average (model soup)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    base: ClassVar[BaseUse] = "model"
    workspace: ClassVar[tuple[int, int]] = (1, 3)

    weight: PerModel = Field(description="wᵢ: coefficient of each model")
    normalize: bool = Field(True, description="divide by the sum of the weights")

    @model_validator(mode="after")
    def _weights_have_a_sum(self) -> Self:
        if self.normalize and abs(sum(self.weight)) < ZERO_SUM:
            raise ValueError(
                "the weights sum to zero, which nothing can be divided by; change them, or set normalize: false"
            )
        return self

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        weights = spread(self.weight, len(block.stored))
        return block.linear(weights, sum(weights) if self.normalize else 1.0)
