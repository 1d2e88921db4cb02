"""Ranks are exact, ties counted, and cut by the lowest index."""

from __future__ import annotations

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core.method import Block, Known, Stage
from merge_core.stages import kept, largest, magnitude
from merge_core.statistics import Grains, Statistic, add_up


def measure(stages: list[Stage], blocks: list[Block]) -> Known:
    """Make every pass, with what is known going through JSON between them as it does between workers."""
    known: Known = {}
    for stage in stages:
        if stage.needed(known):
            totals: dict[str, Statistic] = {}
            for block in blocks:
                add_up(totals, stage.observe(block, known))
            stage.finish(totals, known)
            known = json.loads(json.dumps(known))
    return known


def in_blocks(deltas: Tensor, size: int, length: int) -> list[Block]:
    """A `[models, rows]` stack in blocks of `length` grains of `size` rows, over a zero base."""
    grains = Grains(deltas.shape[1], 1, size)
    spans = [(first, min(first + length, grains.count)) for first in range(0, grains.count, length)]
    return [
        Block(part := deltas[:, slice(*grains.row_range(first, last))], torch.zeros(part.shape[1]), "t", grains, first)
        for first, last in spans
    ]


@settings(max_examples=60)
@given(
    st.integers(1, 400), st.integers(0, 400), st.booleans(), st.integers(1, 60), st.integers(1, 9), st.integers(0, 9999)
)
def test_exactly_the_largest_are_kept(entries: int, wanted: int, ties: bool, size: int, length: int, seed: int) -> None:
    wanted = max(1, min(wanted, entries))
    deltas = torch.randn(2, entries, generator=torch.Generator().manual_seed(seed))
    if ties:
        deltas = (deltas * 2).round() / 2
    blocks = in_blocks(deltas, size, length)

    known = measure(largest(magnitude, lambda model, total: wanted, cut_ties=True), blocks)
    mask = torch.cat([kept(magnitude(block), block, known) for block in blocks], dim=1)

    for row, chosen in zip(deltas.abs(), mask, strict=True):
        order = sorted(range(entries), key=lambda i: (-float(row[i]), i))
        assert chosen.nonzero().flatten().tolist() == sorted(order[:wanted])


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 999))
def test_without_a_cut_all_ties_are_kept(entries: int, wanted: int, seed: int) -> None:
    wanted = min(wanted, entries)
    deltas = torch.randn(1, entries, generator=torch.Generator().manual_seed(seed)).mul(2).round() / 2
    block = in_blocks(deltas, 7, 1000)[0]

    known = measure(largest(magnitude, lambda model, total: wanted, cut_ties=False), [block])

    threshold = deltas.abs().flatten().topk(wanted).values[-1]
    assert torch.equal(kept(magnitude(block), block, known), deltas.abs() >= threshold)


def test_the_cut_is_not_counted_where_no_tie_is_cut() -> None:
    block = in_blocks(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2, 10)[0]
    known = measure(largest(magnitude, lambda model, total: 2, cut_ties=True), [block])
    assert "equals_before" not in known


def test_smallest_and_largest_float32_magnitudes_are_ranked() -> None:
    values = torch.tensor([[0.0, 1e-45, 3.4e38, -3.4e38, 1e-38, -0.0]])
    block = in_blocks(values, 6, 1)[0]
    known = measure(largest(magnitude, lambda model, total: 4, cut_ties=True), [block])
    assert kept(magnitude(block), block, known).tolist() == [[False, True, True, True, True, False]]
