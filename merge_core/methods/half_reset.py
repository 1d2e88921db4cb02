"""Half reset, after half fine-tuning (Hui et al., 2024): set a share of what was tuned back to the base.

θ = m ⊙ θ₀ + (1 − m) ⊙ θ₁        m = 1 on a random share of the tensors, or of the elements
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from pydantic import Field, field_validator
from torch import Tensor

from merge_core.method import Block, Known, MergeMethod, Scope, Share, Stage
from merge_core.statistics import RowValues, Statistic

Category = Literal["attention", "feed_forward", "norm", "other"]
_CATEGORIES: tuple[Category, ...] = get_args(Category)
_PIECES: dict[Category, tuple[str, ...]] = {
    "norm": ("norm", "ln_", ".ln"),
    "attention": ("attn", "attention"),
    "feed_forward": ("mlp", "ffn", "feed_forward", "feedforward", "fc1", "fc2", "intermediate", "output.dense"),
}


def category_of(tensor: str) -> Category:
    """What a tensor belongs to, by its name.

    >>> category_of("model.layers.0.self_attn.q_proj.weight")
    'attention'
    >>> category_of("model.embed_tokens.weight")
    'other'
    """
    return next((name for name, pieces in _PIECES.items() if any(piece in tensor for piece in pieces)), "other")


class HalfReset(MergeMethod):
    """Take a random half of a fine-tune back, so that it remembers more of what the base knew.

    By tensor, round(fraction · n) of the n tensors of each category are the base's, bit for bit, the others the
    tuned model's. By element, each is the base's with probability `fraction`; nothing is rescaled, unlike DARE.

    >>> block = Block.of([[3.0, 4.0]], base=[1.0, 2.0], tensor="layers.0.mlp.weight")
    >>> HalfReset().merge(block, {"reset": ["layers.0.mlp.weight"]}), HalfReset().merge(block, {"reset": []})
    (tensor([1., 2.]), tensor([3., 4.]))
    """

    name: ClassVar[str] = "half_reset"
    title: ClassVar[str] = "Half reset"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.18466"
    count: ClassVar[tuple[int, int | None]] = (1, 1)
    scopes: ClassVar[tuple[Scope, ...]] = ("model",)
    measured: ClassVar[tuple[str, ...]] = ("unit", "fraction", "categories")
    workspace: ClassVar[tuple[int, int]] = (2, 4)

    fraction: Share = Field(0.5, description="share that is set back to the base")
    unit: Literal["tensor", "element"] = Field("tensor", description="what is drawn: whole tensors, or single elements")
    categories: str = Field(
        ", ".join(_CATEGORIES),
        description="what may be set back, each category a share of its own tensors: some of "
        "attention, feed_forward, norm and other, with commas between",
    )

    @field_validator("categories")
    @classmethod
    def _are_known(cls, written: str) -> str:
        names = [name.strip() for name in written.split(",")]
        if unknown := [name for name in names if name not in _CATEGORIES]:
            raise ValueError(f"{unknown[0]!r} is no category; there are {', '.join(_CATEGORIES)}")
        return ", ".join(name for name in _CATEGORIES if name in names)

    def stages(self, scope: Scope) -> Sequence[Stage]:
        return [_Draw(self.fraction, self.categories)] if self.unit == "tensor" else ()

    def merge(self, block: Block, known: Known) -> Tensor:
        if self.unit == "tensor":
            return block.base if block.tensor in known["reset"] else block.models[0]
        if category_of(block.tensor) not in self.categories.split(", "):
            return block.models[0]
        return torch.where(block.uniform() < self.fraction, block.base, block.models[0])


@dataclass
class _Draw(Stage):
    """Which tensors are set back: those with the lowest random numbers of their category. Reads no weight."""

    fraction: float
    categories: str
    name: ClassVar[str] = "drawing tensors"
    reads: ClassVar[float] = 0.0

    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        if block.first_grain == 0 and block.randomness is not None:
            drawn = block.randomness.uniform(block.tensor, 0, 0, 1, torch.device("cpu"))
            values = cast(RowValues, found.setdefault("drawn", RowValues()))
            values.put(block.tensor, 1, 0, drawn.double().numpy())

    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        drawn: dict[str, list[tuple[float, str]]] = defaultdict(list)
        values = cast(RowValues, found["drawn"])
        for tensor, number in values.rows.items():
            drawn[category_of(tensor)].append((float(number[0]), tensor))
        known["reset"] = []
        for category in self.categories.split(", "):
            count = int(self.fraction * len(drawn[category]) + 0.5)
            known["reset"] += [tensor for _, tensor in sorted(drawn[category])[:count]]
