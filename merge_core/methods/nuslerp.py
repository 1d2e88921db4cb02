"""NuSLERP: spherical interpolation of two models, or of what they learned (mergekit's formulation of Shoemake, 1985).

t = w₂ / (w₁ + w₂)        x = sin((1−t)Ω)/sin Ω · x₁ + sin(tΩ)/sin Ω · x₂        θ = x, or θ₀ + x

where xᵢ is θᵢ, or δᵢ = θᵢ − θ₀ where there is a base, and Ω the angle between x₁ and x₂.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import BaseUse, Block, Known, MergeMethod, PerModel, Scope, Stage
from merge_core.spherical import SAME_DIRECTION, Matrix, lengths
from merge_core.stages import Gram

SHORTEST = 1e-7
"""Vectors shorter than this are measured as if they were so long, so that their angle tends to 90°."""
SMALLEST_SUM = 1e-6


class NuSlerp(MergeMethod):
    """Turn from the first model towards the second by its share of the weights.

    Weights that sum to zero mean half way. Vectors of one direction, or of opposite ones, are interpolated linearly,
    as soon as float32 cannot tell their cosine from ±1; between vectors that are nearly opposite the result is large
    and depends on the last bits. Sines are those of the C library, so that the last bit of a coefficient may
    differ between machines.

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

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [Gram()]

    def merge(self, block: Block, known: Known) -> Tensor:
        return block.combination(self._coefficients(known["gram"]))

    def _coefficients(self, gram: Matrix) -> tuple[float, float]:
        whole = self.weight[0] + self.weight[1]
        t = self.weight[1] / whole if abs(whole) >= SMALLEST_SUM else 0.5
        one, other = (max(length, SHORTEST) for length in lengths(gram))
        cosine = gram[0][1] / (one * other)
        if abs(cosine) >= SAME_DIRECTION:
            return 1 - t, t
        angle = math.acos(cosine)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
