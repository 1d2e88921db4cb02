"""DARE: Drop And REscale (Yu et al., 2024), before task arithmetic or TIES.

    mᵢ ~ Bernoulli(p)        δ'ᵢ = (1 − mᵢ) ⊙ δᵢ / (1 − p)

mergekit keeps with probability `density` = 1 − p and rescales each tensor to its own L1 norm instead of by 1 / (1 − p).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels import Vote
from merge_core.kernels.vectors import TaskVectors
from merge_core.method import (
    Block,
    Known,
    MergeMethod,
    PerModel,
    PerModelMarker,
    PerModelShare,
    Semantics,
    Share,
)
from merge_core.sparse_sum import SparseSum
from merge_core.trim_elect_merge import TrimElectMerge

PAPER = "https://arxiv.org/abs/2311.03099"
PerModelDropRate = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], PerModelMarker()]


class DareLinear(SparseSum):
    """mergekit's DARE: drop at random, rescale each tensor to its L1 norm, then task arithmetic.

    With nothing dropped this is task arithmetic:

    >>> DareLinear(weight=(1.0, 1.0)).merge(Block.of([[1.0, 2.0], [3.0, 4.0]], base=[0.0, 0.0]), {})
    tensor([4., 6.])
    """

    name: ClassVar[str] = "dare_linear"
    title: ClassVar[str] = "DARE, then task arithmetic"
    paper: ClassVar[str] = PAPER
    workspace: ClassVar[tuple[int, int]] = (14, 6)

    density: PerModelShare = Field((1.0,), examples=[0.4], description="1 − p: chance of each entry to be kept, 0 to 1")
    rescale: bool = Field(True, description="scale what is left of each tensor back to its L1 norm")

    def sparse(self, block: Block, known: Known) -> TaskVectors:
        return block.task_vectors.dropped(tuple(1 - density for density in self.density))


class DareTies(DareLinear):
    """mergekit's DARE-TIES: drop at random, rescale, then keep what agrees with the sign of the weighted sum; nothing
    is trimmed.

    >>> DareTies(weight=(1.0, 1.0)).merge(Block.of([[1.0, -2.0], [3.0, 4.0]], base=[0.0, 0.0]), {})
    tensor([4., 4.])
    """

    name: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "DARE, then sign election"
    workspace: ClassVar[tuple[int, int]] = (14, 8)
    vote: ClassVar[Vote | None] = "plus"


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

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        vectors = _drop_and_rescale(block, self.drop_rate, self.rescale)
        return kernels.combine(vectors.times(self.weight), scale=self.lambda_)


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

    def vectors(self, block: Block) -> TaskVectors:
        return _drop_and_rescale(block, self.drop_rate, self.rescale)


def _drop_and_rescale(block: Block, drop_rate: tuple[float, ...], rescale: bool) -> TaskVectors:
    vectors = block.task_vectors.dropped(drop_rate)
    return vectors.divided(tuple(1 - rate for rate in drop_rate)) if rescale and any(drop_rate) else vectors
