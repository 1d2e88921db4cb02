"""Sparsify, weigh, add up: what mergekit's ties, breadcrumbs, dare and della share once a method has left entries out.

    θ = θ₀ + λ Σᵢ wᵢ sᵢ δ̂ᵢ / n        sᵢ = ‖δᵢ‖₁ / ‖δ̂ᵢ‖₁ or 1

where a method votes, over the entries alone that agree with the sign of the weighted sum.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels import Vote
from merge_core.kernels.vectors import TaskVectors
from merge_core.method import Block, Known, MergeMethod, PerModel, PerModelShare, Scope, Stage
from merge_core.stages import L1Norms


class SparseSum(MergeMethod):
    """Base of mergekit's sparse methods: `sparse` says what is left of the task vectors, `vote` whether signs are
    elected. Where every density is 1 nothing is left out.
    """

    vote: ClassVar[Vote | None] = None

    weight: PerModel = Field(description="wᵢ: coefficient of each task vector")
    density: PerModelShare = Field((1.0,), description="share of each task vector that is kept, 0 to 1", examples=[0.3])
    normalize: bool = Field(False, description="divide by the sum of the weights")
    rescale: bool = Field(
        False, description="scale what is left of each task vector back to its L1 norm", examples=[True]
    )
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the merged task vector")
    int8_mask: bool = Field(False, description="read for mergekit's sake; has no effect")

    @abstractmethod
    def sparse(self, block: Block, known: Known) -> TaskVectors:
        """What is left of the task vectors, where any density is below 1."""

    def ranks(self, scope: Scope) -> Sequence[Stage]:
        """What `sparse` must know."""
        return ()

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        if not self._is_sparse:
            return ()
        return [*self.ranks(scope), *([L1Norms(self._left)] if self.rescale else [])]

    def merge(self, block: Block, known: Known) -> Tensor:
        vectors = self._left(block, known)
        if self.rescale and self._is_sparse:
            vectors = vectors.times(tuple(known["rescale"]))
        return kernels.combine(
            vectors.times(self.weight),
            vote=self.vote,
            average="weight" if self.normalize else "sum",
            weights=self.weight,
            scale=self.lambda_,
        )

    @property
    def _is_sparse(self) -> bool:
        return any(density < 1 for density in self.density)

    def _left(self, block: Block, known: Known) -> TaskVectors:
        return self.sparse(block, known) if self._is_sparse else block.task_vectors
