"""SCE: select, calculate, erase (Wan et al., 2024), as mergekit defines it: each tensor on its own.

S: δᵢ = 0 but where the models' variance is among the largest     C: wᵢ = mean δᵢ² / Σⱼ mean δⱼ²
E: γ = sgn Σᵢ δᵢ        θ = θ₀ + Σᵢ{ wᵢ δᵢ : sgn δᵢ = γ } / Σᵢ{ wᵢ : sgn δᵢ = γ }
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
from pydantic import Field
from torch import Tensor

from merge_core.kernels.scores import Choice, Scores, chosen_consensus, chosen_squares, equal_scores
from merge_core.kernels.vectors import KEEP_ALL_TIES, KEEP_NO_TIES
from merge_core.method import Block, Known, MergeMethod, Scope, Share, Stage
from merge_core.order import order
from merge_core.statistics import Counts, GrainSums, Statistic

_LEAST_ENERGY = 1e-6


class Sce(MergeMethod):
    """Keep the positions in which the models differ most, weigh each model by its energy there, erase what disagrees.

    Of the positions with any variance the share `select_topk` is kept, rounded down; of equal variances the lowest
    index goes first, where mergekit takes any and so gives other bytes on each machine. A sum of 0 elects +. Where all
    energies together are below 10⁻⁶, as they are for many fine-tunes, the models weigh the same, as in mergekit.

    Energies 1 and 4 weigh 0.2 and 0.8:

    >>> block = Block.of([[1.0, -1.0], [2.0, 2.0]], base=[0.0, 0.0])
    >>> Sce().merge(block, {"weights": [0.2, 0.8]})
    tensor([1.8000, 2.0000])
    """

    name: ClassVar[str] = "sce"
    title: ClassVar[str] = "SCE: select, calculate, erase"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.07990"
    workspace: ClassVar[tuple[int, int]] = (8, 12)

    select_topk: Share = Field(
        1.0, description="share of the positions with any variance that is kept, 0 to 1", examples=[0.4]
    )
    int8_mask: bool = Field(False, description="read for mergekit's sake; has no effect")

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        if not self._selects:
            return [Energies(self)]
        return [*order("spread", lambda block, known: _spread(block), self._place), Ties(self), Energies(self)]

    def merge(self, block: Block, known: Known) -> Tensor:
        return chosen_consensus(self.choice(block, known), tuple(known["weights"]))

    def choice(self, block: Block, known: Known) -> Choice:
        """What is kept of a block."""
        if not self._selects:
            return Choice(_spread(block))
        threshold, ties = known["spread"]["values"][0][0], known.get("cut", KEEP_ALL_TIES)
        if self.kept(known) == 0:
            return Choice(_spread(block), float("inf"), KEEP_NO_TIES)
        if "cut" in known:
            first = (known["cut"][0] - block.first_grain) * block.grain_elements
            ties = KEEP_NO_TIES if first < 0 else (first, known["cut"][1])
        return Choice(_spread(block), threshold, ties)

    def kept(self, known: Known) -> int:
        """How many positions are kept."""
        return int(known["spread"]["nonzero"][0] * self.select_topk)

    @property
    def _selects(self) -> bool:
        return self.select_topk < 1

    def _place(self, entries: int, nonzero: int) -> tuple[int]:
        return (min(entries - int(nonzero * self.select_topk), entries - 1),)


class Ties(Stage):
    """In which grain the ties at the threshold are cut: `known["cut"]`, the grain and how many it keeps."""

    name: ClassVar[str] = "ties at the threshold"

    def __init__(self, method: Sce) -> None:
        self.method = method

    @property
    def expected(self) -> bool:
        return False

    def needed(self, known: Known) -> bool:
        return self._kept_ties(known) < int(known["spread"]["equal"][0][0])

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        counts = cast(Counts, found.setdefault("ties", Counts(np.zeros(block.grains.count, np.int64)))).values
        here = equal_scores(_spread(block), known["spread"]["values"][0][0])
        counts[block.first_grain : block.first_grain + len(here)] += here

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        upto = np.cumsum(cast(Counts, found["ties"]).values)
        kept = self._kept_ties(known)
        grain = int(np.searchsorted(upto, kept, side="right"))
        known["cut"] = [grain, kept - (int(upto[grain - 1]) if grain else 0)]

    def _kept_ties(self, known: Known) -> int:
        spread: dict[str, Any] = known["spread"]
        above = spread["entries"] - spread["below"][0][0] - spread["equal"][0][0]
        return max(0, self.method.kept(known) - int(above))


class Energies(Stage):
    """`known["weights"]`: each model's share of all energies, the means of δ² where only what is kept counts."""

    name: ClassVar[str] = "energies"

    def __init__(self, method: Sce) -> None:
        self.method = method

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        cast(Counts, found.setdefault("entries", Counts(np.zeros(1, np.int64)))).values += block.elements
        block.put_sums(found, "squares", chosen_squares(self.method.choice(block, known)))

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        entries = int(cast(Counts, found["entries"]).values[0])
        energies = [square / entries for square in cast(GrainSums, found["squares"]).total().tolist()]
        whole = sum(energies)
        known["weights"] = [energy / whole if whole >= _LEAST_ENERGY else 1 / len(energies) for energy in energies]


def _spread(block: Block) -> Scores:
    return Scores(block.task_vectors, "spread")
