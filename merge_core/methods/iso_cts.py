"""ISO-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., 2025).

Σᵢ δᵢ = U Σ Vᵀ, of which the first k stay: the common subspace        δ̄ᵢ = δᵢ − U_k U_kᵀ δᵢ = Uᵢ Σᵢ Vᵢᵀ

of which the first (r − k)/n stay        θ = θ₀ + λ σ̄ orth([U₁ … Uₙ U_k]) orth([V₁ … Vₙ V_k])ᵀ, σ̄ = mean of all their σ
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.matrices import Delta, MatrixMethod, Pieces, compose, empty, keep_strongest, orthogonalize
from merge_core.method import Block, Known, Share


class IsoCts(MatrixMethod):
    """Like ISO-C, with the weakest common directions given up for the strongest that each task has alone.

    Vectors and tensors of more than two dimensions are averaged, and so is what is named text_projection, as in the
    authors' code. So many directions are common that the rest can be dealt out evenly. Where there is no full rank, the
    directions that lack stay out; the authors' code takes what the library completes U and V with.

    >>> block = Block.of([[[4.0, 0.0], [0.0, 2.0]]], base=[[0.0, 0.0], [0.0, 0.0]])
    >>> IsoCts(common_space_fraction=0.5).merge(block, {})
    tensor([[3., 0.],
            [0., 3.]])
    """

    name: ClassVar[str] = "iso_cts"
    title: ClassVar[str] = "Isotropic merging (ISO-CTS)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.04959"

    common_space_fraction: Share = Field(0.8, description="k/r: share of the directions that are common, 0 to 1")

    def held_for(self, square: float, lying: float) -> float:
        return 1 + 2 * square + max(6 * square, 4 * square + lying)

    def merge(self, block: Block, known: Known) -> Tensor:
        if not self.is_decomposed(block):
            return self.average(block)
        deltas, summed = Delta.each(block), Delta.sum(block)
        specific, common = self._dealt_out(summed.short, len(deltas))
        size = specific * len(deltas) + common
        long, short, strengths = empty(block, summed.long, size), empty(block, summed.short, size), empty(block, size)
        shared = slice(size - common, size)
        keep_strongest(summed.pieces, long[:, shared], short[:, shared], strengths[shared])
        for i, delta in enumerate(deltas if specific else ()):
            part = slice(i * specific, (i + 1) * specific)
            rest = _without(delta, short[:, shared] if delta.is_lying else long[:, shared])
            keep_strongest(rest, long[:, part], short[:, part], strengths[part], size=delta.norm())
        scale = self.lambda_ * float(strengths.mean())
        return compose(block, orthogonalize(long), orthogonalize(short), scale)

    def _dealt_out(self, rank: int, models: int) -> tuple[int, int]:
        """How many directions each model has alone, and how many they share."""
        common = int(rank * self.common_space_fraction)
        specific = min(round((rank - common) / models), rank // models)
        return specific, rank - specific * models


def _without(delta: Delta, common: Tensor) -> Pieces:
    """The task vector without the common left singular vectors, which are of the short side where it lies down."""
    if delta.is_lying:

        def lying() -> Iterator[tuple[slice, Tensor]]:
            for run, piece in delta.pieces():
                yield run, piece.sub_(piece.to(common.dtype) @ common @ common.T)

        return lying
    shadow = common.new_zeros(common.shape[1], delta.short)
    for run, piece in delta.pieces():
        shadow.addmm_(common[run].T, piece.to(common.dtype))

    def standing() -> Iterator[tuple[slice, Tensor]]:
        for run, piece in delta.pieces():
            yield run, piece.sub_(common[run] @ shadow)

    return standing
