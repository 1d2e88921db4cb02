"""Trim, elect sign, disjoint merge: the official TIES procedure (Yadav et al., 2023, section 4), on any task vectors.

TIES applies it to the task vectors themselves, DARE-TIES to what DARE leaves of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels import Average
from merge_core.kernels.plain import column, disjoint, total
from merge_core.kernels.vectors import TaskVectors
from merge_core.method import Block, Known, MergeMethod, Scope, Stage
from merge_core.stages import SignVotes, SquaredNorms, largest, trimmed

Election = Literal["mass", "normfrac", "normmass"]
Aggregate = Literal["mean", "sum", "max"]
_AVERAGES: dict[Aggregate, Average] = {"mean": "count", "sum": "sum", "max": "max"}


class TrimElectMerge(MergeMethod):
    """Base of the official TIES variants: `vectors` says what is trimmed, `trim_to` the share that is kept.

    Of N entries int(N · share) + 1 are kept, and all that equal the smallest of them.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("model", "tensor")
    workspace: ClassVar[tuple[int, int]] = (8, 8)

    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the merged task vector")
    aggregate: Aggregate = Field("mean", description="what is made of the entries that agree")
    election: Election = Field(
        "mass",
        description="how a sign is elected: mass sums the entries; normfrac takes the sign of the entry with the "
        "largest share of its vector's squared norm; normmass sums the signed shares",
    )

    @property
    @abstractmethod
    def trim_to(self) -> float:
        """The share of entries kept."""

    @abstractmethod
    def vectors(self, block: Block) -> TaskVectors:
        """The task vectors to merge."""

    @property
    def is_fused(self) -> bool:
        return self.election == "mass"

    def stages(self, scope: Scope) -> Sequence[Stage]:
        ranks = largest(self.vectors, self._keep, scope, cut_ties=False) if self.trim_to < 1 else []
        norms = [] if self.election == "mass" else [SquaredNorms(self._trimmed)]
        return [*ranks, *norms, SignVotes(self._vote)]

    def merge(self, block: Block, known: Known) -> Tensor:
        trimmed = self._trimmed(block, known)
        average = _AVERAGES[self.aggregate]
        if self.election == "mass":
            return kernels.combine(
                trimmed, vote="majority", majority=known["majority"], average=average, scale=self.lambda_
            )
        entries = kernels.values(trimmed)
        sign = self._elect(entries, known)
        sign = torch.where(sign == 0, torch.full_like(sign, known["majority"]), sign)
        return block.base + disjoint(entries, sign, average, (1.0,)) * self.lambda_

    def _vote(self, block: Block, known: Known) -> Tensor | TaskVectors:
        trimmed = self._trimmed(block, known)
        return trimmed if self.election == "mass" else self._elect(kernels.values(trimmed), known)

    def _elect(self, entries: Tensor, known: Known) -> Tensor:
        """The sign by the entries' shares of their vectors' squared norms."""
        squares = column([square if square > 0 else 1.0 for square in known["squares"]], entries)
        shares = entries * entries / squares
        if self.election == "normmass":
            return torch.sign(total(torch.sign(entries) * shares))
        return torch.sign(torch.gather(entries, 0, shares.argmax(dim=0, keepdim=True)))[0]

    def _keep(self, model: int, entries: int) -> int:
        return int(entries * self.trim_to) + 1

    def _trimmed(self, block: Block, known: Known) -> TaskVectors:
        vectors = self.vectors(block)
        return trimmed(vectors, block, known) if self.trim_to < 1 else vectors
