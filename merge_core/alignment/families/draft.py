"""A permutation spec while it is being written, and the names of a model as modules with parameters."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from merge_core.alignment.spec import Axis, Blocks, Concat, Fixed, PermutationSpec, Permuted, names
from merge_core.errors import IncompatibleModels, Problem
from merge_core.headers import clip

Shape = tuple[int, ...]

_NORM = re.compile(r"norm|layrnorm|(^|_)ln(_|\d|$)|(^|_)bn(_|\d|$)", re.IGNORECASE)
_NUMBERED = re.compile(r"\.\d+(?:\.|$)")
_DIGITS = re.compile(r"(\d+)")
_KINDS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_OLD_KINDS = {"gamma": "weight", "beta": "bias"}
_MOST_PERMUTATIONS = 2**18
MOST_BLOCKS = 2**14
"""Heads or groups of one axis; config and shapes come from files that nobody vouches for."""

ADVICE = "give a spec of your own: a JSON file that names the permutation on each axis of each tensor"


@dataclass(frozen=True)
class Module:
    """What a path of names holds: kind (`weight`, `bias`, …) → tensor."""

    path: str
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def word(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]


def is_norm(path: str) -> bool:
    """Whether the last word of a path is what norms are called.

    >>> [is_norm(path) for path in ("h.0.ln_1", "bn2", "a.LayerNorm", "downsample", "normal.linear")]
    [True, True, True, False, False]
    """
    return _NORM.search(path.rpartition(".")[2]) is not None


def split(tensor: str) -> tuple[str, str]:
    """The module and the kind of a tensor.

    >>> split("fc.weight"), split("attn.in_proj_bias"), split("cls_token"), split("LayerNorm.gamma")
    (('fc', 'weight'), ('attn.in_proj', 'bias'), ('cls_token', 'weight'), ('LayerNorm', 'weight'))
    """
    module, _, kind = tensor.rpartition(".")
    if kind in _KINDS and module:
        return module, kind
    if kind in _OLD_KINDS and is_norm(module):
        return module, _OLD_KINDS[kind]
    for ending in ("weight", "bias"):
        if kind.endswith(f"_{ending}"):
            return tensor.removesuffix(f"_{ending}"), ending
    return tensor, "weight"


def natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts numbers in names as numbers: `layers.2` before `layers.10`."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _DIGITS.split(path) if part)


def pattern(path: str) -> str:
    """A path with every number in it forgotten: what the same place in each layer has in common."""
    return _DIGITS.sub("#", path)


def nearest(path: str, among: Container[str]) -> str:
    """The path itself or the closest one above it that is `among` some; empty if none is."""
    while path and path not in among:
        path = path.rpartition(".")[0]
    return path


def stack(path: str) -> str:
    """What stands before the first number in a path: the stack of layers that it is in.

    >>> stack("vision_model.encoder.layers.0.mlp.fc1"), stack("pooler.dense")
    ('vision_model.encoder.layers', 'pooler.dense')
    """
    return _NUMBERED.split(path, maxsplit=1)[0]


def by_stack(tensors: Iterable[str], stacks: Iterable[str]) -> dict[str, list[str]]:
    """Stack of layers → the tensors that belong to the same part of the model: those that share most of its path; of
    stacks that share as much, the one with the shortest path.
    """
    found: dict[str, list[str]] = {}
    nearest_of: dict[str, str] = {}
    for path in sorted(stacks, key=lambda each: (each.count("."), each)):
        found[path] = []
        for above in _above(path):
            nearest_of.setdefault(above, path)
    for tensor in tensors:
        path = next((nearest_of[above] for above in _above(stack(tensor)) if above in nearest_of), "")
        found.setdefault(path, []).append(tensor)
    return found


def _above(path: str) -> Iterator[str]:
    """A path and all that stand above it, up to the empty one."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


class Draft:
    """The axes of a model's tensors, filled in place by place.

    Everything that cannot be placed is gathered, so that one refusal names it all.
    """

    def __init__(self, tensors: Mapping[str, Sequence[int]]) -> None:
        self.shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in tensors.items()}
        self.modules: dict[str, Module] = {}
        self.children: dict[str, dict[str, Module]] = {}
        for name in tensors:
            path, kind = split(name)
            module = self.modules.setdefault(path, Module(path))
            if kind in module.parameters:
                self.modules[name] = module = Module(name)
            module.parameters[kind] = name
            self.children.setdefault(module.parent, {})[module.word] = module
        self.placed: set[str] = set()
        """Tensors whose role is known."""
        self.unmeasured: set[str] = set()
        self._permutations: dict[str, int] = {}
        self._axes: dict[str, list[Axis | None]] = {name: [None] * len(shape) for name, shape in self.shapes.items()}
        self._problems: dict[str, Problem] = {}

    def permutation(self, name: str, size: int) -> Axis:
        """An axis that follows a permutation of its own; one element has nowhere to go."""
        if size < 2:
            return Fixed(size)
        self._permutations[name] = size
        if len(self._permutations) > _MOST_PERMUTATIONS:
            raise IncompatibleModels(f"more than {_MOST_PERMUTATIONS:,} permutations; {ADVICE}")
        return Permuted(name)

    def blocks(self, outer: str | None, inner: Sequence[Axis]) -> Axis:
        """Blocks in a row that move as wholes, or stay if `outer` is None, each with what happens inside it."""
        count = len(inner)
        if outer is None or count < 2:
            outer = None
        else:
            self._permutations[outer] = count
        if count == 1:
            return inner[0]
        same = all(each == inner[0] for each in inner)
        if outer is not None and same and inner[0] == Fixed(1):
            return Permuted(outer)
        return Blocks(outer, count, inner[0] if same else tuple(inner))

    def put(self, tensor: str, number: int, axis: Axis) -> None:
        """Say what happens to an axis of a tensor."""
        self.placed.add(tensor)
        if not any(names(axis)):
            return
        if not 0 <= number < len(self._axes[tensor]):
            self.refuse(tensor, "a tensor of this role has more axes")
            return
        before = self._axes[tensor][number]
        if before is not None and before != axis:
            self.refuse(tensor, "two layers want it permuted in different ways")
        self._axes[tensor][number] = axis

    def put_rows(self, module: Module, axis: Axis, number: int = 0) -> None:
        """Say what happens to the outputs of a linear layer: an axis of its weight, and its bias."""
        self.put(module.parameters["weight"], number, axis)
        if bias := module.parameters.get("bias"):
            self.put(bias, 0, axis)

    def put_vectors(self, module: Module, axis: Axis) -> None:
        """Say what happens to all of a module's vectors: weight, bias and running statistics of a norm."""
        for kind, tensor in module.parameters.items():
            if self.shapes[tensor]:
                self.put(tensor, 0, axis)
            self.placed.add(tensor)
            if kind.startswith("running_"):
                self.unmeasured.add(tensor)

    def fix(self, tensors: Iterable[str]) -> None:
        """Say of tensors that nothing happens to them."""
        self.placed.update(tensors)

    def repeated(self, axis: Axis, times: int) -> Axis:
        """An axis where every element of another stands `times` in a row: channels, flattened with their pixels."""
        match axis:
            case _ if times == 1:
                return axis
            case Fixed(size):
                return Fixed(size * times)
            case Permuted(name):
                return Blocks(name, self._permutations[name], Fixed(times))
            case Blocks(outer, count, inner):
                if isinstance(inner, tuple):
                    return Blocks(outer, count, tuple(self.repeated(each, times) for each in inner))
                return Blocks(outer, count, self.repeated(inner, times))
            case Concat(parts):
                return Concat(tuple(self.repeated(part, times) for part in parts))

    def size(self, axis: Axis) -> int:
        """Elements of an axis."""
        return PermutationSpec(self._permutations, {}).size(axis)

    def weight(self, module: Module) -> Shape:
        """The shape of a module's weight; empty if it has none."""
        return self.shapes[module.parameters["weight"]] if "weight" in module.parameters else ()

    def refuse(self, tensor: str, why: str) -> None:
        """Note that a tensor cannot be placed, and why."""
        detail = f"{clip(tensor)} {list(self.shapes.get(tensor, ()))}: {why}"
        self._problems.setdefault(tensor, Problem(detail, tensor=tensor))

    def refuse_module(self, module: Module, why: str) -> None:
        self.refuse(next(iter(module.parameters.values())), why)

    @property
    def is_refused(self) -> bool:
        return bool(self._problems)

    def finish(self) -> PermutationSpec:
        """The spec. Raises `IncompatibleModels` that names every tensor which could not be placed."""
        problems = list(self._problems.values())
        if problems:
            problems[-1] = Problem(f"{problems[-1].detail}; {ADVICE}", tensor=problems[-1].tensor)
            raise IncompatibleModels.of(problems)
        axes = {name: tuple(axes) for name, axes in self._axes.items()}
        used = set(names(*(axis for each in axes.values() for axis in each if axis is not None)))
        sizes = {name: size for name, size in self._permutations.items() if name in used}
        moved = {name for name in self.unmeasured if any(axes[name])}
        spec = PermutationSpec(sizes, axes, frozenset(moved))
        spec.check(self.shapes)
        return spec
