"""Scores of the elements of task vectors, in float32 with the same bits in every pass: made, counted, merged by.

Methods that keep what scores highest have to make the scores several times, because no pass can store them. Their order
is counted in keys: 32-bit numbers that have the order of the scores, signed ones too. Each function has a plain form
here and a compiled one in `compiled_scores.py`, with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_core.kernels import _CODES, _are_served, _is_served, _operands, _places, _target, plain
from merge_core.kernels.arguments import Score
from merge_core.kernels.elementary import exp, exp_double, tanh
from merge_core.kernels.plain import column, total
from merge_core.kernels.vectors import KEEP_ALL_TIES, Numbers, Rows, TaskVectors
from merge_core.statistics import LANES, Counters, Sums, grain_sums

Kind = Literal["magnitude", "spread", "balance", "signed balance", "paired balance", "divergence"]
_KINDS: dict[Kind, int] = {
    "magnitude": 0,
    "spread": 1,
    "balance": 2,
    "signed balance": 3,
    "paired balance": 4,
    "divergence": 5,
}
DIGITS = 2**16
_NAN = 2**32 - 1
_KEEP_ALL = -1.0
_LEAST_WEIGHT = 1e-6
_LEAST_SHARE = 1e-12
Divergences = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """What each element of task vectors scores, by `kind`:

    - `magnitude`: |δᵢ|, a score per model;
    - `spread`: the variance across models, one score;
    - `divergence`: |δ| times the row's number in `divergences`, for the one model, rows being `width` elements;
    - `balance`, `signed balance`, `paired balance`: exp(n · mᵢ²) times tanh(δᵢ Σδⱼ), tanh(δᵢ Σm̃ⱼ) or Σ tanh(m̃ᵢm̃ⱼ), a
      score per model, where mᵢ is the place of |δᵢ| between `lows` and `highs`, m̃ᵢ that with the sign of δᵢ, and the n
      models that are `live` take part; the others score 0.
    """

    vectors: TaskVectors
    kind: Kind
    live: tuple[bool, ...] = ()
    lows: Numbers = ()
    highs: Numbers = ()
    divergences: Divergences | None = None
    width: int = 1

    def __len__(self) -> int:
        return 1 if self.kind in ("spread", "divergence") else len(self.vectors)


def values(scores: Scores) -> Tensor:
    """`[scores, elements]`, float32."""
    deltas = plain.values(scores.vectors).to(torch.float32).reshape(len(scores.vectors), -1)
    if scores.kind == "magnitude":
        return deltas.abs()
    if scores.kind == "spread":
        return _spread(deltas).unsqueeze(0)
    if scores.kind == "divergence":
        rows = deltas[0].abs().reshape(-1, scores.width)
        return (rows * torch.from_numpy(scores.divergences).to(rows.device).unsqueeze(1)).reshape(1, -1)
    found = torch.zeros_like(deltas)
    for model, score in _balance(scores, deltas):
        found[model] = score
    return found


def keys(values: Tensor) -> Tensor:
    """int64 numbers from 0 that have the order of float32 ones, −0 before +0 and NaN last.

    >>> keys(torch.tensor([-1.0, 0.0, 1.0])).diff() > 0
    tensor([True, True])
    """
    bits = values.view(torch.int32)
    flipped = (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(torch.int64) + 2**31
    return torch.where(values.isnan(), _NAN, flipped)


def value_of(key: int) -> float:
    """The float32 of a key.

    >>> value_of(int(keys(torch.tensor([-2.5]))[0]))
    -2.5
    """
    bits = key - 2**31 if key >= 2**31 else 2**32 - 1 - key
    return float(np.uint32(bits).view(np.float32))


def sampled_order(scores: Scores, every: int, found: Counters) -> None:
    """`high_order` of one in so many runs of elements, where that saves reading the others; else of none."""
    if _is_served(scores.vectors):
        with _operands(scores.vectors) as operands:
            _compiled("sampled_order")(operands, _score(scores), every, found)


def high_order(scores: Scores, found: Counters, nonzero: Counters, largest: Counters) -> None:
    """Add up how often each value of the high 16 bits of a key occurs: `found` `[scores, 2**16]`.

    And how many scores are not 0, and the largest key that is not NaN's: `[scores]` each.
    """
    if _is_served(scores.vectors):
        with _operands(scores.vectors) as operands:
            _compiled("high_order")(operands, _score(scores), found, nonzero, largest)
        return
    for row, counts in zip(_keys(scores, nonzero, largest), found, strict=True):
        counts += torch.bincount(row >> 16, minlength=DIGITS).cpu().numpy()


def low_order(scores: Scores, buckets: Sequence[Sequence[int]], found: Counters) -> None:
    """Add up how often each value of the low 16 bits occurs inside each bucket of high ones.

    `found` is `[scores, buckets, 2**16]`.
    """
    if _is_served(scores.vectors):
        with _operands(scores.vectors) as operands:
            _compiled("low_order")(operands, _score(scores), np.array(buckets, np.int64), found)
        return
    for row, its_buckets, its_counts in zip(keys(values(scores)), buckets, found, strict=True):
        for bucket, counts in zip(its_buckets, its_counts, strict=True):
            counts += torch.bincount(row[row >> 16 == bucket] & 0xFFFF, minlength=DIGITS).cpu().numpy()


@dataclass(frozen=True)
class Brackets:
    """Ranges of high digits to look into, `[scores][brackets]` each: from `lows` to below `highs`, and those of which
    the value with no low digits may be that of very many.
    """

    lows: Sequence[Sequence[int]]
    highs: Sequence[Sequence[int]]
    candidates: Sequence[Sequence[int]]


def bracket_order(
    scores: Scores, brackets: Brackets, digits: Counters, below: Counters, nonzero: Counters, largest: Counters
) -> None:
    """Add up how many keys are below each bracket (`[scores, brackets]`), and how often each value inside occurs
    (`digits`, `[scores, brackets, values]`); the rest as `high_order`.
    """
    if _is_served(scores.vectors):
        ranges = (np.array(side, np.int64) for side in (brackets.lows, brackets.highs, brackets.candidates))
        with _operands(scores.vectors) as operands:
            _compiled("bracket_order")(operands, _score(scores), *ranges, digits, below, nonzero, largest)
        return
    for i, row in enumerate(_keys(scores, nonzero, largest)):
        for number, (low, high) in enumerate(zip(brackets.lows[i], brackets.highs[i], strict=True)):
            inside = row[(row >= low << 16) & (row < high << 16)] - (low << 16)
            below[i, number] += int((row < low << 16).sum())
            digits[i, number] += torch.bincount(inside, minlength=digits.shape[2]).cpu().numpy()


def equal_scores(scores: Scores, value: float) -> Counters:
    """How many of the one score equal a value, in each grain: `[grains]`."""
    found = np.zeros(math.ceil(scores.vectors.elements / scores.vectors.grain), np.int64)
    if _is_served(scores.vectors):
        with _operands(scores.vectors) as operands:
            _compiled("equal_scores")(operands, _score(scores), np.float32(value), found)
        return found
    equal = torch.split(values(scores)[0] == value, scores.vectors.grain)
    return np.array([int(part.sum()) for part in equal], np.int64)


@dataclass(frozen=True)
class Choice:
    """The elements whose one score reaches a `threshold`; of those that equal it, the ones from the element `ties[0]`
    of the block on only until there were `ties[1]`. Without a threshold all.
    """

    scores: Scores
    threshold: float | None = None
    ties: tuple[int, int] = KEEP_ALL_TIES


def chosen_squares(choice: Choice) -> Sums:
    """Σδ² of each model over the chosen elements: `[grains, models]`, float64."""
    vectors = choice.scores.vectors
    if not _is_served(vectors):
        chosen = _chosen(choice).to(torch.float64)
        return grain_sums(chosen * chosen, vectors.grain)
    found = np.empty((math.ceil(vectors.elements / vectors.grain), len(vectors)), np.float64)
    with _operands(vectors) as operands:
        _compiled("chosen_squares")(operands, *_choice(choice), found)
    return found


def chosen_consensus(choice: Choice, weights: Numbers) -> Tensor:
    """θ₀ + Σ wᵢδᵢ / Σ wᵢ over the chosen entries that have the sign of Σ δᵢ, a sum of 0 being positive."""
    vectors = choice.scores.vectors
    target = _target((vectors.base, *vectors.models), vectors.working, vectors.out)
    if target is None:
        rows = _chosen(choice)
        up = (total(rows) >= 0).unsqueeze(0)
        agrees = torch.where(up, rows > 0, rows < 0) | rows.isnan()
        zeros, each = torch.zeros_like(rows), column(weights, rows)
        sums = _sum(torch.where(agrees, rows * each, zeros), rows[0])
        divisor = _sum(torch.where(agrees, each, zeros), rows[0])
        return _onto_base(vectors, sums / _at_least(divisor, _LEAST_WEIGHT))
    with _operands(vectors) as operands:
        _compiled("chosen_consensus")(
            operands, *_choice(choice), np.array(weights, np.float32), target.data_ptr(), _CODES[target.dtype]
        )
    return target


def fuse(scores: Scores, threshold: float) -> Tensor:
    """θ₀ + δ where the one score is not below the threshold."""
    vectors = scores.vectors
    target = _target((vectors.base, *vectors.models), vectors.working, vectors.out)
    if target is None:
        rows = plain.values(vectors)[0].reshape(-1)
        return _onto_base(vectors, torch.where(values(scores)[0] < threshold, torch.zeros_like(rows), rows))
    with _operands(vectors) as operands:
        _compiled("fuse")(operands, _score(scores), np.float32(threshold), target.data_ptr(), _CODES[target.dtype])
    return target


def compete(scores: Scores, floors: Numbers, tops: Numbers, weights: Numbers, scale: float) -> Tensor:
    """θ₀ + λ · Σ wᵢ aᵢ sᵢ / Σ sᵢ, where aᵢ is δᵢ clamped between `lows` and `highs` in magnitude, and sᵢ goes from 0
    where the score is not above its floor to 1 at its top.
    """
    vectors = scores.vectors
    spreads = tuple(float(np.float32(top) - np.float32(floor)) for floor, top in zip(floors, tops, strict=True))
    target = _target((vectors.base, *vectors.models), vectors.working, vectors.out)
    if target is None:
        deltas = plain.values(vectors).to(torch.float32).reshape(len(vectors), -1)
        sums, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for model, score in _balance(scores, deltas):
            share = (_at_least(score, floors[model]) - floors[model]) / column((spreads[model],), score)[0]
            clamped = _signed(_clamped(deltas[model], scores.lows[model], scores.highs[model]), deltas[model])
            sums += clamped * weights[model] * share
            divisor += share
        return _onto_base(vectors, sums / _at_least(divisor, _LEAST_SHARE) * scale)
    with _operands(vectors) as operands:
        _compiled("compete")(
            operands,
            _score(scores),
            np.array(floors, np.float32),
            np.array(spreads, np.float32),
            np.array(weights, np.float32),
            np.float32(scale),
            target.data_ptr(),
            _CODES[target.dtype],
        )
    return target


def divergences(base: Rows, model: Rows, width: int, working: torch.dtype, grain: int) -> Divergences:
    """KL(softmax of the model's row ‖ softmax of the base's) for each row of `width` elements: `[rows]`, float32."""
    if width <= grain and _are_served((base, model), working):
        found = np.empty((base.elements // width, 5), np.float64)
        with _places((base, model), grain) as places:
            _compiled("row_softmax")(places, base.elements, grain, width, found)
    else:
        found = _row_softmax(*(rows.load().to(torch.float64).reshape(-1, width) for rows in (base, model)))
    base_top, top, base_sum, its_sum, moved = found.T
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = moved / its_sum - (top + np.log(its_sum)) + (base_top + np.log(base_sum))
        return np.where(exact < 0, 0.0, exact).astype(np.float32)


def _row_softmax(one: Tensor, other: Tensor) -> NDArray[np.float64]:
    """Of two stacks of rows x and y: max x, max y, Σ exp(x − max x), Σ exp(y − max y), Σ exp(y − max y) (y − x)."""
    top, its_top = one.amax(dim=1), other.amax(dim=1)
    its_powers = exp_double(other - its_top.unsqueeze(1))
    moved = _row_sums(its_powers * (other - one))
    sums = _row_sums(exp_double(one - top.unsqueeze(1))), _row_sums(its_powers)
    found: NDArray[np.float64] = torch.stack([top, its_top, *sums, moved], dim=1).cpu().numpy()
    return found


def _row_sums(rows: Tensor) -> Tensor:
    """The sum of each row: element j is added to lane j mod `LANES`, then the second half of the lanes to the first."""
    width = rows.shape[1]
    lanes = rows.new_zeros(len(rows), min(LANES, 1 << (width - 1).bit_length()))
    for part in torch.split(rows, lanes.shape[1], dim=1):
        lanes[:, : part.shape[1]] += part
    while (half := lanes.shape[1] // 2) > 0:
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _balance(scores: Scores, deltas: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each live model and its scores, one after the other."""
    live = [model for model, is_live in enumerate(scores.live) if is_live]

    def place(model: int) -> Tensor:
        low, high = scores.lows[model], scores.highs[model]
        spread = float(np.float32(high) - np.float32(low)) or 1.0
        return (_clamped(deltas[model], low, high) - low) / column((spread,), deltas)[0]

    if scores.kind == "balance":
        agreed = _sum((deltas[model] for model in live), deltas[0])
    elif scores.kind == "signed balance":
        agreed = _sum((_signed(place(model), deltas[model]) for model in live), deltas[0])
    for model in live:
        if scores.kind == "paired balance":
            mine = _signed(place(model), deltas[model])
            inter = _sum((tanh(mine * _signed(place(other), deltas[other])) for other in live), mine)
        else:
            inter = tanh(deltas[model] * agreed)
        intra = place(model)
        yield model, exp(intra * intra * float(len(live))) * inter + 0.0


def _clamped(values: Tensor, low: float, high: float) -> Tensor:
    sizes = _at_least(values.abs(), low)
    return torch.where(sizes > high, torch.full_like(sizes, high), sizes)


def _at_least(values: Tensor, least: float) -> Tensor:
    return torch.where(values < least, torch.full_like(values, least), values)


def _signed(sizes: Tensor, signs: Tensor) -> Tensor:
    """The sizes with the signs of other numbers; 0 where those are 0."""
    return torch.where(signs != 0, torch.where(signs < 0, -sizes, sizes), torch.zeros_like(sizes))


def _sum(rows: Iterable[Tensor], like: Tensor) -> Tensor:
    """Their sum, one after the other, from 0 on."""
    result = torch.zeros_like(like)
    for row in rows:
        result += row
    return result


def _spread(deltas: Tensor) -> Tensor:
    """The variance across models, from differences to the first, so that it is 0 where all are equal."""
    count = column((float(len(deltas)),), deltas)[0]
    away = deltas[1:] - deltas[0]
    mean = _sum(away, deltas[0]) / count
    squares = mean * mean
    for row in away:
        row = row - mean
        squares += row * row
    return squares / count


def _chosen(choice: Choice) -> Tensor:
    """The task vectors with 0 for what is not chosen: `[models, elements]`, in the working dtype."""
    vectors = choice.scores.vectors
    rows = plain.values(vectors).reshape(len(vectors), -1)
    if choice.threshold is None:
        return rows
    scores = values(choice.scores)[0]
    mask = (scores >= choice.threshold) | scores.isnan()
    first, left = choice.ties
    if first < len(mask):
        equal = scores == choice.threshold
        equal[:first] = False
        mask &= ~equal | (torch.cumsum(equal, 0) <= left)
    return torch.where(mask, rows, torch.zeros_like(rows))


def _onto_base(vectors: TaskVectors, merged: Tensor) -> Tensor:
    base = vectors.base.load().to(vectors.working)
    return base + merged.reshape(base.shape)


def _keys(scores: Scores, nonzero: Counters, largest: Counters) -> Tensor:
    made = values(scores)
    found = keys(made)
    for i, (row, its_keys) in enumerate(zip(made, found, strict=True)):
        nonzero[i] += int((row != 0).sum())
        largest[i] = max(int(largest[i]), int(torch.where(row.isnan(), 0, its_keys).max()))
    return found


def _compiled(name: str) -> Callable[..., None]:
    from merge_core.kernels import machine_code

    return machine_code.kernel("merge_core.kernels.compiled_scores", name)


def _score(scores: Scores) -> Any:
    live = scores.live or (False,) * len(scores.vectors)
    numbers = scores.divergences if scores.divergences is not None else np.zeros(1, np.float32)
    return Score(
        kind=_KINDS[scores.kind],
        live=np.array(live, np.uint8),
        lows=np.array(scores.lows or (0.0,), np.float32),
        highs=np.array(scores.highs or (0.0,), np.float32),
        count=np.float32(sum(live)),
        divergences=numbers,
        width=scores.width,
    )


def _choice(choice: Choice) -> tuple[Any, ...]:
    threshold = _KEEP_ALL if choice.threshold is None else choice.threshold
    return _score(choice.scores), np.float32(threshold), *choice.ties


def prepare() -> None:
    """Compile every kernel; see `kernels.prepare`."""
    row = Rows.of(torch.zeros(8))
    vectors = TaskVectors(row, (row,), torch.float32)
    digits, few = np.zeros((1, 1, DIGITS), np.int64), np.zeros(1, np.int64)
    balance = Scores(vectors, "balance", (True,), (0.0,), (1.0,))
    magnitude = Scores(vectors, "magnitude")
    sampled_order(balance, 1, digits[0])
    high_order(balance, digits[0], few, few)
    low_order(balance, ((0,),), digits)
    bracket_order(balance, Brackets(((0,),), ((1,),), ((0,),)), digits, digits[0, :, :1].copy(), few, few)
    equal_scores(magnitude, 0.0)
    chosen_squares(Choice(magnitude))
    chosen_consensus(Choice(magnitude), (1.0,))
    fuse(magnitude, 0.0)
    compete(balance, (0.0,), (1.0,), (1.0,), 1.0)
    divergences(row, row, 8, torch.float32, 8)
