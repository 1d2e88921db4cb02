"""Weight matching: laws, planted permutations, and what brute force finds."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core.alignment.assignment import assign, best, value
from merge_core.alignment.assignment import given as given_others
from merge_core.alignment.costs import Products, bundles
from merge_core.alignment.matching import Work, match, match_many, matching_bytes
from merge_core.alignment.mean import MeanOf
from merge_core.alignment.permutations import Permuted
from merge_core.alignment.spec import Axis, Blocks, Concat, Fixed, Indexed, PermutationSpec, names
from merge_core.alignment.spec import Permuted as Moved
from merge_core.checkpoint import Checkpoint
from merge_core.errors import Canceled, IncompatibleModels, NonFinite
from merge_core.progress import Progress
from tests.conftest import write_checkpoint

Opened = Callable[[Mapping[str, Tensor]], Checkpoint]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return lambda tensors: Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("model"), tensors))


def mlp(*sizes: int) -> PermutationSpec:
    axes: dict[str, tuple[Axis | None, ...]] = {}
    hidden: list[Axis | None] = [None, *(Moved(f"P_{i}") for i in range(len(sizes) - 2)), None]
    for i in range(len(sizes) - 1):
        axes |= {f"{i}.weight": (hidden[i + 1], hidden[i]), f"{i}.bias": (hidden[i + 1],)}
    return PermutationSpec({f"P_{i}": size for i, size in enumerate(sizes[1:-1])}, axes)


def attention(groups: int = 3, heads: int = 2, size: int = 4, fixed: int = 2) -> PermutationSpec:
    """Every form of blocks at once: groups that move with the heads and the dimensions inside them, fused and
    interleaved projections, and what stays inside blocks that move.
    """
    inner = {f"{what}.{g}": heads if what == "heads" else size for what in ("heads", "qk", "vo") for g in range(groups)}
    places = range(groups)
    q = Blocks(
        "groups", groups, tuple(Blocks(f"heads.{g}", heads, Concat((Fixed(fixed), Moved(f"qk.{g}")))) for g in places)
    )
    kv = Blocks("groups", groups, tuple(Concat((Fixed(fixed), Moved(f"qk.{g}"), Moved(f"vo.{g}"))) for g in places))
    o = Blocks("groups", groups, tuple(Blocks(f"heads.{g}", heads, Moved(f"vo.{g}")) for g in places))
    axes: dict[str, tuple[Axis | None, ...]] = {
        "q": (q, Moved("hidden")),
        "q.bias": (q,),
        "kv": (Moved("hidden"), Concat((Fixed(1), kv))),
        "o": (Moved("hidden"), o),
        "conv": (Moved("channels"), Moved("hidden"), None),
        "flat": (None, Blocks("channels", 4, Fixed(3)), Blocks(None, 2, Moved("pairs"))),
        "tied": (Blocks("channels", 4, Moved("shared")), None),
        "mean": (Moved("channels"),),
        "free": (None,),
        "count": (),
    }
    sizes = {"groups": groups, "hidden": 5, "channels": 4, "pairs": 2, "shared": 3} | inner
    return PermutationSpec(sizes, axes, frozenset({"mean"}))


def grouped() -> PermutationSpec:
    """Grouped convolutions: their channels move on one axis as blocks, inside the blocks on another too."""
    before, after = (
        Blocks("groups", 3, Moved("inside")),
        Blocks("groups", 3, tuple(Moved(f"out.{g}") for g in range(3))),
    )
    axes: dict[str, tuple[Axis | None, ...]] = {
        "one": (before, None),
        "two": (after, Moved("inside"), None),
        "three": (None, after),
    }
    return PermutationSpec({"inside": 4, "groups": 3, **{f"out.{g}": 5 for g in range(3)}}, axes)


def random_model(
    spec: PermutationSpec, seed: int, width: int = 6, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: [width if axis is None else spec.size(axis) for axis in axes] for name, axes in spec.axes.items()}
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return made | {name: torch.tensor(3) for name, axes in spec.axes.items() if not axes}


def permuted(spec: PermutationSpec, tensors: Mapping[str, Tensor], indexed: Indexed) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for axis, index in enumerate(spec.indices(name, indexed)):
            tensor = tensor if index is None else tensor.index_select(axis, torch.from_numpy(index))
        found[name] = tensor
    return found


def noisy(tensors: Mapping[str, Tensor], amount: float, seed: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + amount * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def products(spec: PermutationSpec, one: Mapping[str, Tensor], other: Mapping[str, Tensor], indexed: Indexed) -> float:
    moved = permuted(spec, other, indexed)
    names = [name for name in one if name not in spec.unmeasured and one[name].is_floating_point()]
    return sum(float((one[name].double() * moved[name].double()).sum()) for name in names)


def same(one: Indexed, other: Indexed) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# Assignments.


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40)
def test_an_assignment_is_the_best_there_is(size: int, seed: int, is_coarse: bool) -> None:
    matrix = np.random.default_rng(seed).standard_normal((size, size))
    matrix = np.round(matrix) if is_coarse else matrix
    before = matrix.copy()

    index, _ = assign(matrix)

    rows = np.arange(size)
    most = max(matrix[rows, list(each)].sum() for each in itertools.permutations(range(size)))
    assert math.isclose(matrix[rows, index].sum(), most, abs_tol=1e-9)
    assert sorted(index) == list(rows)
    assert (matrix == before).all()


def test_distinct_largest_values_need_no_solver() -> None:
    assert assign(np.eye(3)[[2, 0, 1]])[1]
    index, is_proved = assign(np.array([[2.0, 3.0], [1.0, 3.0]]))
    assert (index.tolist(), is_proved) == ([0, 1], False)


def test_of_equal_ones_elements_stay_where_they_are() -> None:
    matrix = np.zeros((5, 5))
    matrix[0, 3] = matrix[3, 0] = 1.0

    assert assign(matrix)[0].tolist() == [3, 1, 2, 0, 4]
    assert assign(np.zeros((4, 4))) == (pytest.approx(np.arange(4)), True)
    assert assign(np.ones((4, 4)))[0].tolist() == [0, 1, 2, 3]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_blocks_and_what_is_inside_them_are_the_best_there_is(seed: int) -> None:
    chain = Blocks("outer", 3, (Moved("a"), Moved("b"), Moved("c")))
    spec = PermutationSpec({"outer": 3, "a": 2, "b": 2, "c": 2}, {"w": (chain,)})
    generator = np.random.default_rng(seed)
    costs = {chain: generator.standard_normal((6, 6)), Moved("outer"): generator.standard_normal((3, 3))}
    orders = [[np.array(order) for order in itertools.permutations(range(size))] for size in (3, 2, 2, 2)]

    found, _ = best(costs, spec, spec.identity(), lambda: None)

    most = max(
        value(costs, spec, dict(zip(spec.permutations, each, strict=True))) for each in itertools.product(*orders)
    )
    assert math.isclose(value(costs, spec, found), most)


# Costs.


@given(st.integers(0, 2**16), st.integers(0, 2**16))
@settings(max_examples=5)
def test_costs_say_what_permutations_are_worth(opened: Opened, one: int, other: int) -> None:
    spec = attention()
    a, b = random_model(spec, one), random_model(spec, other + 2**17)
    state, new = spec.random(one), spec.random(other)
    found = bundles(spec, [name for name in a if name not in spec.unmeasured])
    with ThreadPoolExecutor(1) as pool, opened(a) as reference, opened(b) as model:
        streamed = Products(spec, reference, model, pool)
        for bundle in found:
            costs = streamed.costs(bundle, state)
            changed = {**state, **{name: new[name] for name in bundle.names}}
            gained = value(costs, spec, changed) - value(costs, spec, state)

            assert gained == pytest.approx(products(spec, a, b, changed) - products(spec, a, b, state), abs=1e-4)
    assert [len(bundle.names) for bundle in found] == [10, 1, 2, 1]


@given(st.integers(0, 2**16), st.sets(st.sampled_from(["groups", "heads", "vo", "shared"]), min_size=1))
@settings(max_examples=15)
def test_costs_of_some_permutations_are_those_of_all_with_the_others_as_they_are(seed: int, kinds: set[str]) -> None:
    """What stays is summed up: blocks that move or not, around and inside what is free."""
    heads = tuple(Blocks(f"heads.{g}", 2, Blocks(f"vo.{g}", 2, Moved("shared"))) for g in range(2))
    chains: tuple[Axis, ...] = (Blocks("groups", 2, heads), Blocks("groups", 2, (Moved("vo.0"), Moved("vo.1"))))
    sizes = dict.fromkeys(["groups", "shared", *(f"{kind}.{g}" for kind in ("heads", "vo") for g in range(2))], 2)
    spec = PermutationSpec(sizes, {str(number): (chain,) for number, chain in enumerate(chains)})
    generator = np.random.default_rng(seed)
    costs = {chain: generator.standard_normal((spec.size(chain),) * 2) for chain in chains}
    free = [name for name in sizes if name.partition(".")[0] in kinds]
    old = spec.random(seed)
    new = {**old, **{name: index for name, index in spec.random(seed + 1).items() if name in free}}

    some = given_others(costs, free, spec, old)

    assert {name for chain in some for name in names(chain)} <= set(free)
    gained = value(costs, spec, new) - value(costs, spec, old)
    assert value(some, spec, new) - value(some, spec, old) == pytest.approx(gained)


def test_blocks_that_differ_in_what_is_free_are_refused() -> None:
    chain = Blocks("o", 2, (Blocks("x", 2, Moved("a")), Blocks("y", 2, Moved("b"))))
    spec = PermutationSpec(dict.fromkeys("oxyab", 2), {"w": (chain,)})

    with pytest.raises(IncompatibleModels, match="in different ways"):
        given_others({chain: np.ones((8, 8))}, ["o", "a"], spec, spec.identity())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_large_costs_are_added_up_in_tiles(opened: Opened, dtype: torch.dtype) -> None:
    spec = mlp(3, 1300, 2)
    a, b = (random_model(spec, seed, dtype=dtype) for seed in (1, 2))
    a = {name: tensor if "0" in name else tensor * 0.1 for name, tensor in a.items()}
    (bundle,) = bundles(spec, a)
    with ThreadPoolExecutor(2) as pool, opened(a) as reference, opened(b) as model:
        (costs,) = Products(spec, reference, model, pool).costs(bundle, spec.identity()).values()

    wide = {name: (a[name].double(), b[name].double()) for name in a}
    dense = sum(one @ two.T for one, two in [wide["0.weight"]]) + wide["1.weight"][0].T @ wide["1.weight"][1]
    dense = dense + torch.outer(*wide["0.bias"])
    assert np.abs(costs - dense.numpy()).max() < (1e-12 if dtype == torch.float64 else 1e-5)
    assert matching_bytes(spec, reference, model, 2)[0] > 8 * 1300**2


# Matching.


@pytest.mark.parametrize(
    ("spec", "width"),
    [(mlp(12, 20, 24, 16, 5), 6), (attention(), 24), (attention(4, 3, 5, 0), 40)],
    ids=["mlp", "gqa", "no rope"],
)
def test_a_planted_permutation_is_found(opened: Opened, spec: PermutationSpec, width: int) -> None:
    a, planted = random_model(spec, 1, width), spec.random(2)
    with opened(a) as reference, opened(noisy(permuted(spec, a, planted), 0.02)) as model:
        found = match(spec, reference, model)

    assert same(found.indexed, spec.inverse(planted))
    assert found.l2_after < 0.1 * found.l2_before
    assert all(distance.difference > 0 for distance in found.after.values())


def test_blocks_alone_are_found_in_one_sweep_and_not_asked_for_again(opened: Opened) -> None:
    spec = attention()
    axes = {name: tuple(None if axis == Moved("hidden") else axis for axis in axes) for name, axes in spec.axes.items()}
    spec = PermutationSpec(spec.permutations, axes, spec.unmeasured)
    a, planted = random_model(spec, 1, 24), {**spec.random(2), "hidden": np.arange(5)}
    with opened(a) as reference, opened(permuted(spec, a, planted)) as model:
        found = match(spec, reference, model)

    assert same(found.indexed, spec.inverse(planted))
    assert len(found.visit_orders) == 2
    assert found.solved < 2 * len(found.visit_orders[0])


@given(st.integers(0, 2**16))
@settings(max_examples=6)
def test_models_never_come_apart(opened: Opened, seed: int) -> None:
    spec = (attention(), mlp(4, 8, 7, 3), grouped())[seed % 3]
    a, b = random_model(spec, seed), random_model(spec, seed + 1)
    with opened(a) as reference, opened(b) as model:
        found = match(spec, reference, model, seed=seed)
        again = match(spec, reference, model, seed=seed + 1, initial=found.indexed)

    assert found.l2_after <= found.l2_before
    assert again.l2_after <= found.l2_after * (1 + 1e-9)
    moved = permuted(spec, b, found.indexed)
    counted = [name for name in a if name not in spec.unmeasured and a[name].is_floating_point()]
    exact = math.sqrt(sum(float((a[name].double() - moved[name].double()).square().sum()) for name in counted))
    assert found.l2_after == pytest.approx(exact)


def test_a_model_is_closest_to_itself_as_it_is(opened: Opened) -> None:
    for spec in (attention(), mlp(4, 8, 7, 3)):
        with opened(random_model(spec, 3)) as model:
            found = match(spec, model, model)

        assert same(found.indexed, spec.identity())
        assert found.l2_after == 0 == found.l2_before
        assert len(found.visit_orders) == 1


def test_threads_and_memory_change_nothing(opened: Opened) -> None:
    spec = attention()
    with opened(random_model(spec, 5)) as reference, opened(random_model(spec, 6)) as model:
        found = [
            match(spec, reference, model, seed=3, work=Work(threads=threads, memory=memory))
            for threads, memory in ((1, None), (4, None), (3, 1))
        ]
        other = match(spec, reference, model, visit_orders=found[0].visit_orders)

    for each in (*found[1:], other):
        assert same(each.indexed, found[0].indexed)
        assert (each.after, each.solved, each.visit_orders) == (found[0].after, found[0].solved, found[0].visit_orders)


def test_dead_neurons_stay_where_they_are(opened: Opened) -> None:
    spec = mlp(4, 8, 3)
    a = random_model(spec, 1)
    for name, tensor in a.items():
        tensor[(slice(None), [2, 5]) if name == "1.weight" else [2, 5] if name[0] == "0" else []] = 0
    planted = {"P_0": np.array([1, 0, 2, 4, 3, 5, 7, 6])}
    with opened(a) as reference, opened(permuted(spec, a, planted)) as model:
        found = match(spec, reference, model)

    assert same(found.indexed, spec.inverse(planted))


@pytest.mark.parametrize(("which", "number"), [(0, math.nan), (1, math.inf)])
def test_what_is_no_number_is_refused(opened: Opened, which: int, number: float) -> None:
    spec = mlp(4, 8, 3)
    models = [random_model(spec, 1), random_model(spec, 2)]
    models[which]["0.bias"][3] = number

    with (
        opened(models[0]) as reference,
        opened(models[1]) as model,
        pytest.raises(NonFinite, match=r"0\.bias of .*NaN"),
    ):
        match(spec, reference, model)


def test_numbers_whose_products_are_none_are_refused(opened: Opened) -> None:
    model = {name: tensor.double() * 1e200 for name, tensor in random_model(mlp(4, 8, 3), 1).items()}

    with opened(model) as huge, pytest.raises(NonFinite, match="too large"):
        match(mlp(4, 8, 3), huge, huge)


def test_models_that_do_not_fit_are_refused(opened: Opened) -> None:
    spec = mlp(4, 8, 3)
    says = r"0\.weight is \[8, 6\] in .*, but \[8, 7\]"
    one, other = random_model(spec, 1), random_model(spec, 2, 7)
    with opened(one) as reference, opened(other) as model, pytest.raises(IncompatibleModels, match=says):
        match(spec, reference, model)


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ((Blocks("a", 2, Moved("b")), Moved("b")), "permutes two axes"),
        ((Blocks("a", 2, (Moved("b"), Moved("c"))), Moved("d"), Blocks("a", 2, Fixed(3))), "permutes two axes"),
        ((Blocks("a", 2, Moved("b")), None, Blocks("b", 2, Moved("a"))), "permutes two axes"),
    ],
)
def test_permutations_on_two_axes_are_refused(opened: Opened, axes: tuple[Axis | None, ...], says: str) -> None:
    spec = PermutationSpec(dict.fromkeys("abcd", 2), {"w": axes})
    with opened(random_model(spec, 1)) as model, pytest.raises(IncompatibleModels, match=says):
        match(spec, model, model)


def test_permutations_inside_one_another_are_refused() -> None:
    sizes = dict.fromkeys("abc", 2)
    crossed = {"v": (Blocks("a", 2, Moved("b")),), "w": (Blocks("b", 2, Moved("a")),)}

    with pytest.raises(IncompatibleModels, match="inside one another's blocks"):
        bundles(PermutationSpec(sizes, crossed), ["v", "w"])


def test_somebody_is_told_and_may_end_it(opened: Opened) -> None:
    spec, told, progress = mlp(4, 8, 7, 3), [], Progress()
    with opened(random_model(spec, 1)) as reference, opened(random_model(spec, 2)) as model:
        match(spec, reference, model, work=Work(progress=progress, report=lambda now: told.append(now.fraction)))
        with pytest.raises(Canceled):
            match(spec, reference, model, work=Work(stop=lambda: True))

    assert told
    assert progress.bytes_read == progress.bytes_read_total > 0
    left = [thread for thread in threading.enumerate() if thread.name.startswith(("match", "multiply"))]
    for thread in left:  # a cancel waits for no assignment
        thread.join(30)
    assert not any(thread.is_alive() or thread.name.startswith("multiply") for thread in left)


# Many models.


def test_many_models_come_together_up_to_one_permutation(opened: Opened) -> None:
    spec = mlp(12, 20, 16, 5)
    origin, planted = random_model(spec, 1), [spec.identity(), spec.random(2), spec.random(3), spec.random(4)]
    models = [opened(noisy(permuted(spec, origin, each), 0.02, seed)) for seed, each in enumerate(planted)]

    found, other = match_many(spec, models), match_many(spec, models, work=Work(threads=3))

    assert all(same(one, spec.inverse(each)) for one, each in zip(found.indexed, planted, strict=True))
    assert all(same(one, two) for one, two in zip(found.indexed, other.indexed, strict=True))
    assert found.rounds > 1
    rows = Permuted(models[1], spec, found.indexed[1]).rows(models[1].tensors["0.weight"], 0, 20)
    assert float((rows - origin["0.weight"]).abs().max()) < 0.2
    for model in models:
        model.close()


def test_what_is_no_number_in_one_of_many_is_refused(opened: Opened) -> None:
    spec = mlp(4, 8, 3)
    models = [random_model(spec, seed) for seed in range(3)]
    models[2]["0.bias"][3] = math.nan

    with pytest.raises(NonFinite, match=r"0\.bias of"):
        match_many(spec, [opened(model) for model in models])


def test_the_mean_of_models_is_weights_like_any_other(opened: Opened) -> None:
    spec = attention()
    tensors = [random_model(spec, seed) for seed in (1, 2)]
    tensors[1] = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors[1].items()}
    with MeanOf([opened(each) for each in tensors]) as mean:
        for name, info in mean.tensors.items():
            space = torch.empty(info.nbytes + 8, dtype=torch.uint8)
            rows = mean.rows(info, 0, info.rows, space)
            expected = tensors[0][name]
            if expected.is_floating_point():
                expected = (expected + tensors[1][name].float()) / 2
            assert torch.equal(rows.reshape(expected.shape), expected), name
            assert rows.data_ptr() == space.data_ptr()
            assert [file for file, *_ in mean.ranges(info)] == ["0/model.safetensors", "1/model.safetensors"]
        assert mean.place(mean.tensors["q"]) is None
        assert mean.place(mean.tensors["count"]) is not None
        assert mean.temporary(mean.tensors["q"]) == 8
        assert mean.descriptor("1/model.safetensors") == mean.models[1].descriptor("model.safetensors")
