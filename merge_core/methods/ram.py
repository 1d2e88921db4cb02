"""RAM: Reinforced Agent Merging (2026). Keep what one model alone changed, average what several did.

cᵢ = [ |δᵢ| > ε ]        θ = θ₀ + Σᵢ cᵢ δᵢ / Σᵢ cᵢ        or θ₀ where no model changed anything

RAM+ makes up for what averaging takes from a model, on the entries that are its own alone:

λᵢ = 1 + r · clip(sharedᵢ / uniqueᵢ, 0, α)        θ = θ₀ + λᵢ δᵢ where only model i changed something
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels.vectors import TaskVectors
from merge_core.method import Block, Known, MergeMethod, Scope, Stage
from merge_core.stages import Overlaps

PAPER = "https://arxiv.org/abs/2601.13572"


class Ram(MergeMethod):
    """Keep changes of one model as they are; where several changed a weight, take the mean of their changes.

    >>> Ram().merge(Block.of([[2.0, 0.0, 4.0], [0.0, 0.0, -1.0]], base=[0.0, 0.0, 0.0]), {})
    tensor([2.0000, 0.0000, 1.5000])
    """

    name: ClassVar[str] = "ram"
    title: ClassVar[str] = "RAM: unique changes kept, shared ones averaged"
    paper: ClassVar[str] = PAPER
    workspace: ClassVar[tuple[int, int]] = (10, 8)

    epsilon: float = Field(1e-5, ge=0, description="ε: a weight that moved no further than this did not change")

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        return kernels.combine(self._changed(block, known), average="shared", scale=1.0)

    def _changed(self, block: Block, known: Known) -> TaskVectors:
        """Trimming keeps what reaches a threshold: here the least float32 above ε."""
        return block.task_vectors.trimmed((float(np.nextafter(np.float32(self.epsilon), np.float32(np.inf))),))


class RamPlus(Ram):
    """RAM, with each model's unique changes enlarged the more of its others are shared; counted per tensor.

    >>> block = Block.of([[2.0, 0.0, 4.0], [0.0, 0.0, -1.0]], base=[0.0, 0.0, 0.0])
    >>> RamPlus(r=0.5, alpha=1.0).merge(block, {"overlaps": [[1, 1], [0, 1]]})
    tensor([3.0000, 0.0000, 1.5000])
    """

    name: ClassVar[str] = "ramplus_tl"
    title: ClassVar[str] = "RAM+: unique changes enlarged, shared ones averaged"
    paper: ClassVar[str] = PAPER

    r: float = Field(0.1, description="how much a unique change grows per shared one")
    alpha: float = Field(0.2, ge=0, description="α: the most shared changes per unique one that count", examples=[2.0])

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [Overlaps(self._changed)]

    def merge(self, block: Block, known: Known) -> Tensor:
        scales = tuple(self._scale(unique, shared) for unique, shared in known["overlaps"])
        return kernels.combine(self._changed(block, known), average="shared", weights=scales, scale=1.0)

    def _scale(self, unique: int, shared: int) -> float:
        return 1 + self.r * min(shared / unique, self.alpha) if unique else 1.0
