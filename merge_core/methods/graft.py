"""Skill grafting (Panigrahi et al., 2023): put back only the few entries in which a skill is localised.

θ = θ₀ + γ ⊙ δ        γ = 1 where |δ| is above the k-th largest, k = int(s · N)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels.vectors import KEEP_NO_TIES
from merge_core.method import Block, Given, Known, MergeMethod, Scope, Share, Stage
from merge_core.stages import largest, task_vectors, thresholds


class Graft(MergeMethod):
    """Keep the entries of one task vector that changed the most, counted over the whole model.

    This is the graft that the authors start to optimise from. Strictly above the k-th largest magnitude: so k − 1
    entries are kept, and fewer where several equal the k-th. A mask that was optimised elsewhere is grafted by
    `entries: given`.

    >>> Graft(sparsity=0.5).merge(Block.of([[1.0, -3.0, 2.0, 5.0]], base=[0.0] * 4), {"threshold": [3.0]})
    tensor([0., 0., 0., 5.])
    >>> Graft(entries="given").merge(Block.of([[1.0, 2.0]], base=[0.0, 0.0], mask=[[0.0, 1.0]]), {})
    tensor([0., 2.])
    """

    name: ClassVar[str] = "graft"
    title: ClassVar[str] = "Skill grafting"
    paper: ClassVar[str] = "https://arxiv.org/abs/2302.06600"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    scopes: ClassVar[tuple[Scope, ...]] = ("model", "tensor")
    measured: ClassVar[tuple[str, ...]] = ("sparsity", "entries")
    workspace: ClassVar[tuple[int, int]] = (8, 8)
    statistics: ClassVar[Mapping[str, Given]] = {
        "mask": Given("γ: 1 for each entry that is grafted, else 0 (entries: given)", required=False)
    }

    sparsity: Share = Field(0.01, description="s: share of all entries that are grafted, 0 to 1", examples=[0.3])
    entries: Literal["largest", "given"] = Field(
        "largest", description="which are grafted: those that changed the most, or those of the given mask"
    )

    def needs(self, statistic: str, model: int) -> bool:
        return self.entries == "given"

    @property
    def is_fused(self) -> bool:
        return self.entries == "largest"

    def stages(self, scope: Scope) -> Sequence[Stage]:
        if self.entries == "given":
            return ()
        return largest(task_vectors, lambda model, entries: int(self.sparsity * entries), scope, cut_ties=False)

    def merge(self, block: Block, known: Known) -> Tensor:
        if self.entries == "given":
            return torch.where(block.numbers("mask") != 0, block.models[0], block.base)
        return kernels.combine(block.task_vectors.trimmed(thresholds(known), (KEEP_NO_TIES,)), scale=1.0)
