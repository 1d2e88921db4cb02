"""Geometric median: the point with the least sum of distances to all models, which one odd model cannot drag away.

θ = argmin_θ Σᵢ wᵢ ‖θ − θᵢ‖        Weiszfeld: θ ← Σᵢ aᵢ θᵢ / Σᵢ aᵢ, aᵢ = wᵢ / ‖θ − θᵢ‖

Weiszfeld's iteration as Vardi and Zhang (2000) completed it: where it meets one of the models, it stays there if
that is the median, and else goes on. Pillutla et al. (2022, https://arxiv.org/abs/1912.13445) average models so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import BaseUse, Block, Known, MergeMethod, PerModelMarker, Scope, Stage, spread
from merge_core.spherical import Matrix, length, products
from merge_core.stages import Gram, first_as_base

TOUCHING = 1e-7
"""A distance that is less than this share of the largest is one of rounding."""
PositivePerModel = Annotated[tuple[Annotated[float, Field(gt=0)], ...], PerModelMarker()]


class GeometricMedian(MergeMethod):
    """Average the models, the less of each the farther it is from the others; each tensor has its own median.

    The iteration is done on the models' coefficients in float64, starting at their weighted mean, for which their inner
    products are enough. It ends with a step shorter than `tol` times the mean distance from the models, or
    after `max_iter` steps.

    Two of three models agree here, which is half of the weight and more:

    >>> block = Block.of([[1.0], [1.0], [7.0]])
    >>> GeometricMedian().merge(block, {"gram": [[0.0, 0.0], [0.0, 36.0]]})
    tensor([1.])
    """

    name: ClassVar[str] = "geometric_median"
    title: ClassVar[str] = "Geometric median"
    paper: ClassVar[str] = "https://doi.org/10.1073/pnas.97.4.1423"
    base: ClassVar[BaseUse] = "model"
    scopes: ClassVar[tuple[Scope, ...]] = ("tensor", "model")
    measured: ClassVar[tuple[str, ...]] = ("weight", "max_iter", "tol")
    workspace: ClassVar[tuple[int, int]] = (8, 10)

    weight: PositivePerModel = Field((1.0,), description="wᵢ: how much the distance from each model counts, above 0")
    max_iter: int = Field(100, ge=0, description="the most steps")
    tol: float = Field(1e-8, ge=0, description="stop at steps shorter than this share of the mean distance")

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [Gram(first_as_base)]

    def merge(self, block: Block, known: Known) -> Tensor:
        if len(block.stored) == 1:
            return block.linear((1.0,))
        return first_as_base(block).combination(tuple(self._coefficients(known["gram"])[1:]))

    def _coefficients(self, relative: Matrix) -> list[float]:
        """Σ = 1; `relative` are the inner products of the models but the first, seen from the first."""
        count = len(relative) + 1
        gram = [[0.0] * count, *([0.0, *row] for row in relative)]
        weights = spread(self.weight, count)
        median = [weight / sum(weights) for weight in weights]
        for _ in range(self.max_iter):
            away = _distances(gram, median)
            pull = [weight / distance if distance else 0.0 for weight, distance in zip(weights, away, strict=True)]
            met = [i for i, distance in enumerate(away) if not distance]
            step = [share / (sum(pull) or 1.0) - c for share, c in zip(pull, median, strict=True)]
            if met:
                held, force = sum(weights[i] for i in met), sum(pull) * length(gram, step)
                if held >= force:
                    return [float(i == met[0]) for i in range(count)]
                step = [(1 - held / force) * s for s in step]
            median = [c + s for c, s in zip(median, step, strict=True)]
            if length(gram, step) <= self.tol * sum(away) / count:
                break
        return median


def _distances(gram: Matrix, point: Sequence[float]) -> list[float]:
    """‖θᵢ − Σⱼ cⱼ θⱼ‖, 0 where the point meets a model."""
    inner = products(gram, point)
    square = sum(c * product for c, product in zip(point, inner, strict=True))
    away = [math.sqrt(max(0.0, gram[i][i] - 2 * inner[i] + square)) for i in range(len(gram))]
    return [distance if distance > TOUCHING * max(away) else 0.0 for distance in away]
