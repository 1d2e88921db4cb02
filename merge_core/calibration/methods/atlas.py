"""aTLAS (Zhang et al., 2024): task vectors scaled tensor by tensor, by labels or by how sure the merge is of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from merge_core.calibration.learner import Learner, Objective
from merge_core.learning import Form, Layout, Plain

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.plan import Plan


class Atlas(Learner):
    """Any number for each tensor and task vector, from 0 on; with `partitions` several for each matrix.

    ×K cuts each tensor of two dimensions or more into K random sets of elements, and learns those alone, as the authors
    do. The objective is the cross entropy of labels (of language models: of the next token), or the entropy at test
    time, without labels.
    """

    title: ClassVar[str] = "aTLAS"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02880"
    serves: ClassVar[Sequence[str]] = ("atlas",)

    method: Literal["atlas"]
    minimize: Literal["cross_entropy", "entropy"] = Field("cross_entropy", description="what is to be small")
    epochs: int = Field(20, ge=1, le=100_000, description="how often all data are seen")
    rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="of learning, by AdamW")
    clip: float | None = Field(1.0, gt=0, allow_inf_nan=False, description="the most that a gradient's norm may be")
    partitions: int = Field(1, ge=1, le=1024, description="K: random sets of elements of each matrix")

    @property
    def wanted(self) -> Objective:
        return self.minimize

    @property
    def initial(self) -> Form:
        return Plain(0.0)

    @property
    def most_parts(self) -> int:
        return self.partitions

    def held_bytes(self, plan: Plan) -> int:
        """The part of each element of a matrix, in a byte or two."""
        width = 0 if self.partitions == 1 else 1 if self.partitions <= 256 else 2
        return width * sum(math.prod(step.shape) for step in plan.steps if len(step.shape) >= 2)

    def layout(self, bench: Bench, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        if self.partitions == 1:
            return Layout.of(shapes)
        matrices = {name: self.partitions for name, shape in shapes.items() if len(shape) >= 2}
        return Layout.of(shapes, matrices, rule="random", seed=bench.plan.document.seed)
