"""DAREx-q (Deng et al., 2025): drop at random, then divide what is left by q instead of 1 − p.

mᵢ ~ Bernoulli(p)        θ = θ₀ + λ Σᵢ wᵢ (1 − mᵢ) ⊙ δᵢ / qᵢ

q is given, or found for each layer from the mean activations a that enter it. With c = δ ⊙ a, a row's q is the one that
bounds best how much its output changes:

    argmin_q | η (1 − (1−p)/q) Σc + η² φ(p) Σc² / (4 q²) + ln(2 / (1−γ)) |        φ(p) = (1 − 2p) / ln((1−p) / p)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.method import Block, Given, Known, MergeMethod, PerModel, PerModelMarker, Scope, Stage
from merge_core.statistics import RowValues, Statistic, lane_sums

ANALYTIC = "analytic"
_GRID = 1000
"""q is searched in steps of a thousandth, from 1 − p to below 0.999."""
_ROWS_AT_ONCE = 256

PerModelDropRate = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], PerModelMarker()]
Divisor = Annotated[float, Field(gt=0)] | Literal["analytic"]
PerModelDivisor = Annotated[tuple[Divisor, ...], PerModelMarker()]


class DarexQ(MergeMethod):
    """Drop even 99 % of a fine-tune, with a rescaling that does not blow up what is left.

    `q: analytic` takes for a matrix the mean of its rows' q, for a bias that of its weight, whose column it is, and for
    all else the mean of all matrices. The authors' code searches in float16 and stops early; this looks at the whole
    grid in float64. A tensor to be kept whole (a classifier) has `drop_rate` 0 there, and q is then 1.

    >>> block = Block.of([[1.0, 2.0]], base=[0.0, 0.0])
    >>> DarexQ(drop_rate=(0.0,), q=(0.5,)).merge(block, {})
    tensor([2., 4.])
    """

    name: ClassVar[str] = "darex"
    title: ClassVar[str] = "DAREx-q, then task arithmetic"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.09344"
    scopes: ClassVar[tuple[Scope, ...]] = ("model",)
    measured: ClassVar[tuple[str, ...]] = ("drop_rate", "q", "eta", "gamma")
    workspace: ClassVar[tuple[int, int]] = (14, 6)
    statistics: ClassVar[Mapping[str, Given]] = {
        "activations": Given(
            "a: for each matrix, under its name, the mean of what enters each of its columns (q: analytic)",
            shape="columns",
            per_model=True,
            required=False,
            partial=True,
        )
    }

    weight: PerModel = Field((1.0,), description="wᵢ: coefficient of each task vector")
    drop_rate: PerModelDropRate = Field((0.9,), description="p: chance of each entry to be dropped, 0 to below 1")
    q: PerModelDivisor = Field(
        description="what is left is divided by it, 1 − p is plain DARE; or analytic: found from given activations",
        examples=[ANALYTIC],
    )
    eta: float = Field(0.3, gt=0, description="η of the analytic q; the authors' lie between 0.27 and 1.01")
    gamma: float = Field(0.95, ge=0, lt=1, description="γ of the analytic q: the bound's confidence")
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the summed task vectors")

    def needs(self, statistic: str, model: int) -> bool:
        return self.is_analytic(model)

    @property
    def is_fused(self) -> bool:
        return not self.stages("model")

    def stages(self, scope: Scope) -> Sequence[Stage]:
        count = max(len(self.q), len(self.drop_rate))
        return [_RowSums(self)] if any(self.is_analytic(model) for model in range(count)) else ()

    def merge(self, block: Block, known: Known) -> Tensor:
        vectors = block.task_vectors.dropped(self.drop_rate)
        divisors = tuple(self._divisor(model, block.tensor, known) for model in range(len(block.stored)))
        return kernels.combine(vectors.divided(divisors).times(self.weight), scale=self.lambda_)

    def drop_rate_of(self, model: int) -> float:
        return self.drop_rate[model % len(self.drop_rate)]

    def is_analytic(self, model: int) -> bool:
        """Whether a model's q has to be found."""
        return self.q[model % len(self.q)] == ANALYTIC and self.drop_rate_of(model) > 0

    def _divisor(self, model: int, tensor: str, known: Known) -> float:
        q = self.q[model % len(self.q)]
        if self.is_analytic(model):
            found = known["q"][model]
            return float(found["layers"].get(tensor, found["others"]))
        return 1.0 if q == ANALYTIC else float(q)


def analytic_q(
    sums: NDArray[np.float64], squares: NDArray[np.float64], drop_rate: float, eta: float, gamma: float
) -> NDArray[np.float64]:
    """The q of each row from its Σc and Σc²; of equally good ones the least.

    >>> analytic_q(np.array([0.0]), np.array([0.0]), 0.9, 0.3, 0.95)
    array([0.099])
    """
    kept = 1 - drop_rate
    phi = 0.5 if drop_rate == 0.5 else (1 - 2 * drop_rate) / math.log(kept / drop_rate)
    grid = np.arange(max(1, int(kept * _GRID)), _GRID - 1) * 1e-3
    offsets, spreads = eta * (1 - kept / grid), eta * eta * phi / (4 * grid * grid)
    found = np.empty(len(sums))
    for start in range(0, len(sums), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        bounds = sums[rows, None] * offsets + squares[rows, None] * spreads + math.log(2 / (1 - gamma))
        found[rows] = grid[np.abs(bounds).argmin(axis=1)]
    return found


@dataclass
class _RowSums(Stage):
    """Σc and Σc² of each row of the matrices whose activations are given, and the biases that join them as a column.

    `known["q"]`: per model the q of each layer's tensors, and of all others. Holds two numbers per row of the model.
    """

    method: DarexQ
    name: ClassVar[str] = "analytic q"

    def kept(self, rows: int) -> int:
        return 2 * 8 * rows

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        size = block.grains.size
        first = block.first_grain * size
        for model, tuned in enumerate(block.models):
            delta = tuned - block.base
            rows = cast(RowValues, found.setdefault(str(model), RowValues()))
            if block.has_numbers("activations", model):
                means = block.numbers("activations", model).double()
                for part, at in zip(delta.split(size), range(first, first + len(delta), size), strict=True):
                    changes = (part.double() * means).reshape(len(part), -1)
                    sums = lane_sums(torch.stack([changes, changes * changes]))
                    rows.put(block.tensor, block.grains.rows, at, sums.T.cpu().numpy())
            elif delta.ndim == 1 and block.tensor.endswith("bias"):
                rows.put(block.tensor, block.grains.rows, first, delta.double().cpu().numpy())

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["q"] = [
            self._of_model(model, cast(RowValues, found[str(model)])) if self.method.is_analytic(model) else None
            for model in range(len(found))
        ]

    def _of_model(self, model: int, rows: RowValues) -> dict[str, Any]:
        drop_rate = self.method.drop_rate_of(model)
        layers: dict[str, float] = {}
        own = []
        for tensor in sorted(rows.rows):
            values = rows.rows[tensor]
            if values.ndim == 1:
                continue
            sums, squares = values.T
            names = [tensor]
            bias = f"{tensor.removesuffix('weight')}bias"
            if bias in rows.rows and len(column := rows.rows[bias]) == len(values):
                sums, squares = sums + column, squares + column * column
                names.append(bias)
            q = analytic_q(sums, squares, drop_rate, self.method.eta, self.method.gamma)
            own.append(math.fsum(q) / len(q))
            layers |= dict.fromkeys(names, own[-1])
        return {"layers": layers, "others": math.fsum(own) / len(own) if own else 1 - drop_rate}
