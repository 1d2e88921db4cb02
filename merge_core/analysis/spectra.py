"""The strong directions of task vectors that are matrices: singular values, how many there are, how far two share them.

A matrix whose short side has no more than so many elements is decomposed whole, by the Gram matrix of that side
(`matrices.py`). Of a larger one a sketch tells the strongest directions only: with a random test matrix Ω of
`top + SPARE` columns, ±1 each,

    Z = (δᵀδ)ᵠ Ω        Q R = Z        δ Q = U Σ Wᵀ        V = Q W

(Halko, Martinsson & Tropp, 2011, algorithm 4.4, https://arxiv.org/abs/0909.4061), with q = `POWER`. A product with δᵀδ
takes one reading of the rows, so all takes q + 1. Sketched singular values are never above the true ones, and those
that stand out are close; memory is that of a few columns. Ω is counter-based: the same for all models of a tensor, for
any threads and blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_core import random
from merge_core.kernels.vectors import RUN_ELEMENTS
from merge_core.matrices import Delta, Pieces, singular

SPARE = 8
"""Columns of the test matrix beyond the directions that are asked for."""
POWER = 2
_RUNS = 8
"""How many runs of a matrix in float64 there are at once while it is read."""


@dataclass(frozen=True)
class Spectrum:
    """The strong directions of one matrix.

    `values`: the largest singular values, descending, none that count as zero; `vectors` `[short side, values]`, the
    singular vectors of the short side, float64. `effective_rank`: e^H of pᵢ = σᵢ/Σσ (Roy & Vetterli, 2007), None where
    the matrix `is_sketched`.
    """

    values: tuple[float, ...]
    vectors: Tensor
    effective_rank: float | None
    is_sketched: bool


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor has directions; a convolution counts as a matrix of its output channels."""
    return len(shape) > 1 and min(shape[0], math.prod(shape[1:])) > 1


def is_sketched(shape: Sequence[int], exact_up_to: int) -> bool:
    """Whether a matrix is too large to be decomposed whole."""
    return min(shape[0], math.prod(shape[1:])) > exact_up_to


def readings(shape: Sequence[int], exact_up_to: int) -> int:
    """How often all rows are read. One that lies down is held while it is read."""
    return POWER + 1 if is_sketched(shape, exact_up_to) else 1


def spectrum_bytes(shape: Sequence[int], top: int, exact_up_to: int, itemsize: int) -> int:
    """Memory that it takes to find the spectrum of one model's matrix, of numbers of so many bytes in the working
    format.
    """
    rows, width = shape[0], math.prod(shape[1:])
    short, run = min(rows, width), min(rows * width, max(RUN_ELEMENTS, width))
    needed = 8 * _RUNS * run + (rows < width) * rows * width * itemsize
    columns = min(short, top + SPARE)
    return needed + 8 * (6 * short * columns if is_sketched(shape, exact_up_to) else 5 * short**2 + short * columns)


def spectrum(delta: Delta, tensor: str, top: int, exact_up_to: int) -> Spectrum:
    """The strongest `top` directions of a task vector, the `tensor` of which keys its sketch."""
    if delta.short > exact_up_to:
        values, vectors = _sketched(delta.pieces, delta.short, min(delta.short, top + SPARE), tensor)
        return _strongest(values, vectors, top, None, is_sketched=True)
    values, vectors = singular(delta.pieces)
    return _strongest(values.flip(0), vectors.flip(1), top, _effective_rank(values), is_sketched=False)


def overlap(one: Spectrum, other: Spectrum) -> float | None:
    """Which part of one strong subspace of the short side lies in the other: ‖V₁ᵀV₂‖²/k for the smaller number k of
    directions, 1 where it is the same, k/short by chance; None where there is no direction.
    """
    count = min(len(one.values), len(other.values))
    if count == 0:
        return None
    return float((one.vectors[:, :count].T @ other.vectors[:, :count]).square().sum()) / count


def _strongest(values: Tensor, vectors: Tensor, top: int, effective: float | None, *, is_sketched: bool) -> Spectrum:
    there = min(top, int((values > 0).sum()))
    return Spectrum(tuple(values[:there].tolist()), vectors[:, :there].clone(), effective, is_sketched)


def _effective_rank(values: Tensor) -> float:
    """e^H of the values as shares of their sum, 0 for a matrix of zeros.

    >>> round(_effective_rank(torch.tensor([1.0, 1.0, 1.0, 0.0])), 6)
    3.0
    """
    total = math.fsum(values.tolist())
    shares = [value / total for value in values.tolist() if value > 0] if total > 0 else []
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


def _sketched(pieces: Pieces, short: int, columns: int, tensor: str) -> tuple[Tensor, Tensor]:
    """Approximate singular values, descending, and vectors of the short side `[short, columns]`."""
    draws = random.uniform(random.stream_key(0, 0, tensor), 0, short * columns)
    basis = torch.where(draws.reshape(short, columns) < 0.5, -1.0, 1.0).to(torch.float64)
    for _ in range(POWER):
        product = torch.zeros_like(basis)
        for _, piece in pieces():
            product.addmm_(piece.T, piece @ basis)
        basis, _ = torch.linalg.qr(product)
    gram = basis.new_zeros(columns, columns)
    for _, piece in pieces():
        images = piece @ basis
        gram.addmm_(images.T, images)
    squares, inner = torch.linalg.eigh(gram)
    values = squares.clamp(min=0).sqrt().flip(0)
    values = torch.where(values > 1e-6 * values[0], values, 0.0)
    return values, (basis @ inner).flip(1)
