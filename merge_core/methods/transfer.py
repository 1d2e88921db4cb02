"""Fine-tuning transfer (Lin et al., 2025): give a new base what a fine-tune learned on an old one.

θ = θ_t + λ Σᵢ wᵢ (θᵢ − θ_sᵢ)        θ_t: the target, θ_sᵢ: what θᵢ was tuned from
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_core.kernels.plain import column, total
from merge_core.method import OWN_BASE, Block, Known, MergeMethod, PerModel, spread


class Transfer(MergeMethod):
    """Add to the base the differences between models and what each was tuned from, its own `base_model`.

    The differences are taken and added in float64 and rounded once. With the one base for all models this is task
    arithmetic. Config and tokenizer are the base's; where rows were added for the tokens of a fine-tune, its tokenizer
    (`tokenizer_source`) knows them, and then nothing needs to be padded.

    >>> block = Block.of([[3.0, 1.0]], base=[10.0, 10.0], base_model=[[1.0, 2.0]])
    >>> Transfer().merge(block, {})
    tensor([12.,  9.])
    """

    name: ClassVar[str] = "transfer"
    title: ClassVar[str] = "Fine-tuning transfer"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.20110"
    own_bases: ClassVar[bool] = True
    precision: ClassVar[Literal["float32", "float64"]] = "float64"
    workspace: ClassVar[tuple[int, int]] = (4, 6)

    vocabulary: Literal["refuse", "pad_zero", "truncate"] = Field(
        "refuse",
        description="what becomes of embeddings and heads of different lengths: they are refused, filled up with zeros "
        "at the end, as the authors do, or cut there",
    )
    weight: PerModel = Field((1.0,), description="wᵢ: coefficient of each difference")
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the summed differences")

    def merge(self, block: Block, known: Known) -> Tensor:
        models = range(len(block.stored))
        deltas = block.models - torch.stack([block.numbers(OWN_BASE, model) for model in models])
        return block.base + total(deltas * column(spread(self.weight, len(models)), deltas)) * self.lambda_
