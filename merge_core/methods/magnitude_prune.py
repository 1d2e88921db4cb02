"""Magnitude pruning of task vectors (Han et al., 2015; compared with DARE by Yu et al., 2024): drop the smallest.

δ̂ᵢ = δᵢ where |δᵢ| exceeds its k-th smallest, k = int(p · N)        θ = θ₀ + λ Σᵢ wᵢ δ̂ᵢ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels.vectors import KEEP_ALL_TIES, KEEP_NO_TIES
from merge_core.method import Block, Known, MergeMethod, PerModel, PerModelShare, Scope, Stage
from merge_core.stages import largest, task_vectors


class MagnitudePrune(MergeMethod):
    """Keep only the largest entries of each tensor's task vectors, unscaled, then task arithmetic.

    Whatever equals the k-th smallest magnitude is dropped with it, as in the code that DARE was compared with.

    >>> block = Block.of([[1.0, -2.0, 3.0, -4.0]], base=[0.0, 0.0, 0.0, 0.0])
    >>> MagnitudePrune(drop_rate=(0.5,)).merge(block, {"entries": 4, "threshold": [2.0]})
    tensor([ 0.,  0.,  3., -4.])
    """

    name: ClassVar[str] = "magnitude_prune"
    title: ClassVar[str] = "Magnitude pruning, then task arithmetic"
    paper: ClassVar[str] = "https://arxiv.org/abs/1506.02626"
    scopes: ClassVar[tuple[Scope, ...]] = ("tensor", "model")
    measured: ClassVar[tuple[str, ...]] = ("drop_rate",)
    workspace: ClassVar[tuple[int, int]] = (12, 6)

    weight: PerModel = Field((1.0,), description="wᵢ: coefficient of each task vector; 1/n for all averages the models")
    drop_rate: PerModelShare = Field(
        (0.9,), description="p: share of each task vector that is dropped, 0 to 1", examples=[0.6]
    )
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the summed task vectors")

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return largest(task_vectors, self._place, scope, cut_ties=False) if any(self.drop_rate) else ()

    def merge(self, block: Block, known: Known) -> Tensor:
        vectors = block.task_vectors
        if any(self.drop_rate):
            counts = [self._count(model, known["entries"]) for model in range(len(vectors))]
            ties = tuple(KEEP_NO_TIES if count else KEEP_ALL_TIES for count in counts)
            vectors = vectors.trimmed(tuple(known["threshold"]), ties)
        return kernels.combine(vectors.times(self.weight), scale=self.lambda_)

    def _count(self, model: int, entries: int) -> int:
        return int(self.drop_rate[model % len(self.drop_rate)] * entries)

    def _place(self, model: int, entries: int) -> int:
        """Which place the largest dropped entry has, from the largest of all."""
        return entries - self._count(model, entries) + 1
