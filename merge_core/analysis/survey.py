"""What one pass over the blocks of a tensor tells of its task vectors: sizes, signs, angles, ranks of magnitudes.

Of each tensor is found

    ‖δᵢ‖/‖θ₀‖      δᵢ·δⱼ      how many entries changed      how many go in opposite directions      how large |δᵢ| are

and the k-th largest |δᵢ| for k = max(1, int(density · entries)), exactly: a sixteenth of the tensor is read before, so
that the one pass nearly always finds it (`stages.py`). Counts are integers and sums follow the grain rule, so no block
size and no number of threads changes a bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.method import Block, Known, MergeMethod, Scope, Stage
from merge_core.stages import Bracket, Gram, HighDigits, LowDigits, Sample, task_vectors
from merge_core.statistics import Counters, Counts, GrainSums, Statistic, counted

_DIGITS = 2**15
_MANTISSA_BITS = 7
_EXPONENT_BIAS = 127
SMALLEST_OCTAVE = -48
OCTAVES = 64
"""Magnitudes below 2^-48 count as in the lowest octave of a histogram, those from 2^16 on as in the highest."""
_EXACT_IN_FLOAT32 = 2**20
_MOST_BYTES = 2**28
"""Of all tensors' histograms."""


def bits_for(tensors: int, models: int) -> int:
    """Into how many steps histograms cut an octave, as a power of two: the finer the fewer there are of them."""
    bits = _MANTISSA_BITS
    while bits and histogram_bytes(tensors, models, bits) > _MOST_BYTES:
        bits -= 1
    return bits


def histogram_bytes(tensors: int, models: int, bits: int) -> int:
    """Memory that the histograms of so many tensors take."""
    return 8 * tensors * models * (OCTAVES << bits)


def lower_edge(step: int, bits: int) -> float:
    """The least magnitude of a histogram's step.

    >>> lower_edge(48 << 3, 3), lower_edge((48 << 3) + 4, 3)
    (1.0, 1.5)
    """
    octave, part = divmod(step, 1 << bits)
    return float(2.0 ** (octave + SMALLEST_OCTAVE) * (1 + part / (1 << bits)))


def coarser(histogram: Counters, bits: int) -> Counters:
    """A histogram's counts in so many fewer halvings of an octave: `[..., steps >> bits]`."""
    return cast(Counters, histogram.reshape(*histogram.shape[:-1], -1, 1 << bits).sum(axis=-1))


@dataclass(frozen=True)
class Figures:
    """What was found of one tensor, or of many together: with k models,

    `entries`; `base`, ‖θ₀‖²; `gram` `[k, k]`, δᵢ·δⱼ; `changed` `[k]`, entries that are not 0; of pairs, `both`
    `[k, k]`, entries that changed in both models, and `opposed` `[k, k]`, those of them with opposite signs; `shared`,
    entries that two models or more changed, and `conflicts`, those of them that go both ways; `magnitudes` `[k,
    steps]`, the histogram of what changed.
    """

    entries: int
    base: float
    gram: np.ndarray[Any, np.dtype[np.float64]]
    changed: Counters
    both: Counters
    opposed: Counters
    shared: int
    conflicts: int
    magnitudes: Counters

    @classmethod
    def of(cls, known: Known) -> Figures:
        """What a survey came to."""
        counts = known["counts"]
        return cls(
            entries=counts["entries"],
            base=known["base"],
            gram=np.array(known["gram"], np.float64),
            changed=counts["both"].diagonal().copy(),
            both=counts["both"],
            opposed=counts["opposed"],
            shared=counts["shared"],
            conflicts=counts["conflicts"],
            magnitudes=counts["magnitudes"],
        )

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.entries + other.entries,
            self.base + other.base,
            self.gram + other.gram,
            self.changed + other.changed,
            self.both + other.both,
            self.opposed + other.opposed,
            self.shared + other.shared,
            self.conflicts + other.conflicts,
            self.magnitudes + other.magnitudes,
        )

    def reaching(self, step: int) -> Counters:
        """How many entries of each model are in the histogram's steps from that one on: `[k]`."""
        return cast(Counters, self.magnitudes[:, step:].sum(axis=1))


@dataclass
class Overview(Stage):
    """One pass: everything that `Figures` has, and of the ranks what `Bracket` finds."""

    density: float
    bits: int
    name: ClassVar[str] = "survey"
    bracket: Bracket = field(init=False)

    def __post_init__(self) -> None:
        self.bracket = Bracket(task_vectors, (self.keep,), "tensor", cut_ties=False)

    def keep(self, model: int, entries: int) -> int:
        """How many of so many entries are asked for."""
        return entries if self.density == 1 else max(1, int(self.density * entries))

    @property
    def space(self) -> int:
        return self.bracket.space + 8 * _DIGITS

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        models = len(block.stored)
        kernels.high_digits(block.task_vectors, counted(found, "\0magnitudes", (models, _DIGITS)).values)
        if self.bracket.needed(known):
            self.bracket.observe(block, known, found)
        grain, working = block.grain_elements, block.working
        block.put_sums(found, "\0products", kernels.gram(block.stored, working, grain, block.stored_base))
        block.put_sums(found, "\0base", kernels.gram([block.origin], working, grain))
        self._observe_signs(kernels.values(block.task_vectors).reshape(models, -1), found)

    def _observe_signs(self, deltas: Tensor, found: dict[str, Statistic]) -> None:
        models = len(deltas)
        entries, shared, conflicts = 0, 0, 0
        both, opposed = (counted(found, f"\0{name}", (models, models)).values for name in ("both", "opposed"))
        for part in torch.split(deltas, _EXACT_IN_FLOAT32, dim=1):
            # Sums of so many ±1 are exact in float32, in whichever order a product adds them up.
            signs = torch.sign(part).to(torch.float32)
            changed = signs.abs()
            together, agreeing = changed @ changed.T, signs @ signs.T
            both += together.to(torch.int64).numpy()
            opposed += ((together - agreeing) / 2).to(torch.int64).numpy()
            goes_both_ways = (signs.amax(0) > 0) & (signs.amin(0) < 0)
            entries += part.shape[1]
            shared += int((changed.sum(0) >= 2).sum())
            conflicts += int(goes_both_ways.sum())
        counted(found, "\0counts", (3,)).values += np.array([entries, shared, conflicts])

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        def counts(name: str) -> Counters:
            return cast(Counts, found[f"\0{name}"]).values

        Gram().finish({"products": found["\0products"]}, known)
        digits = counts("magnitudes")
        entries, shared, conflicts = counts("counts").tolist()
        known["base"] = float(cast(GrainSums, found["\0base"]).total()[0])
        known["counts"] = {
            "entries": entries,
            "shared": shared,
            "conflicts": conflicts,
            "both": counts("both"),
            "opposed": counts("opposed"),
            "magnitudes": _in_steps(digits, entries - counts("both").diagonal(), self.bits),
        }
        if self.bracket.needed(known):
            self.bracket.finish(found, known)
        if "threshold" not in known:
            HighDigits(task_vectors, (self.keep,)).finish({"digits": Counts(digits)}, known)


def _in_steps(digits: Counters, zeros: Counters, bits: int) -> Counters:
    """How many entries that are not 0 have a magnitude in each step of a histogram, from the high digits of all."""
    steps = coarser(digits, _MANTISSA_BITS - bits)
    steps[:, 0] -= zeros
    first = (SMALLEST_OCTAVE + _EXPONENT_BIAS) << bits
    last = first + (OCTAVES << bits)
    found: Counters = steps[:, first:last].copy()
    found[:, 0] += steps[:, :first].sum(axis=1)
    found[:, -1] += steps[:, last:].sum(axis=1)
    return found


class Survey(MergeMethod):
    """Measures task vectors and merges nothing."""

    name: ClassVar[str] = "survey"
    title: ClassVar[str] = "A survey of task vectors"
    paper: ClassVar[str] = ""
    workspace: ClassVar[tuple[int, int]] = (5, 4)

    density: float = Field(gt=0, le=1)
    bits: int = Field(ge=0, le=_MANTISSA_BITS)

    def stages(self, scope: Scope) -> Sequence[Stage]:
        overview = Overview(self.density, self.bits)
        return [Sample(task_vectors, (overview.keep,)), overview, LowDigits(task_vectors)]

    def merge(self, block: Block, known: Known) -> NoReturn:
        raise NotImplementedError("a survey has no output")
