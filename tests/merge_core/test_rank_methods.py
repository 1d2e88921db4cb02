"""What is special to the methods that rank magnitudes: TIES, Breadcrumbs, DELLA, magnitude pruning, MagMax."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_core import kernels
from merge_core.errors import WeightsmithError
from merge_core.kernels.vectors import Marks, Rows, TaskVectors
from merge_core.merge import merge
from merge_core.methods.della import drop_rates
from merge_core.recipe import Recipe
from tests.conftest import FORMS, kernels_in, write_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "inputs"
LADDER = torch.arange(1.0, 11.0)


def merged(folder: Path, method: str, *deltas: Tensor, **keys: Any) -> Tensor:
    """What becomes of one tensor, zero in the base, in both forms of the kernels."""
    names = [f"m{i}" for i in range(len(deltas))]
    for name, delta in zip(["base", *names], [torch.zeros_like(deltas[0]), *deltas], strict=True):
        write_checkpoint(folder / name, {"t": delta})
    semantics = {"semantics": keys.pop("semantics")} if "semantics" in keys else {}
    recipe = Recipe.from_data(
        {"merge_method": method, "base_model": "base", "models": [{"model": name} for name in names]}
        | {"parameters": keys, **semantics}
    )
    found = []
    for form in FORMS:
        with kernels_in(form):
            merge(recipe, folder / form, roots=[folder])
            found.append(load_file(folder / form / "model.safetensors")["t"])
    assert torch.equal(*found)
    return found[0]


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.1, range(5, 10)),
        (0.5, 0.0, range(6, 11)),
        (0.5, 0.05, range(6, 11)),  # int(0.05 · 10) = 0 of the largest are left out, not everything
        (0.6, 0.6, range(1, 7)),  # more than all: the smallest are kept
        (0.95, 0.1, range(1, 10)),
        (0.5, 1.0, range(1, 6)),
        (0.05, 0.1, range(0)),
        (0.0, 0.1, range(0)),
        (1.0, 0.3, range(1, 11)),
    ],
)
def test_breadcrumbs_keeps_what_mergekit_keeps(tmp_path: Path, density: float, gamma: float, kept: range) -> None:
    expected = torch.tensor([number if number in kept else 0.0 for number in range(1, 11)])
    assert torch.equal(merged(tmp_path, "breadcrumbs", LADDER, weight=1, density=density, gamma=gamma), expected)


def test_breadcrumbs_with_a_density_of_1_leaves_a_model_whole_beside_others(tmp_path: Path) -> None:
    got = merged(tmp_path, "breadcrumbs", LADDER, 10 * LADDER, weight=1, gamma=0.1, density=0.5)
    assert got[-1] == 0 and got[4] == 55
    models = [
        {"model": "m0", "parameters": {"density": 0.5}},
        {"model": "m1", "parameters": {"density": 1.0}},
    ]
    recipe = {"merge_method": "breadcrumbs", "base_model": "base", "models": models}
    merge(Recipe.from_data(recipe | {"parameters": {"weight": 1, "gamma": 0.1}}), tmp_path / "mixed", roots=[tmp_path])
    expected = 10 * LADDER + torch.where((LADDER >= 5) & (LADDER < 10), LADDER, 0)
    assert torch.equal(load_file(tmp_path / "mixed" / "model.safetensors")["t"], expected)


def test_official_breadcrumbs_ranks_each_row_and_lets_single_numbers_be(tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, -2.0, 3.0, -4.0], [40.0, 30.0, 20.0, 10.0], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    options: dict[str, Any] = {"semantics": "paper", "top_k_keep": 0.5, "top_k_remove": 0.25}
    expected = torch.tensor([[0.0, -2, 3, 0], [0, 30, 20, 0], [0, 0, 0, 0], [0, 5, 5, 0]])
    assert torch.equal(merged(tmp_path / "a", "breadcrumbs", rows, **options), expected)
    assert torch.equal(merged(tmp_path / "b", "breadcrumbs", rows[0], **options), expected[0])
    assert merged(tmp_path / "c", "breadcrumbs", torch.tensor(3.0), **options) == 3.0
    assert not merged(tmp_path / "d", "breadcrumbs", torch.ones(2, 2, 1, 1), **options).any()


@pytest.mark.parametrize("method", ["breadcrumbs", "della"])
def test_a_vector_of_several_grains_is_one_row(tmp_path: Path, method: str) -> None:
    long = torch.randn(150_000, generator=torch.Generator().manual_seed(0))
    if method == "della":
        left = merged(tmp_path, method, long, weight=1, density=0.5, epsilon=0.4, rescale=False)
        order = long.abs().argsort()
        shares = [float((part != 0).double().mean()) for part in left[order].chunk(10)]
        assert shares == pytest.approx([0.14 + 0.08 * i for i in range(10)], abs=0.02)
    else:
        left = merged(tmp_path, method, long, semantics="paper", top_k_keep=0.1, top_k_remove=0.2)
        order = long.abs().argsort(descending=True)
        assert left[order][30_000:45_000].all() and int((left != 0).sum()) == 15_000


def test_della_keeps_with_the_chances_of_mergekit() -> None:
    base = load_file(GOLDEN / "mk_base.safetensors")
    for number in range(3):
        models = load_file(GOLDEN / f"mk_m{number}.safetensors")
        chances = load_file(GOLDEN / f"mk_della_d0.5_e0.15_prob{number}.safetensors")
        for name, origin in base.items():
            inner = origin.shape[1:]
            width, stride = (inner[0], math.prod(inner[1:])) if inner else (origin.numel(), 1)
            vectors = TaskVectors(Rows.of(origin), (Rows.of(models[name]),), torch.float32)
            rates = kernels.plain.by_rank(kernels.values(vectors), drop_rates((0.5,), (0.15,), width, stride))[0]
            torch.testing.assert_close(1 - rates, chances[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (1,), (4000, 1)])
def test_an_entry_alone_in_its_row_stays_with_the_mean_chance(tmp_path: Path, shape: tuple[int, ...]) -> None:
    left = merged(tmp_path, "della_linear", torch.ones(shape), weight=1, density=0.5, epsilon=0.4, rescale=False)
    assert torch.isfinite(left).all()
    if left.numel() > 1:
        assert float(left.mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.9, 0.15), (0.85, 0.15), (0.15, 0.15), (0.5, 0.5), (0.5, -0.6), (0.1, 0.15)]
)
def test_chances_beyond_0_and_1_are_refused_with_the_reason(tmp_path: Path, density: float, epsilon: float) -> None:
    with pytest.raises(WeightsmithError, match="take an epsilon below"):
        merged(tmp_path, "della", LADDER, weight=1, density=density, epsilon=epsilon)


@pytest.mark.parametrize(("density", "expected"), [(1.0, LADDER), (0.0, 0 * LADDER)])
def test_della_keeps_all_or_nothing_whatever_epsilon_says(tmp_path: Path, density: float, expected: Tensor) -> None:
    assert torch.equal(merged(tmp_path, "della_linear", LADDER, weight=1, density=density), expected)


def test_pruning_drops_whatever_equals_the_last_one_dropped(tmp_path: Path) -> None:
    ladder = torch.tensor([3.0, 1.0, 2.0, -2.0, 2.0, 4.0])
    for rate, least in [(0.0, 1), (0.2, 2), (0.4, 3), (0.6, 3), (0.99, 4), (1.0, 5)]:
        got = merged(tmp_path / str(rate), "magnitude_prune", ladder, drop_rate=rate)
        assert torch.equal(got, torch.where(ladder.abs() >= least, ladder, 0)), rate


def test_magmax_takes_the_first_of_equal_changes(tmp_path: Path) -> None:
    one, other = torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([-1.0, 1.0, -0.5, -4.0])
    got = merged(tmp_path, "magmax", one, other, **{"lambda": 1})
    assert got.tolist() == [1.0, -2.0, -0.5, -4.0]


def test_marks_are_given_once_and_never_take_more_than_their_room() -> None:
    marks = Marks(room=10)
    assert marks.space(11) is None
    eight = marks.space(2, 4)
    assert eight is not None
    marks.put("a", eight)
    assert marks.space(3) is None
    marks.put("b", np.zeros(3, np.uint8))
    assert marks.take("b") is None and marks.take("a") is eight and marks.take("a") is None
    assert marks.space(10) is not None


def test_a_density_of_zero_keeps_nothing_and_the_least_above_it_one_entry(tmp_path: Path) -> None:
    for method in ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"):
        assert merged(tmp_path / method, method, LADDER, weight=1, density=0).count_nonzero() == 0
    assert merged(tmp_path / "one", "ties", LADDER, weight=1, density=1e-6).tolist() == [0] * 9 + [10]
