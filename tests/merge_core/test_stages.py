"""Ranks are exact, ties counted, and cut by the lowest index."""

from __future__ import annotations

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core import kernels
from merge_core.kernels.vectors import Rows
from merge_core.method import Block, Known, Scope, Stage
from merge_core.stages import largest, task_vectors, trimmed
from merge_core.statistics import Grains, Statistic
from tests.conftest import FORMS, kernels_in


def measure(stages: list[Stage], blocks: list[Block]) -> Known:
    """Make every pass, with what is known going through JSON between them as it does between workers."""
    known: Known = {}
    for stage in stages:
        if stage.needed(known):
            totals: dict[str, Statistic] = {}
            for block in blocks:
                if stage.concerns(block.tensor, known):
                    stage.observe(block, known, totals)
            stage.finish(totals, known)
            known = json.loads(json.dumps(known))
    return known


def in_blocks(deltas: Tensor, size: int, length: int, tensor: str = "t") -> list[Block]:
    """A `[models, rows]` stack in blocks of `length` grains of `size` rows, over a zero base."""
    grains = Grains(deltas.shape[1], 1, size)
    spans = [(first, min(first + length, grains.count)) for first in range(0, grains.count, length)]
    parts = [deltas[:, slice(*grains.row_range(*span))].contiguous() for span in spans]
    return [
        Block([Rows.of(row) for row in part], Rows.of(torch.zeros(part.shape[1])), tensor, grains, first)
        for part, (first, _) in zip(parts, spans, strict=True)
    ]


def left_of(blocks: list[Block], stages: list[Stage]) -> Tensor:
    """The deltas with 0 for what is not among the largest: the same in both forms of the kernels."""
    found = []
    for form in FORMS:
        with kernels_in(form):
            known = measure(stages, blocks)
            kept = [
                torch.stack(
                    [
                        kernels.combine(
                            trimmed(block.task_vectors, block, known).times(
                                tuple(float(i == model) for i in range(len(block.stored)))
                            ),
                            scale=1.0,
                        )
                        for model in range(len(block.stored))
                    ]
                )
                for block in blocks
            ]
            found.append(torch.cat(kept, dim=1))
    assert torch.equal(*found)
    return found[0]


def keep_first(deltas: Tensor, wanted: int, cut_off: int = 0) -> Tensor:
    """The oracle: sort by magnitude, then by index."""
    left = torch.zeros_like(deltas)
    for row, out in zip(deltas, left, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-abs(float(row[i])), i))[cut_off:wanted]
        out[order] = row[order]
    return left


@settings(max_examples=40)
@given(
    st.integers(1, 400), st.integers(0, 400), st.booleans(), st.integers(1, 60), st.integers(1, 9), st.integers(0, 9999)
)
def test_exactly_the_largest_are_kept(entries: int, wanted: int, ties: bool, size: int, length: int, seed: int) -> None:
    wanted = max(1, min(wanted, entries))
    deltas = torch.randn(2, entries, generator=torch.Generator().manual_seed(seed))
    if ties:
        deltas = (deltas * 2).round() / 2

    left = left_of(
        in_blocks(deltas, size, length), largest(task_vectors, lambda model, total: wanted, "tensor", cut_ties=True)
    )

    assert torch.equal(left, keep_first(deltas, wanted))


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.tuples(st.integers(0, 300), st.integers(0, 300)),
    st.sampled_from(["tensor", "model"]),
    st.booleans(),
    st.integers(1, 60),
    st.integers(0, 9999),
)
def test_the_largest_of_them_are_cut_off(
    entries: tuple[int, int], ranks: tuple[int, int], scope: Scope, ties: bool, size: int, seed: int
) -> None:
    """Also where both thresholds are one value, where nothing is cut off, or everything."""
    one, total = entries[0], sum(entries)
    cut_off, wanted = sorted(min(rank, total) for rank in ranks)
    deltas = torch.randn(2, total, generator=torch.Generator().manual_seed(seed))
    if ties:
        deltas = (deltas * 2).round() / 2
    blocks = in_blocks(deltas[:, :one], size, 2, "a") + in_blocks(deltas[:, one:], size, 3, "b")
    if scope == "tensor":
        blocks = in_blocks(deltas, size, 2)

    stages = largest(
        task_vectors, lambda model, total: wanted, scope, cut_ties=True, cut_off=lambda model, total: cut_off
    )

    assert torch.equal(left_of(blocks, stages), keep_first(deltas, wanted, cut_off))


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 600), st.integers(1, 60), st.integers(0, 9999))
def test_over_a_whole_model_ties_are_cut_in_the_order_of_names(
    one: int, other: int, wanted: int, size: int, seed: int
) -> None:
    wanted = min(wanted, one + other)
    deltas = torch.randn(2, one + other, generator=torch.Generator().manual_seed(seed)).mul(2).round() / 2
    blocks = in_blocks(deltas[:, :one], size, 2, "a") + in_blocks(deltas[:, one:], size, 3, "b")

    left = left_of(blocks, largest(task_vectors, lambda model, total: wanted, "model", cut_ties=True))

    assert torch.equal(left, keep_first(deltas, wanted))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 999))
def test_without_a_cut_all_ties_are_kept(entries: int, wanted: int, seed: int) -> None:
    wanted = min(wanted, entries)
    deltas = torch.randn(1, entries, generator=torch.Generator().manual_seed(seed)).mul(2).round() / 2

    left = left_of(
        in_blocks(deltas, 7, 1000), largest(task_vectors, lambda model, total: wanted, "tensor", cut_ties=False)
    )

    threshold = deltas.abs().flatten().topk(wanted).values[-1]
    assert torch.equal(left, torch.where(deltas.abs() >= threshold, deltas, torch.zeros_like(deltas)))


def test_the_cut_is_not_counted_where_no_tie_is_cut() -> None:
    block = in_blocks(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2, 10)[0]
    known = measure(largest(task_vectors, lambda model, total: 2, "tensor", cut_ties=True), [block])
    assert "cut" not in known


def test_smallest_and_largest_float32_magnitudes_are_ranked() -> None:
    values = torch.tensor([[0.0, 1e-45, 3.4e38, -3.4e38, 1e-38, -0.0]])
    left = left_of(in_blocks(values, 6, 1), largest(task_vectors, lambda model, total: 3, "tensor", cut_ties=True))
    assert left.tolist() == [[0.0, 0.0, values[0, 2], values[0, 3], values[0, 4], 0.0]]


@settings(max_examples=25)
@given(
    st.integers(2**17, 2**18),
    st.lists(st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.9, 1.0]), min_size=3, max_size=3),
    st.sampled_from([None, 0.0, 0.001, 0.1]),
    st.sampled_from(["tensor", "model"]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.booleans(),
    st.integers(0, 9999),
)
def test_what_a_sample_tells_changes_nothing(
    entries: int,
    densities: list[float],
    gamma: float | None,
    scope: Scope,
    dtype: torch.dtype,
    sorted_: bool,
    seed: int,
) -> None:
    """Tensors large enough to be sampled, models that differ in where their threshold is and in how many ties it has;
    sorted, so that the sample misleads.
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(entries, generator=generator).to(dtype)
    scales = torch.tensor([[0.002], [0.1], [0.0 if seed % 3 else 1.0]])
    models = (base.float() + scales * torch.randn(3, entries, generator=generator)).to(dtype)
    deltas = models.float() - base.float()
    if sorted_:
        deltas = deltas.gather(1, deltas.abs().sort(dim=1).indices)
    half = entries // 2 // 64 * 64
    blocks = in_blocks(deltas[:, :half], 2**12, 7, "a") + in_blocks(deltas[:, half:], 2**12, 5, "b")
    if scope == "tensor":
        blocks = in_blocks(deltas, 2**12, 7)

    def keep(model: int, total: int) -> int:
        return max(1, int(densities[model] * total))

    def cut_off(model: int, total: int) -> int:
        return min(int((gamma or 0) * total), keep(model, total))

    stages = largest(task_vectors, keep, scope, cut_ties=True, cut_off=None if gamma is None else cut_off)
    left = left_of(blocks, stages)

    for model, (row, kept) in enumerate(zip(deltas, left, strict=True)):
        order = torch.sort(-row.abs(), stable=True).indices[cut_off(model, entries) : keep(model, entries)]
        expected = torch.zeros_like(row)
        expected[order] = row[order]
        assert torch.equal(kept, expected)
