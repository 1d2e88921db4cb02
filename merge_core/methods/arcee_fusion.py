"""Arcee Fusion: take over only the changes that matter, as mergekit does it, one tensor at a time.

importance = |δ| · KL(softmax θ₁ ‖ softmax θ₀) of its row        θ = θ₀ + δ where it reaches median + 1.5 · (Q₃ − Q₁)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from merge_core.kernels.scores import Scores, divergences, fuse
from merge_core.method import Block, Extent, Known, MergeMethod, Scope, Stage
from merge_core.order import order

_QUARTILES = (0.25, 0.5, 0.75)


class ArceeFusion(MergeMethod):
    """Keep the entries of one task vector whose importance is far above that of most.

    A row runs along the last dimension; a 1-D tensor is one row. The quantile q of N importances is the one at place
    int(q (N − 1)) when all are sorted; of tensors with more than a million mergekit takes a random sample, and so gives
    other bytes each time. The softmax is made in float64, because in mergekit's float32 or bfloat16 small changes drown
    in its rounding: where importances are near the threshold, other entries may be kept.

    >>> block = Block.of([[[1.0, 0.0, 0.0, 0.1]]], base=[[0.0, 0.0, 0.0, 0.0]])
    >>> ArceeFusion().merge(block, {"importance": {"values": [[0.0, 0.0, 0.01]]}})
    tensor([[1., 0., 0., 0.]])
    """

    name: ClassVar[str] = "arcee_fusion"
    title: ClassVar[str] = "Arcee Fusion"
    paper: ClassVar[str] = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    workspace: ClassVar[tuple[int, int]] = (16, 24)

    @property
    def is_fused(self) -> bool:
        return True

    def extent(self, shape: Sequence[int]) -> Extent:
        return "tensor" if len(shape) == 1 else "grain"

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return order("importance", lambda block, known: _importance(block), _places)

    def merge(self, block: Block, known: Known) -> Tensor:
        first, median, third = np.array(known["importance"]["values"][0], np.float32)
        return fuse(_importance(block), float(median + np.float32(1.5) * (third - first)))


def _places(entries: int, nonzero: int) -> list[int]:
    return [int(quartile * (entries - 1)) for quartile in _QUARTILES]


def _importance(block: Block) -> Scores:
    vectors = block.task_vectors
    width = vectors.base.shape[-1] if vectors.base.shape else 1
    rows = divergences(vectors.base, vectors.models[0], width, block.working, block.grain_elements)
    return Scores(vectors, "divergence", divergences=rows, width=width)
