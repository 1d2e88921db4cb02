"""AdaMerging (Yang et al., 2024): coefficients that make the merge sure of itself on unlabelled data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from merge_core.calibration.learner import Learner, Objective
from merge_core.learning import Clamped, Form, Layout

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench


class AdaMerging(Learner):
    """A number in [0, 1] for each model, or for each model and tensor, from 0.3 on, by the entropy of what is said.

    Each step sees a batch of each of the data. Nothing but the merge itself says what it should be sure of.
    """

    title: ClassVar[str] = "AdaMerging"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.02575"
    serves: ClassVar[Sequence[str]] = ("adamerging",)
    objective: ClassVar[Objective] = "entropy"

    method: Literal["adamerging"]
    per: Literal["tensor", "model"] = Field("tensor", description="what has a coefficient of its own")
    steps: int | None = Field(500, ge=1, le=1_000_000, description="so many, data anew as they end")
    rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="of learning, by AdamW")
    batch: int = Field(16, ge=1, le=1024, description="samples that go through the model at a time")
    first: float = Field(0.3, ge=0, le=1, description="the coefficient that all begin with")

    @property
    def initial(self) -> Form:
        return Clamped(self.first)

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        parameters = dict(data.get("parameters") or {})
        return data | {"merge_method": "task_arithmetic", "parameters": {"weight": self.first} | parameters}

    def layout(self, bench: Bench, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        return Layout.shared(shapes) if self.per == "model" else Layout.of(shapes)
