"""What single methods do in odd cases; the numbers called recorded are mergekit's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from merge_core.kernels.vectors import Rows
from merge_core.method import Block, MergeMethod
from merge_core.methods.darex import DarexQ
from merge_core.methods.expo import ExPO
from merge_core.methods.geometric_median import GeometricMedian
from merge_core.methods.graft import Graft
from merge_core.methods.karcher import Karcher
from merge_core.methods.linear import Linear
from merge_core.methods.model_stock import ModelStock
from merge_core.methods.multislerp import MultiSlerp
from merge_core.methods.nearswap import NearSwap
from merge_core.methods.nuslerp import NuSlerp
from merge_core.methods.ram import Ram, RamPlus
from merge_core.methods.task_arithmetic import TaskArithmetic
from merge_core.methods.wise_ft import WiseFT
from merge_core.statistics import Grains, Statistic
from tests.merge_core import test_method_contract as contract

A, B, C, ZERO = [1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]


def merged(method: MergeMethod, models: Sequence[Any], base: Any = None) -> Tensor:
    """A whole tensor measured and merged in one block."""
    block = Block.of(models, base)
    known: dict[str, Any] = {}
    for stage in method.stages("tensor"):
        found: dict[str, Statistic] = {}
        if stage.needed(known):
            stage.observe(block, known, found)
            stage.finish(found, known)
    return method.merge(block, known)


def assert_merges_to(
    method: MergeMethod, models: Sequence[Any], expected: Any, base: Any = None, rtol: float = 1e-5
) -> None:
    torch.testing.assert_close(merged(method, models, base), torch.tensor(expected), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    ("models", "base", "weight", "recorded"),
    [
        ([A, B], None, (0.5, 0.3), [0.749727, 1.4485154, 1.9822924]),
        ([ZERO, B], None, (0.5, 0.3), [0.0, 1.6667107, 0.5555702]),
        ([ZERO, ZERO], None, (0.5, 0.3), ZERO),
        ([[1.0, 2.0, 2.0], [2.0, 4.0, 4.0]], None, (0.5, 0.3), [1.375, 2.75, 2.75]),
        ([[1.0, 2.0, 2.0], [-2.0, -4.0, -4.0]], None, (0.5, 0.3), [-0.125, -0.25, -0.25]),
        ([[1.0, 2.0, 2.0], [2.2, 4.0, 4.0]], None, (0.5, 0.3), [1.4501754, 2.7503302, 2.7503302]),
        ([A, B], None, (0.5, -0.5), [0.6243072, 1.8729215, 1.8729215]),
        ([A, B], None, (1.5, -0.5), [0.9774686, -1.8729215, 1.3306301]),
        ([A, B], [0.5, 0.5, 0.5], (0.5, 0.3), [0.6412798, 1.5953841, 2.1605034]),
        ([A, B], A, (0.5, 0.3), [0.4444298, 1.6667107, 1.4444298]),
        ([2.0, 3.0], None, (0.5, 0.3), 2.375),
        ([[2.0], [-3.0]], None, (0.5, 0.3), [0.125]),
    ],
)
def test_nuslerp(models: Any, base: Any, weight: tuple[float, float], recorded: Any) -> None:
    assert_merges_to(NuSlerp(weight=weight), models, recorded, base)


@pytest.mark.parametrize(
    ("models", "base", "parameters", "recorded"),
    [
        ([A, B, C], None, {"weight": (0.5, 0.3, 0.9)}, [1.231568, 1.3189206, 0.776289]),
        ([A, B, C], None, {"weight": (0.5, 0.3, 0.9), "normalize_weights": False}, [2.0936656, 2.2421649, 1.3196914]),
        ([A, B, C], None, {"weight": (0.5, -0.3, 0.9)}, [1.1346056, 0.4641196, 0.4648507]),
        ([A, B, C], None, {"weight": (0.5, 0.3, 0.9), "eps": 0.1}, [1.218615, 1.3118438, 0.7839117]),
        ([A, B, ZERO], None, {"weight": (0.5, 0.3, 0.9)}, [0.4170594, 0.53083, 1.0110621]),
        ([A, B], C, {"weight": (0.5, 0.3)}, [0.5135215, 1.0847728, 2.262847]),
        ([A], C, {"weight": (0.5,)}, A),
        ([A], None, {"weight": (0.5,), "normalize_weights": False}, A),
        ([A, [-2.0, 0.0, -4.0]], None, {"weight": (0.5, 0.5)}, [-0.5, 0.0, -1.0]),
        ([A, [-1.0, 0.0, -2.0]], None, {"weight": (0.5, 0.3)}, A),
        ([A, B], None, {"weight": (0.5, -0.5), "normalize_weights": False}, [-0.1729307, 0.3668414, -0.2235809]),
    ],
)
def test_multislerp(models: Any, base: Any, parameters: dict[str, Any], recorded: Any) -> None:
    assert_merges_to(MultiSlerp(**parameters), models, recorded, base, rtol=1e-4 if "eps" in parameters else 1e-5)


PAIR = [[A, [1.0, 1.0, 1.0]], [B, [2.0, 1.0, 3.0]]]
CUBES = [[[[1.0, 0.0], [2.0, 1.0]], [[1.0, 3.0], [1.0, 0.0]]], [[[0.0, 1.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 1.0]]]]


@pytest.mark.parametrize(
    ("row_wise", "models", "recorded"),
    [
        (False, PAIR, [[0.749727, 1.4485154, 1.9822924], [1.4010855, 1.0178815, 1.7842897]]),
        (True, PAIR, [[0.6666557, 1.4276172, 1.7438358], [1.4877049, 1.2176837, 1.8982292]]),
        (False, [[ZERO, [1.0] * 3], [B, [2.0] * 3]], [[0.0, 1.6667107, 0.5555702], [1.375] * 3]),
        (True, [[A], [B]], [[0.8314697, 1.6667107, 1.625]]),
        (False, [A, B], [0.749727, 1.4485154, 1.9822924]),
        (True, [A, B], [0.749727, 1.4485154, 1.9822924]),
        (False, [2.0, 3.0], 2.375),
        (True, [2.0, 3.0], 2.375),
    ],
)
def test_nuslerp_of_rows_and_columns(row_wise: bool, models: Any, recorded: Any) -> None:
    method = NuSlerp(weight=(0.5, 0.3), nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    assert_merges_to(method, models, recorded)


@pytest.mark.parametrize(
    ("models", "recorded"),
    [
        ([[A, B], [C, A]], [[0.4805061, 0.2402531, 0.4805061], [0.2204812, 0.6614437, 0.6614437]]),
        ([[ZERO, B], [ZERO, A]], [ZERO, [0.2204812, 0.6614437, 0.6614437]]),
        (CUBES, [[[0.0, 0.0], [1.4604989, 0.9736660]], [[1.2426406, 1.6568542], [0.8284271, 0.4142136]]]),
        ([A, B], [0.2204812, 0.6614437, 0.6614437]),
        ([1.0, 2.0], 1.5),
    ],
)
def test_model_stock_of_rows(models: Any, recorded: Any) -> None:
    assert_merges_to(ModelStock(filter_wise=True), models, recorded, torch.zeros(torch.tensor(models[0]).shape), 1e-4)


@pytest.mark.parametrize(
    "method",
    [
        NuSlerp(weight=(0.7, 0.2), nuslerp_flatten=False),
        NuSlerp(weight=(0.7, 0.2), nuslerp_flatten=False, nuslerp_row_wise=True),
        ModelStock(filter_wise=True),
    ],
    ids=repr,
)
def test_rows_and_columns_obey_the_laws_of_methods(method: MergeMethod) -> None:
    contract.assert_any_blocks_give_the_same_bytes(method, "tensor")
    contract.assert_workspace_covers_what_is_held(method, "tensor")


def test_multislerp_where_mergekit_fails() -> None:
    third = [[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]]
    assert_merges_to(MultiSlerp(weight=(1.0,) * 3), third, [0.0, 0.0])
    assert_merges_to(MultiSlerp(weight=(1.0,) * 3), [A, A, A], A, base=A)
    for weight in ((0.5, -0.5), (0.0, 0.0)):
        with pytest.raises(ValidationError, match="the weights sum to zero"):
            MultiSlerp(weight=weight)


@pytest.mark.parametrize(
    ("models", "parameters", "recorded"),
    [
        ([A, B, C], {}, [1.1176939, 1.5734866, 1.1965258]),
        ([A, B, C], {"max_iter": 0}, [1.1137022, 1.5975262, 1.1680545]),
        ([A, B, C], {"max_iter": 1}, [1.1177095, 1.5744452, 1.1952495]),
        ([A, B, C], {"tol": 1.0}, [1.0155564, 0.0, 2.0311127]),
        ([A, B, C], {"tol": 10.0}, ZERO),
        ([A, B, ZERO], {}, [0.5024037, 1.0657591, 1.3600603]),
        ([A, ZERO], {}, [0.5, 0.0, 1.0]),
        ([ZERO, ZERO, ZERO], {}, ZERO),
        ([A], {}, A),
        ([A, [2.0, 0.0, 4.0], [3.0, 0.0, 6.0]], {}, [2.0, 0.0, 4.0]),
        ([A, [-1.0, 0.0, -2.0]], {}, A),
        ([A, A, [-1.0, 0.0, -2.0]], {}, A),
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], {}, [0.0, 1.0]),
        ([2.0, 3.0, -1.0], {}, 2.0),
    ],
)
def test_karcher(models: Any, parameters: dict[str, Any], recorded: Any) -> None:
    assert_merges_to(Karcher(**parameters), models, recorded)


@pytest.mark.parametrize(
    ("models", "base", "recorded"),
    [
        ([A, B], ZERO, [0.2204812, 0.6614437, 0.6614437]),
        ([A, B, C], ZERO, [0.4584624, 0.9169248, 0.6876936]),
        ([A, A, A], ZERO, A),
        ([A, A, A], A, A),
        ([ZERO, A, B], ZERO, [0.0793235, 0.2379706, 0.2379706]),
        ([[2.0, 1.0, 1.0], [0.0, 1.0, 1.0]], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ([[1.0, 0.0], [-0.5, 1.0]], [0.0, 0.0], [-0.4045085, -0.809017]),
        ([[math.cos(3.1), math.sin(3.1)], [1.0, 0.0]], [0.0, 0.0], [-0.9991351, -48.0361404]),
        ([[1e-4, 0.0], [1e-4 * math.cos(1), 1e-4 * math.sin(1)]], [0.0, 0.0], [8.277565e-07, 4.522054e-07]),
        ([1.0, 2.0], 0.0, 1.5),
        ([1.0, -2.0], 0.0, 0.0),
    ],
)
def test_model_stock(models: Any, base: Any, recorded: Any) -> None:
    assert_merges_to(ModelStock(), models, recorded, base, rtol=1e-4)


@pytest.mark.parametrize(
    ("t", "recorded"),
    [
        (0.5, [0.1, 0.5, 0.5, -0.5, 1.0]),
        (0.0, [0.0, 0.0, 0.0, 0.0, 1.0]),
        (-1.0, [0.0, 0.0, 0.0, 0.0, 1.0]),
        (5.0, [0.1, 0.5, 1.0, -2.0, 1.0]),
    ],
)
def test_nearswap(t: float, recorded: Any) -> None:
    assert_merges_to(NearSwap(t=t), [[0.1, 0.5, 1.0, -2.0, 1.0]], recorded, [0.0, 0.0, 0.0, 0.0, 1.0])


CHANGED = [
    [2.0, 1.0, 3.0, 1.0, 1.0, 1.05, 1.0],
    [1.0, 3.0, -2.0, 1.0, 1.0, 1.0, 1.0],
    [1.0, 1.0, 1.5, 1.0, 4.0, 1.1, 1.0],
]


@pytest.mark.parametrize(
    ("method", "models", "recorded"),
    [
        (Ram(epsilon=0.02), CHANGED, [2.0, 3.0, 0.8333334, 1.0, 4.0, 1.075, 1.0]),
        (Ram(epsilon=1.0), CHANGED, [1.0, 3.0, 0.5, 1.0, 4.0, 1.0, 1.0]),
        (Ram(epsilon=0.0), CHANGED, [2.0, 3.0, 0.8333334, 1.0, 4.0, 1.075, 1.0]),
        (Ram(), CHANGED[:1], CHANGED[0]),
        (RamPlus(), CHANGED, [2.02, 3.04, 0.8333334, 1.0, 4.06, 1.075, 1.0]),
        (RamPlus(r=1.0, alpha=5.0), CHANGED, [4.0, 5.0, 0.8333334, 1.0, 10.0, 1.075, 1.0]),
        (RamPlus(r=1.0), CHANGED, [2.2, 3.4, 0.8333334, 1.0, 4.6, 1.075, 1.0]),
        (RamPlus(r=1.0), CHANGED[:1], CHANGED[0]),
        (RamPlus(r=1.0), [[1.0] * 7] * 3, [1.0] * 7),
    ],
)
def test_ram(method: MergeMethod, models: Any, recorded: Any) -> None:
    assert_merges_to(method, models, recorded, [1.0] * 7)


def test_geometric_median() -> None:
    cloud = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [50.0, 60.0]])
    found = merged(GeometricMedian(), cloud)
    pulls = (cloud - found) / (cloud - found).norm(dim=1, keepdim=True)
    assert pulls.sum(dim=0).norm() < 1e-5, "directions cancel at the median"

    assert merged(GeometricMedian(weight=(5.0, 1.0, 1.0, 1.0)), cloud).tolist() == [0.0, 0.0], "most of the weight"
    square = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0]])
    assert merged(GeometricMedian(), square).tolist() == [0.0, 0.0], "the mean is a model, and the median"
    assert merged(GeometricMedian(), [A]).tolist() == A
    assert merged(GeometricMedian(), [A, A, A]).tolist() == A


def test_the_median_leaves_a_model_that_is_only_the_mean() -> None:
    models = torch.tensor([[0.0, 0.0], [9.0, 0.0], [-3.0, 3.0], [-3.0, -3.0], [-3.0, 0.0]])
    found = merged(GeometricMedian(), models)
    away = (models - found).norm(dim=1)
    assert away.sum() < (models - models[0]).norm(dim=1).sum() - 0.1
    for step in (torch.tensor([1e-2, 0.0]), torch.tensor([-1e-2, 0.0]), torch.tensor([0.0, 1e-2])):
        assert away.sum() < (models - found - step).norm(dim=1).sum()


def test_interpolation_reaches_both_ends_exactly() -> None:
    base, tuned = [0.1, -7.0, 3.0], [0.3, 1e-3, 3.0]
    assert torch.equal(merged(WiseFT(alpha=0.0), [tuned], base), torch.tensor(base))
    assert torch.equal(merged(WiseFT(alpha=1.0), [tuned], base), torch.tensor(tuned))
    assert_merges_to(ExPO(alpha=0.0), [tuned], tuned, base)
    assert torch.equal(merged(ExPO(alpha=-1.0), [tuned], base), torch.tensor(base))


def test_uniform_soup_negation_and_analogy() -> None:
    base, a, b, c = ([1.0, 1.0], [3.0, 1.0], [2.0, 0.0], [1.0, 4.0])
    assert_merges_to(Linear(weight=(1.0, 1.0, 1.0)), [a, b, c], [2.0, 5 / 3])
    assert_merges_to(TaskArithmetic(weight=(-0.5,)), [a], [0.0, 1.0], base)
    assert_merges_to(TaskArithmetic(weight=(1.0, -1.0, 1.0)), [a, b, c], [2.0, 5.0], base)
    assert torch.equal(merged(TaskArithmetic(weight=(1.0, -1.0)), [a, a], base), torch.tensor(base)), "cancels exactly"


def test_no_model_and_no_entry_has_to_take_part() -> None:
    assert_merges_to(Graft(sparsity=0.1), [A], ZERO, ZERO)
    models, base = contract.make(DarexQ, (5, 4))
    chosen = DarexQ(drop_rate=(0.5, 0.0, 0.5), q=("analytic",))
    assert base is not None and torch.isfinite(contract.run(chosen, "model", models, base, Grains.of((5, 4)), 1)).all()


def test_one_method_serves_any_stored_format() -> None:
    """Fine-tunes in bf16: the angle is that of the stored numbers, not of rounded products."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(1000, generator=generator).bfloat16()
    models = [(base + 0.05 * torch.randn(1000, generator=generator)).bfloat16() for _ in range(3)]
    block = Block([Rows.of(model) for model in models], Rows.of(base), grains=Grains.of((1000,)))
    found: dict[str, Statistic] = {}
    known: dict[str, Any] = {}
    (stage,) = ModelStock().stages("tensor")
    stage.observe(block, known, found)
    stage.finish(found, known)
    deltas = torch.stack([model.double() - base.double() for model in models])
    torch.testing.assert_close(torch.tensor(known["gram"]).double(), deltas @ deltas.T, rtol=1e-6, atol=0)
