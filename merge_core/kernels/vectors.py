"""What kernels work on: stored rows, and task vectors with what is to be done to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

Numbers = tuple[float, ...]
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


class Draws(Protocol):
    """Where random numbers come from."""

    def uniform(self, tensor: str, model: int, start: int, count: int, device: torch.device) -> Tensor:
        """`[count]`, float32, in [0, 1), for the element indices from `start`."""

    def key(self, tensor: str, model: int) -> int | None:
        """The key of the random stream; None where the numbers come from elsewhere."""


@dataclass(frozen=True)
class TaskVectors:
    """δᵢ = θᵢ − θ₀ of a block of one tensor, and what is done to each: drop, divide, trim, multiply.

    Nothing is read or computed before a kernel asks; arithmetic is in `working` (float32 or float64). `start` is the
    first element's index in its tensor, `grain` the elements of a grain. `out`, if given, is where kernels may put a
    merged block, rounded to its dtype. One number per model in each of the others:

    - `drop_rates`: elements whose random number is less become 0,
    - `divisors`: then everything is divided,
    - `thresholds`: then magnitudes below become 0 (NaN never does); of those that equal it, the ones from the element
      `ties[i][0]` of this block on are kept only until there were `ties[i][1]`,
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
    divisors: Numbers | None = None
    thresholds: Numbers | None = None
    ties: tuple[tuple[int, int], ...] | None = None
    factors: tuple[Numbers, ...] = ()

    def __len__(self) -> int:
        return len(self.models)

    @property
    def elements(self) -> int:
        return self.base.elements

    def dropped(self, rates: Numbers) -> Self:
        """Drop each entry with the probability of its model."""
        return replace(self, drop_rates=self._spread(rates)) if any(rates) else self

    def divided(self, divisors: Numbers) -> Self:
        return replace(self, divisors=self._spread(divisors))

    def trimmed(self, thresholds: Numbers, ties: tuple[tuple[int, int], ...] | None = None) -> Self:
        """Keep what reaches its model's threshold; of the ties all, or those that `ties` allows."""
        return replace(self, thresholds=self._spread(thresholds), ties=ties)

    def times(self, factors: Numbers) -> Self:
        return replace(self, factors=(*self.factors, self._spread(factors)))

    def _spread(self, values: Numbers) -> Numbers:
        return tuple(values) if len(values) == len(self.models) else tuple(values) * len(self.models)
