"""Model Stock (Jang et al., 2024): how far to go from the base to the mean, judged by the angle between fine-tunes.

cos φ = mean of the cosines between the δᵢ        t = N cos φ / (1 + (N−1) cos φ)        θ = θ₀ + t · Σᵢ δᵢ / N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from merge_core.kernels.plain import pairs
from merge_core.method import Block, Extent, Known, MergeMethod, Scope, Stage
from merge_core.spherical import row_products, weighted
from merge_core.stages import Gram

SMALLEST = 1e-6
"""What divides a cosine is at least this; a smaller denominator of t divides nothing."""


class ModelStock(MergeMethod):
    """Average the models, drawn back to the base the less they agree; each tensor has its own t, or each row.

    Where t's denominator is zero the base stays as it is. Task vectors are compared in float64; mergekit compares
    them in the dtype of the merge.

    >>> block = Block.of([[1.0, 0.0], [1.0, 1.0]], base=[0.0, 0.0])
    >>> ModelStock().merge(block, {"gram": [[4.0, 2.0], [2.0, 4.0]]})
    tensor([0.6667, 0.3333])
    """

    name: ClassVar[str] = "model_stock"
    title: ClassVar[str] = "Model Stock"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.19522"
    count: ClassVar[tuple[int, int | None]] = (2, None)
    workspace: ClassVar[tuple[int, int]] = (8, 10)

    filter_wise: bool = Field(False, description="a t for each row of the last dimension instead of one per tensor")

    @property
    def is_fused(self) -> bool:
        return not self.filter_wise

    def extent(self, shape: Sequence[int]) -> Extent:
        return "tensor" if self.filter_wise and len(shape) < 2 else "grain"

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return () if self.filter_wise else [Gram()]

    def merge(self, block: Block, known: Known) -> Tensor:
        count = len(block.stored)
        if not self.filter_wise:
            gram = known["gram"]
            share = _share(count, np.array([gram[i][j] for i, j in pairs(count)]))
            return block.combination((float(share) / count,) * count)
        vectors = block.vectors
        share = _share(count, row_products(vectors)) / count
        return weighted(block, torch.from_numpy(share).to(vectors).reshape(*vectors.shape[1:-1], 1))


def _share(count: int, products: NDArray[np.float64]) -> NDArray[np.float64]:
    """t of each row: 0 is the base, 1 the mean of the models; `products` are `[pairs, ...]`."""
    found = dict(zip(pairs(count), products, strict=True))
    sizes = [np.sqrt(found[i, i]) for i in range(count)]
    cosines = [product / np.maximum(sizes[i] * sizes[j], SMALLEST) for (i, j), product in found.items() if i != j]
    cosine = sum(cosines, np.zeros_like(products[0])) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    is_singular = np.abs(denominator) < SMALLEST
    return np.where(is_singular, 0.0, count * cosine / np.where(is_singular, 1.0, denominator))
