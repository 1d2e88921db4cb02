"""Task arithmetic (Ilharco et al., 2023): add scaled task vectors to the base.

δᵢ = θᵢ − θ₀        θ = θ₀ + λ Σᵢ wᵢ δᵢ
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.method import Block, Known, MergeMethod, PerModel


class TaskArithmetic(MergeMethod):
    """Add what each model learned; a negative weight takes it away (negation).

    Weights 1, −1, 1 are the analogy "a is to b as c is to the result": θ₀ + δ_a − δ_b + δ_c.

    >>> block = Block.of([[3.0, 1.0], [1.0, 2.0]], base=[1.0, 1.0])
    >>> TaskArithmetic(weight=(0.5, -1.0)).merge(block, {})
    tensor([2., 0.])
    """

    name: ClassVar[str] = "task_arithmetic"
    title: ClassVar[str] = "Task arithmetic"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.04089"

    weight: PerModel = Field(description="wᵢ: coefficient of each task vector")
    normalize: bool = Field(False, description="divide by the sum of the weights")
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the summed task vectors")
    density: PerModel = Field((1.0,), description="read for mergekit's sake; has no effect here")
    rescale: bool = Field(False, description="read for mergekit's sake; has no effect here")
    int8_mask: bool = Field(False, description="read for mergekit's sake; has no effect")

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        return kernels.combine(
            block.task_vectors.times(self.weight),
            average="weight" if self.normalize else "sum",
            weights=self.weight,
            scale=self.lambda_,
        )
