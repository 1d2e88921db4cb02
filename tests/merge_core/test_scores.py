"""Scores have the same bits in both forms of the kernels, and their order is exact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core import kernels
from merge_core.kernels import elementary
from merge_core.kernels.scores import (
    DIGITS,
    Brackets,
    Choice,
    Kind,
    Scores,
    bracket_order,
    chosen_consensus,
    chosen_squares,
    compete,
    divergences,
    equal_scores,
    fuse,
    high_order,
    keys,
    low_order,
    value_of,
    values,
)
from merge_core.kernels.vectors import Rows, TaskVectors
from merge_core.merge import merge
from merge_core.method import Block, Known, Scope
from merge_core.methods.arcee_fusion import ArceeFusion
from merge_core.methods.pcb import Pcb, Variant
from merge_core.methods.sce import Sce
from merge_core.order import order
from merge_core.recipe import Recipe
from merge_core.statistics import Grains
from tests.conftest import FORMS, kernels_in
from tests.merge_core.test_kernels import in_both_forms, rounded, task_vectors
from tests.merge_core.test_stages import in_blocks, measure

KINDS = get_args(Kind)


@st.composite
def scores(draw: st.DrawFn) -> Scores:
    vectors, kind = draw(task_vectors()), draw(st.sampled_from(KINDS))
    models = len(vectors)
    if kind == "divergence":
        vectors = TaskVectors(
            vectors.base, vectors.models[:1], vectors.working, "t", vectors.start, vectors.grain, None, vectors.out
        )
        width = draw(
            st.sampled_from([size for size in (1, 2, 3, 5, 64, vectors.elements) if not vectors.elements % size])
        )
        rows = torch.rand(vectors.elements // width, generator=torch.Generator().manual_seed(models)).numpy()
        return Scores(vectors, kind, divergences=rows, width=width)
    sizes = [kernels.values(vectors)[model].abs() for model in range(models)]
    lows = tuple(float(size.quantile(0.05, interpolation="lower")) for size in sizes)
    highs = tuple(float(size.quantile(0.95, interpolation="higher")) for size in sizes)
    return Scores(vectors, kind, tuple(draw(st.booleans()) for _ in range(models)), lows, highs)


@settings(max_examples=50)
@given(scores())
def test_both_forms_count_the_same(made: Scores) -> None:
    elements, rows = made.vectors.elements, len(made)

    def high() -> Any:
        found, noted = np.zeros((rows, DIGITS), np.int64), np.zeros((2, rows), np.int64)
        high_order(made, found, *noted)
        return np.concatenate([found.ravel(), noted.ravel()])

    histogram = in_both_forms(high)[: rows * DIGITS].reshape(rows, DIGITS)
    assert (histogram.sum(axis=1) == elements).all()
    middle = [[int(np.searchsorted(np.cumsum(row), elements * share)) for share in (0.2, 0.9)] for row in histogram]

    def low() -> Any:
        found = np.zeros((rows, 2, DIGITS), np.int64)
        low_order(made, middle, found)
        return found

    in_both_forms(low)

    def bracket() -> Any:
        lows = [[max(0, bucket - 1) for bucket in its] for its in middle]
        ranges = Brackets(lows, [[bucket + 2 for bucket in its] for its in lows], lows)
        found = np.zeros((rows, 2, 2 * DIGITS), np.int64), np.zeros((rows, 2), np.int64)
        noted = np.zeros((2, rows), np.int64)
        bracket_order(made, ranges, *found, *noted)
        return np.concatenate([*(array.ravel() for array in found), noted.ravel()])

    in_both_forms(bracket)
    if rows == 1:
        in_both_forms(lambda: equal_scores(made, float(values(made)[0, 0])))


@settings(max_examples=50)
@given(scores(), st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), st.integers(0, 40), st.integers(0, 4000))
def test_both_forms_merge_the_same(made: Scores, weights: list[float], ties: int, start: int) -> None:
    out = made.vectors.out
    assert out is not None
    found = values(made)
    numbers = tuple(weights[: len(made.vectors)])
    if len(made) == 1:
        threshold = float(found[0].median())
        for choice in (Choice(made), Choice(made, threshold), Choice(made, threshold, (start, ties))):
            in_both_forms(lambda choice=choice: chosen_squares(choice))
            in_both_forms(lambda choice=choice: rounded(chosen_consensus(choice, numbers), out))
    if made.kind == "divergence":
        in_both_forms(lambda: rounded(fuse(made, float(found[0].median())), out))
    if "balance" in made.kind:
        floors = tuple(row.quantile(0.7, interpolation="lower").item() for row in found)
        tops = tuple(row.max().item() + 1e-3 for row in found)
        in_both_forms(lambda: rounded(compete(made, floors, tops, numbers, 0.7), out))


@settings(max_examples=20)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 9, 64, 1000, 1024, 1500, 3000]),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 999),
)
def test_divergences_of_rows(count: int, width: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(count, width, generator=generator) * scale).to(dtype)
    model = (base.float() + torch.randn(count, width, generator=generator) * scale / 8).to(dtype)

    def found() -> Tensor:
        rows = [Rows.of(base), Rows.of(model)]
        return torch.from_numpy(divergences(*rows, width, torch.float32, width * max(1, 4096 // width)))

    p, q = (rows.double().log_softmax(1) for rows in (model, base))
    torch.testing.assert_close(in_both_forms(found).double(), (p.exp() * (p - q)).sum(1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("ours", "true"), [(elementary.exp, np.exp), (elementary.tanh, np.tanh)])
def test_elementary_functions_are_nearly_rounded(ours: Callable[[Tensor], Tensor], true: Any) -> None:
    near, far = torch.randn(200_000, generator=torch.Generator().manual_seed(0)), torch.linspace(-87, 88, 200_001)
    x = torch.cat([near, near * 1e-4, far, far / 8, torch.tensor([0.0, 0.625, -0.625])])
    expected = true(x.double().numpy())
    unit = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert (np.abs(ours(x).double().numpy() - expected) / unit).max() < 1.5


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=50))
def test_keys_have_the_order_of_their_values(numbers: list[float]) -> None:
    found = keys(torch.tensor(numbers))
    assert [value_of(int(key)) for key in found] == numbers
    assert [value_of(int(key)) for key in found.sort().values] == sorted(numbers)


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(0, 99), st.integers(1, 60), st.integers(1, 9), st.booleans())
def test_the_value_at_any_place_is_exact(entries: int, seed: int, size: int, length: int, ties: bool) -> None:
    deltas = torch.randn(3, entries, generator=torch.Generator().manual_seed(seed))
    deltas = (deltas * 2).round() / 2 if ties else deltas
    numbers = ((True,) * 3, (0.1,) * 3, (2.0,) * 3)
    places = (0, entries // 3, entries - 1)

    def scored(block: Block, known: Known) -> Scores:
        return Scores(block.task_vectors, "balance", *numbers)

    stages = order("found", scored, lambda entries, nonzero: places)
    for form in FORMS:
        with kernels_in(form):
            blocks = in_blocks(deltas, size, length)
            known = measure(stages, blocks)["found"]
        whole = torch.cat([values(scored(block, {})) for block in blocks], dim=1)
        assert known["largest"] == whole.max(dim=1).values.tolist()
        assert known["nonzero"] == (whole != 0).sum(dim=1).tolist()
        for row, found, below, equal in zip(whole, known["values"], known["below"], known["equal"], strict=True):
            assert found == [float(row.sort().values[place]) for place in places]
            assert below == [int((row < value).sum()) for value in found]
            assert equal == [int((row == value).sum()) for value in found]


@pytest.mark.parametrize("misleads", [False, True])
def test_a_sample_saves_a_pass_and_changes_nothing(misleads: bool) -> None:
    """Misled where what it looks at is not like the rest."""
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, 2**19, generator=generator)
    if misleads:
        deltas[:, ::] *= torch.where(torch.arange(2**19) // 2048 % 8 == 0, 1.0, 5.0)
    numbers = ((True,) * 2, (0.1,) * 2, (2.0,) * 2)
    stages = order(
        "found",
        lambda block, known: Scores(block.task_vectors, "balance", *numbers),
        lambda entries, nonzero: (int(entries * 0.9),),
    )
    found = {}
    for form in FORMS:
        with kernels_in(form):
            found[form] = measure(stages, in_blocks(deltas, 2**16, 2))
    assert found["plain"] == found["compiled"]


def official(deltas: Tensor, variant: Variant, ratio: float, clamp: float) -> Tensor:
    """The equations of the paper's code in float64, on whole vectors."""
    deltas = deltas.double()
    count = deltas.shape[1]

    def between(x: Tensor, low: float, high: float) -> Tensor:
        ordered = x.sort(dim=1).values
        return x.clamp(ordered[:, int(count * low)][:, None], ordered[:, int(count * (1 - high) - 1)][:, None])

    def unit(x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low)

    sizes = between(deltas.abs(), clamp, clamp)
    signed = deltas.sign() * unit(sizes)
    if variant == "C":
        inter = (signed[:, None] * signed[None]).tanh().sum(1)
    else:
        inter = (deltas * (deltas if variant == "A" else signed).sum(0)).tanh()
    scale = unit(between((len(deltas) * unit(sizes) ** 2).exp() * inter, 1 - ratio, 0))
    return (deltas.sign() * sizes * scale).sum(0) / scale.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("variant", get_args(Variant))
@pytest.mark.parametrize("form", FORMS)
def test_pcb_is_the_paper_s(variant: Variant, form: str) -> None:
    deltas = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * 0.3
    method = Pcb(variant=variant, mask_ratio=0.2, clamp=0.01)
    with kernels_in(form):
        merged = run(method, "model", deltas)
    expected = official(deltas, variant, 0.2, 0.01)
    close = torch.isclose(merged.double(), expected, rtol=1e-4, atol=1e-5)
    assert int((~close).sum()) <= 4, "only the scores nearest to a floor may fall on the other side"


def run(method: Pcb | Sce, scope: Scope, deltas: Tensor) -> Tensor:
    blocks = in_blocks(deltas, 1000, 2)
    known = measure(list(method.stages(scope)), blocks)
    return torch.cat([method.merge(block, known) for block in blocks])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", get_args(Variant))
def test_pcb_goes_on_where_the_paper_divides_by_zero(form: str, variant: Variant) -> None:
    deltas = torch.randn(2, 3000, generator=torch.Generator().manual_seed(2))
    nothing, opposite, even = torch.zeros(1, 3000), torch.stack([deltas[0], -deltas[0]]), torch.full((1, 3000), 0.5)
    method = Pcb(variant=variant, mask_ratio=0.1)
    with kernels_in(form):
        assert torch.equal(run(method, "model", torch.cat([deltas, nothing])), run(method, "model", deltas))
        assert torch.equal(run(method, "model", torch.cat([nothing, nothing])), nothing[0])
        assert not run(method, "model", opposite).any()
        mean = run(method, "model", torch.cat([deltas, even]))
        torch.testing.assert_close(mean, torch.cat([deltas, even]).mean(0))
        tiny = run(method, "tensor", deltas[:, :1])
        torch.testing.assert_close(tiny, deltas[:, :1].mean(0))


def test_pcb_says_which_model_takes_no_part(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", models / "same")
    entries = [{"model": str(models / name)} for name in ("m0", "same", "m1")]
    recipe = {"merge_method": "pcb", "base_model": str(models / "base"), "models": entries}

    artifact = merge(Recipe.from_data(recipe), tmp_path / "out")

    assert [warning for warning in artifact.warnings if "no part" in warning] == [
        "model 2 takes no part in the merge: its task vector is zero, or all of it that is not was clamped"
    ]


@pytest.mark.parametrize("form", FORMS)
def test_sce_keeps_exactly_so_many_positions_the_lowest_index_first(form: str) -> None:
    deltas = torch.zeros(2, 5000)
    deltas[0, 10:4010] = 1.0
    with kernels_in(form):
        merged = run(Sce(select_topk=0.5), "tensor", deltas)
    assert merged.nonzero().flatten().tolist() == list(range(10, 2010))


def test_arcee_fusion_takes_exact_quartiles_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    base, delta = torch.randn(40, 300, generator=generator), 0.1 * torch.randn(40, 300, generator=generator)
    model = base + delta
    p, q = (rows.double().log_softmax(1) for rows in (model, base))
    importance = (model - base).abs() * (p.exp() * (p - q)).sum(1, keepdim=True)
    first, median, third = importance.flatten().sort().values[[int(share * 11999) for share in (0.25, 0.5, 0.75)]]

    method, block = ArceeFusion(), Block([Rows.of(model)], Rows.of(base), grains=Grains.of((40, 300)))
    merged = method.merge(block, measure(list(method.stages("tensor")), [block]))

    expected = torch.where(importance >= median + 1.5 * (third - first), model, base)
    assert int((~torch.isclose(merged, expected)).sum()) == 0


def test_sce_weighs_faint_models_alike() -> None:
    deltas = torch.tensor([[1e-4, 1e-4], [2e-4, 2e-4]])
    torch.testing.assert_close(run(Sce(), "tensor", deltas), torch.full((2,), 1.5e-4))
    torch.testing.assert_close(run(Sce(), "tensor", 100 * deltas), torch.full((2,), 1.8e-2))
