"""SLERP: spherical linear interpolation (Shoemake, 1985) of two models, each tensor taken as one vector.

cos Ω = ⟨θ₀, θ₁⟩ / (‖θ₀‖ ‖θ₁‖)        θ = sin((1−t)Ω)/sin Ω · θ₀ + sin(tΩ)/sin Ω · θ₁
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from merge_core.method import Block, Known, MergeMethod, Scope, Stage
from merge_core.stages import Gram, base_as_model

PARALLEL = 0.9995
SMALLEST_NORM = 1e-8


class Slerp(MergeMethod):
    """Walk from the base (t = 0) to the other model (t = 1) along the great circle between them.

    The angle is measured between unit vectors, the combination is of the vectors as they are; nearly parallel ones are
    interpolated linearly.

    >>> block = Block.of([[0.0, 1.0]], base=[1.0, 0.0])
    >>> Slerp(t=0.5).merge(block, {"gram": [[1.0, 0.0], [0.0, 1.0]]})
    tensor([0.7071, 0.7071])
    """

    name: ClassVar[str] = "slerp"
    title: ClassVar[str] = "Spherical linear interpolation"
    paper: ClassVar[str] = "https://doi.org/10.1145/325334.325242"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    workspace: ClassVar[tuple[int, int]] = (6, 8)

    t: float = Field(description="where to stop: 0 is the base, 1 the other model")

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [Gram(base_as_model)]

    @property
    def is_fused(self) -> bool:
        return True

    def merge(self, block: Block, known: Known) -> Tensor:
        return block.linear(self._coefficients(known["gram"]), with_base=True)

    def _coefficients(self, gram: Sequence[Sequence[float]]) -> tuple[float, float]:
        norms = [math.sqrt(gram[i][i]) for i in (0, 1)]
        lengths = [norm if norm > SMALLEST_NORM else 1.0 for norm in norms]
        cosine = gram[0][1] / (lengths[0] * lengths[1])
        if abs(cosine) > PARALLEL:
            return 1 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)
