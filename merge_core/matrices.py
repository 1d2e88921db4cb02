"""What methods that decompose whole matrices share: task vectors read in runs, singular vectors, polar factors.

A matrix is taken with its long side first. Of its singular value decomposition the short side comes from the Gram
matrix of that side in float64, δᵀδ = V Σ² Vᵀ, and the long side is U = δ V Σ⁻¹: one matrix of the short side squared is
decomposed, in place, and the task vectors themselves are read in runs of rows as often as they are needed.

Singular values come out with an error of about 1e-16 σ₁² / σ: those above 1e-4 of the largest are as exact as float32
is, those at `SMALLEST` to some three digits, which is more than a float32 decomposition of the matrix gives. Below it
is what subtracting float32 weights leaves behind: such directions count as zero and have no singular vectors, where the
papers' code takes whatever the library returns.

BLAS and LAPACK give the same bits on the same machine only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels.vectors import RUN_ELEMENTS, Rows
from merge_core.method import Block, ExactOn, Extent, MergeMethod

SMALLEST = 1e-6
"""Singular values below this share of the largest count as zero."""

Pieces = Callable[[], Iterable[tuple[slice, Tensor]]]
"""A matrix with its long side first, read from the beginning: runs of the long side, `[run, short]`, float64."""


class MatrixMethod(MergeMethod):
    """Base of the methods that decompose matrices and average all other tensors."""

    exact_on: ClassVar[ExactOn] = "this machine"
    averaged: ClassVar[tuple[str, ...]] = ("text_projection",)
    """Tensors with these in their names the papers' code averages although they are matrices."""

    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the merged task vector")
    decompose: bool = Field(
        True,
        description="false: average the task vectors, as of tensors that are no matrices; with a filter, for what is "
        "not to be decomposed, such as a large embedding",
    )

    def extent(self, shape: Sequence[int]) -> Extent:
        return "tensor" if self.decompose and len(shape) == 2 else "grain"

    def held(self, shape: Sequence[int]) -> float | None:
        return self.held_for(*sides(shape)) if self.extent(shape) == "tensor" else None

    def held_for(self, square: float, lying: float) -> float:
        """What `held` says of a matrix: `square` is the size of the short side squared, `lying` that of the matrix
        where it lies down and so is held while it is read, else 0; both as shares of the matrix.

        As it stands: vectors of both sides, and the Gram matrix in float64 with what its decomposition needs.
        """
        return 1 + square + max(6 * square, 4 * square + lying)

    def is_decomposed(self, block: Block) -> bool:
        if not self.decompose or len(block.origin.shape) != 2:
            return False
        return not any(part in block.tensor for part in self.averaged)

    def average(self, block: Block) -> Tensor:
        """θ₀ + λ/n Σᵢ δᵢ."""
        equal = (1.0,) * len(block.stored)
        return kernels.combine(block.task_vectors, average="weight", weights=equal, scale=self.lambda_)


def sides(shape: Sequence[int]) -> tuple[float, float]:
    """Of a matrix: its short side by its long one, and whether it lies down, as 1 or 0."""
    rows, width = shape[0], math.prod(shape[1:])
    return min(rows, width) / max(rows, width), float(rows < width)


@dataclass(frozen=True)
class Delta:
    """The task vector of one model, or the sum of several, as a matrix with its long side first.

    A matrix that lies down is held whole while it is read, one that stands is not.
    """

    base: Rows
    models: Sequence[Rows]
    working: torch.dtype

    @classmethod
    def each(cls, block: Block) -> list[Delta]:
        return [cls(block.origin, [model], block.working) for model in block.stored]

    @classmethod
    def sum(cls, block: Block) -> Delta:
        return cls(block.origin, block.stored, block.working)

    @property
    def is_lying(self) -> bool:
        return self.base.shape[0] < math.prod(self.base.shape[1:])

    @property
    def short(self) -> int:
        return min(self.base.shape[0], math.prod(self.base.shape[1:]))

    @property
    def long(self) -> int:
        return max(self.base.shape[0], math.prod(self.base.shape[1:]))

    def norm(self) -> float:
        """‖δ‖, the root of the sum of all squares."""
        squares = [float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2 for _, rows in self._stored_runs()]
        return math.sqrt(math.fsum(squares))

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        if not self.is_lying:
            for run, rows in self._stored_runs():
                yield run, rows.to(torch.float64)
            return
        whole = None
        for run, rows in self._stored_runs():
            if whole is None:
                whole = rows.new_empty(self.short, self.long)
            whole[run] = rows
        assert whole is not None
        for run in runs(self.long, self.short):
            yield run, whole[:, run].T.to(torch.float64)

    def _stored_runs(self) -> Iterator[tuple[slice, Tensor]]:
        rows, width = self.base.shape[0], math.prod(self.base.shape[1:])
        for run in runs(rows, width):
            base = self.base.run(run).to(self.working)
            delta = self.models[0].run(run).to(self.working) - base
            for model in self.models[1:]:
                delta += model.run(run).to(self.working) - base
            yield run, delta.reshape(-1, width)


def runs(rows: int, width: int) -> Iterator[slice]:
    """The rows of a matrix in runs, a function of its shape only."""
    size = max(1, RUN_ELEMENTS // width)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def singular(pieces: Pieces, size: float = 0) -> tuple[Tensor, Tensor]:
    """The singular values of a matrix, ascending, 0 for those that count as zero, and the vectors of its short side as
    columns; float64. `size`: what the values are compared with besides the largest, where a matrix is what is left of
    one of that size.
    """
    gram = None
    for _, piece in pieces():
        if gram is None:
            gram = piece.new_zeros(piece.shape[1], piece.shape[1])
        gram.addmm_(piece.T, piece)
    assert gram is not None
    squares = gram.new_empty(len(gram))
    if not bool(torch.isfinite(gram).all()):
        return squares.fill_(torch.nan), gram.fill_(torch.nan)
    torch.linalg.eigh(gram.T, out=(squares, gram.T))
    values = squares.clamp_(min=0).sqrt_()
    least = SMALLEST * max(float(values[-1]), size)
    return torch.where(values > least, values, 0.0), gram.T


def reciprocal(values: Tensor) -> Tensor:
    """1/σ, and 0 where σ is 0."""
    return torch.where(values == 0, values, 1 / values)


def images(pieces: Pieces, vectors: Tensor, out: Tensor) -> Tensor:
    """A matrix times vectors of its short side, `[long, vectors]`: its long side's singular vectors times Σ."""
    for run, piece in pieces():
        out[run] = piece @ vectors
    return out


def keep_strongest(pieces: Pieces, long: Tensor, short: Tensor, strengths: Tensor, *, size: float = 0) -> None:
    """Put as many of a matrix's strongest singular vectors and values there as have place, 0 where it has fewer;
    for `size` see `singular`.
    """
    first = short.shape[0] - short.shape[1]
    values, vectors = (found[..., first:] for found in singular(pieces, size))
    short.copy_(vectors).mul_(values > 0)
    strengths.copy_(values)
    images(pieces, vectors.mul_(reciprocal(values)), long)


@dataclass(frozen=True)
class Directions:
    """A matrix of low rank, long · shortᵀ, float64 strengths ascending.

    One side's vectors are orthonormal (zeros beyond the matrix's rank), the other's have the strengths in them.
    """

    strengths: Tensor
    long: Tensor
    short: Tensor
    is_short_orthonormal: bool

    def balance(self) -> tuple[Tensor, Tensor]:
        """The long and the short side, each with the roots of the strengths in it, in place."""
        roots = self.strengths.sqrt()
        orthonormal, carrying = (self.short, self.long) if self.is_short_orthonormal else (self.long, self.short)
        orthonormal.mul_(roots.to(orthonormal.dtype))
        carrying.mul_(reciprocal(roots).to(carrying.dtype))
        return self.long, self.short


def strongest(
    delta: Delta, root: Tensor | None, choose: Callable[[Tensor], int], space: Callable[..., Tensor]
) -> Directions:
    """U_k U_kᵀ δ, where U_k are the strongest left singular vectors of δ, or of δ S if there is a `root` S, `[width,
    width]`, float64, which weighs what enters the columns.

    `choose` says from the singular values, ascending, how many; `space` gives room in the dtype of the result. Without
    S the sides are δ V_k and V_k.
    """
    weighted = None if root is None else weigh(delta, root)
    values, vectors = singular(weighted or delta.pieces)
    first = len(values) - min(len(values), choose(values))
    values, vectors = values[first:], vectors[:, first:]
    vectors.mul_(values > 0)
    long = space(delta.long, vectors.shape[1])
    if weighted is None or delta.is_lying:
        return Directions(values, images(delta.pieces, vectors, long), vectors.to(long.dtype), True)
    images(weighted, vectors.mul_(reciprocal(values)), long)
    short = vectors.zero_()
    for run, piece in delta.pieces():
        short.addmm_(piece.T, long[run].to(torch.float64))
    return Directions(values, long, short.to(long.dtype), False)


def weigh(delta: Delta, root: Tensor) -> Pieces:
    """δ S, its long side first as that of δ."""
    if not delta.is_lying:
        return lambda: ((run, piece @ root) for run, piece in delta.pieces())

    def lying() -> Iterator[tuple[slice, Tensor]]:
        whole = torch.cat([piece.to(delta.working) for _, piece in delta.pieces()])
        for run in runs(*whole.shape):
            product = root.new_zeros(run.stop - run.start, delta.short)
            for inner in runs(*whole.shape):
                product.addmm_(root[inner, run].T, whole[inner].to(torch.float64))
            yield run, product

    return lying


def root_of(covariance: Tensor) -> Tensor:
    """S with S Sᵀ = C, float64, in the place of C. Eigenvalues below zero are taken for the smallest above."""
    squares = covariance.new_empty(len(covariance))
    torch.linalg.eigh(covariance.T, out=(squares, covariance.T))
    above = squares[squares > 0]
    squares = torch.where(squares < 0, above[:1], squares) if len(above) else torch.zeros_like(squares)
    return covariance.T.mul_(squares.sqrt())


def held_for_directions(shape: Sequence[int], rank: int | None, *, weighted: bool = False) -> float:
    """What `strongest` holds of a matrix, in sizes of the matrix; without a `rank` all directions are reckoned with."""
    square, lying = sides(shape)
    kept = 1.0 if rank is None else min(1.0, rank / min(shape[0], math.prod(shape[1:])))
    held = kept * (1 + square) + max(6 * square, (2 + 2 * kept) * square + lying)
    columns = math.prod(shape[1:]) / shape[0]
    return max(6 * columns, 2 * columns + held) if weighted else held


def empty(block: Block, *shape: int) -> Tensor:
    """Space in the working dtype, where the block's rows are."""
    return torch.empty(shape, dtype=block.working, device=block.origin.run(slice(0, 1)).device)


def orthogonalize(vectors: Tensor) -> Tensor:
    """The columns replaced by the nearest that are orthonormal, their polar factor, in place."""

    def pieces() -> Iterator[tuple[slice, Tensor]]:
        for run in runs(*vectors.shape):
            yield run, vectors[run].to(torch.float64)

    lengths, axes = singular(pieces)
    straight = (axes * reciprocal(lengths)) @ axes.T
    return images(pieces, straight, vectors)


def compose(block: Block, long: Tensor, short: Tensor, scale: float) -> Tensor:
    """θ₀ + λ · long · shortᵀ, turned as the tensor is stored, a run of rows after the other."""
    rows, width = block.origin.shape[0], math.prod(block.origin.shape[1:])
    left, right = (short, long) if rows < width else (long, short)
    merged = long.new_empty(block.origin.shape) if block.out is None else block.out
    for run in runs(rows, width):
        base = block.origin.run(run).to(block.working)
        rebuilt = base + (left[run] @ right.T * scale).reshape(base.shape)
        merged[run] = torch.where(rebuilt.isnan(), torch.nan, rebuilt)
    return merged
