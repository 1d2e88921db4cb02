"""Model Breadcrumbs (Davari and Belilovsky, 2023): leave out what changed most as well as what changed little.

    δ̂ᵢ = δᵢ where |δᵢ| is neither among the largest nor among the smallest        θ = θ₀ + λ Σᵢ wᵢ δ̂ᵢ

The authors rank the entries of each row, mergekit those of each tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels import Vote
from merge_core.kernels.vectors import RankRates, TaskVectors
from merge_core.method import Block, Extent, Known, MergeMethod, PerModelShare, Scope, Semantics, Share, Stage
from merge_core.sparse_sum import SparseSum
from merge_core.stages import largest, task_vectors, trimmed

PAPER = "https://arxiv.org/abs/2312.06795"


class Breadcrumbs(SparseSum):
    """mergekit's Breadcrumbs: of each tensor's N entries leave out the int(γN) largest, keep the int(density · N) next.

    Where these are more than N, the smallest int(density · N) are kept; with a density of 1 nothing is left out, not
    even by γ. Of equal magnitudes the lowest index counts as the largest; which one mergekit takes is up to its sort,
    so that the two differ where the smallest or the largest kept magnitude is that of several entries.

    >>> block = Block.of([[1.0, -2.0, 3.0, -4.0]], base=[0.0, 0.0, 0.0, 0.0])
    >>> known = {"threshold": [2.0, 4.0], "cut": [None, None]}
    >>> Breadcrumbs(weight=(1.0,), density=(0.5,), gamma=(0.25,)).merge(block, known)
    tensor([ 0., -2.,  3.,  0.])
    """

    name: ClassVar[str] = "breadcrumbs"
    title: ClassVar[str] = "Model Breadcrumbs"
    paper: ClassVar[str] = PAPER
    scopes: ClassVar[tuple[Scope, ...]] = ("tensor", "model")
    measured: ClassVar[tuple[str, ...]] = ("density", "gamma", "rescale")
    workspace: ClassVar[tuple[int, int]] = (12, 6)

    gamma: PerModelShare = Field(
        (0.01,), description="γ: share of the largest entries that is left out", examples=[0.1]
    )

    def ranks(self, scope: Scope) -> Sequence[Stage]:
        return largest(task_vectors, self._keep, scope, cut_ties=True, cut_off=self._cut_off)

    def sparse(self, block: Block, known: Known) -> TaskVectors:
        return trimmed(block.task_vectors, block, known)

    def _counts(self, model: int, entries: int) -> tuple[int, int]:
        """How many entries are kept, and how many larger ones are not."""
        density = self.density[model % len(self.density)]
        if density == 1:
            return entries, 0
        kept, largest = int(density * entries), int(self.gamma[model % len(self.gamma)] * entries)
        return kept, min(largest, entries - kept)

    def _keep(self, model: int, entries: int) -> int:
        return sum(self._counts(model, entries))

    def _cut_off(self, model: int, entries: int) -> int:
        return self._counts(model, entries)[1]


class BreadcrumbsTies(Breadcrumbs):
    """mergekit's Breadcrumbs, of which then only what agrees with the sign of the weighted sum is added; a tied vote
    is +.

    >>> block = Block.of([[1.0, -2.0], [3.0, 4.0]], base=[0.0, 0.0])
    >>> BreadcrumbsTies(weight=(1.0, 1.0)).merge(block, {})
    tensor([4., 4.])
    """

    name: ClassVar[str] = "breadcrumbs_ties"
    title: ClassVar[str] = "Model Breadcrumbs, then sign election"
    vote: ClassVar[Vote | None] = "plus"


class OfficialBreadcrumbs(MergeMethod):
    """The authors' Breadcrumbs: of each row of w entries drop the int(w · top_k_remove) largest, keep the int(w ·
    top_k_keep) largest of the others, drop the rest.

    A row is what lies along the last dimension: all of a 1-D tensor, and only three entries of a 3 × 3 convolution,
    of which none is left where int(3 · top_k_keep) is 0. A number alone (0-d) is kept. Of equal magnitudes the lowest
    index counts as the largest.

    >>> block = Block.of([[[1.0, -2.0, 3.0, -4.0], [8.0, 7.0, 6.0, 5.0]]], base=[[0.0] * 4] * 2)
    >>> OfficialBreadcrumbs(top_k_keep=0.5, top_k_remove=0.25).merge(block, {})
    tensor([[ 0., -2.,  3.,  0.],
            [ 0.,  7.,  6.,  0.]])
    """

    name: ClassVar[str] = "breadcrumbs"
    semantics: ClassVar[Semantics] = "paper"
    title: ClassVar[str] = "Model Breadcrumbs (official)"
    paper: ClassVar[str] = PAPER
    workspace: ClassVar[tuple[int, int]] = (12, 6)

    top_k_keep: Share = Field(0.15, description="β: share of each row that is kept", examples=[0.3])
    top_k_remove: Share = Field(0.006, description="γ: share of each row, the largest, that is dropped", examples=[0.2])
    remove_first: bool = Field(
        True, description="count the kept entries from the largest that is not dropped; else from the largest of all"
    )
    lambda_: float = Field(1.0, alias="lambda", description="α of the paper: scale of the summed task vectors")

    @property
    def is_fused(self) -> bool:
        return True

    def extent(self, shape: Sequence[int]) -> Extent:
        return "grain" if len(shape) > 1 else "tensor"

    def merge(self, block: Block, known: Known) -> Tensor:
        vectors, shape = block.task_vectors, block.stored[0].shape
        if shape:
            rates = _band(shape[-1], self.top_k_remove, self.top_k_keep, self.remove_first, len(vectors))
            vectors = vectors.dropped_by_rank(rates)
        return kernels.combine(vectors, scale=self.lambda_)


@functools.lru_cache(64)
def _band(width: int, remove: float, keep: float, remove_first: bool, models: int) -> RankRates:
    """Rates by place in a row that drop all but some places."""
    first, kept = int(width * remove), int(width * keep)
    rates = np.ones((models, width), np.float32)
    rates[:, first : (first if remove_first else 0) + kept] = 0
    return RankRates(rates)
