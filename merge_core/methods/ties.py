"""TIES-Merging (Yadav et al., 2023): trim small changes, elect a sign, average what agrees with it.

δ̂ᵢ = δᵢ where |δᵢ| is among the largest        γ = sgn Σᵢ δ̂ᵢ        θ = θ₀ + λ · mean{ δ̂ᵢ : sgn δ̂ᵢ = γ }
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from merge_core.kernels import Vote
from merge_core.kernels.vectors import TaskVectors
from merge_core.method import Block, Known, PerModel, Scope, Semantics, Share, Stage
from merge_core.sparse_sum import SparseSum
from merge_core.stages import largest, task_vectors, trimmed
from merge_core.trim_elect_merge import TrimElectMerge


class Ties(SparseSum):
    """mergekit's TIES: trimmed per tensor to exactly k entries, votes and average by weight, a tied vote is +.

    k = max(1, int(density · entries)), or 0 where the density is; of equal magnitudes the lowest index is kept first.

    >>> block = Block.of([[2.0, -1.0, 4.0], [2.0, 3.0, -1.0]], base=[0.0, 0.0, 0.0])
    >>> Ties(weight=(1.0, 1.0)).merge(block, {})
    tensor([2., 3., 4.])
    """

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES-Merging"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    scopes: ClassVar[tuple[Scope, ...]] = ("tensor", "model")
    measured: ClassVar[tuple[str, ...]] = ("density", "rescale")
    workspace: ClassVar[tuple[int, int]] = (12, 6)

    vote: ClassVar[Vote | None] = "plus"

    weight: PerModel = Field(description="wᵢ: coefficient of each task vector, in the vote and in the average")
    normalize: bool = Field(True, description="divide by the weights of the models that agree")

    def ranks(self, scope: Scope) -> Sequence[Stage]:
        return largest(task_vectors, self._keep, scope, cut_ties=True)

    def sparse(self, block: Block, known: Known) -> TaskVectors:
        return trimmed(block.task_vectors, block, known)

    def _keep(self, model: int, entries: int) -> int:
        density = self.density[model % len(self.density)]
        return entries if density == 1 else max(1, int(density * entries)) if density else 0


class OfficialTies(TrimElectMerge):
    """The authors' TIES: each model trimmed over all its tensors at once, votes of equal weight, ties kept.

    A vote of exactly zero takes the sign that most elected entries of the whole model have.

    >>> block = Block.of([[2.0, -1.0, 4.0], [2.0, 3.0, -1.0]], base=[0.0, 0.0, 0.0])
    >>> OfficialTies(density=1.0).merge(block, {"majority": 1})
    tensor([2., 3., 4.])
    """

    name: ClassVar[str] = "ties"
    semantics: ClassVar[Semantics] = "paper"
    title: ClassVar[str] = "TIES-Merging (official)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.01708"

    measured: ClassVar[tuple[str, ...]] = ("density", "election")

    density: Share = Field(0.2, description="share of each task vector that is kept, 0 to 1 (the paper's K)")

    @property
    def trim_to(self) -> float:
        return self.density

    def vectors(self, block: Block) -> TaskVectors:
        return block.task_vectors
