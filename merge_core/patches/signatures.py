"""Robust weight signatures: what training on corrupted images adds to a model's first layers (Cai et al., 2023).

    a = θ_clean − θ₀      d = mean θ_corrupted − θ₀      v = d − (⟨d, a⟩ / ⟨a, a⟩) a      patched = θ + strength · v

per parameter tensor: v is the part of d that is orthogonal to what training on clean images did. Of BatchNorms the
corrupted models' values, running statistics too, are put in place instead. https://arxiv.org/abs/2302.12480

The official code differs in two ways. It applies a weight twice, so that its weights are the square roots of our
strengths. And it puts the corrupted models' mean in place of every tensor whose name contains `bn` or `downsample`: of
a ResNet that is also the 1x1 convolution of each downsampling path, in all layers. Here such a convolution is one like
any other; `replace: [downsample]` does as the official code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from merge_core import kernels
from merge_core.dtypes import FLOAT32, FLOAT64, DType
from merge_core.errors import IncompatibleModels, NonFinite, Problem, RecipeError
from merge_core.headers import TensorInfo
from merge_core.kernels.plain import pairs, rounded
from merge_core.kernels.vectors import Rows
from merge_core.patches.encoding import Difference
from merge_core.patches.shallow import RUNNING, batch_norms, layers
from merge_core.statistics import GrainSums
from merge_core.weights import Weights

BatchNorm = Literal["replace", "project", "leave"]


@dataclass(frozen=True)
class Trio:
    """The models a signature is made of: where training began, trained on clean images, and on corrupted ones.

    `names` are what messages call them, in that order.
    """

    origin: Weights
    clean: Weights
    corrupted: tuple[Weights, ...]
    names: tuple[str, ...]

    @property
    def all(self) -> tuple[Weights, ...]:
        return (self.origin, self.clean, *self.corrupted)


class Mean(Difference):
    """A tensor of the corrupted models' mean, and its like in the clean model."""

    def __init__(self, trio: Trio, name: str, tick: Callable[[int], None]) -> None:
        clean, first = trio.clean.tensors[name], trio.corrupted[0].tensors[name]
        super().__init__(trio.corrupted[0], first, trio.clean, clean, tick)
        self.trio = trio

    @property
    def read(self) -> Sequence[tuple[Weights, str]]:
        """The models that are read, with what messages call them."""
        return list(zip(self.trio.corrupted, self.trio.names[2:], strict=True))

    @property
    def working(self) -> DType:
        formats = {weights.tensors[self.name].dtype for weights in self.trio.all if self.name in weights.tensors}
        return FLOAT64 if FLOAT64 in formats else FLOAT32

    @property
    def block_bytes(self) -> int:
        elements = min(self.block_rows, max(1, self.grains.rows)) * max(1, self.grains.width)
        infos = [(weights, weights.tensors[self.name]) for weights, _ in self.read]
        each = sum(info.dtype.itemsize + weights.temporary(info) + self.working.itemsize for weights, info in infos)
        beside = max(weights.thread_bytes(info) for weights, info in infos)
        return math.ceil(elements * (each + 4 * self.working.itemsize)) + beside

    @property
    def block_rows(self) -> int:
        is_whole = any(weights.is_whole(weights.tensors[self.name]) for weights, _ in self.read)
        return max(1, self.grains.rows) if is_whole else super().block_rows

    def runs(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Start and stop row, and the rows of every model that is read, in the working format. Raises `NonFinite`."""
        for weights, _ in self.read:
            weights.prepare(weights.tensors[self.name], None)
        for start in range(0, self.info.rows if self.info.elements else 0, self.block_rows):
            stop = min(start + self.block_rows, self.info.rows)
            yield start, stop, [self._rows(weights, model, start, stop) for weights, model in self.read]

    def _rows(self, weights: Weights, model: str, start: int, stop: int) -> Tensor:
        rows = weights.rows(weights.tensors[self.name], start, stop)
        self.tick(rows.nbytes)
        if (found := kernels.first_nonfinite(rows)) >= 0:
            at = found + start * self.grains.width
            detail = f"{self.name} of {model} holds NaN or infinity at element {at:,}; repair the model"
            raise NonFinite(self.name, model, detail)
        return rows.to(self.working.torch)

    def tuned_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop, (mean, *others) in self.runs():
            for rows in others:
                mean = mean + rows
            yield start, stop, rounded(mean / (1 + len(others)), self.info.dtype.torch)


class Orthogonal(Mean):
    """v of one tensor: the corrupted models' mean change, without what lies along the clean model's."""

    @property
    def read(self) -> Sequence[tuple[Weights, str]]:
        return list(zip(self.trio.all, self.trio.names, strict=True))

    @cached_property
    def _gram(self) -> tuple[float, float, float]:
        """⟨a, a⟩, ⟨d, a⟩ and ⟨d, d⟩, in one pass, by the grain rule."""
        grains, count = self.grains, len(self.trio.corrupted)
        sums = GrainSums()
        for start, _, (origin, *models) in self.runs():
            rows = [Rows.of(model) for model in models]
            elements = grains.size * max(1, grains.width)
            products = kernels.gram(rows, self.working.torch, elements, Rows.of(origin))
            for offset, values in enumerate(products):
                sums.put(self.name, grains.count, start // grains.size + offset, values)
        found = dict(zip(pairs(1 + count), sums.total().tolist(), strict=True))
        along = sum(found[0, model] for model in range(1, 1 + count)) / count
        size = sum(value * (1 if i == j else 2) for (i, j), value in found.items() if i > 0) / count**2
        return found[0, 0], along, size

    @property
    def coefficient(self) -> float:
        """⟨d, a⟩ / ⟨a, a⟩; 0 where training on clean images left the tensor as it was."""
        clean, along, _ = self._gram
        return along / clean if clean else 0.0

    @property
    def share(self) -> float:
        """‖v‖ / ‖d‖: how much of the change is not what training on clean images did too."""
        clean, along, size = self._gram
        return math.sqrt(max(0.0, 1 - along * along / (clean * size))) if clean * size else 1.0

    def changes(self) -> Iterator[tuple[int, int, Tensor]]:
        coefficient = self.coefficient
        for start, stop, (origin, clean, *corrupted) in self.runs():
            change = corrupted[0] - origin
            for rows in corrupted[1:]:
                change += rows - origin
            yield start, stop, (change / len(corrupted) - (clean - origin) * coefficient).reshape(-1)


def select(
    trio: Trio, chosen: int | Sequence[str], batch_norm: BatchNorm, replace: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The tensors of which a signature keeps the orthogonal part, and those it replaces, in storage order.

    `chosen`: so many layers from the input on, or pieces of tensor names. What has one of the pieces `replace` in its
    name is replaced, wherever it stands. Raises `RecipeError` for a choice that means nothing, and `IncompatibleModels`
    where the models differ.
    """
    tensors = {name: info for name, info in trio.clean.tensors.items() if info.dtype.kind == "float" and info.elements}
    norms = batch_norms(tensors)
    names = _first(tensors, chosen) if isinstance(chosen, int) else _named(tensors, chosen, "layers")
    kept = names - norms
    if batch_norm == "project":
        kept = {name for name in names if name.rpartition(".")[2] not in RUNNING}
    replaced = _named(tensors, replace, "replace") | (norms if batch_norm == "replace" else set())
    kept -= replaced
    problems = [
        problem
        for name in tensors
        if name in kept or name in replaced
        for weights, model in zip(trio.all, trio.names, strict=True)
        if (problem := _misfit(tensors[name], weights, model, is_needed=name in kept or weights is not trio.origin))
    ]
    if problems:
        raise IncompatibleModels.of(problems)
    return [name for name in tensors if name in kept], [name for name in tensors if name in replaced]


def _first(tensors: Mapping[str, TensorInfo], count: int) -> set[str]:
    found = layers(tensors)
    if count > len(found):
        detail = f"{count} layers were asked for, but there are {len(found)} besides the head; or give pieces of names"
        raise RecipeError.of([Problem(detail, "#/layers")])
    return {name for layer in found[:count] for name in layer}


def _named(tensors: Mapping[str, TensorInfo], pieces: Sequence[str], key: str) -> set[str]:
    idle = [i for i, piece in enumerate(pieces) if not any(piece in name for name in tensors)]
    if idle:
        raise RecipeError.of(Problem(f"no tensor's name contains {pieces[i][:60]!r}", f"#/{key}/{i}") for i in idle)
    return {name for name in tensors if any(piece in name for piece in pieces)}


def _misfit(info: TensorInfo, weights: Weights, model: str, *, is_needed: bool) -> Problem | None:
    found = weights.tensors.get(info.name)
    if not is_needed or (found is not None and (found.shape, found.dtype.kind) == (info.shape, "float")):
        return None
    has = "is not there" if found is None else f"is {found.dtype} {list(found.shape)}"
    detail = f"{info.name} {has} in {model}, but {info.dtype} {list(info.shape)} in the clean model"
    return Problem(detail, tensor=info.name)
