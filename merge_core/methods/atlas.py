"""aTLAS (Zhang et al., 2024): add each task vector with a coefficient for every tensor, or random part of it.

θ = θ₀ + Σᵢ cᵢ ⊙ δᵢ        cᵢ: of K coefficients the one of the part, ⌊K u⌋, that an element was drawn into
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Given, Known, MergeMethod, PerModel, spread


class Atlas(MergeMethod):
    """Apply coefficients that were learned elsewhere: one per tensor and model (blockwise), or K per tensor (aTLAS ×K).

    A file has for each tensor a list of K coefficients. With K above 1 each element is in one of K parts, the same one
    for all models, drawn by the recipe's `seed` and the tensor's name: it has to be the seed that they were learned
    with. The authors draw a mask for each shape; ours is one for each tensor. Tensors that a file does not have take
    `weight`; with 0 they stay as in the base, as vectors do where matrices have K coefficients.

    >>> block = Block.of([[1.0, 2.0], [3.0, 4.0]], base=[0.0, 0.0], coefficients=[[0.5], [-1.0]])
    >>> Atlas().merge(block, {})
    tensor([-2.5000, -3.0000])
    """

    name: ClassVar[str] = "atlas"
    title: ClassVar[str] = "aTLAS (given coefficients)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02880"
    workspace: ClassVar[tuple[int, int]] = (3, 8)
    statistics: ClassVar[Mapping[str, Given]] = {
        "coefficients": Given(
            "cᵢ: for each tensor a list of K coefficients of this model's task vector",
            shape="vector",
            per_model=True,
            partial=True,
        )
    }

    weight: PerModel = Field((0.0,), description="coefficient where the file has none; 0 leaves the base as it is")

    def merge(self, block: Block, known: Known) -> Tensor:
        merged, uniform = block.base, None
        for model, weight in enumerate(spread(self.weight, len(block.stored))):
            delta = block.models[model] - block.base
            if not block.has_numbers("coefficients", model):
                merged = merged + delta * weight
                continue
            coefficients = block.numbers("coefficients", model)
            if len(coefficients) == 1:
                merged = merged + delta * coefficients[0]
                continue
            uniform = block.uniform() if uniform is None else uniform
            merged = merged + delta * coefficients[(uniform.double() * len(coefficients)).long()]
        return merged
