"""exp and tanh in + − × ÷ and comparisons, so that they have the same bits on every machine.

The compiled form (`compiled_scores.py`) does the same operations in the same order. Those of float32 are within 2 units
in the last place of the true value.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor


def _single(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


LOG2_E = _single(1.4426950408889634)
LN2_HIGH = 0.693359375
"""ln 2 to 9 bits, so that its product with a small integer is exact."""
LN2_LOW = _single(-2.1219444005469057e-4)
ROUNDER = 12582912.0
"""1.5 · 2²³: added to a small number it leaves the nearest integer in the last bits of the sum."""
EXP = tuple(map(_single, (0.5, 0.16666667163372040, 0.04166646301746368, 0.00833331048488617, 0.0013933731243014336)))
EXP_LAST = _single(0.000198910798644647)
LEAST_EXPONENT = -87.0
"""Below, exp is 0."""
TANH = tuple(
    map(
        _single,
        (
            -0.3333333432674408,
            0.13333304226398468,
            -0.053959257900714874,
            0.02176891826093197,
            -0.008343945257365704,
            0.002292744815349579,
        ),
    )
)
LOG2_E_DOUBLE = 1.4426950408889634
LN2_HIGH_DOUBLE = float.fromhex("0x1.62e42fefa0000p-1")
"""ln 2 to 37 bits."""
LN2_LOW_DOUBLE = float.fromhex("0x1.cf79abc9e3b3ap-40")
ROUNDER_DOUBLE = 6755399441055744.0
"""1.5 · 2⁵²."""
EXP_DOUBLE = tuple(1 / math.factorial(power) for power in range(12))
LEAST_EXPONENT_DOUBLE = -708.0
SMALL = 0.625
"""Below, tanh is a polynomial; above, it is made of exp."""
MOST = 10.0
"""From here on tanh is 1 in float32."""


def exp(x: Tensor) -> Tensor:
    """e to the x, for x up to 88; 0 below −87.

    >>> exp(torch.tensor([0.0, 1.0, -100.0]))
    tensor([1.0000, 2.7183, 0.0000])
    """
    shifted = x * LOG2_E + ROUNDER
    whole = shifted - ROUNDER
    rest = (x - whole * LN2_HIGH) - whole * LN2_LOW
    series = torch.full_like(rest, EXP_LAST)
    for coefficient in reversed(EXP):
        series = series * rest + coefficient
    fraction = rest * rest * series + rest + 1.0
    power = ((shifted.view(torch.int32) << 23) + 0x3F800000).view(torch.float32)
    return torch.where(x < LEAST_EXPONENT, torch.zeros_like(x), fraction * power)


def exp_double(x: Tensor) -> Tensor:
    """e to the x in float64, to 14 digits, for x up to 0; 0 below −708.

    >>> exp_double(torch.tensor([0.0, -1.0], dtype=torch.float64))
    tensor([1.0000, 0.3679], dtype=torch.float64)
    """
    shifted = x * LOG2_E_DOUBLE + ROUNDER_DOUBLE
    whole = shifted - ROUNDER_DOUBLE
    rest = (x - whole * LN2_HIGH_DOUBLE) - whole * LN2_LOW_DOUBLE
    series = torch.full_like(rest, EXP_DOUBLE[-1])
    for coefficient in reversed(EXP_DOUBLE[:-1]):
        series = series * rest + coefficient
    power = ((shifted.view(torch.int64) << 52) + 0x3FF0000000000000).view(torch.float64)
    return torch.where(x < LEAST_EXPONENT_DOUBLE, torch.zeros_like(x), series * power)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent.

    >>> tanh(torch.tensor([0.0, 0.5, -20.0]))
    tensor([ 0.0000,  0.4621, -1.0000])
    """
    size, square = x.abs(), x * x
    series = torch.full_like(x, TANH[-1])
    for coefficient in reversed(TANH[:-1]):
        series = series * square + coefficient
    small = series * square * x + x
    power = exp(torch.where(size > MOST, torch.full_like(size, MOST), size) * 2.0)
    large = 1.0 - torch.full_like(power, 2.0) / (power + 1.0)
    return torch.where(size < SMALL, small, torch.where(x < 0, -large, large))
