"""Geometry on coefficients: vectors that are combinations of a few rows, known by the rows' inner products alone.

A vector is Σᵢ cᵢ xᵢ; with G the Gram matrix of the rows, its length is √(cᵀ G c). All in float64, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from merge_core.kernels.plain import pairs, total
from merge_core.method import Block, Known, Stage
from merge_core.statistics import GrainSums, Statistic, Sums, grain_sums, lane_sums

Matrix = Sequence[Sequence[float]]
SAME_DIRECTION = 1 - 2.0**-25
"""A cosine from which on float32 says 1: between such vectors, or their opposites, there is no plane to turn in."""


def lengths(gram: Matrix) -> list[float]:
    """‖xᵢ‖."""
    return [math.sqrt(gram[i][i]) for i in range(len(gram))]


def scaled_gram(gram: Matrix, scales: Sequence[float]) -> list[list[float]]:
    """The Gram matrix of the rows sᵢ xᵢ."""
    return [[gram[i][j] * (scales[i] * scales[j]) for j in range(len(gram))] for i in range(len(gram))]


def products(gram: Matrix, coefficients: Sequence[float]) -> list[float]:
    """⟨xᵢ, Σⱼ cⱼ xⱼ⟩."""
    return [sum(row[j] * coefficient for j, coefficient in enumerate(coefficients)) for row in gram]


def length(gram: Matrix, coefficients: Sequence[float]) -> float:
    """‖Σᵢ cᵢ xᵢ‖.

    >>> length([[1.0, 0.0], [0.0, 1.0]], [3.0, 4.0])
    5.0
    """
    square = sum(c * product for c, product in zip(coefficients, products(gram, coefficients), strict=True))
    return math.sqrt(max(0.0, square))


class ColumnProducts(Stage):
    """`known["columns"]`: inner products of the models' columns, or task vectors' columns, as lists by pair.

    A column runs over the first dimension; a 1-D tensor is one.
    """

    name: ClassVar[str] = "inner products of columns"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        vectors = block.vectors.to(torch.float64).reshape(len(block.stored), -1, block.grains.width).mT
        products = [grain_sums(vectors[i] * vectors[j], block.grains.size) for i, j in pairs(len(vectors))]
        block.put_sums(found, "columns", np.stack(products, axis=1))

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["columns"] = cast(GrainSums, found["columns"]).total().tolist()


def row_products(vectors: Tensor) -> Sums:
    """Inner products of all pairs (0,0), (0,1), …, (1,1), … of rows in the last dimension: `[pairs, rows]`, float64.

    `vectors` is `[models, ..., elements]`; a 0-d tensor has one row of one.
    """
    rows = vectors.reshape(len(vectors), -1, vectors.shape[-1] if vectors.ndim > 1 else 1).to(torch.float64)
    found: Sums = torch.stack([lane_sums(rows[i] * rows[j]) for i, j in pairs(len(rows))]).cpu().numpy()
    return found


def weighted(block: Block, coefficients: Tensor) -> Tensor:
    """θ₀ + Σᵢ cᵢ δᵢ, or Σᵢ cᵢ θᵢ where there is no base; each row or column has coefficients of its own."""
    summed = total(block.vectors * coefficients)
    return summed if block.stored_base is None else block.base + summed
