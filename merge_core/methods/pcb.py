"""PCB-Merging: parameter competition balancing (Du et al., 2024).

aᵢ = |δᵢ| clamped to its quantiles        mᵢ = (aᵢ − min aᵢ) / (max aᵢ − min aᵢ)
bᵢ = exp(n mᵢ²) ⊙ tanh(δᵢ ⊙ Σⱼ δⱼ)         sᵢ = bᵢ from 0 at its (1 − r)-quantile to 1 at its maximum
θ = θ₀ + λ · Σᵢ λᵢ sgn(δᵢ) aᵢ sᵢ / Σᵢ sᵢ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from merge_core import kernels
from merge_core.kernels.scores import Kind, Scores, compete
from merge_core.method import Block, Known, MergeMethod, PerModel, Scope, Stage, spread
from merge_core.order import order

Variant = Literal["A", "B", "C"]
_KINDS: dict[Variant, Kind] = {"A": "balance", "B": "signed balance", "C": "paired balance"}
_CLAMPS: dict[Variant, float] = {"A": 1e-4, "B": 1e-2, "C": 1e-2}
_MOST_MODELS = 80
"""exp(n) fits into a float32 up to 88."""


class Pcb(MergeMethod):
    """Let the entries of each task vector compete inside it, and by how they agree with the other task vectors.

    The authors published three forms of bᵢ's second factor: A, of their main file and of the language models,
    tanh(δᵢ ⊙ Σⱼ δⱼ); B, of the vision models, tanh(δᵢ ⊙ Σⱼ sgn(δⱼ) mⱼ); C, of the search for λᵢ,
    Σⱼ tanh(sgn(δᵢ) mᵢ ⊙ sgn(δⱼ) mⱼ). All quantiles are taken over the whole model, exactly; one outlier sets the scale
    of everything, which is what `clamp` is for.

    Where the authors' code divides 0 by 0, this goes on: a model of whose magnitudes nothing is left after clamping
    takes no part; where all of a model's clamped magnitudes, or all its scores, are equal (tiny tensors in the scope
    `tensor`), nothing can compete, and the task vectors are averaged.

    Where the sum is 3 or 4 each model agrees with it; −2 is outvoted in the first model and won by the others:

    >>> block = Block.of([[1.0, 2.0, 2.0], [1.0, -2.0, 1.0], [1.0, -2.0, 1.0]], base=[0.0, 0.0, 0.0])
    >>> known = {"magnitudes": {"values": [[1.0, 2.0]] * 3}, "scores": {"values": [[19.0]] * 3, "largest": [21.0] * 3}}
    >>> Pcb().merge(block, known)
    tensor([ 0., -2.,  2.])
    """

    name: ClassVar[str] = "pcb"
    title: ClassVar[str] = "PCB-Merging"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.02396"
    count: ClassVar[tuple[int, int | None]] = (1, _MOST_MODELS)
    scopes: ClassVar[tuple[Scope, ...]] = ("model", "tensor")
    measured: ClassVar[tuple[str, ...]] = ("mask_ratio", "variant", "clamp")
    workspace: ClassVar[tuple[int, int]] = (10, 12)

    mask_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="r: share of each task vector's entries whose scores count, above 0 to 1", examples=[0.3]
    )
    variant: Variant = Field("A", description="which of the authors' forms of the agreement between models; see above")
    clamp: Annotated[float, Field(ge=0, lt=0.5)] | None = Field(
        None,
        description="c: share of each task vector's largest and of its smallest magnitudes that are clamped; by "
        "default 1e-4 for variant A (the authors' language models: 1e-2), 1e-2 for B and C",
    )
    weight: PerModel = Field((1.0,), description="λᵢ: coefficient of each task vector")
    lambda_: float = Field(1.0, alias="lambda", description="λ: scale of the merged task vector")

    @property
    def is_fused(self) -> bool:
        return True

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [*order("magnitudes", _magnitudes, self._clamped_places), *order("scores", self._scores, self._floor)]

    def warnings(self, known: Known) -> Sequence[str]:
        return [
            f"model {number} takes no part in the merge: its task vector is zero, or all of it that is not was clamped"
            for number, (_, high) in enumerate(known["magnitudes"]["values"], start=1)
            if not high > 0
        ]

    def merge(self, block: Block, known: Known) -> Tensor:
        scores = self._scores(block, known)
        weights = spread(self.weight, len(block.stored))
        tops, floors = known["scores"]["largest"], [values[0] for values in known["scores"]["values"]]
        both = zip(floors, tops, strict=True)
        are_equal = [low == high for low, high in zip(scores.lows, scores.highs, strict=True)]
        competes = [floor < top and not equal for (floor, top), equal in zip(both, are_equal, strict=True)]
        if not any(scores.live):
            return kernels.combine(block.task_vectors.times((0.0,)), scale=1.0)
        if any(is_live and not its for is_live, its in zip(scores.live, competes, strict=True)):
            count = sum(scores.live)
            shares = tuple(weight * is_live / count for weight, is_live in zip(weights, scores.live, strict=True))
            return kernels.combine(block.task_vectors.times(shares), scale=self.lambda_)
        return compete(scores, tuple(floors), tuple(tops), weights, self.lambda_)

    def _clamped_places(self, entries: int, nonzero: int) -> tuple[int, int]:
        share = _CLAMPS[self.variant] if self.clamp is None else self.clamp
        return min(int(entries * share), entries - 1), max(0, int(entries * (1 - share) - 1))

    def _floor(self, entries: int, nonzero: int) -> tuple[int]:
        return (min(int(entries * (1 - self.mask_ratio)), entries - 1),)

    def _scores(self, block: Block, known: Known) -> Scores:
        lows, highs = zip(*known["magnitudes"]["values"], strict=True)
        live = tuple(high > 0 for high in highs)
        return Scores(block.task_vectors, _KINDS[self.variant], live, lows, highs)


def _magnitudes(block: Block, known: Known) -> Scores:
    return Scores(block.task_vectors, "magnitude")
