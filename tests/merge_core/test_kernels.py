"""The compiled kernels give the bits of their plain forms, in every stored format."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge_core import kernels
from merge_core.kernels.vectors import Marks, Numbers, RankRates, Rows, TaskVectors
from merge_core.method import Randomness
from tests.conftest import FORMS, kernels_in

STORED = (torch.bfloat16, torch.float16, torch.float32)
INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(values: Tensor) -> Tensor:
    return values.view(INTEGER[values.dtype])


def in_both_forms(call: Callable[[], Any]) -> Any:
    """What a kernel gives, having checked that it is the same in both forms, bit for bit."""
    found = []
    for form in FORMS:
        with kernels_in(form):
            found.append(call())
    plain, compiled = found
    if isinstance(plain, Tensor):
        assert torch.equal(bits(plain), bits(compiled))
    else:
        assert np.array_equal(np.array(plain), np.array(compiled))
    return plain


def rounded(result: Tensor, out: Tensor) -> Tensor:
    """As the merge does it: one rounding, unless the kernel has done it."""
    return result.clone() if result.data_ptr() == out.data_ptr() else result.to(out.dtype)


@st.composite
def task_vectors(draw: st.DrawFn) -> TaskVectors:
    """Mixed formats, ties, zeros, any cut, any start."""
    count, models = draw(st.integers(1, 5000)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    base = torch.randn(count, generator=generator) * 0.1
    sources = [base.to(draw(st.sampled_from(STORED)))]
    for _ in range(models):
        delta = torch.randn(count, generator=generator) * draw(st.sampled_from([0.0, 0.001, 0.1]))
        sources.append((base + delta).to(draw(st.sampled_from(STORED))))
    out = torch.empty(count, dtype=draw(st.sampled_from(STORED)))
    grain = draw(st.sampled_from([1, 7, 500, 2048, 65536]))
    start = grain * draw(st.integers(0, 2**40))
    rows = [Rows.of(source) for source in sources]
    made = TaskVectors(
        rows[0], tuple(rows[1:]), torch.float32, "t", start, grain if count < 600 else 65536, Randomness(3), out
    )

    def numbers(values: st.SearchStrategy[float]) -> Numbers:
        return tuple(draw(values) for _ in range(models))

    if draw(st.booleans()):
        made = made.dropped(numbers(st.sampled_from([0.0, 0.1, 0.5, 0.9, 254.5 / 256, 1.0]) | st.floats(0, 1)))
    if draw(st.booleans()):
        made = made.divided(numbers(st.floats(0.0625, 1, width=32)))
    if draw(st.booleans()):
        ties = tuple((draw(st.integers(0, count)), draw(st.integers(0, 50))) for _ in range(models))
        sizes = [float((row.load().float() - rows[0].load().float()).abs().median()) for row in rows[1:]]
        made = made.trimmed(tuple(sizes), ties if draw(st.booleans()) else None)
        if draw(st.booleans()):
            made = made.cut_off(
                tuple(draw(st.sampled_from([1.0, 1.5, math.nan])) * size for size in sizes),
                ties[::-1] if draw(st.booleans()) else None,
            )
    for _ in range(draw(st.integers(0, 2))):
        made = made.times(numbers(st.floats(-2, 2, width=32)))
    return made


@settings(max_examples=150)
@given(
    task_vectors(),
    st.sampled_from([None, "plus", "majority"]),
    st.sampled_from([-1, 0, 1]),
    st.sampled_from(["sum", "weight", "count", "max", "shared"]),
    st.floats(-2, 2, width=32),
    st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4),
)
def test_combine(
    vectors: TaskVectors, vote: Any, majority: int, average: Any, scale: float, weights: list[float]
) -> None:
    options = {"vote": vote, "majority": majority, "average": average, "scale": scale}
    out = vectors.out
    assert out is not None
    if average == ("count" if vote is None else "shared"):
        average = options["average"] = "sum"
    in_both_forms(
        lambda: rounded(kernels.combine(vectors, weights=tuple(weights[: len(vectors)]), **options), out)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_sums_keep_the_sign_of_zero(rate: float) -> None:
    base = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=torch.bfloat16)
    model = torch.tensor([0.0, 0.0, -0.0, -0.0], dtype=torch.bfloat16)
    for factor, scale in itertools.product((1.0, -1.0), repeat=2):
        vectors = TaskVectors(Rows.of(base), (Rows.of(model),) * 2, torch.float32, "t", draws=Randomness(3))
        vectors = (vectors.dropped((rate, rate)) if rate else vectors).times((factor,))
        in_both_forms(lambda v=vectors, s=scale: kernels.combine(v, scale=s))  # type: ignore[misc]


@settings(max_examples=60)
@given(task_vectors(), st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5), st.floats(0.125, 4, width=32))
def test_linear(vectors: TaskVectors, weights: list[float], divisor: float) -> None:
    sources, out = [vectors.base, *vectors.models], vectors.out
    assert out is not None
    numbers = tuple(weights[: len(sources)])
    in_both_forms(lambda: rounded(kernels.linear(sources, numbers, divisor, torch.float32, vectors.grain, out), out))


@settings(max_examples=60)
@given(task_vectors(), st.sampled_from([-1.0, 0.0, 1e-7, 0.001, 0.05, 3.0]))
def test_near_swap(vectors: TaskVectors, t: float) -> None:
    out = vectors.out
    assert out is not None
    in_both_forms(lambda: rounded(kernels.near_swap(vectors, t), out))


@settings(max_examples=60)
@given(task_vectors())
def test_measurements(vectors: TaskVectors) -> None:
    def histogram(size: int, kernel: Callable[..., None], *given: Any) -> Any:
        found = np.zeros((len(given[0]) if given else len(vectors), size), np.int64)
        kernel(vectors, *given, found)
        return found

    high = in_both_forms(lambda: histogram(2**15, kernels.high_digits))
    assert high.sum() == len(vectors) * vectors.elements
    fullest = [int(row.argmax()) for row in high]
    several = fullest + [int(row.nonzero()[0][0]) for row in high]
    in_both_forms(lambda: histogram(2**16, kernels.low_digits, several))
    sizes = tuple(float(kernels.values(vectors)[model].abs().max()) for model in range(len(vectors)))
    in_both_forms(lambda: kernels.ties(vectors, (*sizes, *sizes[::-1], *([0.0] * len(vectors)))))
    in_both_forms(lambda: kernels.votes(vectors))
    in_both_forms(lambda: kernels.absolute_sums(vectors))
    in_both_forms(lambda: kernels.combine(replace(vectors, out=None), scale=1.0))  # from what was remembered
    in_both_forms(lambda: kernels.gram([vectors.base, *vectors.models], torch.float32, vectors.grain))
    in_both_forms(lambda: kernels.overlaps(vectors))
    in_both_forms(lambda: kernels.gram(vectors.models, torch.float32, vectors.grain, vectors.base))

    def bracket() -> Any:
        digits, above = np.zeros((len(several), 3 * 2**16), np.int64), np.zeros(len(several), np.int64)
        equal = np.zeros((len(several), -(-vectors.elements // vectors.grain)), np.int64)
        lows = [max(0, number - 1) for number in several]
        kernels.bracket(vectors, lows, [number + 2 for number in several], several, digits, above, equal)
        return np.concatenate([digits.ravel(), above, equal.ravel()])

    in_both_forms(bracket)


def test_what_was_drawn_is_remembered_until_it_is_used() -> None:
    draws = Randomness(3)
    draws.marks = Marks(room=2 * 2**13)
    rows = [Rows.of(torch.randn(5000)) for _ in range(3)]
    vectors = TaskVectors(rows[0], tuple(rows[1:]), torch.float32, "t", draws=draws).dropped((0.5, 0.3))
    drawn = kernels.combine(vectors, scale=1.0)
    kernels.absolute_sums(vectors)
    assert draws.marks.space(1) is None
    assert torch.equal(bits(drawn), bits(kernels.combine(vectors, scale=1.0)))
    assert draws.marks.space(2 * 2**13) is not None


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 5, 300, 2500]), st.sampled_from([1, 1, 3])),
    st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 1e30]),
    st.sampled_from(STORED),
    st.sampled_from(["drawn", "a band", "both"]),
    st.integers(1, 3),
    st.integers(0, 9999),
)
def test_places_in_rows(
    shape: tuple[int, int, int], scale: float, dtype: torch.dtype, kind: str, grain: int, seed: int
) -> None:
    """Rows of equal, few and many magnitudes, in whatever steps they lie and however many of them make a grain."""
    _, width, stride = shape
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    base[base < -1] = 0
    change = scale * torch.randn((2, *shape), generator=generator)
    rates = np.linspace(0.9, 0.1, width, dtype=np.float32) if kind != "a band" else np.ones(width, np.float32)
    if kind != "drawn":
        rates[width // 3 : width // 2 + 1] = 0
    sources = [Rows.of(source.to(dtype)) for source in (base, *(base + change))]
    by_rank = RankRates(np.stack([rates, rates[::-1]]), stride)
    grain = width * stride * grain
    vectors = TaskVectors(sources[0], tuple(sources[1:]), torch.float32, "t", grain * seed, grain, Randomness(3))
    vectors = vectors.dropped_by_rank(by_rank)

    in_both_forms(lambda: kernels.combine(vectors, scale=1.0).nan_to_num(7.0))
    in_both_forms(lambda: kernels.combine(vectors.times((0.5, 2.0)), scale=1.0, vote="plus").nan_to_num(7.0))
    in_both_forms(lambda: np.nan_to_num(kernels.absolute_sums(vectors)))
    in_both_forms(lambda: kernels.combine(vectors, scale=1.0).nan_to_num(7.0))  # from what was remembered
    if kind == "a band" and scale:
        first, last = width // 3, width // 2 + 1
        deltas = kernels.values(replace(vectors, rank_rates=None))[0].movedim(1, 2).reshape(-1, width)
        left = kernels.values(vectors)[0].movedim(1, 2).reshape(-1, width)
        for row, kept in zip(deltas.tolist(), left.tolist(), strict=True):
            order = sorted(range(width), key=lambda i: (-abs(row[i]), i))[first:last]
            assert [i for i in range(width) if kept[i]] == sorted(i for i in order if row[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_stored_number_is_read_as_it_is(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(2**16, dtype=torch.float32)
    with kernels_in("compiled"):
        read = kernels.linear([Rows.of(every)], (1.0,), 1.0, torch.float32, 2**16, out)
    expected = torch.where(every.isnan(), torch.nan, every.float())
    assert torch.equal(bits(read), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_once_half_to_even(dtype: torch.dtype) -> None:
    """At, above and below every midpoint between neighbours, subnormals and overflow included."""
    every = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    middle = ((every[1:].double() + every[:-1].double()) / 2).float()
    middle = torch.cat([middle, every, torch.tensor([65519.996, 65520.0, 3.4e38, torch.inf, torch.nan, 1e-45])])
    near = torch.cat(
        [middle, torch.nextafter(middle, torch.tensor(torch.inf)), torch.nextafter(middle, torch.tensor(0.0))]
    )
    values = torch.cat([near, -near])
    out = torch.empty(len(values), dtype=dtype)
    with kernels_in("compiled"):
        kernels.linear([Rows.of(values)], (1.0,), 1.0, torch.float32, 2**16, out)
    expected = values.to(dtype)
    expected[expected.isnan()] = torch.nan
    assert torch.equal(bits(out), bits(expected))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 5000))
def test_random_numbers(key: int, start: int, count: int) -> None:
    in_both_forms(lambda: kernels.uniform(key, start, count, torch.device("cpu")))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 2047, 2048, 4999])
def test_the_first_nonfinite_number_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    rows = torch.full((5000,), torch.finfo(dtype).max, dtype=dtype)
    assert in_both_forms(lambda: kernels.first_nonfinite(rows)) == -1
    rows[place:] = value
    assert in_both_forms(lambda: kernels.first_nonfinite(rows)) == place


def test_nan_goes_through_where_it_is_let_through() -> None:
    base, model = torch.zeros(4), torch.tensor([torch.nan, torch.inf, 1.0, -1.0])
    vectors = TaskVectors(Rows.of(base), (Rows.of(model), Rows.of(model)), torch.float32).trimmed((0.5,))
    for vote in (None, "plus", "majority"):
        merged = in_both_forms(lambda: kernels.combine(vectors, scale=1.0, vote=vote).nan_to_num(7.0))  # noqa: B023
        assert merged[0] == 7.0


def test_rows_in_files_are_read_by_the_kernel_and_refused_by_their_owner(tmp_path: Path) -> None:
    stored = torch.randn(3, 3000).bfloat16()
    file = tmp_path / "rows"
    file.write_bytes(b"12345" + bytes(stored.view(torch.uint8).flatten().tolist()))
    refused: list[int] = []
    descriptor = os.open(file, os.O_RDONLY)
    try:
        rows = [
            Rows(torch.bfloat16, (3000,), lambda i=i: stored[i], descriptor, 5 + 6000 * i, True, refused.append)  # type: ignore[misc]
            for i in range(3)
        ]
        read = in_both_forms(lambda: kernels.linear(rows, (1.0, 2.0, 3.0), 6.0, torch.float32, 700, None))
        assert refused == [] and read.shape == (3000,)
        with kernels_in("compiled"):
            os.truncate(file, 10_000)
            kernels.linear(rows, (1.0, 2.0, 3.0), 6.0, torch.float32, 700, None)
            assert refused == [-1]
            with file.open("r+b") as opened:
                opened.seek(5 + 2 * 1234)
                opened.write(b"\xc0\x7f")
            kernels.linear(rows[:1], (1.0,), 1.0, torch.float32, 700, None)
            assert refused == [-1, 1234]
    finally:
        os.close(descriptor)


def test_nan_and_infinity_are_treated_alike_where_they_are_let_through() -> None:
    """Thresholds that are NaN, sums of opposite infinities."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 64, generator=generator)
    rows[:, ::3] = torch.nan
    rows[0, 1], rows[1, 1] = torch.inf, -torch.inf
    base = TaskVectors(Rows.of(torch.zeros(64)), tuple(Rows.of(row) for row in rows), torch.float32)
    for vectors in (base, base.trimmed((torch.nan,)), base.trimmed((torch.nan,), ((0, 0),) * 3), base.trimmed((0.5,))):
        in_both_forms(lambda vectors=vectors: _numbers(kernels.combine(vectors, scale=1.0)))
        for vote, average in itertools.product(("plus", "majority"), ("sum", "max")):
            options: dict[str, Any] = {"vote": vote, "average": average, "majority": 1, "scale": 1.0}
            in_both_forms(lambda vectors=vectors, options=options: _numbers(kernels.combine(vectors, **options)))


def _numbers(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=7.0, posinf=8.0, neginf=9.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 2, 7, 16])
def test_low_rank_products_have_the_same_bits_in_both_forms(dtype: torch.dtype, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    stored, left, right = (torch.randn(shape, generator=generator) for shape in ((5, 2500), (5, rank), (rank, 2500)))
    found = []
    for form in FORMS:
        with kernels_in(form):
            out = torch.empty(5, 2500)
            kernels.low_rank(stored.to(dtype), left, right, 0.3, out)
            found.append(out)
    assert torch.equal(*found)
    expected = stored.to(dtype).double() + 0.3 * (left.double() @ right.double())
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
