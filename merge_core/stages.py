"""The measurements that methods share: exact ranks in two radix passes, L1 norms, Gram matrices, sign votes.

A non-negative float32 has the order of its bits, so a histogram of the high 16 bits and one of the low 16 bits inside a
single bucket give the exact k-th value of any number of elements in bounded memory, ties counted. A sample first tells
about where it will be; then one pass usually finds it, and the two are made only where the sample misled.

Ties are many: in bfloat16 checkpoints a quarter of all |δ| can equal the k-th. Where they are cut to exactly k, the
first tensor in name order and the lowest index in it go first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from merge_core import kernels
from merge_core.kernels.plain import pairs
from merge_core.kernels.vectors import KEEP_ALL_TIES, KEEP_NO_TIES, Numbers, TaskVectors
from merge_core.method import Block, Known, Scope, Stage
from merge_core.sampling import BRACKET, FEWEST_SAMPLES, AfterAll, AtOnce, sampled_every
from merge_core.statistics import Counters, Counts, GrainSums, Statistic, counted, grain_sums

Ranked = Callable[[Block], TaskVectors]
Keep = Callable[[int, int], int]
Measured = Callable[[Block, Known], TaskVectors]
_HIGH_DIGITS = 2**15
_LOW_DIGITS = 2**16


def task_vectors(block: Block) -> TaskVectors:
    """The task vectors as they are: what TIES ranks by magnitude."""
    return block.task_vectors


def largest(vectors: Ranked, keep: Keep, scope: Scope, *, cut_ties: bool, cut_off: Keep | None = None) -> list[Stage]:
    """Stages after which `trimmed` keeps the entries of the largest magnitudes of each model.

    `keep(model, entries)` says how many to keep of so many. With `cut_ties` it is exactly that many, the lowest element
    indices of equal magnitudes first; without, every magnitude equal to the smallest kept one is kept as well. Of
    those, `cut_off(model, entries)` of the largest are then left out, which takes no further pass.
    """
    keeps = (keep,) if cut_off is None else (keep, cut_off)
    stages: list[Stage] = [
        Sample(vectors, keeps),
        Bracket(vectors, keeps, scope, cut_ties),
        HighDigits(vectors, keeps),
        LowDigits(vectors),
    ]
    if cut_ties:
        stages += [*([TiesPerTensor(vectors)] if scope == "model" else []), TiesPerGrain(vectors)]
    return stages


def trimmed(vectors: TaskVectors, block: Block, known: Known) -> TaskVectors:
    """The task vectors with 0 for whatever is not among the largest, or among those that are cut off."""
    models, reached = len(vectors), thresholds(known)
    ties = tuple(_ties_here(cut, block) for cut in known["cut"]) if "cut" in known else None
    left = vectors.trimmed(reached[:models], None if ties is None else ties[:models])
    if len(reached) == models:
        return left
    return left.cut_off(reached[models:], None if ties is None else ties[models:])


def thresholds(known: Known) -> Numbers:
    """The k-th largest magnitudes of the models, after them those of what is cut off; NaN, which none reaches, where
    nothing is kept.
    """
    return tuple(math.nan if threshold is None else threshold for threshold in known["threshold"])


def _wanted(keeps: Sequence[Keep], models: int, entries: int) -> list[int]:
    """How many of the largest of so many entries: per model, and again for each further rank."""
    return [min(keep(model, entries), entries) for keep in keeps for model in range(models)]


def _ties_here(cut: Sequence[Any] | None, block: Block) -> tuple[int, int]:
    """From which element of the block on how many ties are still kept: `cut` is their last tensor, grain and how many
    there.
    """
    if cut is None or block.tensor < cut[0]:
        return KEEP_ALL_TIES
    first = (cut[1] - block.first_grain) * block.grain_elements
    return KEEP_NO_TIES if block.tensor > cut[0] or first < 0 else (first, cut[2])


@dataclass
class Sample(AtOnce):
    """About where the k-th largest magnitude is: `known["guess"]`, per rank the high digits from and to, and those of
    which the least value is the most likely one.
    """

    vectors: Ranked
    keeps: tuple[Keep, ...]
    name: ClassVar[str] = "ranks, sample"
    reads: ClassVar[float] = 1 / 16

    def needed(self, known: Known) -> bool:
        return kernels.are_compiled()

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        counts = counted(found, "digits", (len(block.stored), _HIGH_DIGITS))
        kernels.sampled_digits(self.vectors(block), sampled_every(block), counts.values)

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        histograms = cast(Counts, found["digits"]).values
        entries = int(histograms[0].sum())
        if entries < FEWEST_SAMPLES:
            return
        guess = []
        for number, wanted in enumerate(_wanted(self.keeps, len(histograms), 2**30)):
            share = max(0.0, wanted / 2**30)
            from_top = np.cumsum(histograms[number % len(histograms)][::-1])
            margin = 16 + 4 * (8 * entries * share * (1 - share)) ** 0.5
            ranks = [share * entries + sign * margin for sign in (-1, 0, 1)]
            high, middle, low = (_HIGH_DIGITS - 1 - int(np.searchsorted(from_top, rank)) for rank in ranks)
            low, high = max(low, middle - BRACKET // 2, 0), min(high, middle + BRACKET // 2 - 1)
            guess.append([low, high + 1, max(middle, 0)])
        known["guess"] = guess


@dataclass
class Bracket(AtOnce):
    """The k-th largest magnitude, if it is where the sample said."""

    vectors: Ranked
    keeps: tuple[Keep, ...]
    scope: Scope
    cut_ties: bool
    name: ClassVar[str] = "ranks"

    @property
    def space(self) -> int:
        """More than that of the stages beside it, which stand behind it."""
        return 8 * (len(self.keeps) * BRACKET * _LOW_DIGITS + _LOW_DIGITS)

    def needed(self, known: Known) -> bool:
        return "guess" in known

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        ranks = len(known["guess"])
        lows, highs, candidates = zip(*known["guess"], strict=True)
        equal = np.zeros((ranks, -(-block.elements // block.grain_elements)), np.int64)
        kernels.bracket(
            self.vectors(block),
            lows,
            highs,
            candidates,
            counted(
                found, "\0digits", (ranks, _LOW_DIGITS * max(high - low for low, high, _ in known["guess"]))
            ).values,
            counted(found, "\0above", (ranks,)).values,
            equal,
        )
        counted(found, "\0entries", (1,)).values += block.elements
        _count_ties(found, block, equal, self.scope)

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        digits, above, entries = (cast(Counts, found[f"\0{name}"]).values for name in ("digits", "above", "entries"))
        ties = _per_tensor(found)
        guess = known.pop("guess")
        wanted = _wanted(self.keeps, len(guess) // len(self.keeps), int(entries[0]))
        threshold: list[float | None] = []
        kept: list[int] = []
        all_: list[int] = []
        all_candidates = True
        for number, (low, _, candidate) in enumerate(guess):
            if wanted[number] <= 0:
                threshold.append(None)
                kept.append(0)
                all_.append(0)
                continue
            place = (candidate - low) << 16
            digits[number, place] += sum(int(counts[number].sum()) for counts in ties.values())
            left = wanted[number] - int(above[number])
            if not 0 < left <= int(digits[number].sum()):
                return  # the sample misled
            (here,), (rest,) = _descend(digits[number : number + 1], [left])
            threshold.append(float(np.int32((low << 16) + here).view(np.float32)))
            kept.append(rest)
            all_.append(int(digits[number, here]))
            all_candidates &= here == place
        known |= {"wanted": wanted, "threshold": threshold, "ties_kept": kept, "ties": all_, "entries": int(entries[0])}
        if self.cut_ties and all_candidates and _is_cut(known):
            known["cut"] = _first_cut(ties, known) if self.scope == "model" else _cut_in(ties, known)


@dataclass
class HighDigits(AfterAll):
    """Which bucket of the high 16 bits holds the k-th largest magnitude of each model, for every rank."""

    vectors: Ranked
    keeps: tuple[Keep, ...]
    name: ClassVar[str] = "ranks, high digits"

    def needed(self, known: Known) -> bool:
        return "threshold" not in known

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        counts = counted(found, "digits", (len(block.stored), _HIGH_DIGITS))
        kernels.high_digits(self.vectors(block), counts.values)

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        histograms = cast(Counts, found["digits"]).values
        entries = int(histograms[0].sum())
        known["entries"] = entries
        known["wanted"] = _wanted(self.keeps, len(histograms), entries)
        known["bucket"], known["left"] = _descend(np.tile(histograms, (len(self.keeps), 1)), known["wanted"])


@dataclass
class LowDigits(AfterAll):
    """The k-th largest magnitude itself, and how many of its equals are among the k."""

    vectors: Ranked
    name: ClassVar[str] = "ranks, low digits"

    def needed(self, known: Known) -> bool:
        return "threshold" not in known

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        counts = counted(found, "digits", (len(known["bucket"]), _LOW_DIGITS))
        kernels.low_digits(self.vectors(block), known["bucket"], counts.values)

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        histograms = cast(Counts, found["digits"]).values
        low, known["ties_kept"] = _descend(histograms, known["left"])
        known["ties"] = [int(histogram[digit]) for histogram, digit in zip(histograms, low, strict=True)]
        bits = np.array(known["bucket"], np.int64) << 16 | np.array(low, np.int64)
        known["threshold"] = bits.astype(np.int32).view(np.float32).astype(np.float64).tolist()
        for number, wanted in enumerate(known["wanted"]):
            if wanted <= 0:
                known["threshold"][number], known["ties_kept"][number], known["ties"][number] = None, 0, 0


@dataclass
class TiesPerTensor(AfterAll):
    """In which tensor each model's ties are cut: `known["cut"]`, per rank its name and how many it keeps, or None."""

    vectors: Ranked
    name: ClassVar[str] = "ties at the threshold, per tensor"

    def needed(self, known: Known) -> bool:
        return "cut" not in known and _is_cut(known)

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        _count_ties(found, block, kernels.ties(self.vectors(block), thresholds(known)), "model")

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["cut"] = _first_cut(_per_tensor(found), known)


@dataclass
class TiesPerGrain(AfterAll):
    """In which grain each model's ties are cut: `known["cut"]`, per rank the tensor, the grain and how many it keeps
    there, or None where all are kept.
    """

    vectors: Ranked
    name: ClassVar[str] = "ties at the threshold, per grain"

    def needed(self, known: Known) -> bool:
        is_open = "cut" not in known or any(cut is not None and len(cut) == 2 for cut in known["cut"])
        return is_open and _is_cut(known)

    def concerns(self, tensor: str, known: Known) -> bool:
        return "cut" not in known or any(cut is not None and cut[0] == tensor for cut in known["cut"])

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        _count_ties(found, block, kernels.ties(self.vectors(block), thresholds(known)), "tensor")

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["cut"] = _cut_in(_per_tensor(found), known)


@dataclass
class L1Norms(Stage):
    """How much of each model's |δ| is left: `known["rescale"]` is ‖δ‖₁ / ‖what is left‖₁, 1 where nothing is."""

    left: Measured
    name: ClassVar[str] = "L1 norms"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        block.put_sums(found, "sums", kernels.absolute_sums(self.left(block, known)))

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        sums = cast(GrainSums, found["sums"]).total().tolist()
        whole, left = sums[: len(sums) // 2], sums[len(sums) // 2 :]
        known["rescale"] = [a / b if b > 0 else 1.0 for a, b in zip(whole, left, strict=True)]


@dataclass
class SquaredNorms(Stage):
    """`known["squares"]`: the sum of the squares of each model's vector."""

    vectors: Measured
    name: ClassVar[str] = "squared norms"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        vectors = kernels.values(self.vectors(block, known)).to(torch.float64).reshape(len(block.stored), -1)
        block.put_sums(found, "squares", grain_sums(vectors * vectors, block.grain_elements))

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["squares"] = cast(GrainSums, found["squares"]).total().tolist()


def base_as_model(block: Block) -> Block:
    """The base first among the models, and nothing to subtract."""
    return (
        block
        if block.stored_base is None
        else replace(block, stored=[block.stored_base, *block.stored], stored_base=None)
    )


def first_as_base(block: Block) -> Block:
    """The other models seen from the first."""
    return replace(block, stored=block.stored[1:], stored_base=block.stored[0])


@dataclass
class Gram(Stage):
    """`known["gram"]`: all inner products, float64, of the task vectors, or of the models where there is no base; `of`
    may say otherwise what is a model and what the base.
    """

    of: Callable[[Block], Block] = lambda block: block
    name: ClassVar[str] = "Gram matrix"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        chosen = self.of(block)
        products = kernels.gram(chosen.stored, block.working, block.grain_elements, chosen.stored_base)
        block.put_sums(found, "products", products)

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        products = cast(GrainSums, found["products"]).total().tolist()
        count = int((2 * len(products)) ** 0.5)
        gram: list[list[float]] = [[0.0] * count for _ in range(count)]
        for (i, j), product in zip(pairs(count), products, strict=True):
            gram[i][j] = gram[j][i] = product
        known["gram"] = gram


@dataclass
class Overlaps(Stage):
    """`known["overlaps"]`: per model, how many of its entries are not 0 where no other model's are, and where others'
    are.
    """

    vectors: Measured
    name: ClassVar[str] = "overlaps"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        counted(found, "overlaps", (len(block.stored), 2)).values += kernels.overlaps(self.vectors(block, known))

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["overlaps"] = cast(Counts, found["overlaps"]).values.tolist()


@dataclass
class SignVotes(Stage):
    """`known["majority"]`: the sign (−1, 0, 1) of most elements of an elected sign, or of summed task vectors."""

    elect: Callable[[Block, Known], Tensor | TaskVectors]
    name: ClassVar[str] = "sign votes"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        elected = self.elect(block, known)
        if isinstance(elected, TaskVectors):
            above, below = kernels.votes(elected)
        else:
            above, below = int((elected > 0).sum()), int((elected < 0).sum())
        counted(found, "votes", (1,)).values += above - below

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        known["majority"] = int(np.sign(cast(Counts, found["votes"]).values[0]))


def _is_cut(known: Known) -> bool:
    return any(kept < all_ for kept, all_ in zip(known["ties_kept"], known["ties"], strict=True))


def _count_ties(found: dict[str, Statistic], block: Block, per_grain: Counters, scope: Scope) -> None:
    """Add a block's ties to those of its tensor: per grain, or together where there are many tensors."""
    if scope == "model":
        counted(found, block.tensor, (len(per_grain),)).values += per_grain.sum(axis=1)
    else:
        counts = counted(found, block.tensor, (len(per_grain), block.grains.count)).values
        counts[:, block.first_grain : block.first_grain + per_grain.shape[1]] += per_grain


def _per_tensor(found: Mapping[str, Statistic]) -> dict[str, Counters]:
    """What `_count_ties` added up; no tensor's name begins as those of the other counts do."""
    return {name: cast(Counts, counts).values for name, counts in found.items() if not name.startswith("\0")}


def _first_cut(ties: Mapping[str, Counters], known: Known) -> list[list[Any] | None]:
    """Per model: the first tensor in name order that does not keep all its ties, and how many it keeps."""
    left = list(known["ties_kept"])
    cuts: list[list[Any] | None] = [None] * len(left)
    for tensor in sorted(ties):
        for model, here in enumerate(ties[tensor].tolist()):
            if cuts[model] is None and left[model] < here:
                cuts[model] = [tensor, left[model]]
            left[model] -= here
    return cuts


def _cut_in(ties: Mapping[str, Counters], known: Known) -> list[list[Any] | None]:
    """Per model: the tensor and the first grain that do not keep all their ties, and how many the grain keeps."""
    (only, *_) = ties
    both = zip(known["ties_kept"], known["ties"], strict=True)
    cuts = known.get("cut") or [[only, kept] if kept < all_ else None for kept, all_ in both]
    found: list[list[Any] | None] = []
    for model, cut in enumerate(cuts):
        if cut is None:
            found.append(None)
            continue
        before = np.cumsum(ties[cut[0]][model])
        grain = int(np.searchsorted(before, cut[1], side="right"))
        found.append([cut[0], grain, cut[1] - (int(before[grain - 1]) if grain else 0)])
    return found


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
