"""WIDEN: weights disentangled into magnitude and direction (Yu et al., 2024).

W = m · D, mⱼ = ‖W[:,j]‖        Δmᵢⱼ = |mᵢⱼ − m₀ⱼ|        Δdᵢⱼ = 1 − cos(Wᵢ[:,j], W₀[:,j])

r = the rank of each column in its model, from 0 up to 1        s = softmaxᵢ r, or c where rᵢⱼ > ρ · meanⱼ rᵢ

θ = θ₀ + Σᵢ ½ (s_m + s_d)ᵢⱼ · δᵢ[:,j]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from merge_core.kernels.plain import total
from merge_core.method import Block, Known, MergeMethod, Scope, Stage
from merge_core.statistics import GrainSums, RowValues, Statistic, grain_sums
from merge_core.weights import is_embedding

Floats = NDArray[np.floating[Any]]
_LANES = 8


class Widen(MergeMethod):
    """Weigh each input column of each task vector by how far it moved its magnitude and its direction, among its own.

    The weights of two models may both be 1: what both find important is added twice, in full. Of a token embedding a
    column is a token, which is a stored row. Tensors of more than two dimensions are matrices `[rows, all the rest]`. A
    vector has no columns: |δ| itself, not its rank, stands for r, element by element.

    A column of zeros has no direction. The official code divides 0 by 0 there, and the NaN ranks it as the most
    important column of its model. Here it has not turned where it is zero in both, and turned by 1, as if orthogonal,
    where it is zero in one. Equal distances are ranked by column index.

    >>> one = Block.of([[3.0, 2.0]], base=[1.0, 2.0])
    >>> Widen().merge(one, {"means": [1.0]})
    tensor([3., 2.])
    """

    name: ClassVar[str] = "widen"
    title: ClassVar[str] = "WIDEN"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.03092"
    workspace: ClassVar[tuple[int, int]] = (12, 6)

    above_average_value_ratio: float = Field(
        1.0, ge=0, description="ρ: a column whose rank is above so many times the average counts as important"
    )
    score_calibration_value: float = Field(1.0, description="c: the score of an important column")

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [Columns(self)]

    def merge(self, block: Block, known: Known) -> Tensor:
        deltas = block.models - block.base
        return block.base + total(deltas * self._weights(deltas, block, known))

    def _weights(self, deltas: Tensor, block: Block, known: Known) -> Tensor:
        """One for each column, shaped to multiply the deltas."""
        if "means" in known:
            sizes = deltas.to(torch.float64).abs().cpu().numpy()
            return torch.from_numpy(self.score(sizes, known["means"])).to(deltas)
        weights: Sequence[Sequence[float]] = known["weights"]
        if _is_lookup(block):
            first = block.first_grain * block.grains.size
            weights = [of[first : first + deltas.shape[1]] for of in weights]
            return torch.tensor(weights).to(deltas).unsqueeze(2)
        return torch.tensor(weights).to(deltas).reshape(len(deltas), 1, *deltas.shape[2:])

    def score(self, ranks: Floats, averages: Sequence[float]) -> Floats:
        """The scores `[models, ...]`, rounded to float32, of ranks whose averages per model are given."""
        powers = np.exp((ranks - ranks.max(axis=0)).astype(np.float64))
        sums = powers[0].copy()
        for power in powers[1:]:
            sums += power
        bounds = np.array(averages, ranks.dtype) * ranks.dtype.type(self.above_average_value_ratio)
        is_important = ranks > bounds.reshape(-1, *[1] * (ranks.ndim - 1))
        scores: Floats = np.where(is_important, self.score_calibration_value, powers / sums)
        return scores.astype(np.float32)


@dataclass
class Columns(Stage):
    """`known["weights"]`: one for each model and column; of a vector `known["means"]`, the average |δ| per model."""

    method: Widen
    name: ClassVar[str] = "columns"

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        if _is_vector(block):
            sizes = (block.models - block.base).to(torch.float64).abs().reshape(len(block.stored), -1)
            counted = torch.cat([sizes, torch.ones_like(sizes[:1])])
            block.put_sums(found, "sizes", grain_sums(counted, block.grain_elements))
            return
        base = block.base.to(torch.float64).flatten(1)
        models = [rows.load().to(torch.float64).flatten(1) for rows in block.stored]
        pairs = [(base, base), *((model, model) for model in models), *((model, base) for model in models)]
        if _is_lookup(block):
            sums = torch.stack([_over_rows((one * other).T) for one, other in pairs])
            columns = cast(RowValues, found.setdefault("columns", RowValues()))
            start = block.first_grain * block.grains.size
            columns.put(block.tensor, block.grains.rows, start, sums.T.cpu().numpy())
            return
        per_pair = [
            torch.stack([_over_rows(grain) for grain in torch.split(one * other, block.grains.size)])
            for one, other in pairs
        ]
        block.put_sums(found, "columns", torch.stack(per_pair, dim=1).cpu().numpy())

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        if "sizes" in found:
            *sizes, count = cast(GrainSums, found["sizes"]).total().tolist()
            known["means"] = [size / count for size in sizes]
            return
        columns = found["columns"]
        if isinstance(columns, RowValues):
            (sums,) = (rows.T for rows in columns.rows.values())
        else:
            sums = cast(GrainSums, columns).total()
        base, models, products = sums[0], sums[1 : len(sums) // 2 + 1], sums[len(sums) // 2 + 1 :]
        lengths = np.sqrt(models), np.sqrt(base)
        both = lengths[0] * lengths[1]
        cosine = np.where(both > 0, products / np.where(both > 0, both, 1.0), (models == base).astype(np.float64))
        scores = [self._scores(np.abs(lengths[0] - lengths[1])), self._scores(1 - cosine)]
        known["weights"] = ((scores[0] + scores[1]) / 2).tolist()

    def _scores(self, distances: Floats) -> Floats:
        """The scores of columns ranked by their distances, `[models, columns]`, among equals the first lower."""
        columns = distances.shape[1]
        ranks = np.empty(distances.shape, np.float32)
        for rank, distance in zip(ranks, distances, strict=True):
            rank[np.argsort(distance, kind="stable")] = np.arange(columns, dtype=np.float32) / np.float32(columns)
        return self.method.score(ranks, [_average(rank) for rank in ranks])


def _average(ranks: Floats) -> float:
    """In float32, in eight lanes from front to back, as the official code's library sums: where a rank equals the bound
    but for rounding (at ρ = 2 the highest always does), it is this that decides.
    """
    lanes = np.zeros((-(-len(ranks) // _LANES), _LANES), np.float32)
    lanes.reshape(-1)[: len(ranks)] = ranks
    return float(np.add.accumulate(np.add.accumulate(lanes)[-1])[-1] / np.float32(len(ranks)))


def _is_vector(block: Block) -> bool:
    return len(block.stored[0].shape) < 2


def _is_lookup(block: Block) -> bool:
    """Whether the stored rows are tokens' embeddings, each a column of the matrix that looks them up."""
    return len(block.stored[0].shape) == 2 and is_embedding(block.tensor)


def _over_rows(values: Tensor) -> Tensor:
    """The sum over the first dimension by halves: it depends on the number of rows alone."""
    while (rows := len(values)) > 1:
        half = (rows + 1) // 2
        upper = values[half:]
        values = values[:half].clone()
        values[: rows - half] += upper
    return values[0]
