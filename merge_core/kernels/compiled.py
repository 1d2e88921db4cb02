"""The kernels in numba: one pass over the stored rows, a tile at a time in the first-level cache.

Each function does, element by element, the float32 operations of its namesake in `plain.py` in the same order, with no
contraction and no reordering, so that the bits are the same. It runs without the interpreter's lock, from the reading
of a grain to the rounding of its last element, and returns nothing (see `machine_code.py`).
"""

from __future__ import annotations

import numpy as np

from merge_core.kernels.arguments import Array, Operands, Places
from merge_core.kernels.tiles import (
    LANES,
    LOW_STREAM,
    TILE,
    add_product,
    add_times,
    drop,
    first_nonfinite,
    load,
    load_distance,
    load_less,
    magnitude_of,
    make_positive,
    masked,
    part,
    philox,
    store,
    sum_of,
    window,
)
from merge_core.kernels.tiles_of_vectors import (
    Tiles,
    add_rows,
    add_vector,
    find_kept,
    load_vector,
    make_tiles,
    only_drops,
    open_window,
)

NO_VOTE, VOTE, VOTE_OR_MAJORITY = 0, 1, 2
SUM, BY_WEIGHT, BY_COUNT, LARGEST, SHARED = 0, 1, 2, 3, 4


@part
def linear(places: Places, weights: Array, divisor: float, elements: int, grain: int, target: int, code: int) -> None:
    """Σᵢ wᵢ xᵢ / divisor."""
    row, summed = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    addresses = np.empty(len(weights), np.int64)
    for first in range(0, elements, grain):
        count = min(grain, elements - first)
        if not window(places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            acc = summed[:size]
            load(addresses[0], places.codes[0], start, acc)
            weight = weights[0]
            for j in range(size):
                acc[j] *= weight
            for i in range(1, len(weights)):
                add_times(addresses[i], places.codes[i], start, weights[i], acc, row[:size])
            if divisor != 1:
                for j in range(size):
                    acc[j] /= divisor
            store(acc, target, code, first + start)


@part
def _largest(rows: Array, size: int, out: Array) -> None:
    """The entry of the largest magnitude, the first of equal ones; NaN is larger than any."""
    first = rows[0, :size]
    for j in range(size):
        out[j] = first[j]
    for i in range(1, len(rows)):
        row = rows[i, :size]
        for j in range(size):
            out[j] = row[j] if abs(row[j]) > abs(out[j]) or row[j] != row[j] else out[j]


@part
def _elect(total: Array, vote: int, majority: float, sign: Array) -> None:
    """The sign of a sum; where it is zero, + or that of the majority."""
    zero, one = np.float32(0), np.float32(1)
    if vote == VOTE:
        for j in range(total.size):
            sign[j] = one if total[j] >= zero else -one
    else:
        for j in range(total.size):
            here = total[j]
            sign[j] = one if here > zero else (-one if here < zero else majority)


@part
def _agreeing(value: float, sign: float) -> float:
    """The value if it has the elected sign, else 0; NaN always counts, so that it is not hidden."""
    up = np.uint32(sign > np.float32(0))
    above, below = np.uint32(value > np.float32(0)), np.uint32(value < np.float32(0))
    return masked(value, np.uint32(above & up) | np.uint32(below & np.uint32(up ^ 1)) | np.uint32(value != value))


@part
def _disjoint(tiles: Tiles, size: int, average: int, weights: Array, out: Array) -> None:
    """Combine the entries of the elected sign."""
    zero, one = np.float32(0), np.float32(1)
    sign, divisor = tiles.sign[:size], tiles.spare[:size]
    out[:] = 0
    if average == LARGEST:
        for i in range(len(tiles.rows)):
            row = tiles.rows[i, :size]
            for j in range(size):
                here = abs(_agreeing(row[j], sign[j]))
                out[j] = here if here > out[j] or here != here else out[j]
        for j in range(size):
            out[j] *= sign[j]
        return
    divisor[:] = 0
    for i in range(len(tiles.rows)):
        row, weight = tiles.rows[i, :size], weights[i] if average == BY_WEIGHT else one
        for j in range(size):
            chosen = _agreeing(row[j], sign[j])
            out[j] += chosen
            divisor[j] += masked(weight, np.uint32(chosen != zero))
    if average != SUM:
        least = np.float32(1e-8) if average == BY_WEIGHT else one
        for j in range(size):
            out[j] /= one if abs(divisor[j]) < least else divisor[j]


@part
def _shared(tiles: Tiles, size: int, weights: Array, out: Array) -> None:
    """Make of a sum the mean of the entries that are not 0, and where there is only one, that times its weight."""
    zero, one = np.float32(0), np.float32(1)
    count, weight = tiles.spare[:size], tiles.sign[:size]
    count[:] = 0
    weight[:] = 0
    for i in range(len(tiles.rows)):
        row, own = tiles.rows[i, :size], weights[i]
        for j in range(size):
            changed = np.uint32(row[j] != zero)
            count[j] += masked(one, changed)
            weight[j] += masked(own, changed)
    for j in range(size):
        out[j] /= one if count[j] < one else count[j]
    for j in range(size):
        out[j] *= weight[j] if count[j] == one else one


@part
def combine(
    given: Operands, vote: int, majority: float, average: int, weights: Array, scale: float, target: int, code: int
) -> None:
    """θ₀ + λ · the task vectors combined: summed or averaged, all of them or those of the elected sign."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    whole = weights[0]
    for i in range(1, models):
        whole = np.float32(whole + weights[i])
    whole = np.float32(1) if abs(whole) < np.float32(1e-8) else whole
    is_plain = vote == NO_VOTE and average in (SUM, BY_WEIGHT) and only_drops(given)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not open_window(given, first, count, addresses, tiles):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, total = tiles.base[:size], tiles.total[:size]
            load(addresses[0], given.places.codes[0], start, base)
            if is_plain:
                total[:] = np.float32(-0.0)  # which, unlike 0, changes nothing that is added to it
                for i in range(models):
                    add_vector(given, i, first, start, base, total, addresses, tiles)
            else:
                for i in range(models):
                    load_vector(given, i, first, start, base, tiles.rows[i, :size], addresses, tiles)
                add_rows(tiles.rows, size, total)
            if vote != NO_VOTE:
                _elect(total, vote, majority, tiles.sign[:size])
                _disjoint(tiles, size, average, weights, total)
            elif average == SHARED:
                _shared(tiles, size, weights, total)
            elif average == LARGEST:
                _largest(tiles.rows, size, total)
            elif average == BY_WEIGHT:
                for j in range(size):
                    total[j] /= whole
            for j in range(size):
                total[j] = base[j] + total[j] * scale
            store(total, target, code, first + start)


@part
def votes(given: Operands, found: Array) -> None:
    """How many elements of the summed task vectors are above and below zero: `found` `[2]`."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    above, below = np.int64(0), np.int64(0)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            break
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, total = tiles.base[:size], tiles.total[:size]
            load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                load_vector(given, i, first, start, base, tiles.rows[i, :size], addresses, tiles)
            add_rows(tiles.rows, size, total)
            for j in range(size):
                above += total[j] > np.float32(0)
                below += total[j] < np.float32(0)
    found[0], found[1] = above, below


@part
def overlaps(given: Operands, found: Array) -> None:
    """Count each model's entries that are not 0: `found` `[models, 2]`, where no other's are, and where others' are."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, models), np.empty(models + 1, np.int64)
    zero, one = np.float32(0), np.float32(1)
    for first in range(0, given.elements, given.grain):
        many = min(given.grain, given.elements - first)
        if not window(given.places, first, many, addresses):
            return
        for start in range(0, many, TILE):
            size = min(TILE, many - start)
            base, count = tiles.base[:size], tiles.total[:size]
            load(addresses[0], given.places.codes[0], start, base)
            count[:] = 0
            for i in range(models):
                row = tiles.rows[i, :size]
                load_vector(given, i, first, start, base, row, addresses, tiles)
                for j in range(size):
                    count[j] += masked(one, np.uint32(row[j] != zero))
            for i in range(models):
                row, alone, shared = tiles.rows[i, :size], np.uint32(0), np.uint32(0)
                for j in range(size):
                    changed = np.uint32(row[j] != zero)
                    alone += changed & np.uint32(count[j] == one)
                    shared += changed & np.uint32(count[j] > one)
                found[i, 0] += alone
                found[i, 1] += shared


@part
def near_swap(given: Operands, t: float, target: int, code: int) -> None:
    """The base, moved to the only model by t / |δ|, at most by 1 and at least by 0."""
    tiles, addresses = make_tiles(given, 1), np.empty(2, np.int64)
    zero, one, smallest = np.float32(0), np.float32(1), np.float32(1e-6)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row, merged = tiles.base[:size], tiles.rows[0, :size], tiles.total[:size]
            load(addresses[0], given.places.codes[0], start, base)
            load(addresses[1], given.places.codes[1], start, row)
            for j in range(size):
                gap = abs(base[j] - row[j])
                share = t / (gap if gap > smallest else smallest)
                share = share if share > zero else zero
                share = share if share < one else one
                merged[j] = base[j] * (one - share) + row[j] * share
            store(merged, target, code, first + start)


@part
def high_digits(given: Operands, found: Array) -> None:
    """Add up how often each value of the high 16 bits of |δ| occurs: `found` `[models, 2**15]`.

    Two counters per value, taken in turns: in one, a run of equal values would wait for the memory each time.
    """
    models = len(given.keys)
    tiles, addresses = make_tiles(given, 1), np.empty(models + 1, np.int64)
    counters = np.zeros((models, 2, found.shape[1]), np.uint32)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row = tiles.base[:size], tiles.rows[0, :size]
            load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                even, odd = counters[i, 0], counters[i, 1]
                load_vector(given, i, first, start, base, row, addresses, tiles)
                for j in range(0, size - 1, 2):
                    even[magnitude_of(row[j]) >> np.uint32(16)] += np.uint32(1)
                    odd[magnitude_of(row[j + 1]) >> np.uint32(16)] += np.uint32(1)
                if size % 2:
                    even[magnitude_of(row[size - 1]) >> np.uint32(16)] += np.uint32(1)
    for i in range(models):
        for value in range(found.shape[1]):
            found[i, value] += np.int64(counters[i, 0, value]) + np.int64(counters[i, 1, value])


@part
def low_digits(given: Operands, buckets: Array, found: Array) -> None:
    """Add up how often each value of the low 16 bits occurs where the high bits are the model's bucket."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, 1), np.empty(models + 1, np.int64)
    inside = np.empty(TILE + 1, np.uint16)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row = tiles.base[:size], tiles.rows[0, :size]
            load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                load_vector(given, i, first, start, base, row, addresses, tiles)
                for number in range(i, len(found), models):
                    bucket, counts = np.uint32(buckets[number]), found[number]
                    length = 0
                    for j in range(size):
                        bits = magnitude_of(row[j])
                        inside[length] = np.uint16(bits & np.uint32(0xFFFF))
                        length += (bits >> np.uint32(16)) == bucket
                    for j in range(length):
                        counts[inside[j]] += 1


@part
def sampled_digits(given: Operands, every: int, found: Array) -> None:
    """`high_digits` of the first of so many tiles of each grain; of the others nothing is read."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, 1), np.empty(models + 1, np.int64)
    for first in range(0, given.elements, given.grain):
        last = min(first + given.grain, given.elements)
        for start in range(first, last, every * TILE):
            size = min(TILE, last - start)
            if not window(given.places, start, size, addresses):
                return
            base, row = tiles.base[:size], tiles.rows[0, :size]
            load(addresses[0], given.places.codes[0], 0, base)
            for i in range(models):
                load_vector(given, i, start, 0, base, row, addresses, tiles)
                for j in range(size):
                    found[i, magnitude_of(row[j]) >> np.uint32(16)] += 1


@part
def bracket(
    given: Operands, lows: Array, highs: Array, candidates: Array, digits: Array, above: Array, equal: Array
) -> None:
    """Count |δ| whose high digits are above, and each value whose high digits are from `lows` to below `highs`.

    `digits` is `[ranges, values from that low on]`, `above` `[ranges]`; the ones equal to the range's candidate are
    counted apart, in `equal` `[ranges, grains]`: there are many of them, and in vector code they cost little. The
    ranges are one per model, or one after the other.
    """
    models = len(given.keys)
    tiles, addresses = make_tiles(given, 1), np.empty(models + 1, np.int64)
    inside = np.empty(TILE + 1, np.uint32)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row = tiles.base[:size], tiles.rows[0, :size]
            load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                load_vector(given, i, first, start, base, row, addresses, tiles)
                for number in range(i, len(above), models):
                    low, candidate = np.uint32(lows[number] << 16), np.uint32(candidates[number] << 16)
                    span = np.uint32((highs[number] - lows[number]) << 16)
                    top = np.uint32(low + span)
                    more, same, near = np.uint32(0), np.uint32(0), np.uint32(0)
                    for j in range(size):
                        bits = magnitude_of(row[j])
                        more += np.uint32(bits >= top)
                        same += np.uint32(bits == candidate)
                        near += np.uint32(np.uint32(bits - low) < span)
                    above[number] += more
                    equal[number, first // given.grain] += same
                    if near > same:
                        length = 0
                        for j in range(size):
                            bits = magnitude_of(row[j])
                            inside[length] = np.uint32(bits - low)
                            length += (np.uint32(bits - low) < span) & (bits != candidate)
                        for j in range(length):
                            digits[number, inside[j]] += 1


@part
def ties(given: Operands, thresholds: Array, found: Array) -> None:
    """How many |δ| equal a threshold, in each grain: `found` `[thresholds, grains]`."""
    models = len(given.keys)
    tiles, addresses = make_tiles(given, 1), np.empty(models + 1, np.int64)
    found[:] = 0
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row = tiles.base[:size], tiles.rows[0, :size]
            load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                load_vector(given, i, first, start, base, row, addresses, tiles)
                for number in range(i, len(found), models):
                    threshold, equal = magnitude_of(thresholds[number]), np.int64(0)
                    for j in range(size):
                        equal += magnitude_of(row[j]) == threshold
                    found[number, first // given.grain] += equal


@part
def _add_products(one: Array, other: Array, lanes: Array) -> None:
    """Of a whole tile, two numbers are added to a lane at once, one after the other, so that it is loaded half as
    often.
    """
    if one.size == 2 * LANES:
        one_more, other_more = one[LANES:], other[LANES:]
        for j in range(LANES):
            first = add_product(np.float64(one[j]), np.float64(other[j]), lanes[j])
            lanes[j] = add_product(np.float64(one_more[j]), np.float64(other_more[j]), first)
    else:
        for begin in range(0, one.size, LANES):
            part, its = one[begin : begin + LANES], other[begin : begin + LANES]
            for j in range(part.size):
                lanes[j] = add_product(np.float64(part[j]), np.float64(its[j]), lanes[j])


@part
def _add_products_of_two(one: Array, other: Array, lanes: Array) -> None:
    """The three products of two whole tiles, each of whose numbers becomes float64 once."""
    first, mixed, second = lanes[0], lanes[1], lanes[2]
    one_more, other_more = one[LANES:], other[LANES:]
    for j in range(LANES):
        x, y = np.float64(one[j]), np.float64(other[j])
        a, b = np.float64(one_more[j]), np.float64(other_more[j])
        first[j] = add_product(a, a, add_product(x, x, first[j]))
        mixed[j] = add_product(a, b, add_product(x, y, mixed[j]))
        second[j] = add_product(b, b, add_product(y, y, second[j]))


@part
def gram(places: Places, has_base: bool, elements: int, grain: int, found: Array) -> None:
    """Inner products of all pairs of rows, less the first of the places if it is a base, by the grain rule, float64:
    `found` `[grains, pairs]`.
    """
    before = 1 if has_base else 0
    sources, pairs = len(places.codes) - before, found.shape[1]
    addresses, base = np.empty(sources + before, np.int64), np.empty(TILE, np.float32)
    tiles, lanes = np.empty((sources, TILE), np.float32), np.empty((pairs, LANES), np.float64)
    for first in range(0, elements, grain):
        count = min(grain, elements - first)
        if not window(places, first, count, addresses):
            return
        lanes[:] = 0
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            if has_base:
                load(addresses[0], places.codes[0], start, base[:size])
            for i in range(sources):
                one = tiles[i, :size]
                if has_base:
                    load_less(addresses[i + 1], places.codes[i + 1], start, base[:size], one)
                else:
                    load(addresses[i], places.codes[i], start, one)
            if sources == 2 and size == TILE:
                _add_products_of_two(tiles[0], tiles[1], lanes)
                continue
            pair = 0
            for i in range(sources):
                for k in range(i, sources):
                    _add_products(tiles[i, :size], tiles[k, :size], lanes[pair])
                    pair += 1
        for pair in range(pairs):
            found[first // grain, pair] = sum_of(lanes[pair])


@part
def _add_to_lanes(values: Array, lanes: Array) -> None:
    """Two numbers to a lane at once, as `_add_products` does."""
    if values.size == 2 * LANES:
        more = values[LANES:]
        for j in range(LANES):
            lanes[j] = (lanes[j] + np.float64(values[j])) + np.float64(more[j])
    else:
        for begin in range(0, values.size, LANES):
            part = values[begin : begin + LANES]
            for j in range(part.size):
                lanes[j] += np.float64(part[j])


@part
def absolute_sums(given: Operands, found: Array) -> None:
    """Σ|δ| of the plain task vectors and of what is left of them, by the grain rule, float64.

    `found` is `[grains, 2 · models]`, first the plain ones.
    """
    models = len(given.keys)
    tiles, addresses = make_tiles(given, 1), np.empty(models + 1, np.int64)
    lanes, codes = np.empty((2, LANES), np.float64), given.places.codes
    is_plain = only_drops(given) and np.all(given.factors == 1)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not open_window(given, first, count, addresses, tiles):
            return
        # One model after the other, so that the lanes stay in the first-level cache.
        for i in range(models):
            lanes[:] = 0
            for start in range(0, count, TILE):
                size = min(TILE, count - start)
                base, row, keep = tiles.base[:size], tiles.rows[0, :size], tiles.keep[:size]
                load_distance(addresses[i + 1], codes[i + 1], addresses[0], codes[0], start, base, row)
                _add_to_lanes(row, lanes[0])
                if not is_plain:
                    load(addresses[0], codes[0], start, base)
                    load_vector(given, i, first, start, base, row, addresses, tiles)
                    make_positive(row)
                elif find_kept(given, i, first, start, tiles, keep):
                    drop(row, keep)
                _add_to_lanes(row, lanes[1])
            found[first // given.grain, i] = sum_of(lanes[0])
            found[first // given.grain, models + i] = sum_of(lanes[1])


@part
def uniform(key: int, start: int, out: Array) -> None:
    """Random numbers in [0, 1), multiples of 2⁻²⁴, for the element indices from `start`."""
    words = np.empty(TILE // 4 + 16, np.uint32)
    lows = np.empty(TILE // 2 + 16, np.uint32)
    for begin in range(0, out.size, TILE):
        size = min(TILE, out.size - begin)
        at = start + begin
        first, first_low = at // 16, at // 8
        philox(key, 0, first, words[: 4 * ((at + size + 15) // 16 - first)])
        philox(key, LOW_STREAM, first_low, lows[: 4 * ((at + size + 7) // 8 - first_low)])
        high = words.view(np.uint8)[at - 16 * first : at - 16 * first + size]
        low = lows.view(np.uint16)[at - 8 * first_low : at - 8 * first_low + size]
        part = out[begin : begin + size]
        for j in range(size):
            number = np.uint32(np.uint32(high[j]) << np.uint32(16)) | np.uint32(low[j])
            part[j] = np.float32(np.int32(number)) * np.float32(2.0**-24)


@part
def low_rank(stored: int, code: int, left: Array, right: Array, scale: float, out: Array) -> None:
    """out = stored + scale · left · right, two ranks at a time, added one after the other."""
    rows, width, rank = out.shape[0], out.shape[1], right.shape[0]
    summed, row = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for start in range(0, width, TILE):
        stop = min(start + TILE, width)
        size = stop - start
        acc, one = summed[:size], row[:size]
        for i in range(rows):
            acc[:] = 0
            for r in range(0, rank - 1, 2):
                a, b = left[i, r], left[i, r + 1]
                first, second = right[r, start:stop], right[r + 1, start:stop]
                for j in range(size):
                    acc[j] = acc[j] + a * first[j] + b * second[j]
            if rank % 2:
                a, first = left[i, rank - 1], right[rank - 1, start:stop]
                for j in range(size):
                    acc[j] += a * first[j]
            load(stored, code, i * width + start, one)
            into = out[i, start:stop]
            for j in range(size):
                into[j] = one[j] + acc[j] * scale


@part
def find_nonfinite(address: int, code: int, count: int, found: Array) -> None:
    """The first NaN or infinity among stored numbers, −1 if there is none."""
    found[0] = first_nonfinite(address, code, count)
