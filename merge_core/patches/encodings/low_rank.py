"""The strongest directions of a change: truncated SVD, weighed by inputs (EoRA) where a covariance of them is given.

    δ' = B A        B = U_k √Σ_k        A = √Σ_k V_kᵀ        U Σ Vᵀ = δ

With C = S Sᵀ, the mean of x xᵀ of what enters the columns, U Σ Vᵀ = δ S and A = √Σ_k V_kᵀ S⁻¹: of all matrices of
rank k the one whose outputs are the nearest, ‖(δ − B A) S‖ (Liu et al., 2024, https://arxiv.org/abs/2410.21271). How
many directions: `rank` of each matrix; as many as hold a share of the `energy` Σσ²; or, for all matrices alike, those
whose σ is at least `threshold` times the largest (WeLore, https://arxiv.org/abs/2407.11239), where matrices that would
not lose more than the share `min_ratio` of their rank are stored whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from merge_core import kernels
from merge_core.dtypes import OUTPUT
from merge_core.errors import NonFinite
from merge_core.kernels.vectors import RUN_ELEMENTS, Rows
from merge_core.matrices import Delta, held_for_directions, root_of, runs, strongest
from merge_core.method import ExactOn
from merge_core.patches.encoding import DeltaTensor, Difference, Encoding, FactorDType, Parts

_RUN_BYTES = 48
"""What an element of a run takes in all: as it is stored and in float32, of both, and in float64."""


class LowRankTensor(DeltaTensor):
    """`left`, B, `[rows, rank]`, and `right`, A, `[rank, width]`; or δ whole in `values`, flat."""

    def check(self) -> None:
        formats = tuple(OUTPUT.values())
        if set(self.entry.parts) == {"values"}:
            self.expect(values=((self.entry.elements,), formats))
            return
        rank = next(iter(self.entry.parts["left"].shape[1:]), 0) if "left" in self.entry.parts else 0
        rows, width = self.entry.grains.rows, self.entry.grains.width
        self.expect(left=((rows, rank), formats), right=((rank, width), formats))
        if not 0 < rank <= min(rows, width):
            self.refuse(f"has a rank of {rank}, but the tensor is {list(self.entry.shape)}")

    def change(self, base: Tensor, start: int, stop: int) -> Tensor:
        working = self.working.torch
        if "values" in self.entry.parts:
            return self.read_flat("values", start, stop).to(working)
        left = self.read("left", start, stop).to(working).contiguous()
        right = self.read("right", 0, self.entry.parts["right"].rows).to(working).contiguous()
        out = torch.empty(stop - start, right.shape[1], dtype=working)
        kernels.low_rank(torch.zeros_like(out), left, right, 1.0, out)
        return self.shaped(out, start, stop)

    @property
    def temporary(self) -> float:
        wide = self.working.itemsize
        if "left" not in self.entry.parts:
            return wide
        left = self.entry.parts["left"]
        return wide + left.shape[1] * (left.dtype.itemsize + wide) / max(1, self.entry.grains.width)

    @property
    def thread_bytes(self) -> int:
        if "right" not in self.entry.parts:
            return 0
        right = self.entry.parts["right"]
        return right.elements * (right.dtype.itemsize + self.working.itemsize)


class LowRank(Encoding):
    """Store the strongest directions of each matrix; other numbers are stored as `dense`."""

    name: ClassVar[str] = "low_rank"
    title: ClassVar[str] = "Strongest directions (truncated SVD, EoRA)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.21271"
    tensor: ClassVar[type[DeltaTensor]] = LowRankTensor
    exact_on: ClassVar[ExactOn] = "this machine"

    rank: int | None = Field(None, ge=1, le=2**16, description="k: how many directions of each matrix")
    energy: float | None = Field(None, gt=0, le=1, description="as many directions as hold this share of Σσ²")
    threshold: float | None = Field(None, gt=0, le=1, description="directions whose σ is this share of the largest")
    min_ratio: float = Field(0.5, ge=0, lt=1, description="with threshold: a matrix that loses less rank stays whole")
    dtype: FactorDType = Field("float32", description="number format of the factors")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if sum(rule is not None for rule in (self.rank, self.energy, self.threshold)) != 1:
            raise ValueError("give one of rank, energy and threshold")
        return self

    def takes(self, difference: Difference) -> bool:
        return difference.is_numeric and len(difference.info.shape) > 1

    def is_whole(self, difference: Difference) -> bool:
        return True

    def most_bytes(self, difference: Difference) -> int:
        elements = difference.info.elements
        if self.rank is not None:
            elements = min(elements, self.rank * (difference.grains.rows + difference.grains.width))
        return elements * OUTPUT[self.dtype].itemsize

    def work_bytes(self, difference: Difference) -> int:
        elements, width = difference.info.elements, difference.grains.width
        weighted = difference.covariance is not None and difference.name in difference.covariance.tensors
        held = held_for_directions(difference.info.shape, self.rank, weighted=weighted) + 1
        run = _RUN_BYTES * min(max(RUN_ELEMENTS, width), elements)
        kept = 2 * difference.dtype.itemsize if difference.is_computed else 0
        return math.ceil(elements * (held * difference.working.itemsize + kept)) + run + difference.block_bytes

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        stored = OUTPUT[self.dtype]
        rows, width = difference.grains.rows, difference.grains.width
        sides = self.sides(difference, (rows * width - 1) // (rows + width))
        if sides is None:
            return None
        left, right = sides
        if not left.shape[1]:
            for _, _, change in difference.changes():
                parts.write("values", stored, difference.fitted(change, stored))
            return {}
        for run in runs(*left.shape):
            parts.write("left", stored, difference.fitted(left[run], stored), width=left.shape[1])
        for direction in range(right.shape[1]):
            parts.write("right", stored, difference.fitted(right[:, direction], stored), width=width)
        return {}

    def sides(self, difference: Difference, most: int) -> tuple[Tensor, Tensor] | None:
        """B, `[rows, k]`, and Aᵀ, `[width, k]`, the strongest direction first; no columns where there would be more
        than `most`; None where nothing changed. Raises `NonFinite`.
        """
        chosen = []

        def choose(values: Tensor) -> int:
            if bool(values.isnan().any()):
                detail = f"{difference.name} differs from the base by NaN or infinity; only sparse stores that"
                raise NonFinite(difference.name, str(difference.tuned.path), detail)
            chosen.append(self._rank(values))
            return chosen[0] if chosen[0] <= most else 0

        def space(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=difference.working.torch)

        delta = Delta(*self._sources(difference), difference.working.torch)
        found = strongest(delta, self._root(difference), choose, space)
        if chosen == [0]:
            return None
        long, short = (side.flip(1) for side in found.balance())
        return (short, long) if delta.is_lying else (long, short)

    def _rank(self, values: Tensor) -> int:
        """How many directions of a matrix with these singular values, ascending; 0 if there are none."""
        there = int(torch.count_nonzero(values))
        if self.rank is not None:
            return min(self.rank, there)
        descending = values.flip(0)
        if self.energy is not None:
            shares = descending.square().cumsum(0)
            return min(there, int(torch.count_nonzero(shares < self.energy * shares[-1])) + 1)
        assert self.threshold is not None
        kept = min(there, int(torch.count_nonzero(descending >= self.threshold * descending[0])))
        return kept if 1 - kept / len(values) > self.min_ratio or not there else len(values)

    @staticmethod
    def _sources(difference: Difference) -> tuple[Rows, list[Rows]]:
        """Base and tuned rows, read by runs; rows that have to be computed are computed once."""

        def tuned() -> Tensor:
            return torch.cat([rows for _, _, rows in difference.tuned_blocks()])

        base_info = difference.base_info
        assert base_info is not None

        def base(rows: slice) -> Tensor:
            return difference.base.rows(base_info, rows.start, rows.stop)

        def some(rows: slice) -> Tensor:
            difference.tick(difference.info.nbytes * (rows.stop - rows.start) // difference.info.rows)
            return difference.tuned.rows(difference.info, rows.start, rows.stop)

        shape = difference.info.shape
        own = Rows.of(tuned()) if difference.is_computed else Rows(difference.dtype.torch, shape, tuned, read=some)
        return Rows(base_info.dtype.torch, shape, lambda: base(slice(0, shape[0])), read=base), [own]

    @staticmethod
    def _root(difference: Difference) -> Tensor | None:
        covariance = difference.covariance
        if covariance is None or (info := covariance.tensors.get(difference.name)) is None:
            return None
        numbers = covariance.rows(info, 0, info.rows)
        if (found := kernels.first_nonfinite(numbers)) >= 0:
            detail = f"the covariance of {difference.name} holds NaN or infinity at element {found:,}"
            raise NonFinite(difference.name, str(covariance.path), detail)
        return root_of(numbers.to(torch.float64))
