"""Multi-SLERP: the direction between several models, at their average length (mergekit).

m = Σᵢ wᵢ xᵢ/‖xᵢ‖        x = (Σᵢ wᵢ ‖xᵢ‖) · m/‖m‖        θ = x, or θ₀ + x

where xᵢ is θᵢ, or δᵢ = θᵢ − θ₀ where there is a base. The barycentre is sought in the plane that touches the sphere at
m/‖m‖, by orthogonal projection; there the weighted mean of the projections is the point of contact itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from merge_core.kernels.plain import ZERO_SUM
from merge_core.method import BaseUse, Block, Known, MergeMethod, PerModel, Scope, Stage, spread
from merge_core.spherical import Matrix, length, lengths, scaled_gram
from merge_core.stages import Gram


class MultiSlerp(MergeMethod):
    """Point all models at their weighted mean direction.

    A single model stays as it is. Where the directions cancel out there is no mean direction, and the vectors are
    averaged linearly; mergekit does so with two models and fails with more, also where no model differs from the base.
    Cosines are those of the C library, which says the same everywhere for any usual `eps`.

    >>> block = Block.of([[2.0, 0.0], [0.0, 2.0]])
    >>> MultiSlerp(weight=(1.0, 1.0)).merge(block, {"gram": [[4.0, 0.0], [0.0, 4.0]]})
    tensor([1.4142, 1.4142])
    """

    name: ClassVar[str] = "multislerp"
    title: ClassVar[str] = "Weighted mean direction of several models"
    paper: ClassVar[str] = "https://doi.org/10.1145/325334.325242"
    base: ClassVar[BaseUse] = "optional"
    workspace: ClassVar[tuple[int, int]] = (8, 10)

    weight: PerModel = Field(description="wᵢ: coefficient of each model's direction and length")
    normalize_weights: bool = Field(True, description="divide the weights by their sum")
    eps: float = Field(1e-8, ge=0, description="added to lengths that divide; a shorter mean direction counts as none")

    @model_validator(mode="after")
    def _weights_have_a_sum(self) -> Self:
        size = sum(abs(weight) for weight in self.weight)
        if self.normalize_weights and (size == 0 or abs(sum(self.weight)) < ZERO_SUM * size):
            raise ValueError(
                "the weights sum to zero, which nothing can be divided by; change them, or set normalize_weights: false"
            )
        return self

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [Gram()]

    def merge(self, block: Block, known: Known) -> Tensor:
        return block.combination(self._coefficients(known["gram"]))

    def _coefficients(self, gram: Matrix) -> tuple[float, ...]:
        if len(gram) == 1:
            return (1.0,)
        weights = spread(self.weight, len(gram))
        if self.normalize_weights:
            weights = tuple(weight / sum(weights) for weight in weights)
        sizes = lengths(gram)
        inverse = [1 / (size + self.eps) if size else 0.0 for size in sizes]
        mean = length(scaled_gram(gram, inverse), weights)
        if mean < max(self.eps, ZERO_SUM):
            return weights
        size = math.cos(self.eps) * sum(weight * size for weight, size in zip(weights, sizes, strict=True))
        return tuple(size * weight * share / mean for weight, share in zip(weights, inverse, strict=True))
