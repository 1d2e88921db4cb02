"""What a merge method is: stages that measure, then the paper's equation on one block.

A method's fields are its hyperparameters, resolved for one output tensor. `stages` names what must be known first;
`merge` turns one block into the merged rows, elementwise across rows, pure in its arguments.

`observe` and `merge` use only operations whose bits depend neither on a block's length nor on the instruction set: the
`kernels`, or plain torch with sums over models written out in recipe order (`plain.total`) and sums over elements by
`grain_sums`; no matmul, no `Tensor.sum` of floats, no `softmax`, `lerp` or `addcmul`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from merge_core import kernels, random
from merge_core.kernels.vectors import Marks, Rows, TaskVectors
from merge_core.statistics import Grains, GrainSums, Statistic, Sums

Known = dict[str, Any]
Semantics = Literal["mergekit", "paper"]
Scope = Literal["tensor", "model"]
BaseUse = Literal["required", "optional", "model"]
Extent = Literal["grain", "tensor"]
ExactOn = Literal["any machine", "this machine"]


class PerModelMarker:
    """Marks a field that has one value per model; in a recipe it may stand beside each model."""


PerModel = Annotated[tuple[float, ...], PerModelMarker()]
Share = Annotated[float, Field(ge=0, le=1)]
PerModelShare = Annotated[tuple[Share, ...], PerModelMarker()]


@dataclass(frozen=True)
class Given:
    """Numbers that somebody measured and a method takes from a file, under the merged tensors' names.

    `shape`: "same" as the merged tensor, read row by row with it; "columns" (one number for each of a row), "square"
    (of a matrix, one for each two columns) and "vector" (a list of any length) are read whole. `per_model`: each model
    may have its own. A recipe must name a `required` one; a `partial` one may lack tensors.
    """

    description: str
    shape: Literal["same", "columns", "square", "vector"] = "same"
    per_model: bool = False
    required: bool = True
    partial: bool = False


OWN_BASE = "base_model"
"""The name by which a block knows the bases that stand beside models."""


class Randomness:
    """Uniform numbers for the elements of an output tensor; tests put recorded masks in its place."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.marks = Marks()

    def key(self, tensor: str, model: int) -> int | None:
        """The key of a tensor's random stream for one model; None where numbers come from elsewhere."""
        return random.stream_key(self.seed, model, tensor)

    def uniform(self, tensor: str, model: int, start: int, count: int, device: torch.device) -> Tensor:
        """`[count]`, float32, in [0, 1), for the element indices from `start`."""
        return kernels.uniform(random.stream_key(self.seed, model, tensor), start, count, device)


@dataclass
class Block:
    """A run of whole grains of one output tensor, from all models at once.

    `stored` are the models' rows in recipe order and `stored_base` those of the base or None, each
    `[rows, *shape[1:]]` in its own dtype. Arithmetic is in `working`: float32, or float64 where a source is stored so.
    `first_grain` is the first grain's index in its tensor. `out`, if given, is where the merged rows may be put,
    rounded to its dtype. `given` are the rows of the method's statistics by name, one for all models or one for each,
    None where a file has no such tensor.
    """

    stored: Sequence[Rows]
    stored_base: Rows | None = None
    tensor: str = "tensor"
    grains: Grains = field(default_factory=lambda: Grains(1, 1, 1))
    first_grain: int = 0
    randomness: Randomness | None = None
    working: torch.dtype = torch.float32
    out: Tensor | None = None
    given: Mapping[str, Sequence[Rows | None]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, models: Sequence[Any], base: Any = None, *, seed: int = 0, tensor: str = "tensor", **given: Sequence[Any]
    ) -> Self:
        """A whole small tensor as one block, for examples and tests."""

        def rows(values: Any) -> Rows:
            return Rows.of(torch.as_tensor(values, dtype=torch.float32))

        stored = [rows(model) for model in models]
        origin = None if base is None else rows(base)
        numbers = {name: [None if each is None else rows(each) for each in of] for name, of in given.items()}
        return cls(stored, origin, tensor, Grains.of(stored[0].shape), 0, Randomness(seed), given=numbers)

    @cached_property
    def models(self) -> Tensor:
        """`[models, rows, *shape[1:]]`, in the working dtype."""
        return torch.stack([rows.load().to(self.working) for rows in self.stored])

    @cached_property
    def base(self) -> Tensor:
        """`[rows, *shape[1:]]`, in the working dtype."""
        return self.origin.load().to(self.working)

    @property
    def task_vectors(self) -> TaskVectors:
        """δᵢ = θᵢ − θ₀, as kernels take them."""
        return TaskVectors(
            self.origin,
            tuple(self.stored),
            self.working,
            self.tensor,
            self.start,
            self.grain_elements,
            self.randomness,
            self.out,
        )

    @property
    def origin(self) -> Rows:
        """The base's rows, as they are stored."""
        if self.stored_base is None:
            raise ValueError("this block has no base")
        return self.stored_base

    @property
    def elements(self) -> int:
        """Elements of one model in this block."""
        return self.stored[0].elements

    @property
    def start(self) -> int:
        """The first element's index in its tensor."""
        return self.first_grain * self.grain_elements

    @property
    def grain_elements(self) -> int:
        return self.grains.size * max(1, self.grains.width)

    def numbers(self, name: str, model: int = 0) -> Tensor:
        """What was given of that name about this tensor and model, in the working dtype."""
        if (rows := self._given(name, model)) is None:
            raise ValueError(f"this block has no {name} of model {model}")
        return rows.load().to(self.working)

    def has_numbers(self, name: str, model: int = 0) -> bool:
        """Whether anything was given of that name about this tensor and model."""
        return self._given(name, model) is not None

    def uniform(self, model: int = 0) -> Tensor:
        """A random number in [0, 1) for each element, float32, `[rows, *shape[1:]]`."""
        like = self.stored[model]
        if self.randomness is None:
            raise ValueError("this block was made without randomness")
        device = like.load().device
        return self.randomness.uniform(self.tensor, model, self.start, self.elements, device).reshape(like.shape)

    def linear(self, weights: tuple[float, ...], divisor: float = 1.0, *, with_base: bool = False) -> Tensor:
        """Σᵢ wᵢ θᵢ / divisor, the base first where it takes part."""
        sources = [self.origin, *self.stored] if with_base else list(self.stored)
        return kernels.linear(sources, weights, divisor, self.working, self.grain_elements, self.out)

    @property
    def vectors(self) -> Tensor:
        """`[models, rows, *shape[1:]]`: the task vectors, or the models where there is no base; working dtype."""
        return self.models if self.stored_base is None else kernels.values(self.task_vectors)

    def combination(self, coefficients: tuple[float, ...]) -> Tensor:
        """θ₀ + Σᵢ cᵢ δᵢ, or Σᵢ cᵢ θᵢ where there is no base."""
        if self.stored_base is None:
            return self.linear(coefficients)
        return kernels.combine(self.task_vectors.times(coefficients), scale=1.0)

    def put_sums(self, found: dict[str, Statistic], name: str, per_grain: Sums) -> None:
        """Add float64 sums of each grain, `[grains, ...]`, to the `GrainSums` of that name."""
        sums = cast(GrainSums, found.setdefault(name, GrainSums()))
        for offset, value in enumerate(per_grain):
            sums.put(self.tensor, self.grains.count, self.first_grain + offset, value)

    def _given(self, name: str, model: int) -> Rows | None:
        each = self.given.get(name, (None,))
        return each[model if len(each) > 1 else 0]


class Stage(ABC):
    """One pass over the inputs before the merge: what to observe in each block, and what it comes to."""

    name: ClassVar[str]
    reads: ClassVar[float] = 1.0
    """About how much of a tensor the pass reads."""

    @property
    def expected(self) -> bool:
        """Whether a plan reckons with the pass."""
        return True

    @property
    def space(self) -> int:
        """Bytes per model that a thread counts in, besides its blocks."""
        return 0

    def needed(self, known: Known) -> bool:
        """Whether the pass has to be made, given what earlier stages came to."""
        return True

    def kept(self, rows: int) -> int:
        """Bytes that it keeps of a tensor of so many rows, per model and thread, until it is finished."""
        return 0

    def concerns(self, tensor: str, known: Known) -> bool:
        """Whether the pass has to read this tensor."""
        return True

    @abstractmethod
    def observe(self, block: Block, known: Known, found: dict[str, Statistic]) -> None:
        """Measure one block and add it to what was found; disjoint blocks come in any order, each thread has its own
        `found`.
        """

    @abstractmethod
    def finish(self, found: Mapping[str, Statistic], known: Known) -> None:
        """Turn the added-up statistics into plain numbers and lists in `known`; it crosses workers as JSON."""


class MergeMethod(BaseModel, ABC):
    """Base class of all methods: subclass it in a file of `merge_core/methods` and it is known everywhere.

    Class attributes: `name` (in recipes), `title`, `paper` (URL), `base` ("required": subtracted or interpolated from;
    "optional": subtracted where one is given; "model": a base is one of the models, if it has a weight or none is
    asked for), `count` (fewest and most models besides the base), `scopes` it can be measured over, the default
    first, `measured`, the parameters its statistics depend on (alike for all tensors where the scope is the model),
    whose meaning of the name it is (`semantics`), and `workspace`: the temporaries that the plain form holds at once,
    as arrays of a block's size, per model and fixed. `statistics` names the files of numbers it takes, `own_bases` says
    that each model brings the base it was tuned from, `precision` what the arithmetic is done in at least, `exact_on`
    where the same recipe gives the same bytes, which with BLAS or LAPACK is not any machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, defer_build=True)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    base: ClassVar[BaseUse] = "required"
    count: ClassVar[tuple[int, int | None]] = (1, None)
    scopes: ClassVar[tuple[Scope, ...]] = ("tensor",)
    measured: ClassVar[tuple[str, ...]] = ()
    copies: ClassVar[bool] = False
    semantics: ClassVar[Semantics] = "mergekit"
    workspace: ClassVar[tuple[int, int]] = (2, 4)
    statistics: ClassVar[Mapping[str, Given]] = {}
    own_bases: ClassVar[bool] = False
    precision: ClassVar[Literal["float32", "float64"]] = "float32"
    exact_on: ClassVar[ExactOn] = "any machine"

    def extent(self, shape: Sequence[int]) -> Extent:
        """What a block must hold at least of a tensor of that shape: a grain, which is whole rows of the first
        dimension, or all of it. A method whose rows are in the last dimension takes a 1-D tensor as one row.
        """
        return "grain"

    def held(self, shape: Sequence[int]) -> float | None:
        """How many arrays of a tensor's size are held at once by a method that sees it whole but reads it in runs of
        rows, temporaries included; None where `workspace` says it.
        """
        return None

    def stages(self, scope: Scope) -> Sequence[Stage]:
        """The passes this tensor needs before `merge`; none for most methods."""
        return ()

    @abstractmethod
    def merge(self, block: Block, known: Known) -> Tensor:
        """The merged rows of one block, in the working dtype, or rounded into `block.out`."""

    def needs(self, statistic: str, model: int) -> bool:
        """Whether the recipe must name that file for that model, given the parameters; if not, it is not read."""
        return self.statistics[statistic].required

    def warnings(self, known: Known) -> Sequence[str]:
        """What the user should know of what the whole model's statistics came to."""
        return ()

    @property
    def is_fused(self) -> bool:
        """Whether measuring and merging go through `kernels` alone, whose compiled form needs no workspace."""
        return False

    @property
    def is_copy(self) -> bool:
        """Whether the output is the one model's stored bits, so that no arithmetic is done at all."""
        return False

    @classmethod
    @functools.cache
    def parameters(cls) -> dict[str, bool]:
        """Every parameter's name in a recipe, and whether it is per model."""
        hints = get_type_hints(cls, include_extras=True)
        return {
            info.alias or name: any(isinstance(mark, PerModelMarker) for mark in get_args(hints[name])[1:])
            for name, info in cls.model_fields.items()
        }

    @classmethod
    @functools.cache
    def required_parameters(cls) -> set[str]:
        return {info.alias or name for name, info in cls.model_fields.items() if info.is_required()}

    @classmethod
    def example_parameters(cls) -> dict[str, Any]:
        """Values by recipe name with which the method does all its work: the fields' examples, else of those required
        0.7.
        """
        examples = {info.alias or name: info.examples for name, info in cls.model_fields.items()}
        required = dict.fromkeys(cls.required_parameters(), 0.7)
        return required | {name: values[0] for name, values in examples.items() if values}


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
