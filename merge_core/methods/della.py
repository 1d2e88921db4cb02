"""DELLA (Deep, Bhardwaj and Poria, 2024): drop entries at random, the small ones of a row more often than the large.

    mᵢ ~ Bernoulli(pᵢ), p linear in the rank of |δᵢ| in its row        δ'ᵢ = s (1 − mᵢ) ⊙ δᵢ

The paper divides each entry by its own chance to stay; mergekit, as here, scales each tensor to its own L1 norm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from merge_core.kernels import Vote
from merge_core.kernels.vectors import RankRates, TaskVectors
from merge_core.method import Block, Extent, Known, PerModel, PerModelShare, spread
from merge_core.sparse_sum import SparseSum


class DellaLinear(SparseSum):
    """mergekit's DELLA: drop by rank in each row, rescale each tensor to its L1 norm, then task arithmetic.

    The smallest of a row's magnitudes stays with probability density − ε, the largest with density + ε, in equal steps
    between; of equal ones the lowest index counts as the largest. A row runs along the second dimension, also in
    convolutions; a 1-D tensor is one row. An entry alone in its row stays with probability `density`, where mergekit
    ends with an error. A density of 1 keeps everything, one of 0 nothing. Which entries go depends on the seed, so that
    no entry need be mergekit's.

    >>> block = Block.of([[1.0, 2.0], [3.0, 4.0]], base=[0.0, 0.0])
    >>> DellaLinear(weight=(1.0, 1.0)).merge(block, {"rescale": [1.0, 1.0]})
    tensor([4., 6.])
    >>> drop_rates((0.5,), (0.25,), 3, 1).rates
    array([[0.25, 0.5 , 0.75]], dtype=float32)
    """

    name: ClassVar[str] = "della_linear"
    title: ClassVar[str] = "DELLA, then task arithmetic"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11617"
    workspace: ClassVar[tuple[int, int]] = (14, 6)

    density: PerModelShare = Field((1.0,), description="mean chance of each entry to be kept, 0 to 1", examples=[0.4])
    epsilon: PerModel = Field(
        (0.15,), description="ε: how much more than the mean the largest entry's chance is, and the smallest's less"
    )
    rescale: bool = Field(True, description="scale what is left of each tensor back to its L1 norm")

    @model_validator(mode="after")
    def _chances_are_chances(self) -> Self:
        count = max(len(self.density), len(self.epsilon))
        for density, epsilon in zip(spread(self.density, count), spread(self.epsilon, count), strict=True):
            if 0 < density < 1 and not 0 < density - abs(epsilon) <= density + abs(epsilon) < 1:
                raise ValueError(
                    f"density − epsilon and density + epsilon are the chances of a row's smallest and largest entries, "
                    f"so both must be between 0 and 1; with density {density:g} and epsilon {epsilon:g} they are "
                    f"{density - epsilon:g} and {density + epsilon:g}; take an epsilon below "
                    f"{min(density, 1 - density):g}"
                )
        return self

    def extent(self, shape: Sequence[int]) -> Extent:
        return "grain" if len(shape) > 1 else "tensor"

    def sparse(self, block: Block, known: Known) -> TaskVectors:
        vectors, (_, *inner) = block.task_vectors, block.stored[0].shape or (1,)
        width, stride = (inner[0], math.prod(inner[1:])) if inner else (block.elements, 1)
        count = len(vectors)
        return vectors.dropped_by_rank(
            drop_rates(spread(self.density, count), spread(self.epsilon, count), width, stride)
        )


class Della(DellaLinear):
    """mergekit's DELLA with its vote: drop by rank in each row, rescale, then average what agrees with the sign of the
    weighted sum; a tied vote is +.

    >>> block = Block.of([[1.0, -2.0], [3.0, 4.0]], base=[0.0, 0.0])
    >>> Della(weight=(1.0, 1.0)).merge(block, {})
    tensor([2., 4.])
    """

    name: ClassVar[str] = "della"
    title: ClassVar[str] = "DELLA, then sign election"
    workspace: ClassVar[tuple[int, int]] = (14, 8)
    vote: ClassVar[Vote | None] = "plus"

    normalize: bool = Field(True, description="divide by the weights of the models that agree")


@functools.lru_cache(64)
def drop_rates(density: tuple[float, ...], epsilon: tuple[float, ...], width: int, stride: int) -> RankRates:
    """The chance to go, by place in a row of so many, the largest magnitude first; one row per model."""
    place = np.arange(width) / (width - 1) if width > 1 else np.full(1, 0.5)
    rates = [
        1 - mean - reach * (1 - 2 * place) if 0 < mean < 1 else np.full(width, 1 - mean)
        for mean, reach in zip(density, epsilon, strict=True)
    ]
    return RankRates(np.array(rates, np.float32), stride)
