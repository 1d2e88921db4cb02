"""The kernels in plain torch: what each computes, on any device, in float32 or float64.

Sums over models are written out in recipe order and nothing depends on a block's length, so the bits are the same on
every device and for every cut into blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_core.kernels.vectors import Numbers, RankRates, Rows, TaskVectors, Ties
from merge_core.statistics import Sums, grain_sums

ZERO_SUM = 1e-8
"""A sum of weights nearer to zero than this divides nothing: mergekit puts 1 in its place."""


SMALLEST_GAP = 1e-6
"""What divides in `near_swap` is at least this."""


def total(stack: Tensor) -> Tensor:
    """Sum over the first dimension, one after the other: `[models, ...]` → `[...]`.

    >>> total(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([4., 6.])
    """
    result = stack[0].clone()
    for row in stack[1:]:
        result += row
    return result


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number per model, shaped to multiply a `[models, ...]` stack.

    A tensor on the same device, because dividing by a mere number is a multiplication by its reciprocal on CUDA.
    """
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def linear(sources: Sequence[Rows], weights: Numbers, divisor: float, working: torch.dtype) -> Tensor:
    """Σᵢ wᵢ xᵢ / divisor."""
    stack = torch.stack([source.load().to(working) for source in sources])
    merged = total(stack * column(weights, stack))
    return merged / column((divisor,), merged)[0]


def values(vectors: TaskVectors) -> Tensor:
    """The task vectors, sparse and scaled: `[models, rows, ...]`, working dtype."""
    deltas = torch.stack([model.load().to(vectors.working) for model in vectors.models]) - _base(vectors)
    zeros = torch.zeros_like(deltas)
    if vectors.drop_rates is not None:
        drop_rates = column(vectors.drop_rates, deltas).to(torch.float32)
        deltas = torch.where(_uniform(vectors, deltas) >= drop_rates, deltas, zeros)
    if vectors.rank_rates is not None:
        rates = by_rank(deltas, vectors.rank_rates)
        numbers = _uniform(vectors, deltas) if vectors.rank_rates.is_drawn else torch.zeros_like(rates)
        deltas = torch.where(numbers >= rates, deltas, zeros)
    if vectors.divisors is not None:
        deltas = deltas / column(vectors.divisors, deltas)
    if vectors.thresholds is not None:
        deltas = torch.where(_reaches(deltas, vectors.thresholds, vectors.ties), deltas, zeros)
    if vectors.ceilings is not None:
        below = ~_reaches(deltas, vectors.ceilings, vectors.ceiling_ties)
        deltas = torch.where(below | deltas.isnan(), deltas, zeros)
    for factors in vectors.factors:
        deltas = deltas * column(factors, deltas)
    return deltas


def combine(
    vectors: TaskVectors, vote: str | None, majority: int, average: str, weights: Numbers, scale: float
) -> Tensor:
    """θ₀ + λ · the task vectors combined: `[rows, ...]`, working dtype."""
    rows = values(vectors)
    combined = total(rows)
    if vote is None:
        if average == "shared":
            combined = _shared(rows, weights)
        elif average == "max":
            combined = _largest(rows)
        elif average == "weight":
            combined = combined / _divisor(total(column(weights, rows)), ZERO_SUM)
    else:
        combined = disjoint(rows, _elect(combined, vote, majority), average, weights)
    return _base(vectors) + combined * scale


def votes(vectors: TaskVectors) -> tuple[int, int]:
    """How many elements of the summed task vectors are above and below zero."""
    summed = total(values(vectors))
    return int((summed > 0).sum()), int((summed < 0).sum())


def overlaps(vectors: TaskVectors) -> NDArray[np.int64]:
    """How many entries of each model are not 0, where no other model's are and where others' are: `[models, 2]`."""
    changed = (values(vectors) != 0).reshape(len(vectors), -1)
    count = total(changed.to(torch.int32))
    alone = [(int((row & (count == 1)).sum()), int((row & (count > 1)).sum())) for row in changed]
    return np.array(alone, np.int64)


def near_swap(vectors: TaskVectors, t: float) -> Tensor:
    """The base, moved to the only model by t / |δ|, at most by 1 and at least by 0: `[rows, ...]`, working dtype."""
    base, model = _base(vectors), vectors.models[0].load().to(vectors.working)
    gap = torch.clamp((base - model).abs(), min=SMALLEST_GAP)
    share = torch.clamp(column((t,), gap)[0] / gap, 0, 1)
    return base * (1 - share) + model * share


def high_digits(vectors: TaskVectors, found: NDArray[np.int64]) -> None:
    """Add up how often each value of the high 16 bits of |δ| in float32 occurs: `found` `[models, 2**15]`."""
    for row, counts in zip(_magnitude_bits(vectors), found, strict=True):
        counts += torch.bincount(row >> 16, minlength=counts.size).cpu().numpy()


def low_digits(vectors: TaskVectors, buckets: Sequence[int], found: NDArray[np.int64]) -> None:
    """Add up how often each value of the low 16 bits occurs where the high bits are the model's bucket."""
    bits = _magnitude_bits(vectors)
    for number, (bucket, counts) in enumerate(zip(buckets, found, strict=True)):
        row = bits[number % len(bits)]
        inside = row[row >> 16 == bucket] & 0xFFFF
        counts += torch.bincount(inside, minlength=counts.size).cpu().numpy()


def bracket(
    vectors: TaskVectors,
    lows: Sequence[int],
    highs: Sequence[int],
    candidates: Sequence[int],
    digits: NDArray[np.int64],
    above: NDArray[np.int64],
    equal: NDArray[np.int64],
) -> None:
    """Count |δ| above a range of high digits, each value inside it, and, apart, those equal to a candidate."""
    bits = _magnitude_bits(vectors)
    for number, (low, high, candidate) in enumerate(zip(lows, highs, candidates, strict=True)):
        row, low, high, candidate = bits[number % len(bits)], low << 16, high << 16, candidate << 16
        same = torch.split(row == candidate, vectors.grain)
        equal[number] += np.array([int(part.sum()) for part in same], np.int64)
        inside = row[(row >= low) & (row < high) & (row != candidate)] - low
        above[number] += int((row >= high).sum())
        digits[number] += torch.bincount(inside, minlength=digits.shape[1]).cpu().numpy()


def ties(vectors: TaskVectors, thresholds: Numbers) -> NDArray[np.int64]:
    """How many |δ| in float32 equal a threshold, in each grain: `[thresholds, grains]`."""
    bits = _magnitude_bits(vectors)
    wanted = torch.tensor(thresholds, dtype=torch.float32, device=bits.device).view(torch.int32)
    found = [
        [part.sum() for part in torch.split(bits[number % len(bits)] == threshold, vectors.grain)]
        for number, threshold in enumerate(wanted)
    ]
    return np.array([[int(count) for count in counts] for counts in found], np.int64)


def gram(sources: Sequence[Rows], working: torch.dtype, grain: int, base: Rows | None) -> Sums:
    """Inner products of all pairs (0,0), (0,1), …, (1,1), … of rows, less the base: `[grains, pairs]`, float64."""
    rows = [source.load().reshape(-1).to(working) for source in sources]
    if base is not None:
        start = base.load().reshape(-1).to(working)
        rows = [row - start for row in rows]
    flat = [row.to(torch.float64) for row in rows]
    return grain_sums(torch.stack([flat[i] * flat[j] for i, j in pairs(len(flat))]), grain)


def absolute_sums(vectors: TaskVectors) -> Sums:
    """Σ|δ| of the plain task vectors, then of what is left of them: `[grains, 2 · models]`, float64."""
    plain = replace(
        vectors, drop_rates=None, rank_rates=None, divisors=None, thresholds=None, ceilings=None, factors=()
    )
    sizes = [values(form).abs().reshape(len(form), -1) for form in (plain, vectors)]
    return grain_sums(torch.cat(sizes), vectors.grain)


def pairs(count: int) -> list[tuple[int, int]]:
    """Which rows are multiplied by which, in the order of `gram`."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def low_rank(stored: Tensor, left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """out = stored + scale · left · right, the sum over the rank in its order: no matmul, whose bits depend on the
    number of rows.
    """
    summed = torch.zeros_like(out)
    for i in range(len(right)):
        summed += left[:, i : i + 1] * right[i]
    torch.add(stored.to(out.dtype), summed.mul_(scale), out=out)


def first_nonfinite(rows: Tensor) -> int:
    """The first NaN or infinity, −1 if there is none."""
    finite = torch.isfinite(rows)
    return -1 if bool(finite.all()) else int((~finite).flatten().nonzero()[0])


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round once, half to even.

    What torch makes of float64 for a 16-bit format goes through float32, and so is rounded twice; rounding the first
    time to odd leaves the second all it needs.

    >>> rounded(torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64), torch.bfloat16)
    tensor([1.0078], dtype=torch.bfloat16)
    """
    if values.dtype != torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    single = values.to(torch.float32)
    wide = single.to(torch.float64)
    bits = single.view(torch.int32)
    bits -= (wide.abs() > values.abs()).to(torch.int32)
    bits |= (wide != values).to(torch.int32)
    return single.to(dtype)


def _base(vectors: TaskVectors) -> Tensor:
    return vectors.base.load().to(vectors.working)


def _elect(summed: Tensor, vote: str, majority: int) -> Tensor:
    if vote == "plus":
        return torch.where(summed >= 0, 1.0, -1.0).to(summed.dtype)
    sign = torch.sign(summed)
    return torch.where(sign == 0, torch.full_like(sign, majority), sign)


def disjoint(rows: Tensor, sign: Tensor, average: str, weights: Numbers) -> Tensor:
    """Combine the entries of the elected sign, `[models, rows, ...]` → `[rows, ...]`; NaN always counts, so that it is
    not hidden.
    """
    agrees = torch.where(sign > 0, rows > 0, rows < 0) | rows.isnan()
    chosen = torch.where(agrees, rows, torch.zeros_like(rows))
    if average == "max":
        return chosen.abs().amax(dim=0) * sign
    if average == "sum":
        return total(chosen)
    if average == "weight":
        counted = torch.where(chosen != 0, column(weights, rows), torch.zeros_like(rows))
        return total(chosen) / _divisor(total(counted), ZERO_SUM)
    return total(chosen) / _divisor(total((chosen != 0).to(rows.dtype)), 1)


def _shared(rows: Tensor, weights: Numbers) -> Tensor:
    """The mean of the entries that are not 0, and where there is only one, that times its weight."""
    changed = rows != 0
    count = total(changed.to(rows.dtype))
    weight = total(torch.where(changed, column(weights, rows), torch.zeros_like(rows)))
    mean = total(rows) / _divisor(count, 1)
    return mean * torch.where(count == 1, weight, torch.ones_like(weight))


def _divisor(divisor: Tensor, least: float) -> Tensor:
    return torch.where(divisor.abs() < least, torch.ones_like(divisor), divisor)


def by_rank(deltas: Tensor, rank_rates: RankRates) -> Tensor:
    """The rate of each entry's place among the magnitudes of its row."""
    width, stride = rank_rates.width, rank_rates.stride
    bits = deltas.abs().to(torch.float32).view(torch.int32).reshape(len(deltas), -1, width, stride)
    order = torch.argsort(bits, dim=2, descending=True, stable=True)
    rates = torch.from_numpy(rank_rates.rates).to(deltas.device).reshape(-1, 1, width, 1).expand_as(order)
    return torch.empty_like(rates).scatter_(2, order, rates).reshape(deltas.shape)


def _largest(rows: Tensor) -> Tensor:
    """The entry of the largest magnitude, the first of equal ones: `[models, ...]` → `[...]`; NaN is larger."""
    best = rows[0]
    for row in rows[1:]:
        best = torch.where((row.abs() > best.abs()) | row.isnan(), row, best)
    return best


def _reaches(deltas: Tensor, thresholds: Numbers, ties: Ties | None) -> Tensor:
    """Which entries reach the threshold, as magnitudes in float32; NaN always does."""
    size = deltas.abs().to(torch.float32)
    threshold = column(thresholds, size)
    mask = (size >= threshold) | size.isnan()
    for model, (first, left) in enumerate(ties or ()):
        if first < size[model].numel():
            equal = (size[model] == threshold[model]).flatten()
            equal[:first] = False
            mask[model] &= (~equal | (torch.cumsum(equal, 0) <= left)).reshape(mask[model].shape)
    return mask


def _uniform(vectors: TaskVectors, deltas: Tensor) -> Tensor:
    if vectors.draws is None:
        raise ValueError("these task vectors were made without randomness")
    drawn = [
        vectors.draws.uniform(vectors.tensor, model, vectors.start, vectors.elements, deltas.device)
        for model in range(len(vectors))
    ]
    return torch.stack(drawn).reshape(deltas.shape)


def _magnitude_bits(vectors: TaskVectors) -> Tensor:
    return values(vectors).abs().to(torch.float32).reshape(len(vectors), -1).view(torch.int32)
