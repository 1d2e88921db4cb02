"""Arithmetic that methods share. Sums over models are written out in recipe order, so that their bits never vary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ZERO_SUM = 1e-8
"""A sum of weights nearer to zero than this divides nothing: mergekit puts 1 in its place."""


def total(stack: Tensor) -> Tensor:
    """Sum over the first dimension, one after the other: `[models, ...]` → `[...]`.

    >>> total(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([4., 6.])
    """
    result = stack[0].clone()
    for row in stack[1:]:
        result += row
    return result


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number per model, shaped to multiply a `[models, ...]` stack."""
    return torch.tensor(values, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def elect_sign(deltas: Tensor) -> Tensor:
    """TIES sign election by mass, mergekit's tie rule: +1 where the deltas sum to ≥ 0, else −1.

    >>> elect_sign(torch.tensor([[3.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]))
    tensor([ 1., -1.,  1.])
    """
    return torch.where(total(deltas) >= 0, 1.0, -1.0).to(deltas.dtype)


def agreeing(deltas: Tensor, sign: Tensor) -> Tensor:
    """Where each delta has the elected sign (zeros never do, NaN always so that it is not hidden): `[models, ...]`."""
    return (torch.sign(deltas) == sign) | deltas.isnan()


def weighted_mean(weighted: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢδᵢ / Σ wᵢ elementwise; `weights` has 0 where an entry does not count, and a sum near zero divides by 1."""
    divisor = total(weights.expand_as(weighted))
    return total(weighted) / torch.where(divisor.abs() < ZERO_SUM, torch.ones_like(divisor), divisor)
