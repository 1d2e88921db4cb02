"""What a sample may save: a value of a given rank is found in one pass where the sample tells about where it is.

`stages.py` and `order.py` both sample first, look closely into a bracket of high digits, and make the passes over all
digits only where the sample misled.
"""

from __future__ import annotations

from merge_core import kernels
from merge_core.method import Block, Stage

BRACKET = 4
"""Values of the high digits that are looked into at most."""
FEWEST_SAMPLES = 2**14
"""Where there are fewer, all are counted."""
_MANY = 2**22
"""Elements of a tensor from which on fewer of them are sampled."""


def sampled_every(block: Block) -> int:
    """One in so many runs of a tensor's elements is sampled."""
    return 8 if block.grains.rows * block.grains.width < _MANY else 32


class AtOnce(Stage):
    """Part of finding a value in one pass, which only compiled kernels are quick enough for."""

    @property
    def expected(self) -> bool:
        return kernels.are_compiled()


class AfterAll(Stage):
    """Part of finding it in several, which compiled kernels do only where the sample misled."""

    @property
    def expected(self) -> bool:
        return not kernels.are_compiled()
