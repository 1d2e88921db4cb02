"""The laws that every method obeys, whatever its name; a new method is tested by being registered."""

from __future__ import annotations

import inspect
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_core.kernels.vectors import Rows
from merge_core.method import OWN_BASE, Block, Known, MergeMethod, Randomness, Scope
from merge_core.methods import METHODS
from merge_core.statistics import Grains, Statistic, add_up

EVERY = [(method, scope) for meanings in METHODS.values() for method in meanings.values() for scope in method.scopes]
IDS = [f"{method.name}-{method.semantics}-{scope}" for method, scope in EVERY]
every_method = pytest.mark.parametrize(("method", "scope"), EVERY, ids=IDS)


def example(method: type[MergeMethod], models: int) -> MergeMethod:
    """The method with parameters that make it do all its work."""
    is_per_model = method.parameters()
    values = method.example_parameters().items()
    return method.model_validate({name: (value,) * models if is_per_model[name] else value for name, value in values})


def count_of(method: type[MergeMethod]) -> int:
    return min(3, method.count[1] or 3)


def make(
    method: type[MergeMethod], shape: tuple[int, ...], *, seed: int = 0, scale: float = 0.1
) -> tuple[Tensor, Tensor | None]:
    """Models on a bf16 grid, so that ties and cancellations are common, and a base where one is needed."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).bfloat16().float()
    deltas = scale * torch.randn((count_of(method), *shape), generator=generator)
    return (base + deltas).bfloat16().float(), bases(method, base)[0]


def bases(method: type[MergeMethod], base: Tensor) -> list[Tensor | None]:
    """With which bases a method can be called."""
    return {"required": [base], "optional": [base, None], "model": [None]}[method.base]


def given(method: MergeMethod, models: Tensor, base: Tensor | None) -> dict[str, list[Tensor | None]]:
    """Whatever else the method takes: a base of each model's own, and numbers of the shapes it declares."""
    generator = torch.Generator().manual_seed(9)
    shape = models.shape[1:]
    there = {"same", "vector", *(["columns"] if len(shape) > 1 else []), *(["square"] if len(shape) == 2 else [])}
    shapes = {"same": shape, "columns": shape[1:], "square": 2 * shape[1:], "vector": (5,)}
    numbers: dict[str, list[Tensor | None]] = {
        name: [
            torch.rand(shapes[each.shape], generator=generator) if each.shape in there else None
            for _ in (models if each.per_model else [0])
        ]
        for name, each in method.statistics.items()
    }
    if method.own_bases and base is not None:
        numbers[OWN_BASE] = [((base + model) / 2).bfloat16().float() for model in models]
    return numbers


def working(method: MergeMethod) -> torch.dtype:
    return torch.float64 if method.precision == "float64" else torch.float32


def run(
    method: MergeMethod,
    scope: Scope,
    models: Tensor,
    base: Tensor | None,
    grains: Grains,
    length: int,
    *,
    scattered: bool = False,
) -> Tensor:
    """Measure and merge one tensor in blocks of `length` grains; scattered: two workers hold alternate blocks."""
    blocks = []
    whole = {name for name, each in method.statistics.items() if each.shape != "same"}
    length = grains.count if method.extent(models.shape[1:]) == "tensor" else length
    for first in range(0, grains.count, length):
        rows = slice(*grains.row_range(first, min(first + length, grains.count))) if models.ndim > 1 else ...
        stored = [Rows.of(model[rows]) for model in models]
        origin = None if base is None else Rows.of(base[rows])
        numbers = {
            name: [None if each is None else Rows.of(each if name in whole else each[rows]) for each in values]
            for name, values in given(method, models, base).items()
        }
        blocks.append(
            Block(stored, origin, "t", grains, first, Randomness(5), working(method), given=numbers),
        )
    known: Known = {}
    for stage in method.stages(scope):
        if not (stage.needed(known) and stage.concerns("t", known)):
            continue
        workers: list[dict[str, Statistic]] = [{}, {}]
        for i, block in reversed(list(enumerate(blocks))) if scattered else enumerate(blocks):
            stage.observe(block, known, workers[i % 2 if scattered else 0])
        add_up(workers[1], workers[0])
        stage.finish(workers[1], known)
        known = json.loads(json.dumps(known))
    merged = [method.merge(block, known) for block in blocks]
    return torch.cat(merged) if models.ndim > 1 else merged[0]


@every_method
def test_any_blocks_on_any_workers_give_the_same_bytes(method: type[MergeMethod], scope: Scope) -> None:
    assert_any_blocks_give_the_same_bytes(example(method, count_of(method)), scope)


def assert_any_blocks_give_the_same_bytes(chosen: MergeMethod, scope: Scope) -> None:
    method = type(chosen)
    models, base = make(method, (211, 9))
    grains = Grains(211, 9, 2)

    for origin in [None] if base is None else bases(method, base):
        whole = run(chosen, scope, models, origin, grains, 1000)

        for length in (1, 3, 7, 100):
            for scattered in (False, True):
                cut = run(chosen, scope, models, origin, grains, length, scattered=scattered)
                assert torch.equal(cut.view(torch.int32), whole.view(torch.int32)), f"blocks of {length} grains"


@every_method
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 3), (2, 3, 2, 2)])
def test_keeps_shape_dtype_and_inputs(method: type[MergeMethod], scope: Scope, shape: tuple[int, ...]) -> None:
    models, base = make(method, shape)
    before = models.clone(), None if base is None else base.clone()

    chosen = example(method, len(models))
    merged = run(chosen, scope, models, base, Grains.of(shape), 1)

    assert merged.shape == shape and merged.dtype == working(chosen)
    assert torch.isfinite(merged).all()
    assert torch.equal(models, before[0]) and (base is None or torch.equal(base, before[1]))


@pytest.mark.parametrize(("method", "scope"), [(method, scope) for method, scope in EVERY if method.base != "model"])
def test_models_that_learned_nothing_leave_the_base(method: type[MergeMethod], scope: Scope) -> None:
    models, base = make(method, (30, 4), scale=0.0)
    assert base is not None

    merged = run(example(method, len(models)), scope, models, base, Grains.of((30, 4)), 1)

    torch.testing.assert_close(merged.float(), base, rtol=1e-6, atol=1e-6)


@every_method
def test_constant_and_all_zero_tensors_stay_finite(method: type[MergeMethod], scope: Scope) -> None:
    for value in (0.0, 1.0):
        models = torch.full((count_of(method), 6, 5), value)
        for base in bases(method, torch.zeros(6, 5)):
            assert torch.isfinite(run(example(method, len(models)), scope, models, base, Grains.of((6, 5)), 1)).all()


@every_method
def test_is_documented_with_a_paper_and_a_worked_example(method: type[MergeMethod], scope: Scope) -> None:
    described = inspect.getdoc(method) or ""
    assert ">>>" in described, "an example small enough to check by hand"
    assert method.paper.startswith("https://")
    schema = method.model_json_schema(by_alias=True)
    assert all("description" in entry for entry in schema.get("properties", {}).values())
    assert schema["additionalProperties"] is False


@every_method
def test_workspace_covers_what_is_held_at_once(method: type[MergeMethod], scope: Scope) -> None:
    """The largest sum of live tensors, counted by torch itself, stays within what the plan reckons with."""
    assert_workspace_covers_what_is_held(example(method, count_of(method)), scope)


def assert_workspace_covers_what_is_held(chosen: MergeMethod, scope: Scope) -> None:
    shape, method = (256, 256), type(chosen)
    models, base = make(method, shape)
    grains = Grains.of(shape)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(chosen, scope, models, base, grains, 1)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    per_model, fixed = method.workspace
    block = models[0].numel() * 4
    histograms = 2 * len(models) * (2**15 + 2**16) * 8
    assert peak <= (per_model * len(models) + fixed + 1) * block + histograms


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_merged_without_an_error(method: type[MergeMethod], scope: Scope, value: float) -> None:
    """`allow_nonfinite` lets them through; what the other elements then are is the method's to say."""
    for place in range(count_of(method)):
        models, base = make(method, (6, 5))
        models[place, 2, 3] = value
        for origin in bases(method, base) if base is not None else [None]:
            with np.errstate(all="ignore"):
                merged = run(example(method, len(models)), scope, models, origin, Grains.of((6, 5)), 1)
            assert merged.shape == (6, 5)
