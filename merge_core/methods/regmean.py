"""RegMean (Jin et al., 2022): of every linear layer the weights whose outputs are nearest to those of all models.

Wᵀ = (Σᵢ λᵢ G̃ᵢ)⁻¹ Σᵢ λᵢ G̃ᵢ Wᵢᵀ        G̃ᵢ = α Gᵢ + (1 − α) diag(Gᵢ), Gᵢ the mean of x xᵀ of what enters model i's layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from merge_core.kernels.plain import ZERO_SUM
from merge_core.matrices import runs
from merge_core.method import (
    BaseUse,
    Block,
    ExactOn,
    Extent,
    Given,
    Known,
    MergeMethod,
    PerModelMarker,
    spread,
)

SMALLEST = 1e-6
"""Eigenvalues below this share of the largest are what rounding left: the files' numbers are float32."""

PerModelImportance = Annotated[tuple[Annotated[float, Field(ge=0)], ...], PerModelMarker()]


class RegMean(MergeMethod):
    """Solve for the weights that answer each model's inputs as that model does, in the least squares' sense.

    Matrices of which every model's Gram matrix is given are solved for, in float64; all else is averaged by λ. What is
    solved for is the change from that average, so where no model's inputs ever go (a column that is always 0, or with
    α = 1 fewer examples than columns) the average stays. Columns are first scaled to inputs of one size: a few huge
    ones hide no others.

    Inputs of the first model go along the first column alone, of the second model along both:

    >>> one, other = [[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 4.0]]
    >>> RegMean(alpha=1).merge(Block.of([[[8.0, 8.0]], [[4.0, 4.0]]], gram=[one, other]), {})
    tensor([[6., 4.]], dtype=torch.float64)
    """

    name: ClassVar[str] = "regmean"
    title: ClassVar[str] = "RegMean"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.09849"
    base: ClassVar[BaseUse] = "model"
    precision: ClassVar[Literal["float32", "float64"]] = "float64"
    exact_on: ClassVar[ExactOn] = "this machine"
    workspace: ClassVar[tuple[int, int]] = (4, 18)
    statistics: ClassVar[Mapping[str, Given]] = {
        "gram": Given(
            "Gᵢ: for a matrix, under its name, the mean of x xᵀ of what enters its columns",
            shape="square",
            per_model=True,
            partial=True,
        )
    }

    weight: PerModelImportance = Field((1.0,), description="λᵢ: how much each model counts, 0 or more")
    alpha: float = Field(0.9, ge=0, le=1, description="α: how much of what is off the diagonals counts")
    solve: bool = Field(
        True, description="false: average; with a filter, for matrices that are not to be held whole in memory"
    )

    @model_validator(mode="after")
    def _weights_have_a_sum(self) -> Self:
        if sum(self.weight) < ZERO_SUM:
            raise ValueError("the weights sum to zero, which nothing can be divided by; give one model a weight")
        return self

    def extent(self, shape: Sequence[int]) -> Extent:
        return "tensor" if self.solve and len(shape) == 2 else "grain"

    def held(self, shape: Sequence[int]) -> float | None:
        """Σ G̃ᵢ and what its decomposition needs; the Gram matrices themselves are reckoned with as given numbers."""
        return 4 * shape[1] / shape[0] if self.extent(shape) == "tensor" else None

    def merge(self, block: Block, known: Known) -> Tensor:
        count = len(block.stored)
        weights = spread(self.weight, count)
        is_solved = self.extent(block.stored[0].shape) == "tensor"
        if not is_solved or not all(block.has_numbers("gram", model) for model in range(count)):
            return block.linear(weights, sum(weights))
        grams = [block.numbers("gram", model).to(torch.float64) for model in range(count)]
        scale, values, axes = _decomposed(grams, weights, self.alpha)
        rows, width = block.stored[0].shape
        merged = grams[0].new_empty(rows, width) if block.out is None else block.out
        for run in runs(rows, width):
            mean = _mean(block, weights, run)
            pull = torch.zeros_like(mean)
            for model, gram in enumerate(grams):
                delta = block.stored[model].run(run).to(mean.dtype) - mean
                pull.addmm_(delta, gram, alpha=weights[model] * self.alpha)
                pull += delta.mul_(gram.diagonal() * (weights[model] * (1 - self.alpha)))
            change = ((pull.mul_(scale) @ axes).mul_(values) @ axes.T).mul_(scale)
            merged[run] = mean.add_(change)
        return merged


def _decomposed(grams: Sequence[Tensor], weights: Sequence[float], alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """S = Σᵢ λᵢ G̃ᵢ as s, Λ⁺, Q with S⁻¹ = diag(s) Q Λ⁺ Qᵀ diag(s), where s brings S's diagonal to 1; 0 in s and Λ⁺ for
    directions without inputs. All is NaN if one of the numbers is.
    """
    whole = torch.zeros_like(grams[0])
    for gram, weight in zip(grams, weights, strict=True):
        whole.add_(gram, alpha=weight * alpha)
        whole.diagonal().add_(gram.diagonal(), alpha=weight * (1 - alpha))
    diagonal = whole.diagonal().clone()
    scale = torch.where(diagonal > 0, diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny).rsqrt(), 0.0)
    whole.mul_(scale).mul_(scale[:, None])
    values = torch.empty_like(diagonal)
    if not bool(torch.isfinite(whole).all()):
        return scale, values.fill_(torch.nan), whole.fill_(torch.nan)
    torch.linalg.eigh(whole.T, out=(values, whole.T))
    is_there = values > SMALLEST * values[-1].clamp(min=0)
    return scale, torch.where(is_there, 1 / values, 0.0), whole.T


def _mean(block: Block, weights: Sequence[float], run: slice) -> Tensor:
    """Σᵢ λᵢ Wᵢ / Σᵢ λᵢ of a run of rows, float64."""
    rows = (stored.run(run).to(torch.float64) for stored in block.stored)
    total = next(rows) * weights[0]
    for weight, more in zip(weights[1:], rows, strict=True):
        total.add_(more, alpha=weight)
    return total.div_(sum(weights))
