"""RegMean's Gram matrices (Jin et al., 2022): of each linear layer the mean of x xᵀ of what enters it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from merge_core.calibration.measurer import GramMeasurer, examples_of, groups_of
from merge_core.calibration.method import Made

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench


class RegMeanGrams(GramMeasurer):
    """The Gram matrices of each model's linear layers, on its own unlabelled data.

    A mean over tokens, so that a model with more data counts no more: give it a `weight` for that. Layers are
    `torch.nn.Linear`; all else, and a head that is the embedding too, RegMean averages.
    """

    title: ClassVar[str] = "Gram matrices for RegMean"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.09849"
    serves: ClassVar[Sequence[str]] = ("regmean",)

    method: Literal["regmean"]

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        weight = {"weight": dict(data.get("parameters") or {}).get("weight", 1.0)}
        return data | {"merge_method": "linear", "parameters": weight}

    def run(self, bench: Bench) -> Made:
        each = [examples_of(groups_of(bench.groups, model)) for model in range(len(bench.places))]
        return Made(
            {"gram": [self.grams(bench, f"gram-{model}.safetensors", model, some) for model, some in enumerate(each)]}
        )
