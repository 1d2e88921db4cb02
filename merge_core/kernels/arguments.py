"""What compiled kernels are called with."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]
PAGE = 4096


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
    marks: Array  # uint8, [grains, models, bytes], a bit per element: what is kept; empty if not remembered
    has_marks: bool  # whether they are found already, or to be found
    divisors: Array  # float32
    thresholds: Array  # float32; negative: nothing is trimmed
    ceilings: Array  # float32; negative: nothing is cut off
    ties_from: Array  # int64, [2, models], element of the block; ties at the threshold or ceiling count before it
    ties_left: Array  # int64, [2, models], how many from there on
    factors: Array  # float32, [models, factors]


class Score(NamedTuple):
    """`Scores` as plain numbers."""

    kind: int
    live: Array  # uint8 per model; 0: it takes no part
    lows: Array  # float32 per model: magnitudes are clamped from here
    highs: Array  # float32 per model: to here
    count: Any  # float32, of the models that take part
    divergences: Array  # float32 per row of the block
    width: int  # elements of such a row
