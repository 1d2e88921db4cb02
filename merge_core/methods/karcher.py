"""Karcher mean: the point on the sphere with the least squared angles to all models, at their mean length.

μ ← exp_μ( Σᵢ log_μ(uᵢ) / n )        uᵢ = θᵢ/‖θᵢ‖        θ = μ · Σᵢ ‖θᵢ‖ / n

starting at the mean direction; each tensor is taken as one vector. The iteration (Karcher, 1977) is done on the
models' coefficients, for which their inner products are enough: the models are read twice, however often it turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import BaseUse, Block, Known, MergeMethod, Scope, Stage
from merge_core.spherical import SAME_DIRECTION, Matrix, length, lengths, products, scaled_gram
from merge_core.stages import Gram


class Karcher(MergeMethod):
    """Average directions along the sphere instead of through it; every model counts the same.

    A base, if one is named, is one of the models, as in mergekit. Models that are zero have no direction and count for
    the mean length only; one that is opposite to the mean gives no direction to go. Where one has no finite
    length (`allow_nonfinite`) there is no mean: all becomes NaN. mergekit iterates in float32, which differs by less
    than `tol`. Sines are those of the C library, so that the last bit of a coefficient may differ between machines.

    >>> block = Block.of([[2.0, 0.0], [0.0, 4.0]])
    >>> Karcher().merge(block, {"gram": [[4.0, 0.0], [0.0, 16.0]]})
    tensor([2.1213, 2.1213])
    """

    name: ClassVar[str] = "karcher"
    title: ClassVar[str] = "Karcher mean"
    paper: ClassVar[str] = "https://doi.org/10.1002/cpa.3160300502"
    base: ClassVar[BaseUse] = "model"
    workspace: ClassVar[tuple[int, int]] = (6, 8)

    max_iter: int = Field(10, ge=0, description="the most steps")
    tol: float = Field(1e-5, ge=0, description="stop at shorter steps; models no longer than this count as zero")

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [Gram()]

    def merge(self, block: Block, known: Known) -> Tensor:
        return block.linear(self._coefficients(known["gram"]))

    def _coefficients(self, gram: Matrix) -> tuple[float, ...]:
        sizes = lengths(gram)
        if not all(map(math.isfinite, sizes)):
            return (math.nan,) * len(sizes)
        kept = [i for i, size in enumerate(sizes) if size > self.tol]
        if not kept:
            return (0.0,) * len(sizes)
        unit = scaled_gram([[gram[i][j] for j in kept] for i in kept], [1 / sizes[i] for i in kept])
        mean = self._mean_direction(unit)
        size = sum(sizes) / len(sizes)
        coefficients = [0.0] * len(sizes)
        for i, coefficient in zip(kept, mean, strict=True):
            coefficients[i] = size * coefficient / sizes[i]
        return tuple(coefficients)

    def _mean_direction(self, unit: Matrix) -> list[float]:
        """The coefficients of μ, given the cosines between the uᵢ."""
        count = len(unit)
        mean = [1 / count] * count
        if length(unit, mean) < max(self.tol, 1 - SAME_DIRECTION):
            mean = [1.0] + [0.0] * (count - 1)
        mean = _normalised(unit, mean)
        for _ in range(self.max_iter):
            step = _step(unit, mean)
            size = length(unit, step)
            if size < self.tol or size == 0:
                break
            along, aside = math.cos(size), math.sin(size) / size
            mean = _normalised(unit, [along * c + aside * s for c, s in zip(mean, step, strict=True)])
        return mean


def _step(unit: Matrix, mean: Sequence[float]) -> list[float]:
    """The mean of log_μ(uᵢ) = Ω/sin Ω · (uᵢ − cos Ω · μ)."""
    count, step = len(unit), [0.0] * len(unit)
    for i, product in enumerate(products(unit, mean)):
        cosine = min(1.0, max(-1.0, product))
        if cosine <= -SAME_DIRECTION:
            continue
        angle = math.acos(cosine)
        share = (angle / math.sin(angle) if angle else 1.0) / count
        step[i] += share
        step = [s - share * cosine * c for s, c in zip(step, mean, strict=True)]
    return step


def _normalised(unit: Matrix, coefficients: Sequence[float]) -> list[float]:
    size = length(unit, coefficients)
    return [coefficient / size for coefficient in coefficients]
