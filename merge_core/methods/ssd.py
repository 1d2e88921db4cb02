"""Selective synaptic dampening (Foster et al., 2023): make a model forget by shrinking what only the forgotten needs.

where I_f > α · I_D:    θ' = θ · min(λ · I_D / I_f, 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Given, Known, MergeMethod


class SelectiveSynapticDampening(MergeMethod):
    """Dampen the weights that matter much more to the data to forget than to all data.

    Both importances are given: for each weight the mean over mini-batches of the squared gradient of the loss. A weight
    that no forgotten sample needs (I_f = 0) is never touched. The official code stops at 0-d tensors; this does not.

    >>> block = Block.of([[1.0, 2.0, 3.0]], importance=[[1.0, 1.0, 0.0]], forget_importance=[[5.0, 20.0, 0.0]])
    >>> SelectiveSynapticDampening(alpha=10).merge(block, {})
    tensor([1.0000, 0.1000, 3.0000])
    """

    name: ClassVar[str] = "ssd"
    title: ClassVar[str] = "Selective synaptic dampening (unlearning)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2308.07707"
    base: ClassVar[Literal["required", "model"]] = "model"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    workspace: ClassVar[tuple[int, int]] = (1, 7)
    statistics: ClassVar[Mapping[str, Given]] = {
        "importance": Given("I_D: importance of each weight to all training data, what is to be forgotten included"),
        "forget_importance": Given("I_f: importance of each weight to what is to be forgotten"),
    }

    alpha: float = Field(10.0, gt=0, description="α: how many times more important to the forgotten a weight must be")
    lambda_: float = Field(1.0, ge=0, alias="lambda", description="λ: how much is left of a weight; less forgets more")

    def merge(self, block: Block, known: Known) -> Tensor:
        weights, everything, forgotten = (
            block.models[0],
            block.numbers("importance"),
            block.numbers("forget_importance"),
        )
        selected = forgotten > everything * self.alpha
        divisor = torch.where(selected, forgotten, torch.ones_like(forgotten))
        factor = (everything * self.lambda_ / divisor).clamp(max=1)
        return torch.where(selected, weights * factor, weights)
