"""NearSwap (Alchemonaut, 2024): take the other model's weights where they are near, and little of them where not.

w = clip(t / |θ₁ − θ₀|, 0, 1)        θ = (1 − w) θ₀ + w θ₁
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.method import Block, Known, MergeMethod


class NearSwap(MergeMethod):
    """Move each weight of the base towards the other model's, but by no more than t.

    Nearer than t it is swapped; differences below 10⁻⁶ count as 10⁻⁶, so that with a smaller t not even those are.

    >>> NearSwap(t=0.5).merge(Block.of([[1.25, 4.0]], base=[1.0, 2.0]), {})
    tensor([1.2500, 2.5000])
    """

    name: ClassVar[str] = "nearswap"
    title: ClassVar[str] = "NearSwap"
    paper: ClassVar[str] = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    workspace: ClassVar[tuple[int, int]] = (2, 8)

    t: float = Field(description="how far a weight may move, in its own units", examples=[0.05])

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        return kernels.near_swap(block.task_vectors, self.t)
