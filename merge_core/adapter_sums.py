"""Adapters merged with one another, exactly: a weighted sum of adapters is an adapter whose rank is the sum of theirs.

    Σᵢ wᵢ sᵢ Bᵢ Aᵢ = s · [B₁w₁s₁/s, B₂w₂s₂/s, …] · [A₁; A₂; …]

Nothing is averaged factor by factor, which would multiply one adapter's B with another's A. Each A is stored as it was;
weights and signs are on B alone. s is the adapters' own scale where they share one, else 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_core import __version__
from merge_core.adapters import (
    CONFIG_NAME,
    MAX_RANK,
    PREFIX,
    WEIGHTS_NAME,
    Adapter,
    AdapterConfig,
    Factors,
    lora_config,
)
from merge_core.cards import Card
from merge_core.documents import canonical_json
from merge_core.dtypes import FLOAT32, FLOAT64, OUTPUT, DType
from merge_core.errors import Problem
from merge_core.headers import TensorInfo
from merge_core.kernels.plain import ZERO_SUM
from merge_core.layers import place_of, stacks
from merge_core.layout import Slot, lay_out
from merge_core.memory import plan_memory
from merge_core.method import MergeMethod
from merge_core.methods.linear import Linear
from merge_core.methods.task_arithmetic import TaskArithmetic
from merge_core.parameters import Resolver
from merge_core.plan import Plan, Source, Step
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.runs import Findings, Input, Run, Wanted, digest_of
from merge_core.weights import Companions, Weights

_ONE_FILE = 2**62


@dataclass(frozen=True)
class _Part:
    """Where a factor of one adapter stands in that of the sum: `axis` is that of the rank."""

    stored: TensorInfo
    first: int
    axis: int


class Placed(Weights):
    """One adapter in the room of a sum: its factors where they stand among those of the others, zeros elsewhere."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.path, self.shards, self.config = adapter, adapter.path, adapter.weights.shards, {}
        self.origins = adapter.weights.origins
        self.tensors: dict[str, TensorInfo] = {}
        self._parts: dict[str, _Part] = {}

    def put(self, name: str, stored: TensorInfo, shape: tuple[int, ...], first: int, axis: int) -> TensorInfo:
        """Give a factor its place in a tensor of the sum."""
        self._parts[name] = _Part(stored, first, axis)
        self.tensors[name] = replace(stored, name=name, shape=shape)
        return self.tensors[name]

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        part = self._parts[info.name]
        size = self.row_bytes(info) * (stop - start)
        buffer = torch.empty(size, dtype=torch.uint8) if space is None else space[:size]
        rows = buffer.view(info.dtype.torch).reshape(stop - start, *info.shape[1:]).zero_()
        rank = part.stored.shape[part.axis]
        if part.axis == 1:
            rows[:, part.first : part.first + rank] = self.adapter.weights.rows(part.stored, start, stop)
        else:
            low, high = max(start, part.first), min(stop, part.first + rank)
            if low < high:
                own = self.adapter.weights.rows(part.stored, low - part.first, high - part.first)
                rows[low - start : high - start] = own
        return rows

    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        return None

    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        yield from self.adapter.weights.ranges(self._parts[info.name].stored)

    def temporary(self, info: TensorInfo) -> float:
        return info.dtype.itemsize

    @property
    def companions(self) -> Companions:
        return {}

    @property
    def cards(self) -> Mapping[str, Card]:
        return self.adapter.cards

    @property
    def settings(self) -> Mapping[str, Path]:
        return {CONFIG_NAME: self.path / CONFIG_NAME}

    def descriptor(self, file: str) -> int:
        return self.adapter.weights.descriptor(file)

    def close(self) -> None:
        self.adapter.weights.close()


def plan_sum(
    recipe: Recipe,
    adapters: Mapping[ModelRef, Placed],
    memory: int | None,
    threads: int | None,
    block_elements: int,
    *,
    on_gpu: bool,
    window: int = 0,
) -> Plan:
    """Plan the sum of adapters. Raises `RecipeError` or `IncompatibleModels` naming all that is wrong."""
    return _SumPlanner(recipe, adapters).plan(memory, threads, block_elements, on_gpu, window)


class _SumPlanner:
    def __init__(self, recipe: Recipe, adapters: Mapping[ModelRef, Placed]) -> None:
        self.recipe, self.adapters = recipe, adapters
        self.findings = Findings()
        self.inputs = [
            Input(entry.model, entry.parameters, f"#/models/{i}") for i, entry in enumerate(recipe.models or [])
        ]
        self.placed = [adapters[taken.ref] for taken in self.inputs]
        self.ranks: dict[str, int] = {}
        self.scales: dict[str, float] = {}

    def plan(self, memory: int | None, threads: int | None, block_elements: int, on_gpu: bool, window: int) -> Plan:
        self._check_recipe()
        self._check_adapters()
        self.findings.raise_any()
        modules = list(dict.fromkeys(module for placed in self.placed for module in placed.adapter.modules))
        layers = stacks(modules)
        resolver = Resolver(self.recipe, self.findings)
        steps = [step for module in modules for step in self._steps(module, place_of(module, layers), resolver)]
        self._check_filters(modules)
        self.findings.raise_any()
        metadata = {"format": "pt", "weightsmith": __version__, "recipe": canonical_json(self.recipe.canonical())}
        slots = [Slot(step.name, step.dtype, step.shape) for step in steps]
        limits = self.recipe.limits
        memory, threads = memory or limits.memory, threads or limits.threads
        return Plan(
            recipe=self.recipe,
            models=tuple(taken.ref for taken in self.inputs),
            donor=0,
            scope="tensor",
            steps=tuple(steps),
            shards=lay_out(slots, _ONE_FILE, metadata, stem=Path(WEIGHTS_NAME).stem),
            memory=plan_memory(steps, "tensor", memory, threads, block_elements, on_gpu=on_gpu, window=window),
            sources_digest=digest_of([taken.ref for taken in self.inputs], self.adapters),
            adapter_config=self._config(modules),
            warnings=(*self.recipe.warnings, *self.findings.warnings),
        )

    # What cannot be.

    def _check_recipe(self) -> None:
        recipe, add = self.recipe, self.findings.recipe_problems.append
        if not issubclass(recipe.method, Linear | TaskArithmetic):
            what = "adapters alone are merged by linear or task_arithmetic"
            add(Problem(f"{what}; for {recipe.merge_method} name their base: base+adapter", "#/merge_method"))
        if recipe.models is None:
            add(Problem("adapters alone are merged as models; for layers of them name their base: base+adapter"))
        if recipe.base_model is not None:
            what = f"{recipe.base_model} is an adapter, and adapters alone are merged without a base"
            add(Problem(f"{what}; leave base_model away", "#/base_model"))
        if recipe.exclude:
            add(Problem("adapters alone have no base that a tensor could be copied from", "#/exclude"))

    def _check_adapters(self) -> None:
        first = self.placed[0].adapter if self.placed else None
        for taken, placed in zip(self.inputs, self.placed, strict=True):
            adapter = placed.adapter
            beside = [part for one in adapter.modules.values() for part in (one.magnitude, one.bias)]
            for part in filter(None, [*adapter.saved.values(), *beside]):
                what = f"{taken.ref}: {part.name} is not a factor of a sum"
                problem = Problem(f"{what}; name the base: base+{taken.ref}", taken.pointer, tensor=part.name)
                self.findings.problems.append(problem)
            assert first is not None
            if set(stacks(adapter.modules)) != set(stacks(first.modules)):
                named = " and ".join(
                    f"{ref} has {', '.join(sorted(stacks(one.modules))) or 'no layers'}"
                    for ref, one in ((self.inputs[0].ref, first), (taken.ref, adapter))
                )
                self.findings.problems.append(Problem(f"the adapters name layers differently: {named}", taken.pointer))
            if adapter.config.fan_in_fan_out != first.config.fan_in_fan_out:
                detail = f"{taken.ref} and {self.inputs[0].ref} have different fan_in_fan_out, so other bases"
                self.findings.problems.append(Problem(detail, taken.pointer))
        bases = {placed.adapter.config.base_model_name_or_path for placed in self.placed} - {None}
        if len(bases) > 1:
            named = ", ".join(sorted(map(str, bases)))
            self.findings.warnings.append(f"the adapters were trained on models of different names: {named}")

    def _check_filters(self, modules: Sequence[str]) -> None:
        for pointer, parameters, _ in self.recipe.parameter_blocks():
            for parameter, setting in parameters.items():
                for entry in setting.entries:
                    if not any(entry.matches(f"{module}.weight") for module in modules):
                        detail = f"no module's name contains {str(entry.filter)[:60]!r}"
                        self.findings.recipe_problems.append(Problem(detail, f"{pointer}/{parameter}"))

    # How each is made.

    def _steps(self, module: str, place: float, resolver: Resolver) -> Iterator[Step]:
        """The two factors of one module."""
        known = [placed.adapter.modules for placed in self.placed]
        found = {i: modules[module] for i, modules in enumerate(known) if module in modules}
        first = next(iter(found.values()))
        for i, factors in found.items():
            shapes = [(*one.down.shape[1:], one.up.shape[0], one.is_embedding) for one in (first, factors)]
            if shapes[0] != shapes[1]:
                taken = self.inputs[i]
                is_here, elsewhere = (f"{list(one.down.shape[1:])} to {one.up.shape[0]}" for one in (factors, first))
                detail = f"{module} takes {is_here} in {taken.ref}, but {elsewhere} elsewhere"
                self.findings.problems.append(Problem(detail, taken.pointer, tensor=factors.down.name))
        rank = sum(factors.rank for factors in found.values())
        if rank > MAX_RANK:
            self.findings.problems.append(Problem(f"{module} would have a rank of {rank}; at most {MAX_RANK}"))
        name = f"{module}.weight"
        wanted = Wanted(name, first.down, self.inputs[0].ref, (name,) * len(self.inputs), place)
        sources = [(taken, Source(i, first.down)) for i, taken in enumerate(self.inputs)]
        method, _, _ = resolver.resolve(Run(self.inputs, None, (), "#"), wanted, sources)
        if method is None or self.findings.problems:
            return
        scales = {factors.scale for factors in found.values()}
        scale = scales.pop() if len(scales) == 1 and 0 not in scales else 1.0
        self.ranks[module], self.scales[module] = rank, scale
        weights = _coefficients(method, len(self.inputs))
        kind = "lora_embedding" if first.is_embedding else "lora"
        end = "" if first.is_embedding else ".weight"
        up_shape = (first.up.shape[0], rank, *first.up.shape[2:])
        downs, ups = f"{PREFIX}{module}.{kind}_A{end}", f"{PREFIX}{module}.{kind}_B{end}"
        yield self._step(downs, found, (rank, *first.down.shape[1:]), 0, dict.fromkeys(found, 1.0))
        on_up = {i: weights[i] * (factors.scale / scale) for i, factors in found.items()}
        yield self._step(ups, found, up_shape, 1, on_up)

    def _step(
        self, name: str, found: Mapping[int, Factors], shape: tuple[int, ...], axis: int, weights: Mapping[int, float]
    ) -> Step:
        sources, at = [], 0
        for i, factors in found.items():
            stored = factors.up if axis else factors.down
            info = self.placed[i].put(name, stored, shape, at, axis)
            sources.append(Source(i, info, self.placed[i].temporary(info), file_bytes=stored.nbytes))
            at += factors.rank
        method = Linear(weight=tuple(weights[i] for i in found), normalize=False)
        return Step(name, shape, self._dtype([source.info.dtype for source in sources]), tuple(sources), None, method)

    def _dtype(self, stored: Sequence[DType]) -> DType:
        """As the recipe says, else as all are stored, else wide enough for each."""
        if written := self.recipe.out_dtype or self.recipe.dtype:
            return OUTPUT[written]
        if len(set(stored)) == 1:
            return stored[0]
        return FLOAT64 if FLOAT64 in stored else FLOAT32

    def _config(self, modules: Sequence[str]) -> dict[str, Any]:
        """`adapter_config.json` of the sum."""
        configs = [placed.adapter.config for placed in self.placed]
        alphas = {module: _plain(self.scales[module] * self.ranks[module]) for module in modules}
        targets = {_targets(config) for config in configs}
        return lora_config(
            self.ranks,
            alphas,
            base=configs[0].base_model_name_or_path,
            task_type=configs[0].task_type,
            targets=targets.pop() if len(targets) == 1 and () not in targets else sorted(modules),
            fan_in_fan_out=configs[0].fan_in_fan_out,
        )


def _coefficients(method: MergeMethod, count: int) -> tuple[float, ...]:
    """What each adapter is multiplied by."""
    assert isinstance(method, Linear | TaskArithmetic)
    total = sum(method.weight) if method.normalize else 1.0
    scale = 1.0
    if isinstance(method, TaskArithmetic):
        scale, total = method.lambda_, total if abs(total) >= ZERO_SUM else 1.0
    assert len(method.weight) == count
    return tuple(weight * scale / total for weight in method.weight)


def _targets(config: AdapterConfig) -> tuple[str, ...]:
    """The names of the modules that an adapter is for, where they say all there is to say."""
    is_plain = isinstance(config.target_modules, list) and not (config.layers_to_transform or config.exclude_modules)
    return tuple(sorted(config.target_modules or ())) if is_plain else ()


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number
