"""AdaMerging (Yang et al., 2024): task arithmetic whose coefficients were learned, for each model or each tensor.

θ = θ₀ + Σᵢ λᵢ δᵢ        λᵢ: of the tensor, by the entropy of what the merge says of unlabelled data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Given, Known, MergeMethod, PerModel, spread


class AdaMerging(MergeMethod):
    """Apply coefficients that were learned elsewhere, one per tensor and model.

    A file has for each tensor a list of one coefficient; those of a model are all alike where they were learned for
    each model. Tensors that a file does not have take `weight`.

    >>> block = Block.of([[1.0, 2.0], [3.0, 4.0]], base=[0.0, 0.0], coefficients=[[0.5], [0.25]])
    >>> AdaMerging().merge(block, {})
    tensor([1.2500, 2.0000])
    """

    name: ClassVar[str] = "adamerging"
    title: ClassVar[str] = "AdaMerging (given coefficients)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.02575"
    workspace: ClassVar[tuple[int, int]] = (2, 4)
    statistics: ClassVar[Mapping[str, Given]] = {
        "coefficients": Given(
            "λᵢ: for each tensor a list of one coefficient of this model's task vector",
            shape="vector",
            per_model=True,
            partial=True,
        )
    }

    weight: PerModel = Field((0.3,), description="λᵢ where the file has none")

    def merge(self, block: Block, known: Known) -> Tensor:
        merged = block.base
        for model, weight in enumerate(spread(self.weight, len(block.stored))):
            delta = block.models[model] - block.base
            has_own = block.has_numbers("coefficients", model)
            merged = merged + delta * (block.numbers("coefficients", model)[0] if has_own else weight)
        return merged
