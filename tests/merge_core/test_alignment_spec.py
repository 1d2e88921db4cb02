"""What a permutation spec says of each axis, and which specs are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.alignment.spec import Blocks, Concat, Fixed, PermutationSpec, Permuted, connected
from merge_core.errors import IncompatibleModels, RecipeError

MLP = {"0.weight": ["P", None], "0.bias": ["P"], "1.weight": [None, "P"], "1.bias": [None]}
SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)}


def of_groups(groups: int = 2, heads: int = 2, size: int = 3) -> PermutationSpec:
    """Grouped-query attention without positions: whole groups move, heads in a group, dimensions in a group."""
    inner = {f"{what}.{g}": heads if what == "heads" else size for what in ("heads", "qk", "vo") for g in range(groups)}
    q = Blocks("groups", groups, tuple(Blocks(f"heads.{g}", heads, Permuted(f"qk.{g}")) for g in range(groups)))
    k, v = (Blocks("groups", groups, tuple(Permuted(f"{name}.{g}") for g in range(groups))) for name in ("qk", "vo"))
    o = Blocks("groups", groups, tuple(Blocks(f"heads.{g}", heads, Permuted(f"vo.{g}")) for g in range(groups)))
    axes = {"q": (q, None), "kv": (Concat((k, v)), None), "o": (None, o)}
    return PermutationSpec({"groups": groups} | inner, axes)


def test_blocks_move_as_wholes_and_are_arranged_where_they_arrive() -> None:
    axis = Concat((Blocks("outer", 2, (Permuted("a"), Permuted("b"))), Fixed(1), Blocks("outer", 2, Fixed(1))))
    spec = PermutationSpec({"outer": 2, "a": 3, "b": 3}, {"w": (axis,)})
    indexed = {"outer": np.array([1, 0]), "a": np.array([2, 0, 1]), "b": np.array([0, 1, 2])}

    spec.check({"w": (9,)})

    assert spec.index(axis, indexed).tolist() == [5, 3, 4, 0, 1, 2, 6, 8, 7]


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_permutations_can_be_undone_and_chained(one: int, two: int) -> None:
    spec = of_groups()
    first, second = spec.random(one), spec.random(two)

    both, undone = spec.then(first, second), spec.then(first, spec.inverse(first))

    for tensor, values in {"q": 12, "kv": 12, "o": 12}.items():
        axis = next(axis for axis in spec.axes[tensor] if axis is not None)
        expected = np.arange(values)[spec.index(axis, first)][spec.index(axis, second)]
        assert (spec.index(axis, both) == expected).all()
    assert all((index == np.arange(len(index))).all() for index in undone.values())
    assert spec.indices("q", undone) == (None, None)


def test_random_permutations_are_a_function_of_seed_and_name() -> None:
    spec = PermutationSpec({"a": 8, "b": 8}, {})

    assert spec.random(3)["a"].tolist() == PermutationSpec({"a": 8}, {}).random(3)["a"].tolist()
    assert sorted(spec.random(3)["a"]) == list(range(8))
    assert spec.random(3)["a"].tolist() != spec.random(3)["b"].tolist() != spec.random(4)["b"].tolist()


def test_json_gives_the_same_spec_again() -> None:
    spec = PermutationSpec(of_groups().permutations, of_groups().axes, frozenset({"q"}))

    assert PermutationSpec.from_data(json.loads(json.dumps(spec.to_data()))) == spec


def test_the_short_form_takes_its_sizes_from_the_tensors() -> None:
    spec = PermutationSpec.from_data(MLP, SHAPES)
    blocks = {"conv": ["C", None, None, None], "linear": [None, {"blocks": "C", "count": 4, "of": 9}]}

    spec.check(SHAPES)

    assert spec.permutations == {"P": 4}
    assert PermutationSpec.from_data(blocks, {"conv": (4, 3, 3, 3), "linear": (2, 36)}).permutations == {"C": 4}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "JSON object"),
        ({"w": "P"}, "#/w"),
        ({"axes": {"w": "P"}}, "#/axes/w"),
        ({"w": [{"blocks": "P", "count": 0, "of": 1}]}, "at least 1"),
        ({"w": [{"blocks": 1, "count": 2, "of": 1}]}, "name of the permutation"),
        ({"w": [-1]}, "not what can happen"),
        ({"w": [2.5]}, "not what can happen"),
        ({"w": [True]}, "not what can happen"),
        ({"w": [{"concat": []}]}, "not what can happen"),
        ({"axes": {"w": ["P"]}}, "how large P is"),
        ({"axes": {"w": ["P"]}, "permutations": {"P": -3}}, "size of every permutation"),
        ({"axes": {"w": ["P"]}, "permutations": {"P": 2**40}}, "can be"),
        ({"axes": {}, "extra": 1}, "unknown key 'extra'"),
        ({"axes": {}, "unmeasured": "all"}, "list of tensor names"),
        ({"axes": {"\n": []}}, "name of a tensor"),
    ],
)
def test_what_is_no_spec_is_refused(data: Any, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        PermutationSpec.from_data(data)

    assert says in str(error.value) or says in str(error.value.problems[0].pointer)


def test_blocks_that_never_end_are_refused() -> None:
    data: Any = 1
    for _ in range(5000):
        data = {"concat": [data]}

    with pytest.raises(RecipeError, match="deep"):
        PermutationSpec.from_data({"w": [data]})


def test_names_are_connected_by_groups() -> None:
    found = connected([["a", "b"], ["c"], ["d", "e", "d"], ["b", "e"], []])

    assert {name: "".join(sorted(part)) for name, part in found.items()} == {**dict.fromkeys("abde", "abde"), "c": "c"}
    assert found["a"] is found["d"]


@pytest.mark.parametrize(
    ("permutations", "axes", "says"),
    [
        ({"P": 4}, {}, r"does not say what happens to w \[4, 4\]"),
        ({"P": 4}, {"w": (None, None), "x": (None,)}, "names x, which is not there"),
        ({"P": 4}, {"w": (None,)}, "describes 1 axes"),
        ({"P": 3}, {"w": (Permuted("P"), None)}, "has 4 elements, the alignment makes it 3"),
        ({"P": 4}, {"w": (Permuted("P"), Permuted("P"))}, "permutes two axes"),
        ({}, {"w": (Permuted("P"), None)}, "how large P is"),
        ({"B": 3}, {"w": (Blocks("B", 2, Fixed(2)), None)}, "moves 2 blocks, but its size is 3"),
        ({"B": 2}, {"w": (Blocks("B", 2, Permuted("B")), None)}, "inside the blocks that it moves"),
        ({"B": 2}, {"w": (Blocks("B", 2, (Fixed(1), Fixed(3))), None)}, "differ in size"),
        ({"B": 2, "a": 2}, {"w": (Blocks("B", 2, (Permuted("a"), Fixed(2))), None)}, "what is permuted inside"),
        ({"B": 2}, {"w": (Blocks("B", 2, (Fixed(4),)), None)}, "1 expressions"),
        ({"B": 2, "a": 2}, {"w": (Blocks("B", 2, (Permuted("a"), Permuted("a"))), None)}, "in w than at one place"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(permutations: Any, axes: Any, says: str) -> None:
    with pytest.raises(IncompatibleModels, match=says):
        PermutationSpec(permutations, axes).check({"w": (4, 4)})


@pytest.mark.parametrize(
    ("axis", "says"),
    [
        ({"concat": [{"blocks": None, "count": 2**50, "of": 0}, "P"]}, "blocks of no elements"),
        ({"concat": [2**50, "P"]}, "at most 16,777,216"),
        ({"blocks": None, "count": 2**50, "of": "P"}, "at most 16,777,216"),
    ],
)
def test_what_would_take_for_ever_is_refused(axis: Any, says: str) -> None:
    with pytest.raises(IncompatibleModels, match=says):
        PermutationSpec.from_data({"axes": {"w": [axis]}, "permutations": {"P": 4}}).check()


def test_permutations_on_no_axis_take_no_memory() -> None:
    data = {"axes": {"w": ["P"]}, "permutations": {"P": 4} | {f"unused.{i}": 2**24 for i in range(9)}}

    with pytest.raises(IncompatibleModels, match="in all"):
        PermutationSpec.from_data(data).check({"w": (4,)})
