"""TSV-M: task singular vectors, merged (Gargiulo et al., 2025).

δᵢ = Uᵢ Σᵢ Vᵢᵀ, of which the first r/n singular vectors stay        U = [U₁ … Uₙ], Σ = diag(Σ₁ … Σₙ), V = [V₁ … Vₙ]

θ = θ₀ + λ orth(U) Σ orth(V)ᵀ, where orth(X) = X (XᵀX)^(−½) is the nearest matrix with orthonormal columns
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from merge_core.matrices import Delta, MatrixMethod, compose, empty, keep_strongest, orthogonalize
from merge_core.method import Block, Known


class TsvM(MatrixMethod):
    """Keep each task vector's strongest singular vectors, an equal share each, and take out what they interfere.

    Vectors and tensors of more than two dimensions are averaged, and so is what is named text_projection, as in the
    authors' code; besides, matrices with a side shorter than there are models, of which that code would keep nothing. A
    task vector without full rank has no further singular vectors; the authors' code takes what the library completes U
    and V with, at strength 0, and makes the others orthogonal to those as well.

    >>> models = [[[2.0, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 3.0]]]
    >>> TsvM().merge(Block.of(models, base=[[0.0, 0.0], [0.0, 0.0]]), {})
    tensor([[2., 0.],
            [0., 3.]])
    """

    name: ClassVar[str] = "tsv_m"
    title: ClassVar[str] = "Task singular vectors (TSV-M)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.00081"

    def merge(self, block: Block, known: Known) -> Tensor:
        if not self.is_decomposed(block) or min(block.origin.shape) < len(block.stored):
            return self.average(block)
        deltas = Delta.each(block)
        share = deltas[0].short // len(deltas)
        size = share * len(deltas)
        long, short, strengths = (
            empty(block, deltas[0].long, size),
            empty(block, deltas[0].short, size),
            empty(block, size),
        )
        for i, delta in enumerate(deltas):
            part = slice(i * share, (i + 1) * share)
            keep_strongest(delta.pieces, long[:, part], short[:, part], strengths[part])
        return compose(block, orthogonalize(long), orthogonalize(short).mul_(strengths), self.lambda_)
