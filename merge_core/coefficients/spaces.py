"""What a number of a search may be: in a range, even or logarithmic, any or whole; or one of some choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Value = float | int | str | bool
"""What is put into a recipe."""
_DIGITS = 12
"""Decimals of what is made by steps: 3 · 0.1 is 0.3."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `step` apart if it is given, else any, or so many `points` evenly.

    `log`: what counts is their ratio. `integer`: whole ones.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    integer: bool = False
    points: int = 11

    def grid(self) -> Sequence[Value]:
        """The numbers of a grid, in order, both ends among them where steps lead there.

        >>> Range(0, 0.3, step=0.1).grid()
        [0.0, 0.1, 0.2, 0.3]
        >>> Range(1, 100, log=True, points=3).grid()
        [1.0, 10.0, 100.0]
        """
        step = self.step or (1 if self.integer and not self.log else None)
        if step is not None:
            count = math.floor((self.high - self.low) / step + 1e-9) + 1
            found = [self.low + i * step for i in range(count)]
        elif self.low == self.high:
            found = [self.low]
        else:
            shares = [i / (self.points - 1) for i in range(self.points)]
            if self.log:
                found = [math.exp((1 - t) * math.log(self.low) + t * math.log(self.high)) for t in shares]
            else:
                found = [(1 - t) * self.low + t * self.high for t in shares]
        numbers: list[Value] = [round(each) if self.integer else round(float(each), _DIGITS) for each in found]
        return list(dict.fromkeys(numbers))

    @property
    def ends(self) -> Sequence[Value]:
        """The least and the most."""
        found: list[Value] = [int(end) if self.integer else float(end) for end in (self.low, self.high)]
        return list(dict.fromkeys(found))

    def holds(self, value: object) -> bool:
        """Whether a value may be among them."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.integer and value != int(value):
            return False
        step = self.step or (1 if self.integer else None)
        return step is None or self.log or abs(math.remainder(value - self.low, step)) < 1e-9


@dataclass(frozen=True)
class Choices:
    """One of some values, between which there is no order."""

    values: tuple[Value, ...]

    def grid(self) -> Sequence[Value]:
        return list(self.values)

    @property
    def ends(self) -> Sequence[Value]:
        return list(self.values)

    def holds(self, value: object) -> bool:
        return any(value == each and type(value) is type(each) for each in self.values)


Space = Range | Choices
