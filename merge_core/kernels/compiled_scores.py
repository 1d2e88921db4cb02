"""Scores and their order in numba: made and counted a tile at a time, so that they are never stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from merge_core.kernels import elementary
from merge_core.kernels.arguments import Array, Operands, Places, Score
from merge_core.kernels.tiles import LANES, TILE, bits_of, float_of, load, masked, part, store, sum_of, window
from merge_core.kernels.tiles_of_vectors import Tiles, add_rows, load_vector, make_tiles

MAGNITUDE, SPREAD, BALANCE, SIGNED_BALANCE, PAIRED_BALANCE, DIVERGENCE = range(6)

LOG2_E = np.float32(elementary.LOG2_E)
LN2_HIGH = np.float32(elementary.LN2_HIGH)
LN2_LOW = np.float32(elementary.LN2_LOW)
ROUNDER = np.float32(elementary.ROUNDER)
EXP_0, EXP_1, EXP_2, EXP_3, EXP_4 = map(np.float32, elementary.EXP)
EXP_5 = np.float32(elementary.EXP_LAST)
LEAST_EXPONENT = np.float32(elementary.LEAST_EXPONENT)
TANH_0, TANH_1, TANH_2, TANH_3, TANH_4, TANH_5 = map(np.float32, elementary.TANH)
SMALL = np.float32(elementary.SMALL)
MOST = np.float32(elementary.MOST)
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)


LOG2_E_DOUBLE, ROUNDER_DOUBLE = elementary.LOG2_E_DOUBLE, elementary.ROUNDER_DOUBLE
LN2_HIGH_DOUBLE, LN2_LOW_DOUBLE = elementary.LN2_HIGH_DOUBLE, elementary.LN2_LOW_DOUBLE
EXP_DOUBLE = elementary.EXP_DOUBLE
LEAST_EXPONENT_DOUBLE = elementary.LEAST_EXPONENT_DOUBLE


@part
def _exp(x: float) -> float:
    shifted = x * LOG2_E + ROUNDER
    whole = shifted - ROUNDER
    rest = (x - whole * LN2_HIGH) - whole * LN2_LOW
    series = EXP_5 * rest + EXP_4
    series = series * rest + EXP_3
    series = series * rest + EXP_2
    series = series * rest + EXP_1
    series = series * rest + EXP_0
    fraction = rest * rest * series + rest + ONE
    power = float_of(np.uint32(np.uint32(bits_of(shifted) << np.uint32(23)) + np.uint32(0x3F800000)))
    return ZERO if x < LEAST_EXPONENT else fraction * power


@intrinsic  # type: ignore[misc]
def _long_bits_of(context: Any, number: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint64))

    return types.uint64(types.float64), code


@intrinsic  # type: ignore[misc]
def _double_of(context: Any, bits: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.uint64), code


@part
def _exp_double(x: float) -> float:
    shifted = x * LOG2_E_DOUBLE + ROUNDER_DOUBLE
    whole = shifted - ROUNDER_DOUBLE
    rest = (x - whole * LN2_HIGH_DOUBLE) - whole * LN2_LOW_DOUBLE
    series = EXP_DOUBLE[11] * rest + EXP_DOUBLE[10]
    series = series * rest + EXP_DOUBLE[9]
    series = series * rest + EXP_DOUBLE[8]
    series = series * rest + EXP_DOUBLE[7]
    series = series * rest + EXP_DOUBLE[6]
    series = series * rest + EXP_DOUBLE[5]
    series = series * rest + EXP_DOUBLE[4]
    series = series * rest + EXP_DOUBLE[3]
    series = series * rest + EXP_DOUBLE[2]
    series = series * rest + EXP_DOUBLE[1]
    series = series * rest + EXP_DOUBLE[0]
    power = _double_of(np.uint64((_long_bits_of(shifted) << np.uint64(52)) + np.uint64(0x3FF0000000000000)))
    return 0.0 if x < LEAST_EXPONENT_DOUBLE else series * power


@part
def _small_tanh(x: float) -> float:
    square = x * x
    series = TANH_5 * square + TANH_4
    series = series * square + TANH_3
    series = series * square + TANH_2
    series = series * square + TANH_1
    series = series * square + TANH_0
    return series * square * x + x


@part
def _large_tanh(x: float) -> float:
    size = abs(x)
    power = _exp((MOST if size > MOST else size) * TWO)
    large = ONE - TWO / (power + ONE)
    return -large if x < ZERO else large


@part
def _tanh(values: Array) -> None:
    """In place; mostly all of a tile is small."""
    largest = np.uint32(0)
    for j in range(values.size):
        largest = max(largest, np.uint32(bits_of(values[j]) & np.uint32(0x7FFFFFFF)))
    if largest < bits_of(SMALL):
        for j in range(values.size):
            values[j] = _small_tanh(values[j])
    else:
        for j in range(values.size):
            x = values[j]
            small, large = _small_tanh(x), _large_tanh(x)
            values[j] = small if abs(x) < SMALL else large


@part
def _key(value: float) -> int:
    """A number whose order is that of the values, −0 before +0 and NaN last."""
    bits = bits_of(value)
    all_if_negative = np.uint32(np.uint32(0) - np.uint32(bits >> np.uint32(31)))
    flipped = np.uint32(bits ^ np.uint32(np.uint32(0x80000000) | all_if_negative))
    return np.uint32(0xFFFFFFFF) if value != value else flipped


@part
def _largest(values: Array) -> float:
    most = np.uint32(0)
    for j in range(values.size):
        most = max(most, _key(values[j]))
    if most == np.uint32(0xFFFFFFFF):
        return np.float32(np.nan)
    return float_of(np.uint32(most ^ np.uint32(0x80000000)) if most >= np.uint32(0x80000000) else np.uint32(~most))


@part
def _bits(number: int) -> int:
    """How many bits a number has."""
    count = 0
    while number >> count:
        count += 1
    return count


@part
def row_softmax(places: Places, elements: int, grain: int, width: int, found: Array) -> None:
    """What `scores.row_softmax` says; a window holds whole rows."""
    addresses = np.empty(2, np.int64)
    lane_count = min(LANES, 1 << _bits(width - 1))
    one, other, lanes = np.empty(width, np.float32), np.empty(width, np.float32), np.empty((3, lane_count), np.float64)
    for first in range(0, elements, grain):
        count = min(grain, elements - first)
        if not window(places, first, count, addresses):
            return
        for start in range(0, count, width):
            load(addresses[0], places.codes[0], start, one)
            load(addresses[1], places.codes[1], start, other)
            row = found[(first + start) // width]
            top, its_top = np.float64(_largest(one)), np.float64(_largest(other))
            lanes[:] = 0
            for begin in range(0, width, lane_count):
                for j in range(min(lane_count, width - begin)):
                    x, y = np.float64(one[begin + j]), np.float64(other[begin + j])
                    power = _exp_double(y - its_top)
                    lanes[0, j] += _exp_double(x - top)
                    lanes[1, j] += power
                    lanes[2, j] += power * (y - x)
            row[0], row[1] = top, its_top
            row[2], row[3], row[4] = sum_of(lanes[0]), sum_of(lanes[1]), sum_of(lanes[2])


@part
def _clamped(value: float, low: float, high: float) -> float:
    """The magnitude, not below `low` and not above `high`."""
    size = abs(value)
    size = low if size < low else size
    return high if size > high else size


@part
def _signed(size: float, sign: float) -> float:
    """The size with the sign of another number; 0 where that is 0."""
    return masked(-size if sign < ZERO else size, np.uint32(sign != ZERO))


@part
def _range(score: Score, model: int) -> float:
    """What magnitudes above the low one are divided by; 1 where there are none."""
    spread = np.float32(score.highs[model] - score.lows[model])
    return spread if spread != ZERO else ONE


@part
def _intra(row: Array, low: float, high: float, spread: float, count: float, out: Array) -> None:
    """exp(n · m²), m being the place of |δ| between low and high."""
    for j in range(row.size):
        place = (_clamped(row[j], low, high) - low) / spread
        out[j] = _exp(place * place * count)


@part
def _sum_live(rows: Array, live: Array, size: int, out: Array) -> None:
    out[:] = ZERO
    for i in range(len(rows)):
        if live[i]:
            row = rows[i, :size]
            for j in range(size):
                out[j] += row[j]


@part
def _balance(score: Score, rows: Array, size: int, tiles: Tiles, out: Array) -> None:
    """How each entry competes inside its model, and agrees with the other models."""
    models = len(rows)
    total, spare, inter = tiles.total[:size], tiles.spare[:size], tiles.sign[:size]
    if score.kind == BALANCE:
        _sum_live(rows, score.live, size, total)
    elif score.kind == SIGNED_BALANCE:
        total[:] = ZERO
        for i in range(models):
            if score.live[i]:
                row, low, high, spread = rows[i, :size], score.lows[i], score.highs[i], _range(score, i)
                for j in range(size):
                    total[j] += _signed((_clamped(row[j], low, high) - low) / spread, row[j])
    for i in range(models):
        scores = out[i, :size]
        if not score.live[i]:
            scores[:] = ZERO
            continue
        row, low, high, spread = rows[i, :size], score.lows[i], score.highs[i], _range(score, i)
        if score.kind == PAIRED_BALANCE:
            inter[:] = ZERO
            for k in range(models):
                if score.live[k]:
                    other, its_low, its_high = rows[k, :size], score.lows[k], score.highs[k]
                    its_spread = _range(score, k)
                    for j in range(size):
                        mine = _signed((_clamped(row[j], low, high) - low) / spread, row[j])
                        its = _signed((_clamped(other[j], its_low, its_high) - its_low) / its_spread, other[j])
                        spare[j] = mine * its
                    _tanh(spare)
                    for j in range(size):
                        inter[j] += spare[j]
        else:
            for j in range(size):
                inter[j] = row[j] * total[j]
            _tanh(inter)
        _intra(row, low, high, spread, score.count, spare)
        for j in range(size):
            scores[j] = spare[j] * inter[j] + ZERO


@part
def _spread(rows: Array, size: int, tiles: Tiles, out: Array) -> None:
    """The variance across models, from differences to the first, so that it is 0 where all are equal."""
    models = len(rows)
    mean, first = tiles.total[:size], rows[0, :size]
    mean[:] = ZERO
    for i in range(1, models):
        row = rows[i, :size]
        for j in range(size):
            mean[j] += row[j] - first[j]
    count = np.float32(models)
    for j in range(size):
        mean[j] /= count
        out[j] = mean[j] * mean[j]
    for i in range(1, models):
        row = rows[i, :size]
        for j in range(size):
            away = (row[j] - first[j]) - mean[j]
            out[j] += away * away
    for j in range(size):
        out[j] /= count


@part
def _vectors(given: Operands, first: int, start: int, size: int, addresses: Array, tiles: Tiles) -> None:
    """One tile of the base and of every task vector."""
    base = tiles.base[:size]
    load(addresses[0], given.places.codes[0], start, base)
    for i in range(len(given.keys)):
        load_vector(given, i, first, start, base, tiles.rows[i, :size], addresses, tiles)


@part
def _scores(given: Operands, score: Score, begin: int, size: int, tiles: Tiles, out: Array) -> None:
    """One tile of every score; its vectors are loaded, and it is at the block's element `begin`."""
    if score.kind == MAGNITUDE:
        for i in range(len(out)):
            row, sizes = tiles.rows[i, :size], out[i, :size]
            for j in range(size):
                sizes[j] = abs(row[j])
    elif score.kind == SPREAD:
        _spread(tiles.rows, size, tiles, out[0, :size])
    elif score.kind == DIVERGENCE:
        row, sizes = tiles.rows[0, :size], out[0, :size]
        done = 0
        while done < size:
            here = (begin + done) // score.width
            last = min(size, (here + 1) * score.width - begin)
            divergence = score.divergences[here]
            for j in range(done, last):
                sizes[j] = abs(row[j]) * divergence
            done = last
    else:
        _balance(score, tiles.rows, size, tiles, out)


@part
def sampled_order(given: Operands, score: Score, every: int, found: Array) -> None:
    """How often each value of the high 16 bits of a key occurs in the first of so many tiles of each grain."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    out = np.empty((len(found), TILE), np.float32)
    for first in range(0, given.elements, given.grain):
        last = min(first + given.grain, given.elements)
        for start in range(first, last, every * TILE):
            size = min(TILE, last - start)
            if not window(given.places, start, size, addresses):
                return
            _vectors(given, start, 0, size, addresses, tiles)
            _scores(given, score, start, size, tiles, out)
            for i in range(len(found)):
                for j in range(size):
                    found[i, _key(out[i, j]) >> np.uint32(16)] += 1


@part
def _note(row: Array, nonzero: Array, largest: Array, i: int) -> None:
    """Count what is not 0, and remember the largest key but that of NaN."""
    most, count = np.uint32(0), np.uint32(0)
    for j in range(row.size):
        count += np.uint32(row[j] != ZERO)
        most = max(most, np.uint32(0) if row[j] != row[j] else _key(row[j]))
    nonzero[i] += count
    largest[i] = max(largest[i], np.int64(most))


@part
def high_order(given: Operands, score: Score, found: Array, nonzero: Array, largest: Array) -> None:
    """How often each value of the high 16 bits of a key occurs: `found` `[scores, 2**16]`."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    out = np.empty((len(found), TILE), np.float32)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            _vectors(given, first, start, size, addresses, tiles)
            _scores(given, score, first + start, size, tiles, out)
            for i in range(len(found)):
                _note(out[i, :size], nonzero, largest, i)
                for j in range(size):
                    found[i, _key(out[i, j]) >> np.uint32(16)] += 1


@part
def low_order(given: Operands, score: Score, buckets: Array, found: Array) -> None:
    """How often each value of the low 16 bits occurs inside some high ones: `found` `[scores, buckets, 2**16]`."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    out = np.empty((len(found), TILE), np.float32)
    inside = np.empty(TILE + 1, np.uint16)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            _vectors(given, first, start, size, addresses, tiles)
            _scores(given, score, first + start, size, tiles, out)
            for i in range(len(found)):
                for number in range(buckets.shape[1]):
                    bucket, length = np.uint32(buckets[i, number]), 0
                    for j in range(size):
                        key = _key(out[i, j])
                        inside[length] = np.uint16(key & np.uint32(0xFFFF))
                        length += (key >> np.uint32(16)) == bucket
                    for j in range(length):
                        found[i, number, inside[j]] += 1


@part
def bracket_order(
    given: Operands,
    score: Score,
    lows: Array,
    highs: Array,
    candidates: Array,
    digits: Array,
    below: Array,
    nonzero: Array,
    largest: Array,
) -> None:
    """Count the keys whose high digits are below `lows`, and each that is from there to below `highs`.

    `[scores, brackets]` each; `digits` is `[scores, brackets, values from that low on]`. Those whose high digits are a
    candidate's and whose low ones are 0 are counted in vector code: there can be many of them.
    """
    models, brackets = len(given.keys), lows.shape[1]
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    out = np.empty((len(digits), TILE), np.float32)
    keys, inside = np.empty(TILE, np.uint32), np.empty(TILE + 1, np.uint32)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            _vectors(given, first, start, size, addresses, tiles)
            _scores(given, score, first + start, size, tiles, out)
            for i in range(len(digits)):
                _note(out[i, :size], nonzero, largest, i)
                for j in range(size):
                    keys[j] = _key(out[i, j])
                for number in range(brackets):
                    low, candidate = np.uint32(lows[i, number] << 16), np.uint32(candidates[i, number] << 16)
                    span = np.uint32((highs[i, number] - lows[i, number]) << 16)
                    less, same, near = np.uint32(0), np.uint32(0), np.uint32(0)
                    for j in range(size):
                        less += np.uint32(keys[j] < low)
                        same += np.uint32(keys[j] == candidate)
                        near += np.uint32(np.uint32(keys[j] - low) < span)
                    below[i, number] += less
                    digits[i, number, candidate - low] += same
                    if near > same:
                        length = 0
                        for j in range(size):
                            inside[length] = np.uint32(keys[j] - low)
                            length += (np.uint32(keys[j] - low) < span) & (keys[j] != candidate)
                        for j in range(length):
                            digits[i, number, inside[j]] += 1


@part
def equal_scores(given: Operands, score: Score, value: float, found: Array) -> None:
    """How many of the one score equal a value, in each grain."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    out = np.empty((1, TILE), np.float32)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            _vectors(given, first, start, size, addresses, tiles)
            _scores(given, score, first + start, size, tiles, out)
            equal = np.int64(0)
            for j in range(size):
                equal += out[0, j] == value
            found[first // given.grain] += equal


@part
def _chosen(scores: Array, threshold: float, begin: int, ties_from: int, left: Array, keep: Array) -> None:
    """1 where a score reaches the threshold; of those that equal it, the first so many from some element on."""
    for j in range(scores.size):
        if scores[j] == threshold and begin + j >= ties_from:
            keep[j] = np.uint8(left[0] > 0)
            left[0] -= keep[j]
        else:
            keep[j] = np.uint8(scores[j] >= threshold) | np.uint8(scores[j] != scores[j])


@part
def _select(
    given: Operands,
    score: Score,
    threshold: float,
    ties_from: int,
    left: Array,
    begin: int,
    size: int,
    tiles: Tiles,
    out: Array,
) -> None:
    """Put 0 into the vectors where the score is not among the chosen; a negative threshold chooses all."""
    if threshold < ZERO:
        return
    _scores(given, score, begin, size, tiles, out)
    keep = tiles.keep[:size]
    _chosen(out[0, :size], threshold, begin, ties_from, left, keep)
    for i in range(len(tiles.rows)):
        row = tiles.rows[i, :size]
        for j in range(size):
            row[j] = masked(row[j], keep[j])


@part
def chosen_squares(
    given: Operands, score: Score, threshold: float, ties_from: int, ties_left: int, found: Array
) -> None:
    """Σδ² of each model over the chosen elements by the grain rule, float64: `found` `[grains, models]`."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    out, ties = np.empty((1, TILE), np.float32), np.full(1, ties_left)
    lanes = np.empty((models, LANES), np.float64)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        lanes[:] = 0
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            _vectors(given, first, start, size, addresses, tiles)
            _select(given, score, threshold, ties_from, ties, first + start, size, tiles, out)
            for i in range(models):
                for begin in range(0, size, LANES):
                    for j in range(min(LANES, size - begin)):
                        value = np.float64(tiles.rows[i, begin + j])
                        lanes[i, j] += value * value
        for i in range(models):
            found[first // given.grain, i] = sum_of(lanes[i])


@part
def chosen_consensus(
    given: Operands,
    score: Score,
    threshold: float,
    ties_from: int,
    ties_left: int,
    weights: Array,
    target: int,
    code: int,
) -> None:
    """θ₀ + the weighted mean of the chosen entries that have the sign of their sum."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    out, ties = np.empty((1, TILE), np.float32), np.full(1, ties_left)
    least = np.float32(1e-6)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            _vectors(given, first, start, size, addresses, tiles)
            _select(given, score, threshold, ties_from, ties, first + start, size, tiles, out)
            base, total, sums, divisor = tiles.base[:size], tiles.total[:size], tiles.sign[:size], tiles.spare[:size]
            add_rows(tiles.rows, size, total)
            sums[:] = ZERO
            divisor[:] = ZERO
            for i in range(models):
                row, weight = tiles.rows[i, :size], weights[i]
                for j in range(size):
                    is_up = np.uint32(total[j] >= ZERO)
                    above, below = np.uint32(row[j] > ZERO), np.uint32(row[j] < ZERO)
                    agrees = np.uint32(above & is_up) | np.uint32(below & np.uint32(is_up ^ 1))
                    agrees |= np.uint32(row[j] != row[j])
                    sums[j] += masked(row[j] * weight, agrees)
                    divisor[j] += masked(weight, agrees)
            for j in range(size):
                total[j] = base[j] + sums[j] / (least if divisor[j] < least else divisor[j])
            store(total, target, code, first + start)


@part
def fuse(given: Operands, score: Score, threshold: float, target: int, code: int) -> None:
    """θ₀ + δ where the score is not below the threshold."""
    tiles, addresses = make_tiles(given, 1), np.empty(2, np.int64)
    out = np.empty((1, TILE), np.float32)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            _vectors(given, first, start, size, addresses, tiles)
            _scores(given, score, first + start, size, tiles, out)
            base, total, row, scores = tiles.base[:size], tiles.total[:size], tiles.rows[0, :size], out[0, :size]
            for j in range(size):
                total[j] = base[j] + masked(row[j], np.uint32(scores[j] < threshold) ^ np.uint32(1))
            store(total, target, code, first + start)


@part
def compete(
    given: Operands, score: Score, floors: Array, spreads: Array, weights: Array, scale: float, target: int, code: int
) -> None:
    """θ₀ + λ · the clamped task vectors, averaged by how far their scores are above their floors."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    out, least = np.empty((models, TILE), np.float32), np.float32(1e-12)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            _vectors(given, first, start, size, addresses, tiles)
            _scores(given, score, first + start, size, tiles, out)
            base, sums, divisor = tiles.base[:size], tiles.total[:size], tiles.spare[:size]
            sums[:] = ZERO
            divisor[:] = ZERO
            for i in range(models):
                if score.live[i]:
                    row, scores, floor, spread = tiles.rows[i, :size], out[i, :size], floors[i], spreads[i]
                    low, high, weight = score.lows[i], score.highs[i], weights[i]
                    for j in range(size):
                        share = (floor if scores[j] < floor else scores[j]) - floor
                        share = share / spread
                        sums[j] += _signed(_clamped(row[j], low, high), row[j]) * weight * share
                        divisor[j] += share
            for j in range(size):
                total = sums[j] / (least if divisor[j] < least else divisor[j])
                sums[j] = base[j] + total * scale
            store(sums, target, code, first + start)
