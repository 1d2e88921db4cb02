"""What a method takes besides a base and models: each model's own base, and files of measured numbers.

Both are opened, checked and read like any other source; `Step.given` holds what a tensor is made with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from merge_core.errors import Problem
from merge_core.headers import TensorInfo
from merge_core.method import OWN_BASE, Given, MergeMethod
from merge_core.plan import Source
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.runs import Findings, Input, Wanted
from merge_core.statistics import GRAIN_ELEMENTS
from merge_core.weights import Weights

Each = tuple[Source | None, ...]


@dataclass
class GivenFinder:
    """Finds for one tensor after the other what its method takes; `findings` gets what is missing or does not fit."""

    recipe: Recipe
    weights: Mapping[ModelRef, Weights]
    source: Callable[[ModelRef, TensorInfo], Source]
    findings: Findings
    pointers: dict[ModelRef, str] = field(default_factory=dict)
    of_use: set[ModelRef] = field(default_factory=set)
    needed: set[str] = field(default_factory=set)

    def find(self, method: MergeMethod, wanted: Wanted, models: Sequence[tuple[Input, str]]) -> Mapping[str, Each]:
        """By name what is given about a tensor. `models`: those that take part, and their names for it."""
        found: dict[str, Each] = {}
        if method.own_bases:
            found[OWN_BASE] = tuple(self._own_base(taken, name, wanted) for taken, name in models)
        for title, given in method.statistics.items():
            if given.per_model:
                each = [(taken.statistics, f"{taken.pointer}/statistics", name) for taken, name in models]
            else:
                each = [({}, "#/statistics", wanted.info.name)]
            numbers = tuple(
                self._numbers(method, title, i, beside, pointer, name, wanted)
                for i, (beside, pointer, name) in enumerate(each)
            )
            if any(source is not None for source in numbers):
                found[title] = numbers
        return found

    def check_use(self) -> None:
        """Refuse files that nothing asks for, or of which not one number was of use."""
        for pointer, statistics, _ in self.recipe.statistics_blocks():
            for title in statistics:
                if title in self.recipe.method.statistics and title not in self.needed:
                    detail = f"with these parameters {self.recipe.merge_method} has no use for {title}"
                    self.findings.add_recipe_problem(Problem(detail, f"{pointer}/{title}"))
        for ref, pointer in self.pointers.items():
            if ref not in self.of_use:
                detail = f"no tensor in {ref} has the name of one that {self.recipe.merge_method} merges"
                self.findings.add_recipe_problem(Problem(detail, pointer))

    def _own_base(self, taken: Input, name: str, wanted: Wanted) -> Source | None:
        pointer = f"{taken.pointer}/base_model"
        if taken.own_base is None:
            detail = f"{self.recipe.merge_method} needs what {taken.ref} was tuned from: write base_model beside it"
            self.findings.add_recipe_problem(Problem(detail, pointer))
            return None
        info = self.weights[taken.own_base].find(name, wanted.info.shape)
        if info is None:
            lacks = f"{taken.own_base} lacks {name}, which {taken.ref}, tuned from it, has"
            self.findings.problems.append(Problem(lacks, pointer, tensor=name))
            return None
        if info.shape != wanted.info.shape or info.dtype.kind != "float":
            self._refuse(taken.own_base, info, f"{list(wanted.info.shape)} in {wanted.owner}", pointer)
            return None
        return self.source(taken.own_base, info)

    def _numbers(
        self,
        method: MergeMethod,
        title: str,
        model: int,
        beside: Mapping[str, ModelRef],
        pointer: str,
        name: str,
        wanted: Wanted,
    ) -> Source | None:
        given = method.statistics[title]
        ref = beside.get(title, self.recipe.statistics.get(title))
        pointer = f"{pointer if title in beside else '#/statistics'}/{title}"
        if not method.needs(title, model):
            return None
        self.needed.add(title)
        if ref is None:
            needs = f"{self.recipe.merge_method} needs statistics: {title}, a safetensors file"
            self.findings.add_recipe_problem(Problem(f"{needs} ({given.description})", pointer))
            return None
        self.pointers.setdefault(ref, pointer)
        info = self.weights[ref].tensors.get(name)
        if info is None:
            if not given.partial:
                lacks = f"{ref} lacks {name}, for which {self.recipe.merge_method} needs {title}; add it to the file"
                self.findings.problems.append(Problem(f"{lacks}, or exclude the tensor", pointer, tensor=name))
            return None
        self.of_use.add(ref)
        if expected := _unlike(given, info, wanted.info.shape):
            self._refuse(ref, info, f"{title} of {wanted.name} must be {expected}", pointer)
            return None
        return replace(self.source(ref, info), small=given.shape != "same")

    def _refuse(self, ref: ModelRef, info: TensorInfo, but: str, pointer: str) -> None:
        detail = f"{info.name} is {info.dtype}{list(info.shape)} in {ref}, but {but}"
        self.findings.problems.append(Problem(detail, pointer, tensor=info.name))


def _unlike(given: Given, info: TensorInfo, shape: tuple[int, ...]) -> str:
    """What a tensor of numbers should be and is not; empty if it is."""
    if info.dtype.kind == "packed":
        return "stored as plain numbers"
    if given.shape == "vector":
        fits = len(info.shape) == 1 and 0 < info.elements <= GRAIN_ELEMENTS
        return "" if fits else f"a list of 1 to {GRAIN_ELEMENTS:,} numbers"
    if given.shape == "columns" and len(shape) < 2:
        return "left out, because it has no columns"
    if given.shape == "square" and len(shape) != 2:
        return "left out, because it is no matrix"
    expected = {"same": shape, "columns": shape[1:], "square": 2 * shape[1:]}[given.shape]
    return "" if info.shape == expected else str(list(expected))
