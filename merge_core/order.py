"""Stages for the exact values at given places of the sorted scores, signed ones too, several at once, ties counted.

Two histograms, one of the high 16 bits of the scores' keys and one of the low 16 bits inside the buckets found, give
the value at any place in bounded memory. A sample first tells about where it will be; then one pass usually finds it,
and the two are made only where the sample misled. `stages.py` does the same for the one rank that trimming needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from merge_core import kernels
from merge_core.kernels.scores import (
    DIGITS,
    Brackets,
    Scores,
    bracket_order,
    high_order,
    low_order,
    sampled_order,
    value_of,
)
from merge_core.method import Block, Known, Stage
from merge_core.sampling import BRACKET, FEWEST_SAMPLES, AfterAll, AtOnce, sampled_every
from merge_core.statistics import Counters, Counts, Largest, Statistic, counted

Scored = Callable[[Block, Known], Scores]
Places = Callable[[int, int], Sequence[int]]
_VAGUE = 16
"""Where the sample leaves more of them open, the bracket would likely miss."""


def order(name: str, scored: Scored, places: Places) -> list[Stage]:
    """Stages after which `known[name]` tells of each score

    - `values`, `below`, `equal`: what is at each of the places, how many scores are less, how many are equal,
    - `nonzero`, `largest`: how many are not 0, and the largest.

    `places(entries, nonzero)` are counted from 0 in ascending order, of so many entries.
    """
    return [
        Sampled(name, scored, places),
        Bracketed(name, scored, places),
        HighDigits(name, scored, places),
        LowDigits(name, scored),
    ]


@dataclass
class _Order(Stage):
    key: str
    scored: Scored

    def needed(self, known: Known) -> bool:
        return self.key not in known

    def _observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> tuple[Scores, tuple[Counters, ...]]:
        """The scores of a block, and where what is noted of all of them is counted."""
        scores = self.scored(block, known)
        counted(found, "entries", (1,)).values += block.elements
        if "largest" not in found:
            found["largest"] = Largest(np.zeros(len(scores), np.int64))
        return scores, (counted(found, "nonzero", (len(scores),)).values, cast(Largest, found["largest"]).values)

    def _guess(self) -> str:
        return f"{self.key}, guess"


@dataclass
class Sampled(AtOnce, _Order):
    """About where the values are: a bracket of high digits for each, or nothing where it would be too wide."""

    places: Places
    name: ClassVar[str] = "order, sample"
    reads: ClassVar[float] = 1 / 16

    def needed(self, known: Known) -> bool:
        return kernels.are_compiled()

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        scores = self.scored(block, known)
        sampled_order(scores, sampled_every(block), counted(found, "digits", (len(scores), DIGITS)).values)

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        histograms = cast(Counts, found["digits"]).values
        entries = int(histograms[0].sum())
        if entries < FEWEST_SAMPLES:
            return
        guess = [self._brackets(histogram, entries) for histogram in histograms]
        if all(high - low <= _VAGUE for its in guess for low, high, _ in its):
            half = BRACKET // 2
            known[self._guess()] = [
                [[max(low, middle - half), min(high, middle + half), middle] for low, high, middle in its]
                for its in guess
            ]

    def _brackets(self, histogram: Counters, entries: int) -> list[list[int]]:
        many = 2**40
        nonzero = many - int(histogram[DIGITS // 2]) * many // entries
        upto = np.cumsum(histogram)
        brackets = []
        for place in self.places(many, nonzero):
            share = min(1.0, max(0.0, place / many))
            margin = 16 + 3 * (8 * entries * share * (1 - share)) ** 0.5
            ranks = [min(max(share * entries + sign * margin, 1), entries) for sign in (-1, 0, 1)]
            low, middle, high = (int(np.searchsorted(upto, rank)) for rank in ranks)
            brackets.append([low, high + 1, middle])
        return brackets


@dataclass
class Bracketed(AtOnce, _Order):
    """The values, if they are where the sample said."""

    places: Places
    name: ClassVar[str] = "order"

    @property
    def space(self) -> int:
        return 3 * BRACKET * DIGITS * 8

    def needed(self, known: Known) -> bool:
        return self._guess() in known

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        scores, noted = self._observe(block, known, found)
        guess = known[self._guess()]
        lows, highs, candidates = (tuple([bracket[side] for bracket in its] for its in guess) for side in range(3))
        width = DIGITS * max(high - low for its in guess for low, high, _ in its)
        shape = (len(scores), len(guess[0]))
        bracket_order(
            scores,
            Brackets(lows, highs, candidates),
            counted(found, "digits", (*shape, width)).values,
            counted(found, "below", shape).values,
            *noted,
        )

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        guess, noted = known.pop(self._guess()), _noted(found)
        histograms, below = (cast(Counts, found[name]).values for name in ("digits", "below"))
        told: dict[str, list[list[Any]]] = {"values": [], "below": [], "equal": []}
        for i, nonzero in enumerate(noted["nonzero"]):
            rows: list[tuple[float, int, int]] = []
            for number, place in enumerate(self.places(noted["entries"], nonzero)):
                inside = place - int(below[i, number])
                if not 0 <= inside < int(histograms[i, number].sum()):
                    return  # the sample misled
                digit, less, equal = _descend(histograms[i, number], inside)
                key = (guess[i][number][0] << 16) + digit
                rows.append((value_of(key), int(below[i, number]) + less, equal))
            _tell(told, rows)
        known[self.key] = noted | told


@dataclass
class HighDigits(AfterAll, _Order):
    """Which bucket of the high 16 bits holds each of the values."""

    places: Places
    name: ClassVar[str] = "order, high digits"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        scores, noted = self._observe(block, known, found)
        high_order(scores, counted(found, "digits", (len(scores), DIGITS)).values, *noted)

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        noted = _noted(found)
        histograms = cast(Counts, found["digits"]).values
        buckets = []
        for histogram, nonzero in zip(histograms, noted["nonzero"], strict=True):
            places = self.places(noted["entries"], nonzero)
            buckets.append([[*_descend(histogram, place)[:2], place] for place in places])
        known[self._guess()] = {"noted": noted, "buckets": buckets}


@dataclass
class LowDigits(AfterAll, _Order):
    """The values themselves."""

    name: ClassVar[str] = "order, low digits"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        scores = self.scored(block, known)
        buckets = [[bucket for bucket, _, _ in its] for its in known[self._guess()]["buckets"]]
        low_order(scores, buckets, counted(found, "digits", (len(scores), len(buckets[0]), DIGITS)).values)

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        guess = known.pop(self._guess())
        told: dict[str, list[list[Any]]] = {"values": [], "below": [], "equal": []}
        for buckets, histograms in zip(guess["buckets"], cast(Counts, found["digits"]).values, strict=True):
            rows = []
            for (bucket, below, place), histogram in zip(buckets, histograms, strict=True):
                digit, less, equal = _descend(histogram, place - below)
                rows.append((value_of((bucket << 16) + digit), below + less, equal))
            _tell(told, rows)
        known[self.key] = guess["noted"] | told


def _noted(found: Mapping[str, Statistic]) -> dict[str, Any]:
    return {
        "entries": int(cast(Counts, found["entries"]).values[0]),
        "nonzero": cast(Counts, found["nonzero"]).values.tolist(),
        "largest": [value_of(int(key)) for key in cast(Largest, found["largest"]).values],
    }


def _tell(told: dict[str, list[list[Any]]], rows: Sequence[tuple[float, int, int]]) -> None:
    for name, column in zip(told, zip(*rows, strict=True), strict=True):
        told[name].append(list(column))


def _descend(histogram: Counters, place: int) -> tuple[int, int, int]:
    """The value at a place of those counted, how many are less, and how many equal it."""
    upto = np.cumsum(histogram)
    value = int(np.searchsorted(upto, place, side="right"))
    return value, int(upto[value - 1]) if value else 0, int(histogram[value])
