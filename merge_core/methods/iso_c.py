"""ISO-C: isotropic merging in the common subspace (Marczak et al., 2025).

Σᵢ δᵢ = U Σ Vᵀ        σ̄ = mean of Σ        θ = θ₀ + λ σ̄ U Vᵀ
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from merge_core.matrices import Delta, MatrixMethod, compose, empty, images, reciprocal, singular
from merge_core.method import Block, Known


class IsoC(MatrixMethod):
    """Give all directions of the summed task vectors the same, their average, strength.

    Vectors and tensors of more than two dimensions are averaged, and so is what is named text_projection, as in the
    authors' code. Where the sum does not have full rank, the directions it lacks stay out; the authors' code takes what
    the library completes U and V with.

    >>> IsoC().merge(Block.of([[[4.0, 0.0], [0.0, 2.0]]], base=[[0.0, 0.0], [0.0, 0.0]]), {})
    tensor([[3., 0.],
            [0., 3.]])
    """

    name: ClassVar[str] = "iso_c"
    title: ClassVar[str] = "Isotropic merging (ISO-C)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.04959"

    def held_for(self, square: float, lying: float) -> float:
        return max(6 * square, 1 + 4 * square + lying)

    def merge(self, block: Block, known: Known) -> Tensor:
        if not self.is_decomposed(block):
            return self.average(block)
        delta = Delta.sum(block)
        values, vectors = singular(delta.pieces)
        mean = float(values.mean())
        short = vectors.to(block.working).mul_(values > 0)
        long = images(delta.pieces, vectors.mul_(reciprocal(values)), empty(block, delta.long, delta.short))
        return compose(block, long, short, self.lambda_ * mean)
