"""Fisher information (Matena & Raffel, 2021), for Fisher-weighted averages and WiSE-FT.

F = mean over x of E over y of (∂ log p(y|x) / ∂θ)², of every weight alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from merge_core.calibration.measurer import Measurer, examples_of, groups_of, parameters_among
from merge_core.calibration.method import Made
from merge_core.errors import Problem
from merge_core.measuring import fisher
from merge_core.measuring.examples import Examples, Forward
from merge_core.measuring.gradients import Labels

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.recipe import Recipe


_MOST_LOW = 0.5
"""Of what is measured may be below the floor without a word."""


class Fisher(Measurer):
    """The diagonal of the Fisher information of each model, on its own data; of WiSE-FT's base on those of no model.

    One sample is one x, and log p(y|x) the sum over its tokens. `labels`: `expected` takes every class y with its
    chance, exactly, and asks for no labels (classifiers; one pass for each class); `drawn` estimates that by classes,
    or next tokens, that the model itself draws; `given` takes the data's labels, which is the empirical Fisher
    information.
    """

    title: ClassVar[str] = "Fisher information"
    paper: ClassVar[str] = "https://arxiv.org/abs/2111.09832"
    serves: ClassVar[Sequence[str]] = ("fisher", "wise_ft")

    method: Literal["fisher"]
    labels: Labels | None = Field(
        None,
        description="whose: all of them (expected: classifiers), the model's own (drawn: language models), the data's",
    )
    draws: int = Field(1, ge=1, le=1000, description="of each sample, where labels are drawn")
    seed: int = Field(0, ge=0, lt=2**31, description="of what is drawn")

    @property
    def wanted(self) -> Labels:
        return self.labels or ("drawn" if self.task == "language_model" else "expected")

    @property
    def needs_labels(self) -> bool:
        return self.wanted == "given"

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        if self.labels == "expected" and self.task == "language_model":
            detail = "a text has too many next tokens to expect them all; take drawn, or given"
            yield Problem(detail, "#/calibrate/labels")
        for name in ("draws", "seed"):
            if name in self.model_fields_set and self.wanted != "drawn":
                yield Problem(f"nothing is drawn where labels are {self.wanted}", f"#/calibrate/{name}")

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        parameters = dict(data.get("parameters") or {})
        if data["merge_method"] == "wise_ft":
            return data | {"parameters": parameters | {"by_fisher": False}}
        weight = {"weight": parameters.get("weight", 1.0)}
        return data | {"merge_method": "linear", "parameters": weight}

    def files_of(self, recipe: Recipe) -> int:
        return super().files_of(recipe) + (recipe.base_model is not None)

    def bytes_of(self, tensor: str, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape)

    def run(self, bench: Bench) -> Made:
        document = bench.plan.document
        groups = bench.groups

        def of(module: nn.Module, forward: Forward, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            low = count = 0
            for name, numbers in fisher(
                module,
                forward,
                examples,
                labels=self.wanted,
                draws=self.draws,
                seed=self.seed,
                tensors=parameters_among(tensors),
                most_bytes=bench.room,
            ):
                low, count = low + int((numbers < _floor(document, name)).sum()), count + numbers.numel()
                yield name, numbers
            bench.note(f"below the floor {len(files)}", low / max(1, count))

        files: list[str] = []
        is_wise = document.merge_method == "wise_ft"
        for model in [*([None] if is_wise else []), *range(len(bench.places))]:
            examples: list[Examples] = examples_of(groups_of(groups, model), single=True)
            name = "fisher-base" if model is None else f"fisher-{model}"
            files.append(self.measured(bench, f"{name}.safetensors", model, examples, of))
        low = [bench.known(f"below the floor {number}") for number in range(len(files))]
        warnings = [
            f"{share:.0%} of the numbers in {file} are below fisher_floor and count as that much: choose a lower one, "
            "or these weights are averaged as if they mattered alike"
            for file, share in zip(files, low, strict=True)
            if share > _MOST_LOW
        ]
        told = {"labels": self.wanted, "below_floor": dict(zip(files, low, strict=True))}
        if is_wise:
            return Made({"base_fisher": files[0], "fisher": files[1]}, {"by_fisher": True}, (), told, warnings)
        return Made({"fisher": files}, told=told, warnings=warnings)


def _floor(document: Recipe, tensor: str) -> float:
    setting = document.parameters.get("fisher_floor")
    value = None if setting is None else setting.evaluate(tensor, 0)
    return float(document.method.model_fields["fisher_floor"].default if value is None else value)
