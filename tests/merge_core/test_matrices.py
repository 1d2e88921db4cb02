"""Methods on whole matrices, against the papers' formulas with a float64 singular value decomposition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core import matrices
from merge_core.matrices import SMALLEST
from merge_core.merge import merge
from merge_core.method import Block, MergeMethod
from merge_core.methods.iso_c import IsoC
from merge_core.methods.iso_cts import IsoCts
from merge_core.methods.low_rank import Eora, LowRank
from merge_core.methods.tsv_m import TsvM
from merge_core.recipe import Recipe
from tests.conftest import method_recipe

Oracle = Callable[[Tensor], Tensor]


def svd(matrix: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, V with nothing where σ is zero beside the largest, or beside the whole that this is left `of`."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    there = (s > SMALLEST * (s[0] if of is None else of.norm())).to(s)
    return u * there, s * there, vt.T * there


def nearest_orthonormal(vectors: Tensor) -> Tensor:
    u, _, v = svd(vectors)
    return u @ v.T


def iso_c(deltas: Tensor) -> Tensor:
    u, s, v = svd(deltas.sum(0))
    return s.mean() * u @ v.T


def iso_cts(deltas: Tensor, fraction: float = 0.8) -> Tensor:
    models, rank = len(deltas), min(deltas.shape[1:])
    alone = min(round((rank - int(rank * fraction)) / models), rank // models)
    common = rank - alone * models
    u, s, v = svd(deltas.sum(0))
    left, strengths, right = [u[:, :common]], [s[:common]], [v[:, :common]]
    for delta in deltas:
        own_u, own_s, own_v = svd(delta - u[:, :common] @ u[:, :common].T @ delta, delta)
        left, strengths = [*left, own_u[:, :alone]], [*strengths, own_s[:alone]]
        right.append(own_v[:, :alone])
    u, v = nearest_orthonormal(torch.cat(left, 1)), nearest_orthonormal(torch.cat(right, 1))
    return torch.cat(strengths).mean() * u @ v.T


def tsv_m(deltas: Tensor) -> Tensor:
    share = min(deltas.shape[1:]) // len(deltas)
    parts = [svd(delta) for delta in deltas]
    u = nearest_orthonormal(torch.cat([u[:, :share] for u, _, _ in parts], 1))
    v = nearest_orthonormal(torch.cat([v[:, :share] for _, _, v in parts], 1))
    return u @ torch.diag(torch.cat([s[:share] for _, s, _ in parts])) @ v.T


ORACLES: list[tuple[MergeMethod, Oracle]] = [(IsoC(), iso_c), (IsoCts(), iso_cts), (TsvM(), tsv_m)]
each = pytest.mark.parametrize(("method", "oracle"), ORACLES, ids=[type(method).__name__ for method, _ in ORACLES])
SHAPES = [(1, 7), (7, 1), (5, 5), (12, 30), (30, 12), (40, 39)]


def deltas_of(shape: tuple[int, int], models: int, seed: int = 0) -> Tensor:
    return torch.randn((models, *shape), generator=torch.Generator().manual_seed(seed))


def merged(method: MergeMethod, deltas: Tensor, *, tensor: str = "t") -> Tensor:
    return method.merge(Block.of(deltas, torch.zeros(deltas.shape[1:]), tensor=tensor), {})


@each
@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_paper(method: MergeMethod, oracle: Oracle, shape: tuple[int, int], models: int) -> None:
    deltas = deltas_of(shape, models)
    is_mean = isinstance(method, TsvM) and min(shape) < models
    expected = deltas.double().mean(0) if is_mean else oracle(deltas.double())
    torch.testing.assert_close(merged(method, deltas).double(), expected, rtol=1e-5, atol=1e-5)


@each
@settings(max_examples=40)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), models=st.integers(1, 3), seed=st.integers(0, 99))
def test_agrees_with_the_paper_on_any_shape(
    method: MergeMethod, oracle: Oracle, rows: int, columns: int, models: int, seed: int
) -> None:
    """Singular vectors are as unique as their values are apart: closer than that, the oracle is not one either, and not
    in float32, in which the papers' code works and vectors are kept here.
    """
    deltas = deltas_of((rows, columns), models, seed)
    if isinstance(method, TsvM) and min(rows, columns) < models:
        return
    expected = oracle(deltas.double())
    nearby = oracle(deltas.double() * (1 + 1e-9 * deltas_of((rows, columns), models, seed + 1).double()))
    in_float32 = oracle(deltas).double()
    tolerance = 1e-5 + 1e3 * float((expected - nearby).abs().max()) + 4 * float((expected - in_float32).abs().max())
    torch.testing.assert_close(merged(method, deltas).double(), expected, rtol=0, atol=tolerance)


@each
@pytest.mark.parametrize("shape", [(9, 16), (16, 9), (12, 12)], ids=str)
def test_directions_that_the_task_vectors_lack_stay_out(
    method: MergeMethod, oracle: Oracle, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randint(-3, 4, (2, size, 2), generator=generator).float() for size in shape]
    deltas = factors[0] @ factors[1].mT
    ours = merged(method, deltas)
    torch.testing.assert_close(ours.double(), oracle(deltas.double()), rtol=1e-5, atol=1e-5)
    assert int(torch.linalg.matrix_rank(ours, rtol=1e-4)) <= 4


@each
def test_a_model_that_learned_nothing_has_no_directions(method: MergeMethod, oracle: Oracle) -> None:
    deltas = deltas_of((12, 8), 2)
    deltas[1] = 0
    torch.testing.assert_close(merged(method, deltas).double(), oracle(deltas.double()), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged(method, torch.zeros(2, 12, 8)), torch.zeros(12, 8))


def test_singular_values_far_below_the_largest_are_right() -> None:
    """As the module says: to float32 down to 1e-4 of the largest, to three digits at a millionth."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    exact = torch.logspace(-6, 0, 42, dtype=torch.float64)[2:]
    values, _ = matrices.singular(lambda: [(slice(0, 60), u @ torch.diag(exact) @ v.T)])
    torch.testing.assert_close(values, exact, rtol=2e-3, atol=0)
    high = exact > 1e-4
    torch.testing.assert_close(values[high], exact[high], rtol=1e-7, atol=0)


@each
def test_what_is_no_matrix_or_shall_not_be_one_is_averaged(method: MergeMethod, oracle: Oracle) -> None:
    for shape, tensor, chosen in [
        ((6,), "t", method),
        ((4, 3, 2, 2), "t", method),
        ((6, 5), "model.text_projection.weight", method),
        ((6, 5), "t", method.model_copy(update={"decompose": False})),
    ]:
        deltas = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
        ours = merged(chosen, deltas, tensor=tensor)
        torch.testing.assert_close(ours, deltas.mean(0))


@each
def test_many_runs_give_what_one_gives(method: MergeMethod, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((30, 12), (12, 30)):
        deltas = deltas_of(shape, 2)
        whole = merged(method, deltas)
        with monkeypatch.context() as patch:
            patch.setattr(matrices, "RUN_ELEMENTS", 40)
            torch.testing.assert_close(merged(method, deltas), whole, rtol=1e-5, atol=1e-5)


@each
def test_nan_that_is_let_through_is_not_hidden(method: MergeMethod, oracle: Oracle) -> None:
    deltas = deltas_of((6, 5), 2)
    deltas[0, 2, 2] = torch.nan
    assert merged(method, deltas).isnan().all()


@each
@pytest.mark.parametrize("shape", [(300, 300), (900, 300), (300, 900)], ids=str)
def test_holds_what_it_says(
    method: MergeMethod, oracle: Oracle, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = deltas_of(shape, 3)
    holds_what_it_says(method, Block.of(deltas, torch.zeros(shape)), deltas[0], monkeypatch)


def holds_what_it_says(method: MergeMethod, block: Block, delta: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sum of live tensors, counted by torch itself, is what the plan reckons with."""
    block.out = torch.empty(delta.shape)
    monkeypatch.setattr(matrices, "RUN_ELEMENTS", 3000)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        method.merge(block, {})
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    held = method.held(delta.shape)
    assert held is not None
    assert peak <= held * delta.nbytes + 48 * 3000 + 100_000


@pytest.mark.parametrize("rank", [1, 3, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_is_the_truncated_decomposition(shape: tuple[int, int], rank: int) -> None:
    (delta,) = deltas_of(shape, 1).double()
    u, s, v = svd(delta)
    expected = u[:, :rank] @ torch.diag(s[:rank]) @ v[:, :rank].T
    torch.testing.assert_close(merged(LowRank(rank=rank), delta[None].float()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("samples", [100, 4])
def test_eora_is_the_papers_formula(
    shape: tuple[int, int], rank: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer samples than columns the paper's S cannot well be divided by."""
    (delta,) = deltas_of(shape, 1).double()
    inputs = torch.randn(samples, shape[1], generator=torch.Generator().manual_seed(5))
    covariance = inputs.T @ inputs / samples
    block = Block.of(delta[None], torch.zeros(shape), covariance=[covariance])
    monkeypatch.setattr(matrices, "RUN_ELEMENTS", 40)

    ours = Eora(rank=rank).merge(block, {}).double()

    squares, axes = torch.linalg.eigh(covariance.double())
    root = axes * torch.where(squares < 0, squares[squares > 0].min(), squares).sqrt()
    u, s, v = svd(delta @ root)
    if samples > shape[1]:
        expected = u[:, :rank] @ torch.diag(s[:rank]) @ v[:, :rank].T @ torch.linalg.inv(root)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, u[:, :rank] @ u[:, :rank].T @ delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(300, 300), (900, 300), (300, 900)], ids=str)
@pytest.mark.parametrize("method", [LowRank(rank=20), Eora(rank=20)], ids=lambda method: method.name)
def test_low_rank_holds_what_it_says(method: LowRank, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    (delta,) = deltas_of(shape, 1)
    block = Block.of([delta], torch.zeros(shape), covariance=[torch.eye(shape[1])])
    holds_what_it_says(method, block, delta, monkeypatch)


@pytest.mark.parametrize(("title", "promise"), [("tsv_m", "this machine"), ("linear", "any machine")])
def test_the_lock_says_where_its_bytes_can_be_made_again(
    models: Path, tmp_path: Path, title: str, promise: str
) -> None:
    merge(Recipe.from_data(method_recipe(title)), tmp_path / "out", roots=[models])
    assert json.loads((tmp_path / "out" / "merge.lock.json").read_text())["exact_on"] == promise
