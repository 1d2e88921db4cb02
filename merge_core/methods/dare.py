"""DARE: Drop And REscale (Yu et al., 2024), before task arithmetic or TIES.

    mᵢ ~ Bernoulli(p)        δ'ᵢ = (1 − mᵢ) ⊙ δᵢ / (1 − p)

mergekit keeps with probability `density` = 1 − p and rescales each tensor to its own L1 norm instead of by 1 / (1 − p).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from merge_core.method import (
    Block,
    Known,
    MergeMethod,
    PerModel,
    PerModelMarker,
    PerModelShare,
    Scope,
    Semantics,
    Share,
    Stage,
    spread,
)
from merge_core.stages import L1Norms
from merge_core.task_vectors import agreeing, column, elect_sign, total, weighted_mean
from merge_core.trim_elect_merge import TrimElectMerge

PAPER = "https://arxiv.org/abs/2311.03099"
PerModelDropRate = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], PerModelMarker()]


class DareLinear(MergeMethod):
    """mergekit's DARE: drop at random, rescale each tensor to its L1 norm, then task arithmetic.

    With nothing dropped this is task arithmetic:

    >>> DareLinear(weight=(1.0, 1.0)).merge(Block.of([[1.0, 2.0], [3.0, 4.0]], base=[0.0, 0.0]), {})
    tensor([4., 6.])
    """

    name: ClassVar[str] = "dare_linear"
    title: ClassVar[str] = "DARE, then task arithmetic"
    paper: ClassVar[str] = PAPER
    workspace: ClassVar[tuple[int, int]] = (14, 6)

    weight: PerModel = Field(description="wᵢ: coefficient of each task vector")
    density: PerModelShare = Field((1.0,), description="1 − p: chance of each entry to be kept, 0 to 1")
    normalize: bool = Field(False, description="divide by the sum of the weights")
    rescale: bool = Field(True, description="scale what is left of each tensor back to its L1 norm")
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the merged task vector")
    int8_mask: bool = Field(False, description="read for mergekit's sake; has no effect")

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [L1Norms(self._mask)] if self._drops and self.rescale else ()

    def merge(self, block: Block, known: Known) -> Tensor:
        assert block.base is not None
        weights = column(spread(self.weight, len(block.models)), block.models)
        return block.base + self._combine(self._dropped(block, known) * weights, weights) * self.lambda_

    def _combine(self, weighted: Tensor, weights: Tensor) -> Tensor:
        return weighted_mean(weighted, weights) if self.normalize else total(weighted)

    @property
    def _drops(self) -> bool:
        return any(density < 1 for density in self.density)

    def _mask(self, block: Block, known: Known) -> Tensor:
        drop_rate = [1 - density for density in spread(self.density, len(block.models))]
        return _survives(block, drop_rate)

    def _dropped(self, block: Block, known: Known) -> Tensor:
        if not self._drops:
            return block.deltas
        left = torch.where(self._mask(block, known), block.deltas, torch.zeros_like(block.deltas))
        return left * column(known["rescale"], left) if self.rescale else left


class DareTies(DareLinear):
    """mergekit's DARE-TIES: drop at random, rescale, then keep what agrees with the sign of the weighted sum; nothing
    is trimmed.

    >>> DareTies(weight=(1.0, 1.0)).merge(Block.of([[1.0, -2.0], [3.0, 4.0]], base=[0.0, 0.0]), {})
    tensor([4., 4.])
    """

    name: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "DARE, then sign election"
    workspace: ClassVar[tuple[int, int]] = (14, 8)

    def _combine(self, weighted: Tensor, weights: Tensor) -> Tensor:
        agrees = agreeing(weighted, elect_sign(weighted))
        weighted = torch.where(agrees, weighted, torch.zeros_like(weighted))
        return (
            weighted_mean(weighted, torch.where(agrees, weights, torch.zeros_like(weights)))
            if self.normalize
            else total(weighted)
        )


class OfficialDareLinear(MergeMethod):
    """The authors' DARE: drop with rate p, divide the survivors by 1 − p, then task arithmetic.

    >>> OfficialDareLinear(drop_rate=(0.0,)).merge(Block.of([[1.0, 2.0], [3.0, 4.0]], base=[0.0, 0.0]), {})
    tensor([4., 6.])
    """

    name: ClassVar[str] = "dare_linear"
    semantics: ClassVar[Semantics] = "paper"
    title: ClassVar[str] = "DARE (official), then task arithmetic"
    paper: ClassVar[str] = PAPER
    workspace: ClassVar[tuple[int, int]] = (14, 6)

    weight: PerModel = Field((1.0,), description="wᵢ: coefficient of each task vector; 1/n for all averages the models")
    drop_rate: PerModelDropRate = Field((0.9,), description="p: chance of each entry to be dropped, 0 to below 1")
    rescale: bool = Field(True, description="divide what is left by 1 − p")
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the summed task vectors")

    def merge(self, block: Block, known: Known) -> Tensor:
        assert block.base is not None
        weights = column(spread(self.weight, len(block.models)), block.models)
        return block.base + total(_drop_and_rescale(block, self.drop_rate, self.rescale) * weights) * self.lambda_


class OfficialDareTies(TrimElectMerge):
    """The authors' DARE before TIES: drop with rate p, divide by 1 − p, then the official trim, vote and mean.

    >>> block = Block.of([[1.0, -2.0], [3.0, 4.0]], base=[0.0, 0.0])
    >>> OfficialDareTies(drop_rate=(0.0,), ties_density=1.0).merge(block, {"majority": 1})
    tensor([2., 4.])
    """

    name: ClassVar[str] = "dare_ties"
    semantics: ClassVar[Semantics] = "paper"
    title: ClassVar[str] = "DARE (official), then TIES"
    paper: ClassVar[str] = PAPER
    measured: ClassVar[tuple[str, ...]] = ("drop_rate", "rescale", "ties_density", "election")
    workspace: ClassVar[tuple[int, int]] = (16, 8)

    drop_rate: PerModelDropRate = Field((0.9,), description="p: chance of each entry to be dropped, 0 to below 1")
    rescale: bool = Field(True, description="divide what is left by 1 − p")
    ties_density: Share = Field(0.2, description="share of each task vector that TIES keeps after dropping")

    @property
    def trim_to(self) -> float:
        return self.ties_density

    def vectors(self, block: Block) -> Tensor:
        return _drop_and_rescale(block, self.drop_rate, self.rescale)


def _survives(block: Block, drop_rate: Sequence[float]) -> Tensor:
    return block.uniform() >= column(drop_rate, block.models).to(torch.float32)


def _drop_and_rescale(block: Block, drop_rate: Sequence[float], rescale: bool) -> Tensor:
    rates = spread(drop_rate, len(block.models))
    if not any(rates):
        return block.deltas
    left = torch.where(_survives(block, rates), block.deltas, torch.zeros_like(block.deltas))
    return left / column([1 - rate for rate in rates], left) if rescale else left
