"""Fisher-weighted averaging (Matena & Raffel, 2021): each weight counts as much as the model's outputs depend on it.

θ = Σᵢ λᵢ Fᵢ ⊙ θᵢ / Σᵢ λᵢ Fᵢ
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from merge_core.kernels.plain import ZERO_SUM
from merge_core.method import BaseUse, Block, Given, Known, MergeMethod, PerModelMarker, Scope, Stage, spread
from merge_core.statistics import GrainSums, Statistic, grain_sums

PerModelImportance = Annotated[tuple[Annotated[float, Field(ge=0)], ...], PerModelMarker()]


class FisherAverage(MergeMethod):
    """Average the models, every weight by the diagonal of each model's Fisher information.

    A file has the mean over examples of the squared gradient of the log-likelihood; a calibration measures it. Tensors
    that one of the files lacks are averaged by λ alone, and so is what no model needs: where all Fisher information is
    below the floor.

    >>> block = Block.of([[1.0, 8.0], [5.0, 4.0]], fisher=[[3.0, 0.0], [1.0, 0.0]])
    >>> FisherAverage().merge(block, {})
    tensor([2., 6.])
    """

    name: ClassVar[str] = "fisher"
    title: ClassVar[str] = "Fisher-weighted average"
    paper: ClassVar[str] = "https://arxiv.org/abs/2111.09832"
    base: ClassVar[BaseUse] = "model"
    scopes: ClassVar[tuple[Scope, ...]] = ("model",)
    measured: ClassVar[tuple[str, ...]] = ("normalize",)
    workspace: ClassVar[tuple[int, int]] = (4, 8)
    statistics: ClassVar[Mapping[str, Given]] = {
        "fisher": Given("Fᵢ: Fisher information of each of the model's weights", per_model=True, partial=True)
    }

    weight: PerModelImportance = Field((1.0,), description="λᵢ: how much each model counts, 0 or more")
    normalize: bool = Field(
        False,
        description="divide each model's Fisher information by its norm over the whole model, so that no model counts "
        "more because its loss is steeper",
        examples=[True],
    )
    fisher_floor: float = Field(
        1e-6, gt=0, description="the least Fisher information that counts, before it is divided"
    )

    @model_validator(mode="after")
    def _weights_have_a_sum(self) -> Self:
        if sum(self.weight) < ZERO_SUM:
            raise ValueError("the weights sum to zero, which nothing can be divided by; give one model a weight")
        return self

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [_Norms()] if self.normalize else ()

    def merge(self, block: Block, known: Known) -> Tensor:
        count = len(block.stored)
        weights = spread(self.weight, count)
        if not _is_known(block):
            return block.linear(weights, sum(weights))
        total = divisor = torch.zeros_like(block.models[0])
        for model, norm in enumerate(known.get("norms") or (1.0,) * count):
            importance = block.numbers("fisher", model).clamp(min=self.fisher_floor) * (weights[model] / norm)
            total = total + importance * block.models[model]
            divisor = divisor + importance
        return total / divisor


class _Norms(Stage):
    """`known["norms"]`: of each model ‖F‖₂ over all tensors of which every model's is known; 1 where that is 0."""

    name: ClassVar[str] = "norms of the Fisher information"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        if _is_known(block):
            each = [block.numbers("fisher", model).to(torch.float64).flatten() for model in range(len(block.stored))]
            squares = torch.stack([numbers * numbers for numbers in each])
            block.put_sums(found, "squares", grain_sums(squares, block.grain_elements))

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        squares = cast(GrainSums, found["squares"]).total().tolist() if "squares" in found else []
        known["norms"] = [math.sqrt(square) or 1.0 for square in squares]


def _is_known(block: Block) -> bool:
    return all(block.has_numbers("fisher", model) for model in range(len(block.stored)))
