"""What runs whole models on data, as the core sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Some samples as a model takes them. `labels`: the right class of each, or for language models the tokens, of
    which each is to be said after those before; None where the data have none. `mask`: which tokens count,
    `[rows, tokens]`; None for classifiers. `expert`: the place among the recipe's models that it is about, if any.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None
    mask: Tensor | None = None
    expert: int | None = None
    rows: int = 1


@dataclass(frozen=True)
class Outputs:
    """`logits`, float32: `[rows, classes]`, or `[rows, tokens, vocabulary]`; `hidden`: what was asked for of the states
    after each layer, `[rows, tokens, width]`.
    """

    logits: Tensor
    hidden: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Group:
    """The samples of one of the document's files, in batches; `weight`: how much it counts."""

    file: str
    model: str | None
    expert: int | None
    batches: Sequence[Batch]
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What curves call it."""
        return self.model or self.file

    @property
    def samples(self) -> int:
        return sum(batch.rows for batch in self.batches)


class Models(Protocol):
    """Loads models and runs them. Raises `CalibrationFailed` for what cannot be loaded or read."""

    @property
    def digest(self) -> str:
        """The same for the same data, prepared in the same way."""

    def working(self) -> AbstractContextManager[None]:
        """The time in which models are loaded and run."""

    def groups(self, base: Path, experts: Sequence[Path], *, check: bool) -> Sequence[Group]:
        """The data, or those to check with, prepared as the model in the folder `base` takes them. Names of classes are
        those of the expert that data are about.
        """

    def load(self, folder: Path) -> nn.Module:
        """A model, whole, in float32, on the device."""

    def tensors(self, module: nn.Module) -> Mapping[str, Tensor]:
        """Its parameters and buffers, by the names that they have in files; those that files have otherwise, put
        together or apart, are not among them.
        """

    def run(self, module: nn.Module, batch: Batch, hidden: Sequence[int] = ()) -> Outputs:
        """What a model says of a batch; `hidden`: of which layers the states are wanted, 0 being the embeddings."""
