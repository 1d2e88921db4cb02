"""The kernels in numba: one pass over the stored rows, a tile at a time in the first-level cache.

Each function does, element by element, the float32 operations of its namesake in `plain.py` in the same order, with no
contraction and no reordering, so that the bits are the same. Rows come as places and format codes, because the models
of one merge may be stored in different formats: bfloat16, float16 and float32 are widened as a tile is loaded and
rounded once, half to even, as it is stored. All functions run without the interpreter's lock, from the reading of a
grain to the rounding of its last element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from merge_core.kernels.vectors import PAGE

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
TILE = 2048
LANES = 1024
DIGIT = 11
"""Bits of a sort's digit: three of them hold the bits of a magnitude."""
TOGETHER = 16
"""Rows that are gathered at once: a random counter has a byte for as many."""
LOW_STREAM = 1
"""The random stream of the low 16 bits; the high 8 come from stream 0 (see `merge_core/random.py`)."""

NO_VOTE, VOTE, VOTE_OR_MAJORITY = 0, 1, 2
SUM, BY_WEIGHT, BY_COUNT, LARGEST, SHARED = 0, 1, 2, 3, 4

Array = NDArray[Any]


class Places(NamedTuple):
    """Where the stored rows of several sources are, one entry per source: in a file, or at an address."""

    descriptors: Array  # int64; −1: in memory
    offsets: Array  # int64, of the first byte in the file, or its address
    codes: Array  # int64
    checked: Array  # uint8; 1: NaN and infinity are refused
    space: Array  # uint8, [sources, bytes of a grain and a page], on pages, for rows that are in files
    refused: Array  # int64, [2]: the source that could not be used, from 1; its element, −1 if its file is too short


class Operands(NamedTuple):
    """`TaskVectors` as plain numbers: one entry per model, and where the block begins. The base is place 0."""

    places: Places
    elements: int
    grain: int
    start: int  # the first element's index in its tensor
    keys: Array  # uint64, of the random stream
    drop_below: Array  # int64 in units of 2⁻²⁴; −1: nothing is dropped
    rank_below: Array  # int32, [models, width], the same by place in a row; width 0: nothing is dropped by rank
    rank_stride: int
    marks: Array  # uint8, [grains, models, bytes], a bit per element: what is kept by rank; empty if not remembered
    has_marks: bool  # whether they are found already, or to be found
    divisors: Array  # float32
    thresholds: Array  # float32; negative: nothing is trimmed
    ceilings: Array  # float32; negative: nothing is cut off
    ties_from: Array  # int64, [2, models], element of the block; ties at the threshold or ceiling count before it
    ties_left: Array  # int64, [2, models], how many from there on
    factors: Array  # float32, [models, factors]


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


@intrinsic  # type: ignore[misc]
def _pointer(context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


@intrinsic  # type: ignore[misc]
def _bits_of(context: Any, number: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), code


@intrinsic  # type: ignore[misc]
def _float_of(context: Any, bits: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), code


def _kernel(function: Any) -> Any:
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither beside the sources nor in the user's folder can anything be kept
        return njit(nogil=True, error_model="numpy")(function)


@_kernel
def _magnitude(value: float) -> int:
    """The bits of |value|, which have the order of the magnitudes; those of NaN come after all others."""
    return np.uint32(_bits_of(value) & np.uint32(0x7FFFFFFF))


@_kernel
def _load(address: int, code: int, start: int, out: Array) -> None:
    """Widen stored numbers to float32."""
    count = out.size
    if code == BFLOAT16:
        short = carray(_pointer(address + 2 * start), count, np.uint16)
        for j in range(count):
            out[j] = _float_of(np.uint32(np.uint32(short[j]) << np.uint32(16)))
    elif code == FLOAT16:
        short = carray(_pointer(address + 2 * start), count, np.uint16)
        for j in range(count):
            magnitude = np.uint32(short[j] & np.uint16(0x7FFF))
            sign = np.uint32(np.uint32(short[j] & np.uint16(0x8000)) << np.uint32(16))
            shifted = np.uint32(magnitude << np.uint32(13))
            # The exponents' biases differ by 112; the product is exact, and makes subnormals normal.
            finite = _bits_of(_float_of(shifted) * np.float32(2.0**112))
            special = np.uint32(shifted | np.uint32(0x7F800000))
            out[j] = _float_of(np.uint32((special if magnitude >= np.uint32(0x7C00) else finite) | sign))
    else:
        single = carray(_pointer(address + 4 * start), count, np.float32)
        for j in range(count):
            out[j] = single[j]


@_kernel
def _store(values: Array, address: int, code: int, start: int) -> None:
    """Round float32 to the stored format, half to even; NaN becomes the one quiet NaN."""
    count = values.size
    if code == BFLOAT16:
        short = carray(_pointer(address + 2 * start), count, np.uint16)
        for j in range(count):
            bits = _bits_of(values[j])
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            is_nan = _magnitude(values[j]) > np.uint32(0x7F800000)
            short[j] = np.uint16(0x7FC0) if is_nan else rounded
    elif code == FLOAT16:
        short = carray(_pointer(address + 2 * start), count, np.uint16)
        for j in range(count):
            bits = _bits_of(values[j])
            sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
            # Rebias the exponent by −112 and round the 13 bits that go; a carry may make infinity, as it should.
            normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
            # Adding one half leaves the bits of a subnormal at the end of the sum, rounded by the addition.
            small = np.uint32(_bits_of(_float_of(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000))
            half = small if magnitude < np.uint32(0x38800000) else normal
            half = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else half
            is_nan = magnitude > np.uint32(0x7F800000)
            short[j] = np.uint16(0x7E00) if is_nan else np.uint16(half | sign)
    else:
        single = carray(_pointer(address + 4 * start), count, np.float32)
        for j in range(count):
            single[j] = values[j] if values[j] == values[j] else np.float32(np.nan)


@_kernel
def first_nonfinite(address: int, code: int, count: int) -> int:
    """The first NaN or infinity among stored numbers, −1 if there is none."""
    for start in range(0, count, TILE):
        stop = min(start + TILE, count)
        largest = np.uint32(0)
        if code == FLOAT32:
            words = carray(_pointer(address), count, np.uint32)
            for j in range(start, stop):
                largest = max(largest, np.uint32(words[j] & np.uint32(0x7FFFFFFF)))
            limit = np.uint32(0x7F800000)
            if largest >= limit:
                for j in range(start, stop):
                    if np.uint32(words[j] & np.uint32(0x7FFFFFFF)) >= limit:
                        return j
        else:
            short = carray(_pointer(address), count, np.uint16)
            most = np.uint16(0)
            for j in range(start, stop):
                most = max(most, np.uint16(short[j] & np.uint16(0x7FFF)))
            limit = np.uint32(0x7F80 if code == BFLOAT16 else 0x7C00)
            if most >= limit:
                for j in range(start, stop):
                    if np.uint32(short[j] & np.uint16(0x7FFF)) >= limit:
                        return j
    return -1


_pread = types.ExternalFunction("pread", types.int64(types.int32, types.voidptr, types.uint64, types.int64))


@_kernel
def _size_of(code: int) -> int:
    return 4 if code == FLOAT32 else 2


@_kernel
def _window(places: Places, first: int, count: int, addresses: Array) -> bool:
    """Bring a run of elements of every source into memory, `addresses` saying where; False if one was refused.

    A grain fits into the second-level cache, so that what is read is still there when it is used. It lies as far behind
    a page's begin as it does in its file: where it is a few bytes further, processors copy five times slower.
    """
    for i in range(len(places.codes)):
        size = count * _size_of(places.codes[i])
        begin = places.offsets[i] + first * _size_of(places.codes[i])
        if places.descriptors[i] < 0:
            addresses[i] = begin
        else:
            addresses[i] = places.space[i].ctypes.data + begin % PAGE
            done = 0
            while done < size:
                here = _pread(
                    np.int32(places.descriptors[i]), _pointer(addresses[i] + done), np.uint64(size - done), begin + done
                )
                if here <= 0:
                    places.refused[0], places.refused[1] = i + 1, -1
                    return False
                done += here
        if places.checked[i]:
            element = first_nonfinite(addresses[i], places.codes[i], count)
            if element >= 0:
                places.refused[0], places.refused[1] = i + 1, first + element
                return False
    return True


@_kernel
def philox(key: int, stream: int, first: int, out: Array) -> None:
    """The four words of each counter from `first` on, one counter after the other."""
    for i in range(out.size // 4):
        counter = np.uint64(first + i)
        a, b = np.uint32(counter), np.uint32(counter >> np.uint64(32))
        c, d = np.uint32(stream), np.uint32(0)
        low, high = np.uint32(key), np.uint32(np.uint64(key) >> np.uint64(32))
        for _ in range(10):
            p, q = np.uint64(a) * np.uint64(0xD2511F53), np.uint64(c) * np.uint64(0xCD9E8D57)
            a, b = np.uint32(q >> np.uint64(32)) ^ b ^ low, np.uint32(q)
            c, d = np.uint32(p >> np.uint64(32)) ^ d ^ high, np.uint32(p)
            low, high = np.uint32(low + np.uint32(0x9E3779B9)), np.uint32(high + np.uint32(0xBB67AE85))
        out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3] = a, b, c, d


@_kernel
def _low_bits(key: int, element: int, words: Array) -> int:
    """The low 16 of the 24 bits of one random number."""
    philox(key, LOW_STREAM, element // 8, words)
    half = element % 8
    return np.int64(np.uint32(words[half // 2] >> np.uint32(16 * (half % 2))) & np.uint32(0xFFFF))


@_kernel
def _masked(value: float, keep: int) -> float:
    """The value where `keep` is 1, +0 where it is 0; in bits, because a branch would keep loops from being vector
    code.
    """
    return _float_of(np.uint32(_bits_of(value) & np.uint32(np.uint32(0) - np.uint32(keep))))


@_kernel
def _survives(key: int, below: int, start: int, words: Array, keep: Array) -> None:
    """1 where the random number of an element is not less than `below`.

    The high byte of a number decides, but for one in 256 where it equals that of `below`.
    """
    count = keep.size
    if below >= 1 << 24:
        keep[:] = 0
        return
    first = start // 16
    needed = (start + count + 15) // 16 - first
    philox(key, 0, first, words[: 4 * needed])
    offset = start - 16 * first
    bytes_ = words.view(np.uint8)[offset : offset + count]
    high, low = np.uint8(below >> 16), np.int64(below & 0xFFFF)
    if low == 0:
        for j in range(count):
            keep[j] = np.uint8(bytes_[j] >= high)
        return
    for j in range(count):
        keep[j] = np.uint8(bytes_[j] > high)
    eights = words[: 4 * needed].view(np.uint64)
    ones, tops = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    pattern = np.uint64(ones * np.uint64(high))
    spare = words[4 * needed : 4 * needed + 4]
    for eight in range(eights.size):
        differs = np.uint64(eights[eight] ^ pattern)
        if np.uint64(differs - ones) & ~differs & tops:
            for j in range(max(8 * eight - offset, 0), min(8 * eight + 8 - offset, count)):
                if bytes_[j] == high:
                    keep[j] = np.uint8(_low_bits(key, start + j, spare) >= low)


@_kernel
def _trim(values: Array, threshold: float, start: int, ties_from: int, left: Array, out: Array) -> None:
    """0 where a magnitude is below the threshold, or equals it and no more ties may be kept; else the value."""
    count = out.size
    is_nan = threshold != threshold  # then only NaN is kept, and no two of it are equal
    least = np.uint32(0x7F800001) if is_nan else _bits_of(threshold)
    if is_nan or start + count <= ties_from:
        for j in range(count):
            out[j] = _masked(values[j], np.uint32(_magnitude(values[j]) >= least))
    elif start >= ties_from and left[0] == 0:
        for j in range(count):
            out[j] = _masked(values[j], np.uint32(_magnitude(values[j]) > least))
    else:
        for j in range(count):
            keep = _magnitude(values[j]) >= least
            if _magnitude(values[j]) == least and start + j >= ties_from:
                keep = left[0] > 0
                left[0] -= keep
            out[j] = _masked(values[j], keep)


@_kernel
def _cut_off(values: Array, ceiling: float, start: int, ties_from: int, left: Array, out: Array) -> None:
    """0 where a magnitude is above the ceiling, or equals it and is among the ties that count; else the value."""
    count = out.size
    limit, nan = _bits_of(ceiling), np.uint32(0x7F800001)
    if ceiling != ceiling:
        out[:] = values
    elif start + count <= ties_from:
        for j in range(count):
            bits = _magnitude(values[j])
            out[j] = _masked(values[j], np.uint32(bits < limit) | np.uint32(bits >= nan))
    elif start >= ties_from and left[0] == 0:
        for j in range(count):
            bits = _magnitude(values[j])
            out[j] = _masked(values[j], np.uint32(bits <= limit) | np.uint32(bits >= nan))
    else:
        for j in range(count):
            bits = _magnitude(values[j])
            keep = bits < limit or bits >= nan
            if bits == limit and start + j >= ties_from:
                keep = left[0] == 0
                left[0] -= not keep
            out[j] = _masked(values[j], keep)


@_kernel
def _sort(values: Array, sorting: Sorting) -> int:
    """Sort a row by magnitude, the largest first, equal ones by index: the indices are the low halves of one of the
    `entries`, whose number this returns.

    A radix sort from the lowest digit on, over no more bits than the row's magnitudes differ in.
    """
    keys, count = sorting.keys, values.size
    any_, largest, least = np.uint32(0), np.uint32(0), np.uint32(0xFFFFFFFF)
    for j in range(count):
        bits = _magnitude(values[j])
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


@_kernel
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
            kept = _low_bits(key, element + index * stride, spare) >= limit & 0xFFFF
        keep[index * stride] = np.uint8(kept)


@_kernel
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
            _load(addresses[0], base_code, start, base)
            _load(addresses[model + 1], code, start, row)
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
                _load(addresses[0], base_code, start + at, few_base)
                _load(addresses[model + 1], code, start + at, few)
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


@_kernel
def _open(given: Operands, first: int, count: int, addresses: Array, tiles: Tiles) -> bool:
    """A window of all sources, and which of its elements are kept by rank; False if a source was refused."""
    if not _window(given.places, first, count, addresses):
        return False
    width, lanes = given.rank_below.shape[1], 1 if given.rank_stride == 1 else TOGETHER
    number = first // given.grain
    if width and given.has_marks:
        for model in range(len(given.keys)):
            marks, keep = given.marks[number, model], tiles.ranked[model]
            for j in range(count):
                keep[j] = (marks[j >> 3] >> np.uint8(j & 7)) & np.uint8(1)
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
            keep = tiles.ranked[model]
            _keep_by_rank(given, model, first, count, addresses, sorting, keep[:count])
            if given.marks.size:
                marks = given.marks[number, model]
                for byte in range((count + 7) // 8):
                    bits = np.uint8(0)
                    for j in range(8 * byte, min(8 * byte + 8, count)):
                        bits |= np.uint8(keep[j] << np.uint8(j & 7))
                    marks[byte] = bits
    return True


@_kernel
def _vector(
    given: Operands, model: int, first: int, start: int, base: Array, out: Array, addresses: Array, tiles: Tiles
) -> None:
    """One tile of one task vector, sparse and scaled: `TaskVectors.values`. It is at `start` of a window that begins at
    the block's element `first`.

    Selections go from one tile to another: in place, compilers make of them stores under a mask, which are slow.
    """
    size = out.size
    spare, keep = tiles.spare[:size], tiles.keep[:size]
    drops, divisor, threshold = given.drop_below[model] >= 0, given.divisors[model], given.thresholds[model]
    ceiling, factors = given.ceilings[model], given.factors.shape[1]
    trims = not (threshold < 0 and ceiling < 0)
    stored = out if trims else spare
    _load(addresses[model + 1], given.places.codes[model + 1], start, stored)
    if drops:
        _survives(given.keys[model], given.drop_below[model], given.start + first + start, tiles.words, keep)
    elif tiles.ranked.shape[1] > 0:
        keep, drops = tiles.ranked[model, start : start + size], True
    if trims:
        if drops:
            for j in range(size):
                spare[j] = _masked(stored[j] - base[j], keep[j])
        else:
            for j in range(size):
                spare[j] = stored[j] - base[j]
        if divisor != 1:
            for j in range(size):
                spare[j] /= divisor
        if threshold < 0:
            out[:] = spare
        else:
            _trim(spare, threshold, first + start, given.ties_from[0, model], tiles.left[0, model : model + 1], out)
        if not ceiling < 0:
            spare[:] = out
            _cut_off(spare, ceiling, first + start, given.ties_from[1, model], tiles.left[1, model : model + 1], out)
    else:
        factor = given.factors[model, 0] if factors else np.float32(1)
        if drops and divisor == 1:
            for j in range(size):
                out[j] = _masked(stored[j] - base[j], keep[j]) * factor
        elif drops:
            for j in range(size):
                out[j] = _masked(stored[j] - base[j], keep[j]) / divisor * factor
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


@_kernel
def linear(places: Places, weights: Array, divisor: float, elements: int, grain: int, target: int, code: int) -> None:
    """Σᵢ wᵢ xᵢ / divisor."""
    row, summed = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    addresses = np.empty(len(weights), np.int64)
    for first in range(0, elements, grain):
        count = min(grain, elements - first)
        if not _window(places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            one, acc = row[:size], summed[:size]
            _load(addresses[0], places.codes[0], start, acc)
            weight = weights[0]
            for j in range(size):
                acc[j] *= weight
            for i in range(1, len(weights)):
                _load(addresses[i], places.codes[i], start, one)
                weight = weights[i]
                for j in range(size):
                    acc[j] += one[j] * weight
            if divisor != 1:
                for j in range(size):
                    acc[j] /= divisor
            _store(acc, target, code, first + start)


@_kernel
def _tiles(given: Operands, rows: int) -> Tiles:
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


@_kernel
def _total(rows: Array, size: int, out: Array) -> None:
    first = rows[0, :size]
    for j in range(size):
        out[j] = first[j]
    for i in range(1, len(rows)):
        row = rows[i, :size]
        for j in range(size):
            out[j] += row[j]


@_kernel
def _largest(rows: Array, size: int, out: Array) -> None:
    """The entry of the largest magnitude, the first of equal ones; NaN is larger than any."""
    first = rows[0, :size]
    for j in range(size):
        out[j] = first[j]
    for i in range(1, len(rows)):
        row = rows[i, :size]
        for j in range(size):
            out[j] = row[j] if abs(row[j]) > abs(out[j]) or row[j] != row[j] else out[j]


@_kernel
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


@_kernel
def _agreeing(value: float, sign: float) -> float:
    """The value if it has the elected sign, else 0; NaN always counts, so that it is not hidden."""
    up = np.uint32(sign > np.float32(0))
    above, below = np.uint32(value > np.float32(0)), np.uint32(value < np.float32(0))
    return _masked(value, np.uint32(above & up) | np.uint32(below & np.uint32(up ^ 1)) | np.uint32(value != value))


@_kernel
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
            divisor[j] += _masked(weight, np.uint32(chosen != zero))
    if average != SUM:
        least = np.float32(1e-8) if average == BY_WEIGHT else one
        for j in range(size):
            out[j] /= one if abs(divisor[j]) < least else divisor[j]


@_kernel
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
            count[j] += _masked(one, changed)
            weight[j] += _masked(own, changed)
    for j in range(size):
        out[j] /= one if count[j] < one else count[j]
    for j in range(size):
        out[j] *= weight[j] if count[j] == one else one


@_kernel
def combine(
    given: Operands, vote: int, majority: float, average: int, weights: Array, scale: float, target: int, code: int
) -> None:
    """θ₀ + λ · the task vectors combined: summed or averaged, all of them or those of the elected sign."""
    models = len(given.keys)
    tiles, addresses = _tiles(given, models), np.empty(models + 1, np.int64)
    whole = weights[0]
    for i in range(1, models):
        whole = np.float32(whole + weights[i])
    whole = np.float32(1) if abs(whole) < np.float32(1e-8) else whole
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not _open(given, first, count, addresses, tiles):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, total = tiles.base[:size], tiles.total[:size]
            _load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                _vector(given, i, first, start, base, tiles.rows[i, :size], addresses, tiles)
            _total(tiles.rows, size, total)
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
            _store(total, target, code, first + start)


@_kernel
def votes(given: Operands) -> tuple[int, int]:
    """How many elements of the summed task vectors are above and below zero."""
    models = len(given.keys)
    tiles, addresses = _tiles(given, models), np.empty(models + 1, np.int64)
    above, below = np.int64(0), np.int64(0)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not _window(given.places, first, count, addresses):
            break
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, total = tiles.base[:size], tiles.total[:size]
            _load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                _vector(given, i, first, start, base, tiles.rows[i, :size], addresses, tiles)
            _total(tiles.rows, size, total)
            for j in range(size):
                above += total[j] > np.float32(0)
                below += total[j] < np.float32(0)
    return above, below


@_kernel
def overlaps(given: Operands, found: Array) -> None:
    """Count each model's entries that are not 0: `found` `[models, 2]`, where no other's are, and where others' are."""
    models = len(given.keys)
    tiles, addresses = _tiles(given, models), np.empty(models + 1, np.int64)
    zero, one = np.float32(0), np.float32(1)
    for first in range(0, given.elements, given.grain):
        many = min(given.grain, given.elements - first)
        if not _window(given.places, first, many, addresses):
            return
        for start in range(0, many, TILE):
            size = min(TILE, many - start)
            base, count = tiles.base[:size], tiles.total[:size]
            _load(addresses[0], given.places.codes[0], start, base)
            count[:] = 0
            for i in range(models):
                row = tiles.rows[i, :size]
                _vector(given, i, first, start, base, row, addresses, tiles)
                for j in range(size):
                    count[j] += _masked(one, np.uint32(row[j] != zero))
            for i in range(models):
                row, alone, shared = tiles.rows[i, :size], np.uint32(0), np.uint32(0)
                for j in range(size):
                    changed = np.uint32(row[j] != zero)
                    alone += changed & np.uint32(count[j] == one)
                    shared += changed & np.uint32(count[j] > one)
                found[i, 0] += alone
                found[i, 1] += shared


@_kernel
def near_swap(given: Operands, t: float, target: int, code: int) -> None:
    """The base, moved to the only model by t / |δ|, at most by 1 and at least by 0."""
    tiles, addresses = _tiles(given, 1), np.empty(2, np.int64)
    zero, one, smallest = np.float32(0), np.float32(1), np.float32(1e-6)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not _window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row, merged = tiles.base[:size], tiles.rows[0, :size], tiles.total[:size]
            _load(addresses[0], given.places.codes[0], start, base)
            _load(addresses[1], given.places.codes[1], start, row)
            for j in range(size):
                gap = abs(base[j] - row[j])
                share = t / (gap if gap > smallest else smallest)
                share = share if share > zero else zero
                share = share if share < one else one
                merged[j] = base[j] * (one - share) + row[j] * share
            _store(merged, target, code, first + start)


@_kernel
def high_digits(given: Operands, found: Array) -> None:
    """Add up how often each value of the high 16 bits of |δ| occurs: `found` `[models, 2**15]`.

    Two counters per value, taken in turns: in one, a run of equal values would wait for the memory each time.
    """
    models = len(given.keys)
    tiles, addresses = _tiles(given, 1), np.empty(models + 1, np.int64)
    counters = np.zeros((models, 2, found.shape[1]), np.uint32)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not _window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row = tiles.base[:size], tiles.rows[0, :size]
            _load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                even, odd = counters[i, 0], counters[i, 1]
                _vector(given, i, first, start, base, row, addresses, tiles)
                for j in range(0, size - 1, 2):
                    even[_magnitude(row[j]) >> np.uint32(16)] += np.uint32(1)
                    odd[_magnitude(row[j + 1]) >> np.uint32(16)] += np.uint32(1)
                if size % 2:
                    even[_magnitude(row[size - 1]) >> np.uint32(16)] += np.uint32(1)
    for i in range(models):
        for value in range(found.shape[1]):
            found[i, value] += np.int64(counters[i, 0, value]) + np.int64(counters[i, 1, value])


@_kernel
def low_digits(given: Operands, buckets: Array, found: Array) -> None:
    """Add up how often each value of the low 16 bits occurs where the high bits are the model's bucket."""
    models = len(given.keys)
    tiles, addresses = _tiles(given, 1), np.empty(models + 1, np.int64)
    inside = np.empty(TILE + 1, np.uint16)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not _window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row = tiles.base[:size], tiles.rows[0, :size]
            _load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                _vector(given, i, first, start, base, row, addresses, tiles)
                for number in range(i, len(found), models):
                    bucket, counts = np.uint32(buckets[number]), found[number]
                    length = 0
                    for j in range(size):
                        bits = _magnitude(row[j])
                        inside[length] = np.uint16(bits & np.uint32(0xFFFF))
                        length += (bits >> np.uint32(16)) == bucket
                    for j in range(length):
                        counts[inside[j]] += 1


@_kernel
def sampled_digits(given: Operands, every: int, found: Array) -> None:
    """`high_digits` of the first of so many tiles of each grain; of the others nothing is read."""
    models = len(given.keys)
    tiles, addresses = _tiles(given, 1), np.empty(models + 1, np.int64)
    for first in range(0, given.elements, given.grain):
        last = min(first + given.grain, given.elements)
        for start in range(first, last, every * TILE):
            size = min(TILE, last - start)
            if not _window(given.places, start, size, addresses):
                return
            base, row = tiles.base[:size], tiles.rows[0, :size]
            _load(addresses[0], given.places.codes[0], 0, base)
            for i in range(models):
                _vector(given, i, start, 0, base, row, addresses, tiles)
                for j in range(size):
                    found[i, _magnitude(row[j]) >> np.uint32(16)] += 1


@_kernel
def bracket(
    given: Operands, lows: Array, highs: Array, candidates: Array, digits: Array, above: Array, equal: Array
) -> None:
    """Count |δ| whose high digits are above, and each value whose high digits are from `lows` to below `highs`.

    `digits` is `[ranges, values from that low on]`, `above` `[ranges]`; the ones equal to the range's candidate are
    counted apart, in `equal` `[ranges, grains]`: there are many of them, and in vector code they cost little. The
    ranges are one per model, or one after the other.
    """
    models = len(given.keys)
    tiles, addresses = _tiles(given, 1), np.empty(models + 1, np.int64)
    inside = np.empty(TILE + 1, np.uint32)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not _window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row = tiles.base[:size], tiles.rows[0, :size]
            _load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                _vector(given, i, first, start, base, row, addresses, tiles)
                for number in range(i, len(above), models):
                    low, candidate = np.uint32(lows[number] << 16), np.uint32(candidates[number] << 16)
                    span = np.uint32((highs[number] - lows[number]) << 16)
                    top = np.uint32(low + span)
                    more, same, near = np.uint32(0), np.uint32(0), np.uint32(0)
                    for j in range(size):
                        bits = _magnitude(row[j])
                        more += np.uint32(bits >= top)
                        same += np.uint32(bits == candidate)
                        near += np.uint32(np.uint32(bits - low) < span)
                    above[number] += more
                    equal[number, first // given.grain] += same
                    if near > same:
                        length = 0
                        for j in range(size):
                            bits = _magnitude(row[j])
                            inside[length] = np.uint32(bits - low)
                            length += (np.uint32(bits - low) < span) & (bits != candidate)
                        for j in range(length):
                            digits[number, inside[j]] += 1


@_kernel
def ties(given: Operands, thresholds: Array, found: Array) -> None:
    """How many |δ| equal a threshold, in each grain: `found` `[thresholds, grains]`."""
    models = len(given.keys)
    tiles, addresses = _tiles(given, 1), np.empty(models + 1, np.int64)
    found[:] = 0
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not _window(given.places, first, count, addresses):
            return
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row = tiles.base[:size], tiles.rows[0, :size]
            _load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                _vector(given, i, first, start, base, row, addresses, tiles)
                for number in range(i, len(found), models):
                    threshold, equal = _magnitude(thresholds[number]), np.int64(0)
                    for j in range(size):
                        equal += _magnitude(row[j]) == threshold
                    found[number, first // given.grain] += equal


@_kernel
def _sum_of(lanes: Array) -> float:
    """The sum of all lanes, the second half being added to the first until one is left."""
    half = lanes.size // 2
    while half:
        for j in range(half):
            lanes[j] += lanes[half + j]
        half //= 2
    return lanes[0]


@_kernel
def _add_products(one: Array, other: Array, lanes: Array) -> None:
    """Of a whole tile, two numbers are added to a lane at once, one after the other, so that it is loaded half as
    often.
    """
    if one.size == 2 * LANES:
        one_more, other_more = one[LANES:], other[LANES:]
        for j in range(LANES):
            first = np.float64(one[j]) * np.float64(other[j])
            lanes[j] = (lanes[j] + first) + np.float64(one_more[j]) * np.float64(other_more[j])
    else:
        for begin in range(0, one.size, LANES):
            part, its = one[begin : begin + LANES], other[begin : begin + LANES]
            for j in range(part.size):
                lanes[j] += np.float64(part[j]) * np.float64(its[j])


@_kernel
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
        if not _window(places, first, count, addresses):
            return
        lanes[:] = 0
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            if has_base:
                _load(addresses[0], places.codes[0], start, base[:size])
            for i in range(sources):
                one = tiles[i, :size]
                _load(addresses[i + before], places.codes[i + before], start, one)
                if has_base:
                    for j in range(size):
                        one[j] -= base[j]
            pair = 0
            for i in range(sources):
                for k in range(i, sources):
                    _add_products(tiles[i, :size], tiles[k, :size], lanes[pair])
                    pair += 1
        for pair in range(pairs):
            found[first // grain, pair] = _sum_of(lanes[pair])


@_kernel
def _add_magnitudes(values: Array, lanes: Array) -> None:
    for begin in range(0, values.size, LANES):
        part = values[begin : begin + LANES]
        for j in range(part.size):
            lanes[j] += np.float64(abs(part[j]))


@_kernel
def _add_magnitudes_and_kept(values: Array, keep: Array, lanes: Array, kept: Array) -> None:
    for begin in range(0, values.size, LANES):
        part, here = values[begin : begin + LANES], keep[begin : begin + LANES]
        for j in range(part.size):
            magnitude = abs(part[j])
            lanes[j] += np.float64(magnitude)
            kept[j] += np.float64(_masked(magnitude, here[j]))


@_kernel
def absolute_sums(given: Operands, found: Array) -> None:
    """Σ|δ| of the plain task vectors and of what is left of them, by the grain rule, float64.

    `found` is `[grains, 2 · models]`, first the plain ones.
    """
    models = len(given.keys)
    tiles, addresses = _tiles(given, 1), np.empty(models + 1, np.int64)
    lanes = np.empty((2 * models, LANES), np.float64)
    only_dropped = np.all(given.factors == 1) and np.all(given.divisors == 1)
    only_dropped = only_dropped and np.all(given.thresholds < 0) and np.all(given.ceilings < 0)
    for first in range(0, given.elements, given.grain):
        count = min(given.grain, given.elements - first)
        if not _open(given, first, count, addresses, tiles):
            return
        lanes[:] = 0
        for start in range(0, count, TILE):
            size = min(TILE, count - start)
            base, row, plain = tiles.base[:size], tiles.rows[0, :size], tiles.total[:size]
            _load(addresses[0], given.places.codes[0], start, base)
            for i in range(models):
                _load(addresses[i + 1], given.places.codes[i + 1], start, plain)
                for j in range(size):
                    plain[j] -= base[j]
                if only_dropped:
                    keep = tiles.keep[:size]
                    below = given.drop_below[i]
                    if below >= 0:
                        _survives(given.keys[i], below, given.start + first + start, tiles.words, keep)
                    elif tiles.ranked.shape[1] > 0:
                        keep = tiles.ranked[i, start : start + size]
                    else:
                        keep[:] = 1
                    _add_magnitudes_and_kept(plain, keep, lanes[i], lanes[models + i])
                else:
                    _add_magnitudes(plain, lanes[i])
                    _vector(given, i, first, start, base, row, addresses, tiles)
                    _add_magnitudes(row, lanes[models + i])
        for i in range(2 * models):
            found[first // given.grain, i] = _sum_of(lanes[i])


@_kernel
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


@_kernel
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
            _load(stored, code, i * width + start, one)
            into = out[i, start:stop]
            for j in range(size):
                into[j] = one[j] + acc[j] * scale
