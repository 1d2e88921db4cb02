"""What permutations of one model are worth, measured against another: sums of products, streamed from both.

Of a tensor that a permutation stands on, C[i, k] is the inner product of what the reference has at place i of the axis
and what the model has at k, its other axes being permuted as they are at the time. It is added up from tiles whose
sizes depend on shapes only. Products are exact in float64 up to `EXACT` places; above it, where they would take the
time, tiles of at most 1024 products are added up in float32, |error| ≤ 2⁻¹⁴ Σ |a b| (some 10⁻⁶ of it as a rule), and
those sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from merge_core import kernels
from merge_core.alignment.assignment import Check, Costs, Matrix, given
from merge_core.alignment.permutations import gather
from merge_core.alignment.spec import (
    Axis,
    Blocks,
    Concat,
    Fixed,
    Indexed,
    Indices,
    PermutationSpec,
    Permuted,
    connected,
    names,
)
from merge_core.dtypes import FLOAT64
from merge_core.errors import IncompatibleModels, NonFinite, Problem
from merge_core.headers import TensorInfo
from merge_core.weights import Weights

EXACT = 1024
"""Up to so many places products are added up in float64."""
_TILE = 1024
"""Places of a tile, and products that are added up in float32."""
_BLOCK = 2**21
_PANEL = 2**22
"""Elements of a tensor that are read at once, at least a row."""

_LIBRARIES = 2**26
"""Bytes that the assignment solver and the linear algebra library take once they are used, as measured."""

_Job = TypeVar("_Job")


@dataclass(frozen=True)
class Term:
    """One way in which permutations move a tensor: `chain`, what happens to units of its axis, an expression of
    permuted elements and named blocks only, and where they are on the axis: `positions`, `[units, elements of each]`.
    """

    tensor: str
    axis: int
    chain: Axis
    positions: Indices


@dataclass(frozen=True)
class Bundle:
    """Permutations that are found together, as some stand inside the others' blocks, and all that they move; of blocks
    other permutations may stand inside too.
    """

    names: tuple[str, ...]
    terms: tuple[Term, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the cost matrices."""
        return 8 * sum(size * size for size in {term.chain: len(term.positions) for term in self.terms}.values())


def bundles(spec: PermutationSpec, measured: Iterable[str]) -> list[Bundle]:
    """Everything that can be found out, in the spec's order.

    Permutations are found together if one stands inside the other's blocks, unless they stand on two axes of a tensor.
    Raises `IncompatibleModels` for such as stand inside one another.
    """
    terms = [term for tensor in measured for term in _terms(spec, tensor)]
    order = {name: number for number, name in enumerate(spec.permutations)}
    parts = connected(names(term.chain) for term in terms)
    apart = _apart(terms)
    found: list[list[str]] = []
    for part in {id(part): part for part in parts.values()}.values():
        of_part: list[list[str]] = []
        for name in sorted(part, key=order.__getitem__):
            together = next((each for each in of_part if apart.get(name, set()).isdisjoint(each)), None)
            if together is None:
                of_part.append([name])
            else:
                together.append(name)
        found += of_part
    _check_nesting(terms)
    holding: dict[str, list[Term]] = {}
    for term in terms:
        for name in dict.fromkeys(names(term.chain)):
            holding.setdefault(name, []).append(term)
    made = [Bundle(tuple(each), tuple({id(t): t for name in each for t in holding[name]}.values())) for each in found]
    return sorted(made, key=lambda bundle: order[bundle.names[0]])


def _apart(terms: Iterable[Term]) -> dict[str, set[str]]:
    """Of each permutation those that stand on another axis of a tensor: what both are worth is no sum."""
    on_axes: dict[str, dict[int, set[str]]] = {}
    for term in terms:
        on_axes.setdefault(term.tensor, {}).setdefault(term.axis, set()).update(names(term.chain))
    apart: dict[str, set[str]] = {}
    for axes in on_axes.values():
        for axis, here in axes.items():
            for other in (other for other in axes if other != axis):
                for name in here:
                    apart.setdefault(name, set()).update(axes[other])
    return apart


def _check_nesting(terms: Iterable[Term]) -> None:
    inside: dict[str, set[str]] = {}
    for term in terms:
        for outer, name in _nested(term.chain):
            inside.setdefault(outer, set()).add(name)
    while free := [name for name in inside if not any(name in others for others in inside.values())]:
        for name in free:
            del inside[name]
    if inside:
        detail = f"the permutations {', '.join(inside)} stand inside one another's blocks"
        raise IncompatibleModels(detail, [Problem(detail)])


def _nested(chain: Axis) -> Iterator[tuple[str, str]]:
    """Every permutation of blocks, with those inside them."""
    if isinstance(chain, Blocks) and chain.outer is not None:
        for inner in chain.inner if isinstance(chain.inner, tuple) else (chain.inner,):
            yield from ((chain.outer, name) for name in names(inner))
            yield from _nested(inner)


def _terms(spec: PermutationSpec, tensor: str) -> Iterator[Term]:
    for number, axis in enumerate(spec.axes[tensor]):
        if axis is not None:
            where = np.arange(spec.size(axis), dtype=np.int64)
            for chain, positions in _units(axis, where, spec):
                if chain is not None and positions.size:
                    yield Term(tensor, number, chain, positions)


def _units(axis: Axis, where: Indices, spec: PermutationSpec) -> Iterator[tuple[Axis | None, Indices]]:
    """An axis in parts that each are permuted in one way, and where their units are; None for what stays."""
    match axis:
        case Fixed():
            yield None, where[np.newaxis]
        case Permuted():
            yield axis, where[:, np.newaxis]
        case Concat(parts):
            start = 0
            for part in parts:
                size = spec.size(part)
                yield from _units(part, where[start : start + size], spec)
                start += size
        case Blocks(None, count, _):
            for place, block in enumerate(where.reshape(count, -1)):
                yield from _units(axis.at(place), block, spec)
        case Blocks(str(outer), count, inner):
            blocks = where.reshape(count, -1)
            inside = np.arange(blocks.shape[1], dtype=np.int64)
            insides = inner if isinstance(inner, tuple) else (inner,)
            for found in zip(*(_units(each, inside, spec) for each in insides), strict=True):
                chains = [chain for chain, _ in found if chain is not None]
                units = np.take(blocks, found[0][1], axis=1)
                if not chains:
                    yield Permuted(outer), units.reshape(count, -1)
                else:
                    of = tuple(chains) if isinstance(inner, tuple) else chains[0]
                    yield Blocks(outer, count, of), units.reshape(count * units.shape[1], units.shape[2])


def measured_tensors(spec: PermutationSpec, reference: Weights, model: Weights) -> list[str]:
    """The tensors by which two models are compared: all of numbers that the spec does not except, in name order.

    Raises `IncompatibleModels` if the spec does not fit both models, or they not one another.
    """
    for weights in (reference, model):
        spec.check({name: info.shape for name, info in weights.tensors.items()})
    if problems := [
        Problem(f"{name} is {list(shape)} in {reference.path}, but {list(theirs)} in {model.path}", tensor=name)
        for name, shape in ((name, info.shape) for name, info in reference.tensors.items())
        if (theirs := model.tensors[name].shape) != shape
    ]:
        raise IncompatibleModels.of(problems)
    return sorted(
        name
        for name, info in reference.tensors.items()
        if name not in spec.unmeasured and info.dtype.kind == model.tensors[name].dtype.kind == "float"
    )


@dataclass(frozen=True)
class Products:
    """Streams the products of two models; `pool` does the arithmetic, each of its threads alone. `read` is told of each
    tensor that is done with.
    """

    spec: PermutationSpec
    reference: Weights
    model: Weights
    pool: Executor
    check: Check = lambda: None
    read: Callable[[str], None] = lambda tensor: None

    def costs(self, bundle: Bundle, indexed: Indexed) -> Costs:
        """What the permutations of a bundle are worth, all others being as they are. Raises `NonFinite`."""
        found: dict[Axis, Matrix] = {}
        for term in bundle.terms:
            size = len(term.positions)
            if term.chain not in found:
                found[term.chain] = np.zeros((size, size))
            indices: list[Indices | None] = list(self.spec.indices(term.tensor, indexed))
            indices[term.axis] = None
            add = self._add_rows if term.axis == 0 else self._add_columns
            add(term, indices, torch.from_numpy(found[term.chain]))
            self.read(term.tensor)
        if not all(math.isfinite(float(matrix.sum())) for matrix in found.values()):
            tensor = bundle.terms[0].tensor
            detail = f"{tensor} or others that {bundle.names[0]} permutes hold numbers too large to be compared"
            raise NonFinite(tensor, str(self.model.path), detail)
        return given(found, bundle.names, self.spec, indexed)

    def _add_rows(self, term: Term, indices: Sequence[Indices | None], out: Tensor) -> None:
        """Of a tensor whose rows are permuted: tiles of all pairs of rows."""
        units, elements = term.positions.shape
        reference, model = self.reference.tensors[term.tensor], self.model.tensors[term.tensor]
        width = elements * math.prod(reference.shape[1:])
        size = max(1, min(_TILE, _PANEL // max(1, width)))
        dtype = _working(out, reference, model)

        def panel(begin: int) -> None:
            end = min(begin + size, units)
            rows = term.positions[begin:end].reshape(-1)
            left = self._read(self.reference, reference, rows, [None] * len(indices[1:])).reshape(end - begin, -1)
            for start in range(0, units, size):
                self.check()
                stop = min(start + size, units)
                rows = term.positions[start:stop].reshape(-1)
                right = self._read(self.model, model, rows, indices[1:]).reshape(stop - start, -1)
                _add_product(out[begin:end, start:stop], left, right, dtype)

        self._each(panel, range(0, units, size))

    def _add_columns(self, term: Term, indices: Sequence[Indices | None], out: Tensor) -> None:
        """Of a tensor another axis of which is permuted: runs of rows, each added to all tiles."""
        units, elements = term.positions.shape
        reference, model = self.reference.tensors[term.tensor], self.model.tensors[term.tensor]
        before = math.prod(reference.shape[1 : term.axis])
        after = math.prod(reference.shape[term.axis + 1 :])
        size = max(1, _TILE // max(1, before * elements * after), _BLOCK // max(1, math.prod(reference.shape[1:])))
        dtype = _working(out, reference, model)
        tiles = [(begin, start) for begin in range(0, units, _TILE) for start in range(0, units, _TILE)]

        for first in range(0, reference.rows, size):
            last = min(first + size, reference.rows)
            rows = range(first, last) if indices[0] is None else indices[0][first:last]
            left = self._read(self.reference, reference, range(first, last), [None] * len(indices[1:]))
            right = self._read(self.model, model, rows, indices[1:])

            def tile(corner: tuple[int, int], left: Tensor = left, right: Tensor = right) -> None:
                self.check()
                begin, start = corner
                places, elements = term.positions[begin : begin + _TILE], term.positions[start : start + _TILE]
                one, other = _units_first(left, term.axis, places), _units_first(right, term.axis, elements)
                _add_product(out[begin : begin + _TILE, start : start + _TILE], one, other, dtype)

            self._each(tile, tiles)
            del left, right, tile  # or they would still be there while the next are read

    def _each(self, function: Callable[[_Job], None], jobs: Iterable[_Job]) -> None:
        for _ in self.pool.map(function, jobs):
            pass

    def _read(
        self, weights: Weights, info: TensorInfo, rows: Indices | range, others: Sequence[Indices | None]
    ) -> Tensor:
        if not isinstance(rows, range) and len(rows) and bool((np.diff(rows) == 1).all()):
            rows = range(int(rows[0]), int(rows[-1]) + 1)
        self.check()  # whoever canceled closes the files, and reading would open them again
        found = gather(weights, info, rows, others)
        if kernels.first_nonfinite(found) >= 0:
            file = f"{weights.path}/{info.file}"
            detail = f"{info.name} of {weights.path} holds NaN or infinity ({file}); no permutation fits it: repair it"
            raise NonFinite(info.name, file, detail)
        return found

    # How far models are from one another.

    def distance(self, tensor: str, indexed: Indexed) -> Distance:
        """How far a tensor of the permuted model is from the reference's; summed in float64. Raises `NonFinite`."""
        reference, model = self.reference.tensors[tensor], self.model.tensors[tensor]
        indices = self.spec.indices(tensor, indexed) or (None,)
        size = max(1, _BLOCK // 4 // max(1, math.prod(reference.shape[1:])))
        sums = [0.0, 0.0, 0.0]
        for first in range(0, reference.rows if reference.elements else 0, size):
            self.check()
            run = range(first, min(first + size, reference.rows))
            rows = run if indices[0] is None else indices[0][run.start : run.stop]
            left = self._read(self.reference, reference, run, [None] * len(indices[1:])).to(torch.float64)
            right = self._read(self.model, model, rows, indices[1:]).to(torch.float64)
            for number, values in enumerate((left, right, left - right)):
                sums[number] += float(values.square_().sum())
        self.read(tensor)
        return Distance(*sums)


@dataclass(frozen=True)
class Distance:
    """Sums of squares: of the reference's numbers, of the model's, of their differences."""

    reference: float
    model: float
    difference: float


def _working(out: Tensor, *infos: TensorInfo) -> torch.dtype:
    """The format of products: exact where places are few, and where float32 would not hold the numbers."""
    is_exact = len(out) <= EXACT or any(info.dtype == FLOAT64 for info in infos)
    return torch.float64 if is_exact else torch.float32


def _units_first(rows: Tensor, axis: int, positions: Indices) -> Tensor:
    """Units of an axis, each with everything that belongs to it: `[units, …]`."""
    units, elements = positions.shape
    flat = positions.reshape(-1)
    before, after = math.prod(rows.shape[1:axis]), math.prod(rows.shape[axis + 1 :])
    wide = rows.reshape(len(rows), before, rows.shape[axis], after)
    if int(flat[-1]) - int(flat[0]) + 1 == len(flat) and bool((np.diff(flat) == 1).all()):
        wide = wide.narrow(2, int(flat[0]), len(flat))
    else:
        wide = wide.index_select(2, torch.from_numpy(flat))
    return wide.reshape(len(rows), before, units, elements, after).permute(2, 0, 1, 3, 4).reshape(units, -1)


def _add_product(out: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """out += left · rightᵀ, `_TILE` products at a time."""
    for start in range(0, left.shape[1], _TILE):
        one, other = (side[:, start : start + _TILE].to(dtype) for side in (left, right))
        out += one @ other.T


def working_bytes(
    spec: PermutationSpec, measured: Sequence[str], reference: Weights, model: Weights, threads: int
) -> int:
    """Memory besides the cost matrices: what each of so many threads reads of both models at once, its tiles, and what
    it takes to compute rows.
    """
    most = 0
    for tensor in measured:
        widest = 1
        for axis in spec.axes[tensor]:
            for _, positions in [] if axis is None else _units(axis, np.arange(spec.size(axis)), spec):
                widest = max(widest, positions.shape[1])
        for weights in (reference, model):
            info = weights.tensors[tensor]
            row = info.elements // max(1, info.rows)
            elements = min(info.elements, max(_PANEL, _TILE * row, widest * row))
            needed = elements * (2 * info.dtype.itemsize + weights.temporary(info)) + weights.thread_bytes(info)
            most = max(most, math.ceil(needed))
    return _LIBRARIES + threads * (2 * most + 4 * 8 * _TILE * _TILE)
