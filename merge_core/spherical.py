"""Geometry on coefficients: vectors that are combinations of a few rows, known by the rows' inner products alone.

A vector is Σᵢ cᵢ xᵢ; with G the Gram matrix of the rows, its length is √(cᵀ G c). All in float64, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
