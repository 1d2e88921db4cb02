"""Which value a parameter has for one output tensor: the innermost setting that has one for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from merge_core.errors import Problem
from merge_core.method import MergeMethod
from merge_core.plan import Source
from merge_core.recipe import Recipe
from merge_core.runs import Findings, Input, Run, Wanted
from merge_core.settings import Setting


@dataclass
class Resolver:
    """Reads a recipe's parameters tensor by tensor."""

    recipe: Recipe
    findings: Findings

    def __post_init__(self) -> None:
        self.method = self.recipe.method

    def resolve(
        self, run: Run, wanted: Wanted, sources: Sequence[tuple[Input, Source]]
    ) -> tuple[MergeMethod | None, Source | None, tuple[Source, ...]]:
        """The method with its parameters for one tensor, the base, and the models that take part."""
        required = self.method.required_parameters()
        base = (
            next((source for taken, source in sources if taken.ref == run.base), None)
            if self.method.base != "model"
            else None
        )
        names = {taken.pointer: name for taken, name in zip(run.inputs, wanted.names, strict=True)}
        values: dict[str, Any] = {}
        taking_part: list[Source] = []
        per_model: dict[str, list[float]] = defaultdict(list)
        for taken, source in sources:
            if source is base:
                continue
            found: dict[str, Any] = {}
            for name in (name for name, is_per_model in self.method.parameters().items() if is_per_model):
                found[name] = self._lookup(name, names[taken.pointer], wanted.place, taken.parameters, *run.levels)
            missing = sorted(name for name, value in found.items() if value is None and name in required)
            is_unasked = taken.pointer == "#/base_model" and found and not required & found.keys()
            if taken.ref == run.base and (missing or is_unasked):
                continue
            for name in missing:
                detail = f"{taken.ref} has no {name} for {wanted.name}; give it beside the model or for all"
                self.findings.add_recipe_problem(Problem(detail, f"{taken.pointer}/parameters/{name}"))
            taking_part.append(source)
            for name, value in found.items():
                default = self.method.model_fields[_field(self.method, name)].default
                per_model[name].append(value if value is not None else default[0] if name not in required else 1.0)
        for name in (name for name, is_per_model in self.method.parameters().items() if not is_per_model):
            value = self._lookup(name, wanted.name, wanted.place, *run.levels)
            if value is not None:
                values[name] = value
            elif name in required:
                detail = f"{self.recipe.merge_method} needs {name}, which has no value for {wanted.name}"
                self.findings.add_recipe_problem(Problem(detail, f"#/parameters/{name}"))
        if self.findings.recipe_problems:
            return None, base, tuple(taking_part)
        try:
            method = self.method.model_validate(
                {**values, **{name: tuple(column) for name, column in per_model.items()}}
            )
        except ValidationError as error:
            for problem in error.errors():
                name = str(problem["loc"][0]) if problem["loc"] else ""
                detail = (
                    str(problem["ctx"]["error"])
                    if problem["type"] == "value_error"
                    else f"{name} = {problem['input']}: {problem['msg']}"
                )
                self.findings.add_recipe_problem(Problem(detail, f"#/parameters/{name}" if name else "#/parameters"))
            return None, base, tuple(taking_part)
        return method, base, tuple(taking_part)

    def _lookup(self, parameter: str, tensor: str, place: float, *levels: Mapping[str, Setting]) -> Any:
        """The first level that has a value for this tensor, the innermost first; the recipe's own is the last."""
        for level in (*levels, self.recipe.parameters):
            if parameter in level and (value := level[parameter].evaluate(tensor, place)) is not None:
                return value
        return None


def _field(method: type[MergeMethod], parameter: str) -> str:
    return next(name for name, field in method.model_fields.items() if parameter in (name, field.alias))
