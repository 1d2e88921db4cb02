"""TIES-Merging (Yadav et al., 2023): trim small changes, elect a sign, average what agrees with it.

δ̂ᵢ = δᵢ where |δᵢ| is among the largest        γ = sgn Σᵢ δ̂ᵢ        θ = θ₀ + λ · mean{ δ̂ᵢ : sgn δ̂ᵢ = γ }
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Known, MergeMethod, PerModel, PerModelShare, Scope, Semantics, Share, Stage, spread
from merge_core.stages import L1Norms, kept, largest, magnitude
from merge_core.task_vectors import agreeing, column, elect_sign, total, weighted_mean
from merge_core.trim_elect_merge import TrimElectMerge


class Ties(MergeMethod):
    """mergekit's TIES: trimmed per tensor to exactly k entries, votes and average by weight, a tied vote is +.

    k = max(1, int(density · entries)); of equal magnitudes the lowest index is kept first.

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

    weight: PerModel = Field(description="wᵢ: coefficient of each task vector, in the vote and in the average")
    density: PerModelShare = Field((1.0,), description="share of each task vector that is kept, 0 to 1")
    normalize: bool = Field(True, description="divide by the weights of the models that agree")
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the merged task vector")
    rescale: bool = Field(False, description="after trimming, scale each task vector back to its L1 norm")
    int8_mask: bool = Field(False, description="read for mergekit's sake; has no effect")

    def stages(self, scope: Scope) -> Sequence[Stage]:
        if not self._trims:
            return ()
        ranks = largest(magnitude, self._keep, cut_ties=True)
        return [*ranks, L1Norms(self._mask)] if self.rescale else ranks

    def merge(self, block: Block, known: Known) -> Tensor:
        assert block.base is not None
        weights = column(spread(self.weight, len(block.models)), block.models)
        weighted = self._trimmed(block, known) * weights
        agrees = agreeing(weighted, elect_sign(weighted))
        weighted = torch.where(agrees, weighted, torch.zeros_like(weighted))
        merged = (
            weighted_mean(weighted, torch.where(agrees, weights, torch.zeros_like(weights)))
            if self.normalize
            else total(weighted)
        )
        return block.base + merged * self.lambda_

    @property
    def _trims(self) -> bool:
        return any(density < 1 for density in self.density)

    def _keep(self, model: int, entries: int) -> int:
        density = self.density[model % len(self.density)]
        return max(1, int(density * entries)) if density < 1 else entries

    def _mask(self, block: Block, known: Known) -> Tensor:
        return kept(magnitude(block), block, known)

    def _trimmed(self, block: Block, known: Known) -> Tensor:
        if not self._trims:
            return block.deltas
        trimmed = torch.where(self._mask(block, known), block.deltas, torch.zeros_like(block.deltas))
        return trimmed * column(known["rescale"], trimmed) if self.rescale else trimmed


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

    def vectors(self, block: Block) -> Tensor:
        return block.deltas
