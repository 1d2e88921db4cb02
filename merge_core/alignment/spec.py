"""Which permutations a model may undergo, and which axis of which tensor each of them moves.

A permutation is a vector of indices with a name; permuting an axis means `new[i] = old[index[i]]`. What happens to an
axis is written as an expression: it stays as it is, it follows one permutation, it falls into blocks that move as
wholes while something happens inside each, or it is several such parts behind one another.

An inner permutation belongs to the place where its block arrives: of a block that moves from 3 to 0 the elements are
arranged by the first inner expression. So permutations of a spec can be inverted and chained, `check` sees to it that
they really can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from merge_core.errors import IncompatibleModels, Problem, RecipeError
from merge_core.headers import MAX_ELEMENTS, clip, is_usable_name
from merge_core.random import permutation, stream_key

Indices: TypeAlias = NDArray[np.int64]
Indexed: TypeAlias = Mapping[str, Indices]
"""The index vector of every permutation of a spec, by name."""

_DEEPEST = 8
_MOST_PERMUTED = 2**24
"""Elements of one permutation, or of an axis of which a spec says anything."""
_MOST_IN_ALL = 2**27
"""Elements of all permutations of a spec: what says where they go is held in memory, for every model."""


@dataclass(frozen=True)
class Fixed:
    """So many elements that stay where they are. In JSON the number itself."""

    size: int


@dataclass(frozen=True)
class Permuted:
    """Elements that follow a permutation. In JSON its name."""

    name: str


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of one size that move by the permutation `outer` (None: they stay), each arranged inside.

    `inner` is what happens inside every block, or one expression for each place a block can arrive at. In JSON
    `{"blocks": outer, "count": count, "of": inner}`.
    """

    outer: str | None
    count: int
    inner: Axis | tuple[Axis, ...]

    def at(self, place: int) -> Axis:
        """What happens inside the block that arrives at a place."""
        return self.inner[place] if isinstance(self.inner, tuple) else self.inner


@dataclass(frozen=True)
class Concat:
    """Parts behind one another. In JSON `{"concat": [part, …]}`."""

    parts: tuple[Axis, ...]


Axis: TypeAlias = Fixed | Permuted | Blocks | Concat
Axes: TypeAlias = tuple[Axis | None, ...]
"""What happens to each axis of a tensor; None: nothing."""


@dataclass(frozen=True)
class PermutationSpec:
    """`permutations`: their sizes by name; `axes`: what happens to the axes of every tensor of the model;
    `unmeasured`: tensors that are permuted, but do not count when two models are compared, such as the running
    statistics of a BatchNorm.
    """

    permutations: Mapping[str, int]
    axes: Mapping[str, Axes]
    unmeasured: frozenset[str] = field(default_factory=frozenset)

    def size(self, axis: Axis) -> int:
        """Elements of an axis."""
        match axis:
            case Fixed(size):
                return size
            case Permuted(name):
                return self.permutations[name]
            case Blocks(_, count, _):
                return count * self.size(axis.at(0)) if count else 0
            case Concat(parts):
                return sum(self.size(part) for part in parts)

    def index(self, axis: Axis, indexed: Indexed) -> Indices:
        """Where each element of a permuted axis comes from: `[size]`, int64."""
        match axis:
            case Fixed(size):
                return np.arange(size, dtype=np.int64)
            case Permuted(name):
                return indexed[name]
            case Blocks(outer, count, inner):
                size = self.size(axis) // max(count, 1)
                sources = np.arange(count, dtype=np.int64) if outer is None else indexed[outer]
                if isinstance(inner, tuple):
                    inside = np.stack([self.index(each, indexed) for each in inner])
                else:
                    inside = self.index(inner, indexed)[np.newaxis]
                return (sources[:, np.newaxis] * size + inside).reshape(-1)
            case Concat(parts):
                starts = accumulate((self.size(part) for part in parts[:-1]), initial=0)
                arranged = [self.index(part, indexed) + start for part, start in zip(parts, starts, strict=True)]
                return np.concatenate(arranged)

    def indices(self, tensor: str, indexed: Indexed) -> tuple[Indices | None, ...]:
        """Where the elements of each axis of a tensor come from; None for an axis that stays as it is."""
        found = (None if axis is None else self.index(axis, indexed) for axis in self.axes[tensor])
        return tuple(None if index is None or _is_identity(index) else index for index in found)

    def identity(self) -> dict[str, Indices]:
        """The permutations that change nothing."""
        return {name: np.arange(size, dtype=np.int64) for name, size in self.permutations.items()}

    def random(self, seed: int) -> dict[str, Indices]:
        """Random permutations, a function of the seed and their names."""
        return {name: permutation(stream_key(seed, 0, name), size).numpy() for name, size in self.permutations.items()}

    def inverse(self, indexed: Indexed) -> dict[str, Indices]:
        """The permutations that undo these."""
        return self._named({axis: np.argsort(self.index(axis, indexed)) for axis in self._distinct_axes()})

    def then(self, first: Indexed, second: Indexed) -> dict[str, Indices]:
        """The permutations that do what `first` does and then, to what came out, `second`."""
        return self._named({a: self.index(a, first)[self.index(a, second)] for a in self._distinct_axes()})

    def _distinct_axes(self) -> list[Axis]:
        return list(dict.fromkeys(axis for axes in self.axes.values() for axis in axes if axis is not None))

    def _named(self, arranged: Mapping[Axis, Indices]) -> dict[str, Indices]:
        """The permutations by name that arrange axes so; names on no axis keep their order."""
        found = self.identity()
        for axis, index in arranged.items():
            self._read(axis, index, found)
        return found

    def _read(self, axis: Axis, index: Indices, found: dict[str, Indices]) -> None:
        match axis:
            case Permuted(name):
                found[name] = index
            case Blocks(outer, count, inner) if count:
                blocks = index.reshape(count, -1)
                size = blocks.shape[1]
                sources = blocks[:, 0] // size if size else np.arange(count, dtype=np.int64)
                if outer is not None:
                    found[outer] = sources
                for place in range(count if isinstance(inner, tuple) else 1):
                    self._read(axis.at(place), blocks[place] - sources[place] * size, found)
            case Concat(parts):
                bounds = accumulate((self.size(part) for part in parts), initial=0)
                for part, (start, stop) in zip(parts, pairwise(bounds), strict=True):
                    self._read(part, index[start:stop] - start, found)
            case _:
                pass

    def check(self, tensors: Mapping[str, Sequence[int]] | None = None) -> None:
        """Raise `IncompatibleModels` unless the spec says of all these tensors (name → shape), and of no other, what
        happens to each of their axes, in the right sizes and so that it can be undone. None: whatever tensors it names.
        """
        known = dict.fromkeys(self.axes) if tensors is None else tensors
        problems = [
            Problem(f"the alignment does not say what happens to {clip(name)} {list(shape)}", tensor=name)
            for name, shape in (tensors or {}).items()
            if name not in self.axes
        ]
        problems += [
            Problem(f"the alignment names {clip(name)}, which is not there", tensor=name)
            for name in [*self.axes, *sorted(self.unmeasured - self.axes.keys())]
            if name not in known
        ]
        if (elements := sum(self.permutations.values())) > _MOST_IN_ALL:
            what = f"the alignment permutes {elements:,} elements in all; at most {_MOST_IN_ALL:,} can be"
            problems.append(Problem(what))
        contexts: dict[str, tuple[_Context, str]] = {}
        for name, axes in self.axes.items():
            problems += [Problem(what, tensor=name) for what in self._wrong(name, axes, known.get(name), contexts)]
        if problems:
            raise IncompatibleModels.of(problems)

    def _wrong(
        self, tensor: str, axes: Axes, shape: Sequence[int] | None, contexts: dict[str, tuple[_Context, str]]
    ) -> Iterator[str]:
        if shape is not None and len(shape) != len(axes):
            yield f"{clip(tensor)} is {list(shape)}, but the alignment describes {len(axes)} axes of it"
            return
        seen: set[str] = set()
        for number, axis in enumerate(axes):
            if axis is None:
                continue
            if wrong := self._unsound(axis):
                yield f"axis {number} of {clip(tensor)}: {wrong}"
                continue
            if (size := self.size(axis)) > _MOST_PERMUTED:
                yield f"axis {number} of {clip(tensor)} has {size:,} elements; at most {_MOST_PERMUTED:,} can be"
                continue
            if shape is not None and size != shape[number]:
                yield f"axis {number} of {clip(tensor)} has {shape[number]:,} elements, the alignment makes it {size:,}"
            found = dict.fromkeys(names(axis))
            for name in found:
                if name in seen:
                    yield f"{clip(name)} permutes two axes of {clip(tensor)}"
            seen |= found.keys()
            misplaced = {}
            for name, context in _contexts(axis, ()):
                before, where = contexts.setdefault(name, (context, tensor))
                if before != context:
                    misplaced[name] = where
            for name, where in misplaced.items():
                other = "at one place" if where == tensor else f"in {clip(where)}"
                yield f"{clip(name)} stands inside other blocks in {clip(tensor)} than {other}"

    def _unsound(self, axis: Axis) -> str | None:
        """What makes an expression meaningless, whatever the axis is."""
        match axis:
            case Permuted(name):
                return None if name in self.permutations else f"nothing says how large {clip(name)} is"
            case Concat(parts):
                return next((wrong for part in parts if (wrong := self._unsound(part))), None)
            case Blocks(outer, count, inner):
                insides = inner if isinstance(inner, tuple) else (inner,)
                if isinstance(inner, tuple) and len(inner) != count:
                    return f"{count} blocks, but {len(inner)} expressions for what is inside them"
                if wrong := next((wrong for each in insides if (wrong := self._unsound(each))), None):
                    return wrong
                if not self.size(axis):
                    return f"{count:,} blocks of no elements"
                if outer is not None and self.permutations.get(outer) != count:
                    return f"{clip(outer)} moves {count} blocks, but its size is {self.permutations.get(outer)}"
                if outer is not None and outer in names(*insides):
                    return f"{clip(outer)} stands inside the blocks that it moves"
                if len({self._form(each) for each in insides}) > 1:
                    return "its blocks differ in size or in what is permuted inside them"
        return None

    def _form(self, axis: Axis) -> Any:
        """An expression without the names: blocks that change places must have the same."""
        match axis:
            case Fixed(size):
                return size
            case Permuted(name):
                return "permuted", self.permutations[name]
            case Blocks(outer, count, inner):
                return outer is not None, count, isinstance(inner, tuple), self._form(axis.at(0)) if count else None
            case Concat(parts):
                return tuple(self._form(part) for part in parts)

    def to_data(self) -> dict[str, Any]:
        """The spec as JSON, which `from_data` reads."""
        return {
            "permutations": dict(self.permutations),
            "axes": {
                name: [None if axis is None else _axis_to_data(axis) for axis in axes]
                for name, axes in self.axes.items()
            },
            "unmeasured": sorted(self.unmeasured),
        }

    @classmethod
    def from_data(cls, data: object, tensors: Mapping[str, Sequence[int]] | None = None) -> Self:
        """A spec from JSON: as `to_data` writes it, or only what stands below its `axes`,
        `{"layers.0.weight": ["P_0", null], …}`.

        Sizes that are not written are those of the `tensors` (name → shape). Raises `RecipeError`.
        """
        if not isinstance(data, Mapping):
            raise _wrong("a spec is a JSON object: the axes of every tensor by its name", "#")
        whole = data if isinstance(data.get("axes"), Mapping) else {"axes": data}
        if unknown := whole.keys() - {"permutations", "axes", "unmeasured"}:
            raise _wrong(
                f"unknown key {clip(min(map(str, unknown)))!r}; a spec has permutations, axes, unmeasured", "#"
            )
        above = "#" if whole["axes"] is data else "#/axes"
        axes: dict[str, Axes] = {}
        for name, written in whole["axes"].items():
            pointer = f"{above}/{_escaped(name)}"
            if not isinstance(name, str) or not is_usable_name(name):
                raise _wrong(f"{clip(name)!r} cannot be the name of a tensor", above)
            if not isinstance(written, list):
                raise _wrong(f"{clip(name)} needs a list with an entry for each of its axes", pointer)
            axes[name] = tuple(
                None if each is None else _axis_from_data(each, f"{pointer}/{i}") for i, each in enumerate(written)
            )
        sizes = whole.get("permutations", {})
        if not isinstance(sizes, Mapping) or not all(
            isinstance(name, str) and is_usable_name(name) and _is_size(size) for name, size in sizes.items()
        ):
            raise _wrong("permutations is an object: the size of every permutation by its name", "#/permutations")
        unmeasured = whole.get("unmeasured", [])
        if not isinstance(unmeasured, list) or not all(isinstance(name, str) for name in unmeasured):
            raise _wrong("unmeasured is a list of tensor names", "#/unmeasured")
        found: dict[str, int] = dict(sizes)
        for name, expressions in axes.items():
            for axis, size in zip(expressions, (tensors or {}).get(name, ()), strict=False):
                if axis is not None:
                    _infer(axis, size, found)
        for name in (name for each in axes.values() for axis in each if axis is not None for name in names(axis)):
            if name not in found:
                detail = f"nothing says how large {clip(name)} is; write it under permutations"
                raise _wrong(detail, "#/permutations")
        if (largest := max(found.values(), default=0)) > _MOST_PERMUTED:
            raise _wrong(f"a permutation of {largest:,} elements; at most {_MOST_PERMUTED:,} can be", "#/permutations")
        return cls(found, axes, frozenset(unmeasured))


def names(*axes: Axis) -> Iterator[str]:
    """The permutations on axes, as often as they stand there."""
    for axis in axes:
        match axis:
            case Permuted(name):
                yield name
            case Blocks(outer, _, inner):
                if outer is not None:
                    yield outer
                yield from names(*(inner if isinstance(inner, tuple) else (inner,)))
            case Concat(parts):
                yield from names(*parts)
            case Fixed():
                pass


def connected(groups: Iterable[Iterable[str]]) -> dict[str, list[str]]:
    """Of every name all that groups connect it with, itself included: one list that they share."""
    found: dict[str, list[str]] = {}
    for group in groups:
        parts = {id(part): part for part in (found.setdefault(name, [name]) for name in group)}
        largest = max(parts.values(), key=len, default=[])
        for part in parts.values():
            if part is not largest:
                largest += part
                found.update(dict.fromkeys(part, largest))
    return found


_Context: TypeAlias = tuple[tuple[str, int], ...]
"""The blocks that a permutation stands in, the outermost first: what moves them, and at which place."""


def _contexts(axis: Axis, context: _Context) -> Iterator[tuple[str, _Context]]:
    match axis:
        case Permuted(name):
            yield name, context
        case Blocks(outer, _, inner):
            if outer is not None:
                yield outer, context
            if not isinstance(inner, tuple):
                yield from _contexts(inner, context)
                return
            for place, each in enumerate(inner):
                yield from _contexts(each, context if outer is None else (*context, (outer, place)))
        case Concat(parts):
            for part in parts:
                yield from _contexts(part, context)
        case Fixed():
            pass


def _is_identity(index: Indices) -> bool:
    return bool((index == np.arange(len(index))).all())


def _axis_to_data(axis: Axis) -> Any:
    match axis:
        case Fixed(size):
            return size
        case Permuted(name):
            return name
        case Blocks(outer, count, inner):
            of = [_axis_to_data(each) for each in inner] if isinstance(inner, tuple) else _axis_to_data(inner)
            return {"blocks": outer, "count": count, "of": of}
        case Concat(parts):
            return {"concat": [_axis_to_data(part) for part in parts]}


def _axis_from_data(data: object, pointer: str, depth: int = 0) -> Axis:
    if depth > _DEEPEST:
        raise _wrong(f"blocks in blocks more than {_DEEPEST} deep", pointer)
    if isinstance(data, str) and is_usable_name(data):
        return Permuted(data)
    if _is_size(data):
        return Fixed(int(data))  # type: ignore[call-overload]
    if isinstance(data, Mapping) and data.keys() == {"concat"} and isinstance(data["concat"], list) and data["concat"]:
        parts = data["concat"]
        return Concat(tuple(_axis_from_data(each, f"{pointer}/concat/{i}", depth + 1) for i, each in enumerate(parts)))
    if isinstance(data, Mapping) and data.keys() == {"blocks", "count", "of"}:
        outer, count, inner = data["blocks"], data["count"], data["of"]
        if not _is_size(count) or count == 0:
            raise _wrong("count is how many blocks there are, at least 1", f"{pointer}/count")
        if outer is not None and not (isinstance(outer, str) and is_usable_name(outer)):
            raise _wrong("blocks is the name of the permutation that moves them, or null", f"{pointer}/blocks")
        if isinstance(inner, list):
            of = tuple(_axis_from_data(each, f"{pointer}/of/{i}", depth + 1) for i, each in enumerate(inner))
            return Blocks(outer, count, of)
        return Blocks(outer, count, _axis_from_data(inner, f"{pointer}/of", depth + 1))
    expected = '"name", a number of elements that stay, {"blocks", "count", "of"} or {"concat"}'
    raise _wrong(f"not what can happen to an axis; expected {expected}", pointer)


def _infer(axis: Axis, size: int, found: dict[str, int]) -> None:
    """Take the sizes that are not known from that of the axis; `check` says where they disagree."""
    match axis:
        case Permuted(name):
            found.setdefault(name, size)
        case Blocks(outer, count, inner):
            if outer is not None:
                found.setdefault(outer, count)
            for each in inner if isinstance(inner, tuple) else (inner,):
                _infer(each, size // count, found)
        case _:
            pass


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ELEMENTS


def _escaped(name: object) -> str:
    return clip(name).replace("~", "~0").replace("/", "~1")


def _wrong(detail: str, pointer: str) -> RecipeError:
    error = RecipeError.of([Problem(detail, pointer)])
    assert isinstance(error, RecipeError)
    return error
