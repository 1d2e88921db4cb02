"""A task vector reduced to a few directions: truncated SVD, and EoRA (Liu et al., 2024), which weighs by the inputs.

θ = θ₀ + λ U_k U_kᵀ δ, where U_k are the k strongest left singular vectors of δ; or of δ S, where S Sᵀ is the covariance
of what enters the columns: the matrix of rank k whose outputs, not whose numbers, are the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from merge_core.matrices import Delta, MatrixMethod, compose, empty, held_for_directions, root_of, strongest
from merge_core.method import Block, Given, Known


class LowRank(MatrixMethod):
    """Add a model's task vector with a given rank, as an extracted adapter would hold it.

    Of vectors and tensors of more than two dimensions the whole task vector is added.

    >>> block = Block.of([[[4.0, 0.0], [0.0, 2.0]]], base=[[1.0, 0.0], [0.0, 1.0]])
    >>> LowRank(rank=1).merge(block, {})
    tensor([[4., 0.],
            [0., 1.]])
    """

    name: ClassVar[str] = "low_rank"
    title: ClassVar[str] = "Low-rank task vector (truncated SVD)"
    paper: ClassVar[str] = "https://doi.org/10.1007/BF02288367"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    averaged: ClassVar[tuple[str, ...]] = ()

    rank: int = Field(ge=1, description="k: how many directions of each matrix stay", examples=[2])

    def held(self, shape: Sequence[int]) -> float | None:
        return held_for_directions(shape, self.rank) if self.extent(shape) == "tensor" else None

    def merge(self, block: Block, known: Known) -> Tensor:
        if not self.is_decomposed(block):
            return self.average(block)
        (delta,) = Delta.each(block)
        found = strongest(delta, self.root(block), lambda values: self.rank, partial(empty, block))
        return compose(block, found.long, found.short, self.lambda_)

    def root(self, block: Block) -> Tensor | None:
        """S, where directions are weighed."""
        return None


class Eora(LowRank):
    """Add a model's task vector with a given rank, so that the layers' outputs on given inputs change least by what is
    left out.

    What is weighed is known of matrices with a covariance in the file; of others it is the task vector itself.
    Eigenvalues of a covariance below zero are taken for its smallest above, as in the official code. That code divides
    by S again; U Uᵀ δ is the same without.

    >>> model, base = [[4.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]
    >>> block = Block.of([model], base, covariance=[[[1.0, 0.0], [0.0, 9.0]]])
    >>> Eora(rank=1).merge(block, {})
    tensor([[0., 0.],
            [0., 2.]])
    """

    name: ClassVar[str] = "eora"
    title: ClassVar[str] = "Low-rank task vector for given inputs (EoRA)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.21271"
    statistics: ClassVar[Mapping[str, Given]] = {
        "covariance": Given(
            "C: for a matrix, under its name, the mean of x xᵀ of what enters its columns", shape="square", partial=True
        )
    }

    def held(self, shape: Sequence[int]) -> float | None:
        whole = self.extent(shape) == "tensor"
        return held_for_directions(shape, self.rank, weighted=True) if whole else None

    def root(self, block: Block) -> Tensor | None:
        if not block.has_numbers("covariance"):
            return None
        return root_of(block.numbers("covariance").to(torch.float64, copy=True))
