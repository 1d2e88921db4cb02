"""One tile of a task vector: what is dropped of it, trimmed, cut off, and what it is multiplied by."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from merge_core.kernels.arguments import Array, Operands
from merge_core.kernels.tiles import (
    TILE,
    add_kept,
    add_scaled,
    bits_of,
    copy,
    load,
    low_bits,
    magnitude_of,
    masked,
    pack,
    part,
    philox,
    survive,
    unpack,
    window,
)

DIGIT = 11
"""Bits of a sort's digit: three of them hold the bits of a magnitude."""
TOGETHER = 16
"""Rows that are gathered at once: a random counter has a byte for as many."""


class Tiles(NamedTuple):
    """Space for one tile of each thing, small enough for the first-level cache."""

    base: Array  # float32
    rows: Array  # float32, [models, tile]
    total: Array  # float32
    sign: Array  # float32
    spare: Array  # float32
    words: Array  # uint32, random
    keep: Array  # uint8
    ranked: Array  # uint8, [models, elements of a grain], 1 where a place in a row is kept; empty without rates by rank
    left: Array  # int64, [2, models], ties that may still be kept, or cut off


class Sorting(NamedTuple):
    """Space for ranking rows."""

    base: Array  # float32
    values: Array  # float32, [rows, width]
    high: Array  # uint8, [rows, width], of random numbers
    words: Array  # uint32, random
    keys: Array  # uint32, [width]
    entries: Array  # uint64, [2, width]: key and index
    counts: Array  # uint32, [passes, digits]


@part
def _trim(values: Array, threshold: float, start: int, ties_from: int, left: Array, out: Array) -> None:
    """0 where a magnitude is below the threshold, or equals it and no more ties may be kept; else the value."""
    count = out.size
    is_nan = threshold != threshold  # then only NaN is kept, and no two of it are equal
    least = np.uint32(0x7F800001) if is_nan else bits_of(threshold)
    if is_nan or start + count <= ties_from:
        for j in range(count):
            out[j] = masked(values[j], np.uint32(magnitude_of(values[j]) >= least))
    elif start >= ties_from and left[0] == 0:
        for j in range(count):
            out[j] = masked(values[j], np.uint32(magnitude_of(values[j]) > least))
    else:
        for j in range(count):
            keep = magnitude_of(values[j]) >= least
            if magnitude_of(values[j]) == least and start + j >= ties_from:
                keep = left[0] > 0
                left[0] -= keep
            out[j] = masked(values[j], keep)


@part
def _cut_off(values: Array, ceiling: float, start: int, ties_from: int, left: Array, out: Array) -> None:
    """0 where a magnitude is above the ceiling, or equals it and is among the ties that count; else the value."""
    count = out.size
    limit, nan = bits_of(ceiling), np.uint32(0x7F800001)
    if ceiling != ceiling:
        copy(values, out)
    elif start + count <= ties_from:
        for j in range(count):
            bits = magnitude_of(values[j])
            out[j] = masked(values[j], np.uint32(bits < limit) | np.uint32(bits >= nan))
    elif start >= ties_from and left[0] == 0:
        for j in range(count):
            bits = magnitude_of(values[j])
            out[j] = masked(values[j], np.uint32(bits <= limit) | np.uint32(bits >= nan))
    else:
        for j in range(count):
            bits = magnitude_of(values[j])
            keep = bits < limit or bits >= nan
            if bits == limit and start + j >= ties_from:
                keep = left[0] == 0
                left[0] -= not keep
            out[j] = masked(values[j], keep)


@part
def _sort(values: Array, sorting: Sorting) -> int:
    """Sort a row by magnitude, the largest first, equal ones by index: the indices are the low halves of one of the
    `entries`, whose number this returns.

    A radix sort from the lowest digit on, over no more bits than the row's magnitudes differ in.
    """
    keys, count = sorting.keys, values.size
    any_, largest, least = np.uint32(0), np.uint32(0), np.uint32(0xFFFFFFFF)
    for j in range(count):
        bits = magnitude_of(values[j])
        keys[j] = bits
        any_ |= bits
        largest = max(largest, bits)
        least = min(least, np.uint32(bits - np.uint32(1)))  # of those above zero
    one, other = sorting.entries[0], sorting.entries[1]
    if any_ == 0:
        for j in range(count):
            one[j] = np.uint64(j)
        return 0
    shift = np.uint32(0)
    while not (any_ >> shift) & np.uint32(1):
        shift += np.uint32(1)
    last = np.uint32(((largest - np.uint32(least + np.uint32(1))) >> shift) + np.uint32(1))  # zeros come last
    bits = np.int64(1)
    while last >> np.uint32(bits):
        bits += 1
    passes = (bits + DIGIT - 1) // DIGIT
    digit = np.uint32((bits + passes - 1) // passes)
    mask, size = np.uint32((np.uint32(1) << digit) - np.uint32(1)), 1 << np.int64(digit)
    lowest, second, third = sorting.counts[0, :size], sorting.counts[1, :size], sorting.counts[2, :size]
    sorting.counts[:, :size] = 0
    for j in range(count):
        keys[j] = np.uint32((largest - keys[j]) >> shift) if keys[j] else last
    if passes < 3:
        for j in range(count):
            lowest[keys[j] & mask] += np.uint32(1)
            second[(keys[j] >> digit) & mask] += np.uint32(1)
    else:
        for j in range(count):
            lowest[keys[j] & mask] += np.uint32(1)
            second[(keys[j] >> digit) & mask] += np.uint32(1)
            third[keys[j] >> np.uint32(digit + digit)] += np.uint32(1)
    for number in range(passes):
        before = np.uint32(0)
        counts = sorting.counts[number, :size]
        for value in range(size):
            here = counts[value]
            counts[value] = before
            before += here
    for j in range(count):
        key = keys[j]
        place = lowest[key & mask]
        lowest[key & mask] = place + np.uint32(1)
        one[place] = np.uint64(np.uint64(key) << np.uint64(32)) | np.uint64(j)
    if passes > 1:
        for j in range(count):
            key = np.uint32(one[j] >> np.uint64(32))
            place = second[(key >> digit) & mask]
            second[(key >> digit) & mask] = place + np.uint32(1)
            other[place] = one[j]
    if passes > 2:
        for j in range(count):
            key = np.uint32(other[j] >> np.uint64(32))
            place = third[key >> np.uint32(digit + digit)]
            third[key >> np.uint32(digit + digit)] = place + np.uint32(1)
            one[place] = other[j]
    return 1 if passes == 2 else 0


@part
def _place_row(
    values: Array, below: Array, high: Array, key: int, element: int, stride: int, sorting: Sorting, keep: Array
) -> None:
    """1 for each entry of a row that is kept by its place, whose rate its random number is not below; `high` has the
    high bytes of the numbers, `keep[::stride]` is the row.
    """
    order = sorting.entries[_sort(values, sorting)]
    if high.size == 0:
        for place in range(values.size):
            keep[np.int64(np.uint32(order[place])) * stride] = np.uint8(below[place] == 0)
        return
    spare = sorting.words[:4]
    for place in range(values.size):
        index, limit = np.int64(np.uint32(order[place])), below[place]
        kept = high[index] > limit >> 16
        if high[index] == limit >> 16:
            kept = low_bits(key, element + index * stride, spare) >= limit & 0xFFFF
        keep[index * stride] = np.uint8(kept)


@part
def _keep_by_rank(
    given: Operands, model: int, first: int, count: int, addresses: Array, sorting: Sorting, keep: Array
) -> None:
    """1 where an element of a window is kept by its place in its row.

    Rows whose elements do not lie together are gathered several at once.
    """
    below, stride, key = given.rank_below[model], given.rank_stride, given.keys[model]
    width, code, base_code = below.size, given.places.codes[model + 1], given.places.codes[0]
    base, values, words = sorting.base, sorting.values, sorting.words[4:]
    is_drawn = False
    for place in range(width):
        is_drawn |= 0 < below[place] < 1 << 24
    for start in range(0, count, width * stride):
        element = given.start + first + start
        if stride == 1:
            row = values[0]
            load(addresses[0], base_code, start, base)
            load(addresses[model + 1], code, start, row)
            for j in range(width):
                row[j] -= base[j]
            high = sorting.high[0, :0]
            if is_drawn:
                from_ = element // 16
                philox(key, 0, from_, words[: 4 * ((element + width + 15) // 16 - from_)])
                high = words.view(np.uint8)[element - 16 * from_ :][:width]
            _place_row(row, below, high, key, element, 1, sorting, keep[start : start + width])
            continue
        for lane in range(0, stride, TOGETHER):
            lanes = min(TOGETHER, stride - lane)
            few, few_base = base[:lanes], base[TOGETHER : TOGETHER + lanes]
            for place in range(width):
                at = place * stride + lane
                load(addresses[0], base_code, start + at, few_base)
                load(addresses[model + 1], code, start + at, few)
                for j in range(lanes):
                    values[j, place] = few[j] - few_base[j]
                if is_drawn:
                    from_ = (element + at) // 16
                    philox(key, 0, from_, words[: 4 * ((element + at + lanes + 15) // 16 - from_)])
                    bytes_ = words.view(np.uint8)[element + at - 16 * from_ :]
                    for j in range(lanes):
                        sorting.high[j, place] = bytes_[j]
            for j in range(lanes):
                high = sorting.high[j, : width if is_drawn else 0]
                at = lane + j
                _place_row(values[j], below, high, key, element + at, stride, sorting, keep[start + at :])


@part
def open_window(given: Operands, first: int, count: int, addresses: Array, tiles: Tiles) -> bool:
    """A window of all sources, and which of its elements are kept by rank; False if a source was refused."""
    if not window(given.places, first, count, addresses):
        return False
    width, lanes = given.rank_below.shape[1], 1 if given.rank_stride == 1 else TOGETHER
    number = first // given.grain
    if width and given.has_marks:
        for model in range(len(given.keys)):
            unpack(given.marks[number, model, : (count + 7) // 8], tiles.ranked[model, :count])
    elif width:
        sorting = Sorting(
            np.empty(max(width, 2 * TOGETHER), np.float32)[: width if lanes == 1 else 2 * TOGETHER],
            np.empty((lanes, width), np.float32),
            np.empty((lanes, width), np.uint8),
            np.empty(width // 4 + 2 * TOGETHER, np.uint32),
            np.empty(width, np.uint32),
            np.empty((2, width), np.uint64),
            np.empty((3, 1 << DIGIT), np.uint32),
        )
        for model in range(len(given.keys)):
            keep = tiles.ranked[model, :count]
            _keep_by_rank(given, model, first, count, addresses, sorting, keep)
            if given.marks.size:
                pack(keep, given.marks[number, model, : (count + 7) // 8])
    return True


@part
def find_kept(given: Operands, model: int, first: int, start: int, tiles: Tiles, keep: Array) -> bool:
    """1 for each element of a tile that is kept; False if none is dropped, and nothing is found."""
    below, stop = given.drop_below[model], start + keep.size
    if tiles.ranked.shape[1] > 0:
        ranked = tiles.ranked[model, start:stop]
        for j in range(keep.size):
            keep[j] = ranked[j]
        return True
    if below < 0:
        return False
    if given.has_marks:
        unpack(given.marks[first // given.grain, model, start // 8 : (stop + 7) // 8], keep)
        return True
    survive(given.keys[model], below, given.start + first + start, tiles.words, keep)
    if given.marks.size:
        pack(keep, given.marks[first // given.grain, model, start // 8 : (stop + 7) // 8])
    return True


@part
def only_drops(given: Operands) -> bool:
    """Whether entries are dropped, and multiplied once, at the most."""
    is_whole = np.all(given.thresholds < 0) and np.all(given.ceilings < 0)
    return is_whole and np.all(given.divisors == 1) and given.factors.shape[1] < 2


@part
def load_vector(
    given: Operands, model: int, first: int, start: int, base: Array, out: Array, addresses: Array, tiles: Tiles
) -> None:
    """One tile of one task vector, sparse and scaled: `TaskVectors.values`. It is at `start` of a window that begins at
    the block's element `first`.

    Selections go from one tile to another: in place, compilers make of them stores under a mask, which are slow.
    """
    size = out.size
    spare, keep = tiles.spare[:size], tiles.keep[:size]
    divisor, threshold = given.divisors[model], given.thresholds[model]
    ceiling, factors = given.ceilings[model], given.factors.shape[1]
    trims = not (threshold < 0 and ceiling < 0)
    stored = out if trims else spare
    load(addresses[model + 1], given.places.codes[model + 1], start, stored)
    drops = find_kept(given, model, first, start, tiles, keep)
    if trims:
        if drops:
            for j in range(size):
                spare[j] = masked(stored[j] - base[j], keep[j])
        else:
            for j in range(size):
                spare[j] = stored[j] - base[j]
        if divisor != 1:
            for j in range(size):
                spare[j] /= divisor
        if threshold < 0:
            copy(spare, out)
        else:
            _trim(spare, threshold, first + start, given.ties_from[0, model], tiles.left[0, model : model + 1], out)
        if not ceiling < 0:
            copy(out, spare)
            _cut_off(spare, ceiling, first + start, given.ties_from[1, model], tiles.left[1, model : model + 1], out)
    else:
        factor = given.factors[model, 0] if factors else np.float32(1)
        if drops and divisor == 1:
            for j in range(size):
                out[j] = masked(stored[j] - base[j], keep[j]) * factor
        elif drops:
            for j in range(size):
                out[j] = masked(stored[j] - base[j], keep[j]) / divisor * factor
        elif divisor == 1:
            for j in range(size):
                out[j] = (stored[j] - base[j]) * factor
        else:
            for j in range(size):
                out[j] = (stored[j] - base[j]) / divisor * factor
    for number in range(0 if trims else 1, factors):
        factor = given.factors[model, number]
        if factor != 1:
            for j in range(size):
                out[j] *= factor


@part
def add_vector(
    given: Operands, model: int, first: int, start: int, base: Array, total: Array, addresses: Array, tiles: Tiles
) -> None:
    """Add one tile of one task vector of which some is dropped, and that is multiplied, at the most."""
    size, address, code = total.size, addresses[model + 1], given.places.codes[model + 1]
    factor, keep = given.factors[model, 0] if given.factors.shape[1] else np.float32(1), tiles.keep[:size]
    if find_kept(given, model, first, start, tiles, keep):
        add_kept(address, code, start, base, keep, factor, total, tiles.spare[:size])
    else:
        add_scaled(address, code, start, base, factor, total, tiles.spare[:size])


@part
def make_tiles(given: Operands, rows: int) -> Tiles:
    """Space, with so many rows."""
    in_window = min(given.grain, given.elements) if given.rank_below.shape[1] else 0
    return Tiles(
        np.empty(TILE, np.float32),
        np.empty((rows, TILE), np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE // 4 + 16, np.uint32),
        np.empty(TILE, np.uint8),
        np.empty((len(given.keys), in_window), np.uint8),
        given.ties_left.copy(),
    )


@part
def add_rows(rows: Array, size: int, out: Array) -> None:
    """The sum of some rows, one after the other."""
    first = rows[0, :size]
    for j in range(size):
        out[j] = first[j]
    for i in range(1, len(rows)):
        row = rows[i, :size]
        for j in range(size):
            out[j] += row[j]
