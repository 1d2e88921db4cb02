"""Expert Merging (Zhang et al., 2025): add each task vector with coefficients learned for every tensor or chunk of it.

θ = θ₀ + Σᵢ cᵢ ⊙ δᵢ        cᵢ: the j-th of K coefficients on the j-th run of ⌈n / K⌉ of a tensor's n elements
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Given, Known, MergeMethod, PerModel, spread


class ExpertMerging(MergeMethod):
    """Apply coefficients that were learned elsewhere: one per tensor and model, or one per chunk of a tensor.

    A file has for each tensor a list of K coefficients, as they multiply (after the sigmoid, where they were learned
    through one). Chunks are runs of ⌈n / K⌉ elements in row-major order, the last one shorter, so that not all K may be
    used. Tensors that a file does not have take `weight`; with 0 they stay as in the base, as the authors leave
    embeddings, norms, biases and the head.

    >>> block = Block.of([[[1.0, 1.0], [1.0, 1.0]]], base=[[0.0, 0.0], [0.0, 0.0]], coefficients=[[0.25, 0.5, 0.75]])
    >>> ExpertMerging().merge(block, {})
    tensor([[0.2500, 0.2500],
            [0.5000, 0.5000]])
    """

    name: ClassVar[str] = "expert_merging"
    title: ClassVar[str] = "Expert Merging (given coefficients)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.25712"
    workspace: ClassVar[tuple[int, int]] = (3, 6)
    statistics: ClassVar[Mapping[str, Given]] = {
        "coefficients": Given(
            "cᵢ: for each tensor a list of coefficients of this model's task vector",
            shape="vector",
            per_model=True,
            partial=True,
        )
    }

    weight: PerModel = Field((0.0,), description="coefficient where the file has none; 0 leaves the base as it is")

    def merge(self, block: Block, known: Known) -> Tensor:
        merged = block.base
        for model, weight in enumerate(spread(self.weight, len(block.stored))):
            delta = block.models[model] - block.base
            has_own = block.has_numbers("coefficients", model)
            merged = merged + delta * (self._by_chunk(block, model) if has_own else weight)
        return merged

    @staticmethod
    def _by_chunk(block: Block, model: int) -> Tensor:
        """The coefficient of each element's chunk."""
        coefficients = block.numbers("coefficients", model)
        size = -(-block.grains.rows * block.grains.width // len(coefficients))
        elements = torch.arange(block.start, block.start + block.elements, device=coefficients.device)
        return coefficients[elements // size].reshape(block.stored[model].shape)
