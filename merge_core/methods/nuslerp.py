"""NuSLERP: spherical interpolation of two models, or of what they learned (mergekit's formulation of Shoemake, 1985).

t = w₂ / (w₁ + w₂)        x = sin((1−t)Ω)/sin Ω · x₁ + sin(tΩ)/sin Ω · x₂        θ = x, or θ₀ + x

where xᵢ is θᵢ, or δᵢ = θᵢ − θ₀ where there is a base, and Ω the angle between x₁ and x₂.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from merge_core.method import BaseUse, Block, Extent, Known, MergeMethod, PerModel, Scope, Stage
from merge_core.spherical import SAME_DIRECTION, ColumnProducts, row_products, weighted
from merge_core.stages import Gram

SHORTEST = 1e-7
"""Vectors shorter than this are measured as if they were so long, so that their angle tends to 90°."""
SMALLEST_SUM = 1e-6


class NuSlerp(MergeMethod):
    """Turn from the first model towards the second by its share of the weights.

    Weights that sum to zero mean half way. Vectors of one direction, or of opposite ones, are interpolated linearly,
    as soon as float32 cannot tell their cosine from ±1; between vectors that are nearly opposite the result is large
    and depends on the last bits. Sines are those of numpy, so that the last bit of a coefficient may differ between
    machines.

    >>> block = Block.of([[1.0, 0.0], [0.0, 1.0]])
    >>> NuSlerp(weight=(1.0, 1.0)).merge(block, {"gram": [[1.0, 0.0], [0.0, 1.0]]})
    tensor([0.7071, 0.7071])
    """

    name: ClassVar[str] = "nuslerp"
    title: ClassVar[str] = "Spherical interpolation of models or task vectors"
    paper: ClassVar[str] = "https://doi.org/10.1145/325334.325242"
    base: ClassVar[BaseUse] = "optional"
    count: ClassVar[tuple[int, int | None]] = (2, 2)
    workspace: ClassVar[tuple[int, int]] = (8, 10)

    weight: PerModel = Field(description="wᵢ: how far to go towards each model, relative to their sum")
    nuslerp_flatten: bool = Field(
        True, description="take each tensor as one vector; else each row of its last dimension"
    )
    nuslerp_row_wise: bool = Field(
        False, description="where tensors are not flattened: take vectors along the first dimension, not the last"
    )

    @property
    def is_fused(self) -> bool:
        return self.nuslerp_flatten

    def extent(self, shape: Sequence[int]) -> Extent:
        return "tensor" if self._by_rows and len(shape) < 2 else "grain"

    def stages(self, scope: Scope) -> Sequence[Stage]:
        if self.nuslerp_flatten:
            return [Gram()]
        return () if self._by_rows else [ColumnProducts()]

    def merge(self, block: Block, known: Known) -> Tensor:
        if self.nuslerp_flatten:
            (first, cross), (_, second) = known["gram"]
            one, other = self._coefficients(np.array([first, cross, second])).tolist()
            return block.combination((one, other))
        vectors = block.vectors
        shape = vectors.shape[1:]
        if self._by_rows:
            coefficients = self._coefficients(row_products(vectors)).reshape(2, *shape[:-1], *[1] * bool(shape))
        else:
            coefficients = self._coefficients(np.array(known["columns"])).reshape(2, *[1] * bool(shape), *shape[1:])
        return weighted(block, torch.from_numpy(coefficients).to(vectors))

    @property
    def _by_rows(self) -> bool:
        return not self.nuslerp_flatten and not self.nuslerp_row_wise

    def _coefficients(self, products: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of both vectors, `[2, ...]`, given ⟨x₁, x₁⟩, ⟨x₁, x₂⟩ and ⟨x₂, x₂⟩, `[3, ...]`."""
        whole = self.weight[0] + self.weight[1]
        t = self.weight[1] / whole if abs(whole) >= SMALLEST_SUM else 0.5
        one, other = (np.maximum(np.sqrt(squares), SHORTEST) for squares in (products[0], products[2]))
        cosine = products[1] / (one * other)
        is_straight = np.abs(cosine) >= SAME_DIRECTION
        angle = np.arccos(np.where(is_straight, 0.0, cosine))
        turned = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
        return np.stack([np.where(is_straight, share, sine) for share, sine in zip((1 - t, t), turned, strict=True)])
