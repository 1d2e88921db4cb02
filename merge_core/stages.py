"""The measurements that methods share: exact ranks in two radix passes, L1 norms, Gram matrices, sign votes.

A non-negative float32 has the order of its bits, so a histogram of the high 16 bits and one of the low 16 bits inside a
single bucket give the exact k-th value of any number of elements in bounded memory, ties counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from merge_core.method import Block, Known, Stage
from merge_core.statistics import Counts, GrainCounts, GrainSums, Statistic

Score = Callable[[Block], Tensor]
Keep = Callable[[int, int], int]
Mask = Callable[[Block, Known], Tensor]
_HIGH_DIGITS = 2**15
_LOW_DIGITS = 2**16


def magnitude(block: Block) -> Tensor:
    """|δᵢ| in float32, the score of TIES."""
    return block.deltas.abs().to(torch.float32)


def largest(score: Score, keep: Keep, *, cut_ties: bool) -> list[Stage]:
    """Stages after which `kept` tells which entries are among the largest scores of each model.

    `keep(model, entries)` says how many to keep of so many. With `cut_ties` it is exactly that many, the lowest element
    indices of equal scores first; without, every score equal to the smallest kept one is kept as well.
    """
    digits: list[Stage] = [HighDigits(score, keep), LowDigits(score)]
    return [*digits, TieCut(score)] if cut_ties else digits


def kept(score: Tensor, block: Block, known: Known) -> Tensor:
    """Which entries are among the largest: bool, `[models, rows, ...]`."""
    threshold = torch.tensor(known["threshold"], dtype=torch.float32).reshape(-1, *[1] * (score.ndim - 1))
    mask = (score >= threshold) | score.isnan()
    if "equals_before" not in known:
        return mask
    before = known["equals_before"][block.tensor][str(block.first_grain)]
    for model, allowed in enumerate(known["ties_kept"]):
        equal = score[model] == threshold[model]
        rank = torch.cumsum(equal.flatten(), 0).reshape(equal.shape) + before[model]
        mask[model] &= ~equal | (rank <= allowed)
    return mask


def _bits(score: Tensor) -> Tensor:
    return score.reshape(len(score), -1).view(torch.int32)


@dataclass
class HighDigits(Stage):
    """Which bucket of the high 16 bits holds the k-th largest score of each model."""

    score: Score
    keep: Keep
    name: ClassVar[str] = "ranks, high digits"

    def observe(self, block: Block, known: Known) -> dict[str, Statistic]:
        return {"digits": _histogram(_bits(self.score(block)) >> 16, _HIGH_DIGITS)}

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        histograms = cast(Counts, found["digits"]).values
        entries = int(histograms[0].sum())
        known["entries"] = entries
        known["wanted"] = [min(self.keep(model, entries), entries) for model in range(len(histograms))]
        known["bucket"], known["left"] = _descend(histograms, known["wanted"])


@dataclass
class LowDigits(Stage):
    """The k-th largest score itself, and how many of its equals are among the k."""

    score: Score
    name: ClassVar[str] = "ranks, low digits"

    def observe(self, block: Block, known: Known) -> dict[str, Statistic]:
        bits = _bits(self.score(block))
        inside = [row[row >> 16 == bucket] & 0xFFFF for row, bucket in zip(bits, known["bucket"], strict=True)]
        return {"digits": _histogram(inside, _LOW_DIGITS)}

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        histograms = cast(Counts, found["digits"]).values
        low, known["ties_kept"] = _descend(histograms, known["left"])
        known["ties"] = [int(histogram[digit]) for histogram, digit in zip(histograms, low, strict=True)]
        bits = np.array(known["bucket"], np.int64) << 16 | np.array(low, np.int64)
        known["threshold"] = bits.astype(np.int32).view(np.float32).astype(np.float64).tolist()


@dataclass
class TieCut(Stage):
    """How many scores equal to the threshold come before each grain, where some of them must go."""

    score: Score
    name: ClassVar[str] = "ties at the threshold"

    def needed(self, known: Known) -> bool:
        return any(kept < all_ for kept, all_ in zip(known["ties_kept"], known["ties"], strict=True))

    def observe(self, block: Block, known: Known) -> dict[str, Statistic]:
        score = self.score(block).reshape(len(block.models), -1)
        equal = score == torch.tensor(known["threshold"], dtype=torch.float32).unsqueeze(1)
        per_grain = torch.split(equal, block.grains.size * block.grains.width, dim=1)
        counts = {(block.tensor, block.first_grain + i): part.sum(dim=1).tolist() for i, part in enumerate(per_grain)}
        return {"equals": GrainCounts(counts)}

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        before = cast(GrainCounts, found["equals"]).before()
        # JSON has only text keys, and what is known must be the same before and after it crosses workers.
        known["equals_before"] = {
            name: {str(grain): count for grain, count in counts.items()} for name, counts in before.items()
        }


@dataclass
class L1Norms(Stage):
    """How much of each model's |δ| a mask leaves: `known["rescale"]` is ‖δ‖₁ / ‖δ ⊙ m‖₁, 1 where nothing is left."""

    mask: Mask
    name: ClassVar[str] = "L1 norms"

    def observe(self, block: Block, known: Known) -> dict[str, Statistic]:
        size = block.deltas.abs().reshape(len(block.models), -1)
        left = torch.where(self.mask(block, known).reshape(size.shape), size, torch.zeros_like(size))
        return {"whole": block.sums(size), "left": block.sums(left)}

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        whole, left = (cast(GrainSums, found[name]).total() for name in ("whole", "left"))
        known["rescale"] = [a / b if b > 0 else 1.0 for a, b in zip(whole, left, strict=True)]


@dataclass
class SquaredNorms(Stage):
    """`known["squares"]`: the sum of the squares of each model's vector."""

    vectors: Callable[[Block, Known], Tensor]
    name: ClassVar[str] = "squared norms"

    def observe(self, block: Block, known: Known) -> dict[str, Statistic]:
        vectors = self.vectors(block, known).to(torch.float64).reshape(len(block.models), -1)
        return {"squares": block.sums(vectors * vectors)}

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["squares"] = list(cast(GrainSums, found["squares"]).total())


class Gram(Stage):
    """`known["gram"]`: all inner products of the base (first) and the models, float64."""

    name: ClassVar[str] = "Gram matrix"

    def observe(self, block: Block, known: Known) -> dict[str, Statistic]:
        rows = ([] if block.base is None else [block.base]) + list(block.models)
        flat = [row.reshape(-1).to(torch.float64) for row in rows]
        products = torch.stack([flat[i] * flat[j] for i, j in _pairs(len(flat))])
        return {"products": block.sums(products)}

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        products = cast(GrainSums, found["products"]).total()
        count = int((2 * len(products)) ** 0.5)
        gram: list[list[float]] = [[0.0] * count for _ in range(count)]
        for (i, j), product in zip(_pairs(count), products, strict=True):
            gram[i][j] = gram[j][i] = product
        known["gram"] = gram


@dataclass
class SignVotes(Stage):
    """`known["majority"]`: the sign (−1, 0, 1) that most elements of an elected sign tensor have."""

    elect: Callable[[Block, Known], Tensor]
    name: ClassVar[str] = "sign votes"

    def observe(self, block: Block, known: Known) -> dict[str, Statistic]:
        sign = self.elect(block, known)
        return {"votes": Counts(np.array([int((sign > 0).sum()) - int((sign < 0).sum())], np.int64))}

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["majority"] = int(np.sign(cast(Counts, found["votes"]).values[0]))


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def _histogram(digits: Sequence[Tensor] | Tensor, size: int) -> Counts:
    return Counts(torch.stack([torch.bincount(row, minlength=size) for row in digits]).numpy())


def _descend(histograms: Any, wanted: Sequence[int]) -> tuple[list[int], list[int]]:
    """Per model: the bucket that holds the wanted-th largest, and how many of that bucket are wanted."""
    buckets, left = [], []
    for histogram, rank in zip(histograms, wanted, strict=True):
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, max(rank, 1)))
        above = int(from_top[place - 1]) if place else 0
        buckets.append(len(histogram) - 1 - place)
        left.append(rank - above)
    return buckets, left
