"""A task vector reduced to a few directions: truncated SVD, and EoRA (Liu et al., 2024), which weighs by the inputs.

θ = θ₀ + λ U_k U_kᵀ δ, where U_k are the k strongest left singular vectors of δ; or of δ S, where S Sᵀ is the covariance
of what enters the columns: the matrix of rank k whose outputs, not whose numbers, are the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from merge_core.matrices import Delta, MatrixMethod, Pieces, compose, empty, images, reciprocal, runs, sides, singular
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
        if self.extent(shape) != "tensor":
            return None
        square, lying = sides(shape)
        kept = min(1.0, self.rank / min(shape))
        return kept * (1 + square) + max(6 * square, (2 + 2 * kept) * square + lying)

    def merge(self, block: Block, known: Known) -> Tensor:
        if not self.is_decomposed(block):
            return self.average(block)
        (delta,) = Delta.each(block)
        weighted = self.weighted(delta, block)
        first = max(0, delta.short - self.rank)
        values, vectors = (found[..., first:] for found in singular(weighted or delta.pieces))
        vectors.mul_(values > 0)
        long = empty(block, delta.long, vectors.shape[1])
        if weighted is None or delta.is_lying:
            return compose(block, images(delta.pieces, vectors, long), vectors.to(block.working), self.lambda_)
        images(weighted, vectors.mul_(reciprocal(values)), long)
        short = vectors.zero_()
        for run, piece in delta.pieces():
            short.addmm_(piece.T, long[run].to(torch.float64))
        return compose(block, long, short.to(block.working), self.lambda_)

    def weighted(self, delta: Delta, block: Block) -> Pieces | None:
        """δ S, its long side first as that of δ, where directions are weighed."""
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
        if (held := super().held(shape)) is None:
            return None
        columns = shape[1] / shape[0]
        return max(6 * columns, 2 * columns + held)

    def weighted(self, delta: Delta, block: Block) -> Pieces | None:
        if not block.has_numbers("covariance"):
            return None
        root = _root(block.numbers("covariance").to(torch.float64, copy=True))
        if not delta.is_lying:
            return lambda: ((run, piece @ root) for run, piece in delta.pieces())

        def lying() -> Iterator[tuple[slice, Tensor]]:
            whole = torch.cat([piece.to(block.working) for _, piece in delta.pieces()])
            for run in runs(*whole.shape):
                product = root.new_zeros(run.stop - run.start, delta.short)
                for inner in runs(*whole.shape):
                    product.addmm_(root[inner, run].T, whole[inner].to(torch.float64))
                yield run, product

        return lying


def _root(covariance: Tensor) -> Tensor:
    """S with S Sᵀ = C, in the place of C."""
    squares = covariance.new_empty(len(covariance))
    torch.linalg.eigh(covariance.T, out=(squares, covariance.T))
    above = squares[squares > 0]
    squares = torch.where(squares < 0, above[:1], squares) if len(above) else torch.zeros_like(squares)
    return covariance.T.mul_(squares.sqrt())
