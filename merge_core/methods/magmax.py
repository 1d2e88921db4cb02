"""MagMax (Marczak et al., 2024): of each parameter's changes the largest.

j = argmaxᵢ |δᵢ|        θ = θ₀ + λ δⱼ, element by element
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.method import Block, Known, MergeMethod


class MagMax(MergeMethod):
    """Take each entry from the model that changed it most; of equal changes the first model's.

    >>> block = Block.of([[3.0, 1.0, -1.0], [-2.0, -4.0, 1.0]], base=[0.0, 0.0, 0.0])
    >>> MagMax(**{"lambda": 0.5}).merge(block, {})
    tensor([ 1.5000, -2.0000, -0.5000])
    """

    name: ClassVar[str] = "magmax"
    title: ClassVar[str] = "MagMax: the largest change of each parameter"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.06322"
    workspace: ClassVar[tuple[int, int]] = (4, 6)

    lambda_: float = Field(0.5, alias="lambda", description="λ: scale of the merged task vector")

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        return kernels.combine(block.task_vectors, average="max", scale=self.lambda_)
