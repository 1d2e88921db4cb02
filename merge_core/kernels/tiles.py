"""One tile of stored rows, small enough for the first-level cache: read, widened, rounded, and random numbers for it.

Rows come as places and format codes, because the models of one merge may be stored in different formats: bfloat16,
float16 and float32 are widened as a tile is loaded and rounded once, half to even, as it is stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from merge_core.kernels.arguments import PAGE, Array, Places

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
TILE = 2048
LANES = 1024
LOW_STREAM = 1
"""The random stream of the low 16 bits; the high 8 come from stream 0 (see `merge_core/random.py`)."""

part = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""What kernels are made of. Nothing of Python is compiled into it: machine code is kept and loaded without numba."""

_pread = types.ExternalFunction("pread", types.int64(types.int32, types.voidptr, types.uint64, types.int64))


@intrinsic  # type: ignore[misc]
def pointer(context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


@intrinsic  # type: ignore[misc]
def bits_of(context: Any, number: Any) -> Any:
    """The bits of a float32 number."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), code


@intrinsic  # type: ignore[misc]
def float_of(context: Any, bits: Any) -> Any:
    """The float32 number with these bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), code


@intrinsic  # type: ignore[misc]
def add_product(context: Any, one: Any, other: Any, total: Any) -> Any:
    """total + one · other, rounded once, in float64: of float32 numbers the product is exact anyway."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), code


@part
def magnitude_of(value: float) -> int:
    """The bits of |value|, which have the order of the magnitudes; those of NaN come after all others."""
    return np.uint32(bits_of(value) & np.uint32(0x7FFFFFFF))


@part
def widened(short: int) -> float:
    """The float32 number that a bfloat16's bits stand for."""
    return float_of(np.uint32(np.uint32(short) << np.uint32(16)))


@part
def load(address: int, code: int, start: int, out: Array) -> None:
    """Widen stored numbers to float32."""
    count = out.size
    if code == BFLOAT16:
        short = carray(pointer(address + 2 * start), count, np.uint16)
        for j in range(count):
            out[j] = widened(short[j])
    elif code == FLOAT16:
        short = carray(pointer(address + 2 * start), count, np.uint16)
        for j in range(count):
            magnitude = np.uint32(short[j] & np.uint16(0x7FFF))
            sign = np.uint32(np.uint32(short[j] & np.uint16(0x8000)) << np.uint32(16))
            shifted = np.uint32(magnitude << np.uint32(13))
            # The exponents' biases differ by 112; the product is exact, and makes subnormals normal.
            finite = bits_of(float_of(shifted) * np.float32(2.0**112))
            special = np.uint32(shifted | np.uint32(0x7F800000))
            out[j] = float_of(np.uint32((special if magnitude >= np.uint32(0x7C00) else finite) | sign))
    else:
        single = carray(pointer(address + 4 * start), count, np.float32)
        for j in range(count):
            out[j] = single[j]


@part
def load_less(address: int, code: int, start: int, base: Array, out: Array) -> None:
    """The same, less others."""
    if code == BFLOAT16:
        short = carray(pointer(address + 2 * start), out.size, np.uint16)
        for j in range(out.size):
            out[j] = widened(short[j]) - base[j]
    else:
        load(address, code, start, out)
        for j in range(out.size):
            out[j] -= base[j]


@part
def load_distance(address: int, code: int, base: int, base_code: int, start: int, spare: Array, out: Array) -> None:
    """How far stored numbers are from others."""
    if code == BFLOAT16 and base_code == BFLOAT16:
        short = carray(pointer(address + 2 * start), out.size, np.uint16)
        other = carray(pointer(base + 2 * start), out.size, np.uint16)
        for j in range(out.size):
            mine = widened(short[j])
            out[j] = abs(mine - widened(other[j]))
    else:
        load(base, base_code, start, spare)
        load_less(address, code, start, spare, out)
        make_positive(out)


@part
def make_positive(values: Array) -> None:
    """|values|"""
    for j in range(values.size):
        values[j] = abs(values[j])


@part
def add_times(address: int, code: int, start: int, factor: float, total: Array, spare: Array) -> None:
    """Add stored numbers times a factor."""
    if code == BFLOAT16:
        short = carray(pointer(address + 2 * start), total.size, np.uint16)
        for j in range(total.size):
            total[j] += widened(short[j]) * factor
    else:
        load(address, code, start, spare)
        for j in range(total.size):
            total[j] += spare[j] * factor


@part
def add_scaled(address: int, code: int, start: int, base: Array, factor: float, total: Array, spare: Array) -> None:
    """Add stored numbers less others, times a factor."""
    if code == BFLOAT16:
        short = carray(pointer(address + 2 * start), total.size, np.uint16)
        for j in range(total.size):
            total[j] += (widened(short[j]) - base[j]) * factor
    else:
        load(address, code, start, spare)
        for j in range(total.size):
            total[j] += (spare[j] - base[j]) * factor


@part
def add_kept(
    address: int, code: int, start: int, base: Array, keep: Array, factor: float, total: Array, spare: Array
) -> None:
    """The same, of those that are kept."""
    if code == BFLOAT16:
        short = carray(pointer(address + 2 * start), total.size, np.uint16)
        for j in range(total.size):
            mine = widened(short[j])
            total[j] += masked(mine - base[j], keep[j]) * factor
    else:
        load(address, code, start, spare)
        for j in range(total.size):
            total[j] += masked(spare[j] - base[j], keep[j]) * factor


@part
def store(values: Array, address: int, code: int, start: int) -> None:
    """Round float32 to the stored format, half to even; NaN becomes the one quiet NaN."""
    count = values.size
    if code == BFLOAT16:
        short = carray(pointer(address + 2 * start), count, np.uint16)
        for j in range(count):
            bits = bits_of(values[j])
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            is_nan = magnitude_of(values[j]) > np.uint32(0x7F800000)
            short[j] = np.uint16(0x7FC0) if is_nan else rounded
    elif code == FLOAT16:
        short = carray(pointer(address + 2 * start), count, np.uint16)
        for j in range(count):
            bits = bits_of(values[j])
            sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
            # Rebias the exponent by −112 and round the 13 bits that go; a carry may make infinity, as it should.
            normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
            # Adding one half leaves the bits of a subnormal at the end of the sum, rounded by the addition.
            small = np.uint32(bits_of(float_of(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000))
            half = small if magnitude < np.uint32(0x38800000) else normal
            half = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else half
            is_nan = magnitude > np.uint32(0x7F800000)
            short[j] = np.uint16(0x7E00) if is_nan else np.uint16(half | sign)
    else:
        single = carray(pointer(address + 4 * start), count, np.float32)
        for j in range(count):
            single[j] = values[j] if values[j] == values[j] else np.float32(np.nan)


@part
def first_nonfinite(address: int, code: int, count: int) -> int:
    """The first NaN or infinity among stored numbers, −1 if there is none."""
    if code == FLOAT32:
        words = carray(pointer(address), count, np.uint32)
        for start in range(0, count, TILE):
            # Of indices that do not begin at 0 numba asks whether they are negative, which is ten times slower.
            word = words[start : min(start + TILE, count)]
            largest = np.uint32(0)
            for j in range(word.size):
                largest = max(largest, np.uint32(word[j] & np.uint32(0x7FFFFFFF)))
            if largest >= np.uint32(0x7F800000):
                for j in range(word.size):
                    if np.uint32(word[j] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000):
                        return start + j
        return -1
    shorts = carray(pointer(address), count, np.uint16)
    limit = np.uint16(0x7F80 if code == BFLOAT16 else 0x7C00)
    for start in range(0, count, TILE):
        short = shorts[start : min(start + TILE, count)]
        most = np.uint16(0)
        for j in range(short.size):
            most = max(most, np.uint16(short[j] & np.uint16(0x7FFF)))
        if most >= limit:
            for j in range(short.size):
                if np.uint16(short[j] & np.uint16(0x7FFF)) >= limit:
                    return start + j
    return -1


@part
def size_of(code: int) -> int:
    """Bytes of a stored number."""
    return 4 if code == FLOAT32 else 2


@part
def window(places: Places, first: int, count: int, addresses: Array) -> bool:
    """Bring a run of elements of every source into memory, `addresses` saying where; False if one was refused.

    A grain fits into the second-level cache, so that what is read is still there when it is used. It lies as far behind
    a page's begin as it does in its file: where it is a few bytes further, processors copy five times slower.
    """
    for i in range(len(places.codes)):
        size = count * size_of(places.codes[i])
        begin = places.offsets[i] + first * size_of(places.codes[i])
        if places.descriptors[i] < 0:
            addresses[i] = begin
        else:
            addresses[i] = places.space[i].ctypes.data + begin % PAGE
            done = 0
            while done < size:
                here = _pread(
                    np.int32(places.descriptors[i]), pointer(addresses[i] + done), np.uint64(size - done), begin + done
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


@part
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


@part
def low_bits(key: int, element: int, words: Array) -> int:
    """The low 16 of the 24 bits of one random number."""
    philox(key, LOW_STREAM, element // 8, words)
    half = element % 8
    return np.int64(np.uint32(words[half // 2] >> np.uint32(16 * (half % 2))) & np.uint32(0xFFFF))


@part
def masked(value: float, keep: int) -> float:
    """The value where `keep` is 1, +0 where it is 0; in bits, because a branch would keep loops from being vector
    code.
    """
    return float_of(np.uint32(bits_of(value) & np.uint32(np.uint32(0) - np.uint32(keep))))


@part
def drop(values: Array, keep: Array) -> None:
    """0 where `keep` is 0."""
    for j in range(values.size):
        values[j] = masked(values[j], keep[j])


@part
def survive(key: int, below: int, start: int, words: Array, keep: Array) -> None:
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
                    keep[j] = np.uint8(low_bits(key, start + j, spare) >= low)


@part
def pack(keep: Array, marks: Array) -> None:
    """Put ones and zeros into bits: bit b of byte i is that of the element b · bytes + i."""
    width = marks.size
    marks[:] = 0
    for bit in range(8):
        run, mask = keep[bit * width : (bit + 1) * width], np.uint8(1 << bit)
        for i in range(run.size):
            marks[i] |= np.uint8(np.uint8(0) - run[i]) & mask


@part
def unpack(marks: Array, keep: Array) -> None:
    """Take them out again."""
    width = marks.size
    for bit in range(8):
        run, mask = keep[bit * width : (bit + 1) * width], np.uint8(1 << bit)
        for i in range(run.size):
            run[i] = np.uint8(np.uint8(marks[i] & mask) != np.uint8(0))


@part
def copy(values: Array, out: Array) -> None:
    """`out[:] = values`, which would bring in what Python needs to refuse other sizes."""
    for j in range(out.size):
        out[j] = values[j]


@part
def sum_of(lanes: Array) -> float:
    """The sum of all lanes, the second half being added to the first until one is left."""
    half = lanes.size // 2
    while half:
        first, second = lanes[:half], lanes[half:]
        for j in range(half):
            first[j] += second[j]
        half //= 2
    return lanes[0]
