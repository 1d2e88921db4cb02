"""Model Stock (Jang et al., 2024): how far to go from the base to the mean, judged by the angle between fine-tunes.

cos φ = mean of the cosines between the δᵢ        t = N cos φ / (1 + (N−1) cos φ)        θ = θ₀ + t · Σᵢ δᵢ / N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from merge_core.kernels.plain import pairs
from merge_core.method import Block, Known, MergeMethod, Scope, Stage
from merge_core.spherical import Matrix, lengths
from merge_core.stages import Gram

SMALLEST = 1e-6
"""What divides a cosine is at least this; a smaller denominator of t divides nothing."""


class ModelStock(MergeMethod):
    """Average the models, drawn back to the base the less they agree; each tensor has its own t.

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

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [Gram()]

    def merge(self, block: Block, known: Known) -> Tensor:
        count = len(block.stored)
        return block.combination((_share(known["gram"]) / count,) * count)


def _share(gram: Matrix) -> float:
    """t: 0 is the base, 1 the mean of the models."""
    count, sizes = len(gram), lengths(gram)
    cosines = [gram[i][j] / max(sizes[i] * sizes[j], SMALLEST) for i, j in pairs(count) if i != j]
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if abs(denominator) >= SMALLEST else 0.0
