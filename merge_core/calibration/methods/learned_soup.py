"""Learned soups (Wortsman et al., 2022, appendix): the share of each model in each tensor, learned on held-out data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from merge_core.calibration.learner import Learner
from merge_core.errors import Problem
from merge_core.learning import Form, Layout, Softmax

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.recipe import Recipe


class LearnedSoup(Learner):
    """Shares that sum to 1, softmax of β times raw numbers, by the cross entropy of labels; the average at first."""

    title: ClassVar[str] = "Learned soup"
    paper: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    serves: ClassVar[Sequence[str]] = ("learned_soup",)

    method: Literal["learned_soup"]
    per: Literal["tensor", "model"] = Field("tensor", description="what has shares of its own")
    epochs: int = Field(5, ge=1, le=100_000, description="how often all data are seen")
    rate: float = Field(0.05, gt=0, allow_inf_nan=False, description="of learning, by AdamW")

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        if recipe.base_model is not None:
            yield Problem("a soup has no base; leave this away", "#/base_model")
        if self.compare:
            yield Problem("a soup has no task vectors; leave this away", "#/calibrate/compare")

    @property
    def initial(self) -> Form:
        return Softmax()

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        parameters = {key: value for key, value in (data.get("parameters") or {}).items() if key != "weight"}
        return data | {"merge_method": "linear", "parameters": {**parameters, "weight": 1}}

    def layout(self, bench: Bench, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        return Layout.shared(shapes) if self.per == "model" else Layout.of(shapes)
