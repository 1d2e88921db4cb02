"""What kernels work on: stored rows, and task vectors with what is to be done to them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = tuple[float, ...]
Ties = tuple[tuple[int, int], ...]
KEEP_ALL_TIES = (2**62, 0)
KEEP_NO_TIES = (0, 0)
RUN_ELEMENTS = 2**19
"""Of a tensor that is read in runs of rows, the elements of one, or a row where that has more."""


@dataclass(frozen=True)
class Rows:
    """A run of rows of one source, as it is stored: in memory, or in a file until a kernel reads them.

    `load` gives them as a tensor. Rows in a file lie at `offset` of `descriptor`; whoever reads them there calls
    `refuse` with the first element that is NaN or infinite, if `checked` asks for that, or with −1 if the file ends.
    `read` gives some of them alone, where that can be had.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    descriptor: int = -1
    offset: int = 0
    checked: bool = False
    refuse: Callable[[int], None] = lambda element: None
    read: Callable[[slice], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Rows that are in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def run(self, rows: slice) -> Tensor:
        """Some of the rows, without the others in memory."""
        return self.load()[rows] if self.read is None else self.read(rows)


class Marks:
    """Which elements of a block are kept, from the pass that found it out to the one that needs it again.

    A bit per element and model, in so much `room` in bytes; what finds no room is found out again.
    """

    def __init__(self, room: int = 16 * 2**20) -> None:
        self._room = room
        self._kept: dict[Hashable, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def space(self, *shape: int) -> NDArray[np.uint8] | None:
        """An array to `put`; None where there is no room for it."""
        return np.empty(shape, np.uint8) if math.prod(shape) <= self._room else None

    def put(self, key: Hashable, marks: NDArray[np.uint8]) -> None:
        with self._lock:
            if key not in self._kept and marks.nbytes <= self._room:
                self._kept[key] = marks
                self._room -= marks.nbytes

    def take(self, key: Hashable) -> NDArray[np.uint8] | None:
        """The marks put there, once."""
        with self._lock:
            marks = self._kept.pop(key, None)
            self._room += 0 if marks is None else marks.nbytes
            return marks


class Draws(Protocol):
    """Where random numbers come from; `marks` is where what was drawn may be remembered."""

    marks: Marks

    def uniform(self, tensor: str, model: int, start: int, count: int, device: torch.device) -> Tensor:
        """`[count]`, float32, in [0, 1), for the element indices from `start`."""

    def key(self, tensor: str, model: int) -> int | None:
        """The key of the random stream; None where the numbers come from elsewhere."""


@dataclass(frozen=True, eq=False)
class RankRates:
    """How likely an element is dropped, by its place among its row's magnitudes: the largest has place 0, of equal ones
    the lowest index comes first.

    A row is `width` elements that lie `stride` apart in their tensor; `rates` is float32 `[models, width]`. Where all
    are 0 or 1, no random numbers are drawn.
    """

    rates: NDArray[np.float32]
    stride: int = 1

    @property
    def width(self) -> int:
        return len(self.rates[0])

    @cached_property
    def is_drawn(self) -> bool:
        return bool(((self.rates > 0) & (self.rates < 1)).any())

    @cached_property
    def below(self) -> NDArray[np.int32]:
        """The least random number that is not dropped, as a multiple of 2⁻²⁴."""
        return np.ceil(self.rates.astype(np.float64) * 2**24).astype(np.int32)


@dataclass(frozen=True)
class TaskVectors:
    """δᵢ = θᵢ − θ₀ of a block of one tensor, and what is done to each: drop, divide, trim, cut off, multiply.

    Nothing is read or computed before a kernel asks; arithmetic is in `working` (float32 or float64). `start` is the
    first element's index in its tensor, `grain` the elements of a grain. `out`, if given, is where kernels may put a
    merged block, rounded to its dtype. One number per model in each of the others:

    - `drop_rates`: elements whose random number is less become 0,
    - `rank_rates`: so they do by the rate of their place in their row,
    - `divisors`: then everything is divided,
    - `thresholds`: then magnitudes below become 0 (NaN never does); of those that equal it, the ones from the element
      `ties[i][0]` of this block on are kept only until there were `ties[i][1]`,
    - `ceilings`: then magnitudes above become 0 (NaN never does); of those that equal it, the ones before the element
      `ceiling_ties[i][0]` do, and from there on as many as `ceiling_ties[i][1]`,
    - `factors`: then everything is multiplied, by one after the other.
    """

    base: Rows
    models: tuple[Rows, ...]
    working: torch.dtype
    tensor: str = ""
    start: int = 0
    grain: int = 2**16
    draws: Draws | None = None
    out: Tensor | None = None
    drop_rates: Numbers | None = None
    rank_rates: RankRates | None = None
    divisors: Numbers | None = None
    thresholds: Numbers | None = None
    ties: Ties | None = None
    ceilings: Numbers | None = None
    ceiling_ties: Ties | None = None
    factors: tuple[Numbers, ...] = ()

    def __len__(self) -> int:
        return len(self.models)

    @property
    def elements(self) -> int:
        return self.base.elements

    def dropped(self, rates: Numbers) -> Self:
        """Drop each entry with the probability of its model."""
        return replace(self, drop_rates=self._spread(rates)) if any(rates) else self

    def dropped_by_rank(self, rates: RankRates) -> Self:
        """Drop each entry with the probability of its place in its row."""
        return replace(self, rank_rates=rates)

    def divided(self, divisors: Numbers) -> Self:
        return replace(self, divisors=self._spread(divisors))

    def trimmed(self, thresholds: Numbers, ties: Ties | None = None) -> Self:
        """Keep what reaches its model's threshold; of the ties all, or those that `ties` allows."""
        return replace(self, thresholds=self._spread(thresholds), ties=ties)

    def cut_off(self, ceilings: Numbers, ties: Ties | None = None) -> Self:
        """Leave out what reaches its model's ceiling; of the ties all, or those that `ties` says. No NaN is reached."""
        return replace(self, ceilings=self._spread(ceilings), ceiling_ties=ties)

    def times(self, factors: Numbers) -> Self:
        return replace(self, factors=(*self.factors, self._spread(factors)))

    def _spread(self, values: Numbers) -> Numbers:
        return tuple(values) if len(values) == len(self.models) else tuple(values) * len(self.models)
