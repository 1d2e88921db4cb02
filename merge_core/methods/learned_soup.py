"""Learned soups (Wortsman et al., 2022, appendix): average models with learned shares, in each tensor others.

θ = Σᵢ wᵢ θᵢ        wᵢ: of the tensor, a softmax over the models of what was learned
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from merge_core.method import BaseUse, Block, Given, Known, MergeMethod


class LearnedSoup(MergeMethod):
    """Apply shares that were learned elsewhere, one per tensor and model; they are taken as they are.

    A file has for each tensor a list of one share. Tensors that the files do not have are averaged.

    >>> LearnedSoup().merge(Block.of([[1.0, 2.0], [5.0, 6.0]], coefficients=[[0.75], [0.25]]), {})
    tensor([2., 3.])
    """

    name: ClassVar[str] = "learned_soup"
    title: ClassVar[str] = "Learned soup (given shares)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    base: ClassVar[BaseUse] = "model"
    workspace: ClassVar[tuple[int, int]] = (2, 3)
    statistics: ClassVar[Mapping[str, Given]] = {
        "coefficients": Given(
            "wᵢ: for each tensor a list of one share of this model", shape="vector", per_model=True, partial=True
        )
    }

    def merge(self, block: Block, known: Known) -> Tensor:
        alike = 1.0 / len(block.stored)
        merged = None
        for model in range(len(block.stored)):
            has_own = block.has_numbers("coefficients", model)
            share = block.numbers("coefficients", model)[0] if has_own else alike
            added = block.models[model] * share
            merged = added if merged is None else merged + added
        assert merged is not None  # a block has models
        return merged
