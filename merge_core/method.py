"""What a merge method is: stages that measure, then the paper's equation on one block.

A method's fields are its hyperparameters, resolved for one output tensor. `stages` names what must be known first;
`merge` turns one block into the merged rows, elementwise across rows, pure in its arguments.

`observe` and `merge` use only operations whose bits depend neither on a block's length nor on the instruction set: sums
over models are written out in recipe order (`task_vectors.total`), sums over elements go through `Block.sums`; no
matmul, no `Tensor.sum` of floats, no `softmax`, `lerp` or `addcmul`.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from merge_core import random
from merge_core.statistics import Grains, GrainSums, Statistic, grain_sums

Known = dict[str, Any]
Semantics = Literal["mergekit", "paper"]
Scope = Literal["tensor", "model"]


class PerModelMarker:
    """Marks a field that has one value per model; in a recipe it may stand beside each model."""


PerModel = Annotated[tuple[float, ...], PerModelMarker()]
Share = Annotated[float, Field(ge=0, le=1)]
PerModelShare = Annotated[tuple[Share, ...], PerModelMarker()]


class Randomness:
    """Uniform numbers for the elements of an output tensor; tests put recorded masks in its place."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniform(self, tensor: str, model: int, start: int, count: int) -> Tensor:
        """`[count]`, float32, in [0, 1), for the element indices from `start`."""
        return random.uniform(random.stream_key(self.seed, model, tensor), start, count)


@dataclass
class Block:
    """A run of whole grains of one output tensor, from all models at once.

    `models` is `[models, rows, *shape[1:]]` in recipe order and `base` `[rows, *shape[1:]]` or None, both in the
    working dtype (float32; float64 where a source is stored so). `first_grain` is the first grain's index in its
    tensor.
    """

    models: Tensor
    base: Tensor | None = None
    tensor: str = "tensor"
    grains: Grains = field(default_factory=lambda: Grains(1, 1, 1))
    first_grain: int = 0
    randomness: Randomness | None = None

    @classmethod
    def of(cls, models: Sequence[Any], base: Any = None, *, seed: int = 0, tensor: str = "tensor") -> Self:
        """A whole small tensor as one block, for examples and tests."""
        stack = torch.stack([torch.as_tensor(model, dtype=torch.float32) for model in models])
        origin = None if base is None else torch.as_tensor(base, dtype=torch.float32)
        return cls(stack, origin, tensor, Grains.of(stack.shape[1:]), 0, Randomness(seed))

    @cached_property
    def deltas(self) -> Tensor:
        """Task vectors δᵢ = θᵢ − θ₀: `[models, rows, *shape[1:]]`."""
        if self.base is None:
            raise ValueError("deltas need a base")
        return self.models - self.base

    @property
    def last_grain(self) -> int:
        """One past the last grain."""
        elements = self.models[0].numel()
        return self.first_grain + -(-elements // max(1, self.grains.size * self.grains.width))

    def uniform(self) -> Tensor:
        """One number in [0, 1) per model and element, float32, shaped like `models`."""
        if self.randomness is None:
            raise ValueError("this block was made without randomness")
        start = self.first_grain * self.grains.size * self.grains.width
        count = self.models[0].numel()
        drawn = [self.randomness.uniform(self.tensor, model, start, count) for model in range(len(self.models))]
        return torch.stack(drawn).reshape(self.models.shape)

    def sums(self, values: Tensor) -> GrainSums:
        """Sum `values` (`[..., elements of this block]`) over the elements by the grain rule."""
        found = GrainSums()
        per_grain = grain_sums(values, self.grains.size * self.grains.width)
        for offset, value in enumerate(per_grain):
            found.put(self.tensor, self.grains.count, self.first_grain + offset, value)
        return found


class Stage(ABC):
    """One pass over the inputs before the merge: what to observe in each block, and what it comes to."""

    name: ClassVar[str]

    def needed(self, known: Known) -> bool:
        """Whether the pass has to be made, given what earlier stages came to."""
        return True

    @abstractmethod
    def observe(self, block: Block, known: Known) -> dict[str, Statistic]:
        """Measure one block; results of disjoint blocks are added up in any order."""

    @abstractmethod
    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        """Turn the added-up statistics into plain numbers and lists in `known`; it crosses workers as JSON."""


class MergeMethod(BaseModel, ABC):
    """Base class of all methods: subclass it in a file of `merge_core/methods` and it is known everywhere.

    Class attributes: `name` (in recipes), `title`, `paper` (URL), `base` ("required": subtracted or interpolated from;
    "model": a base is one of the models, if it has a weight), `count` (fewest and most models besides the base),
    `scopes` it can be measured over, the default first, `measured`, the parameters its statistics depend on (alike for
    all tensors where the scope is the model), whose meaning of the name it is (`semantics`), and `workspace`: the
    temporaries it holds at once, as arrays of a block's size, per model and fixed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    base: ClassVar[Literal["required", "model"]] = "required"
    count: ClassVar[tuple[int, int | None]] = (1, None)
    scopes: ClassVar[tuple[Scope, ...]] = ("tensor",)
    measured: ClassVar[tuple[str, ...]] = ()
    copies: ClassVar[bool] = False
    semantics: ClassVar[Semantics] = "mergekit"
    workspace: ClassVar[tuple[int, int]] = (2, 4)

    def stages(self, scope: Scope) -> Sequence[Stage]:
        """The passes this tensor needs before `merge`; none for most methods."""
        return ()

    @abstractmethod
    def merge(self, block: Block, known: Known) -> Tensor:
        """The merged rows of one block, in the working dtype."""

    @property
    def is_copy(self) -> bool:
        """Whether the output is the one model's stored bits, so that no arithmetic is done at all."""
        return False

    @classmethod
    def parameters(cls) -> dict[str, bool]:
        """Every parameter's name in a recipe, and whether it is per model."""
        hints = get_type_hints(cls, include_extras=True)
        return {
            info.alias or name: any(isinstance(mark, PerModelMarker) for mark in get_args(hints[name])[1:])
            for name, info in cls.model_fields.items()
        }

    @classmethod
    def required_parameters(cls) -> set[str]:
        return {info.alias or name for name, info in cls.model_fields.items() if info.is_required()}


def spread(values: Sequence[float], count: int) -> tuple[float, ...]:
    """One value per model: as given, or the one value for all."""
    return tuple(values) if len(values) == count else tuple(values) * count


def load_methods(package: str) -> dict[str, dict[Semantics, type[MergeMethod]]]:
    """Import every module of `package`; return what they define: recipe name → whose meaning → method, sorted by
    name.
    """
    paths: Iterable[str] = importlib.import_module(package).__path__
    found: dict[str, dict[Semantics, type[MergeMethod]]] = {}
    for module in pkgutil.iter_modules(paths):
        for member in vars(importlib.import_module(f"{package}.{module.name}")).values():
            if isinstance(member, type) and issubclass(member, MergeMethod) and "name" in vars(member):
                found.setdefault(member.name, {})[member.semantics] = member
    return dict(sorted(found.items()))
