"""Statistics add up over disjoint grains, in any order, to the same bits."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.statistics import GRAIN_ELEMENTS, Grains, GrainSums, RowValues, grain_sums


@given(st.integers(1, 70), st.integers(0, 2**32), st.integers(1, 5))
def test_sums_have_the_same_bits_in_any_order_on_any_workers(grains: int, seed: int, workers: int) -> None:
    shuffle = random.Random(seed)
    values = torch.randn(grains, generator=torch.Generator().manual_seed(seed % 1000), dtype=torch.float64).numpy()
    in_order = GrainSums()
    for index, value in enumerate(values):
        in_order.put("t", grains, index, np.array([value]))

    order = list(range(grains))
    shuffle.shuffle(order)
    held = [GrainSums() for _ in range(workers)]
    for index in order:
        held[shuffle.randrange(workers)].put("t", grains, index, values[index : index + 1])
    shuffle.shuffle(held)
    scattered = GrainSums()
    for part in held:
        scattered.add(part)

    assert scattered.total() == in_order.total()
    assert math.isclose(in_order.total()[0], math.fsum(values), abs_tol=1e-12)


def test_a_run_of_grains_holds_few_partial_sums() -> None:
    sums = GrainSums()
    for index in range(1000, 3000):
        sums.put("t", 10_000, index, np.zeros(2))
    assert len(sums.trees["t"].nodes) <= 2 * math.log2(10_000)


def test_tensors_are_added_in_name_order() -> None:
    parts = {"b": 1e16, "a": 1.0, "c": -1e16}
    sums = GrainSums()
    for name, value in parts.items():
        sums.put(name, 1, 0, np.array([value]))
    assert sums.total() == (1.0 + 1e16) - 1e16


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 40))
def test_a_grain_sum_depends_on_its_grain_alone(elements: int, size: int) -> None:
    values = torch.randn(2, elements, generator=torch.Generator().manual_seed(elements))

    together = grain_sums(values, size)
    apart = [grain_sums(part, size)[0] for part in values.split(size, dim=1)]

    assert np.array_equal(together, apart)
    assert torch.allclose(torch.from_numpy(together).sum(0), values.double().sum(1))


@given(st.lists(st.integers(0, 300), min_size=0, max_size=4))
def test_grains_are_whole_rows_and_cover_every_row_once(shape: list[int]) -> None:
    grains = Grains.of(shape)
    covered = [row for i in range(grains.count) for row in range(*grains.row_range(i, i + 1))]
    assert covered == list(range(shape[0] if shape else 1))
    assert grains.size == 1 or grains.size * max(1, grains.width) <= GRAIN_ELEMENTS


def test_values_of_rows_are_kept_in_place_however_they_were_put() -> None:
    one, other = RowValues(), RowValues()
    other.put("t", 5, 4, np.array([5.0]))
    other.put("t", 5, 0, np.array([1.0, 2.0]))
    one.put("t", 5, 2, np.array([3.0, 4.0]))
    one.add(other)
    assert one.rows["t"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
