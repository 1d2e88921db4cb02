"""Which permutations make a sum of costs largest, given the costs as matrices.

Permutations that stand inside one another's blocks are found together: what a block is worth at a place is what the
best arrangement inside it is worth, so that all levels come out at once. The matrices say what it is worth when element
k comes to place i.

Git Re-Basin, https://arxiv.org/abs/2209.04836, section 3.2, for permutations of single neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from merge_core.alignment.spec import Axis, Blocks, Indexed, Indices, PermutationSpec, Permuted, connected, names
from merge_core.errors import IncompatibleModels, Problem

Matrix: TypeAlias = NDArray[np.float64]
Costs: TypeAlias = Mapping[Axis, Matrix]
"""What it is worth when elements of an axis change places, `[place, element]`, by what may happen to the axis: an
expression of permuted elements and named blocks only.
"""

RELATIVE = 1e-9
"""A sum counts as larger only if it is by this share: less is what rounding makes of equal ones."""
_TIE = 1e-12
"""Share of the largest value that speaks for leaving an element where it is when nothing else does."""
_MOST_ROUNDS = 100

Check = Callable[[], None]


def assign(matrix: Matrix) -> tuple[Indices, bool]:
    """The index that makes Σ matrix[i, index[i]] largest, and whether the free certificate proved it; of equal ones one
    that leaves elements where they are. The matrix is written to meanwhile, so that nothing of its size is needed.

    The certificate: where every row has its largest value in another column, taking these is optimal.
    """
    largest = max(float(matrix.max(initial=0.0)), -float(matrix.min(initial=0.0)))
    if largest == 0.0:
        return np.arange(len(matrix), dtype=np.int64), True
    diagonal = np.diag_indices_from(matrix)
    stored = matrix[diagonal]
    matrix[diagonal] += _TIE * largest
    index = matrix.argmax(1)
    is_proved = bool((np.bincount(index, minlength=len(index)) == 1).all())
    if not is_proved:
        from scipy.optimize import linear_sum_assignment  # a third of a second, and few merges need it

        np.negative(matrix, out=matrix)
        index = linear_sum_assignment(matrix)[1]
        np.negative(matrix, out=matrix)
    matrix[diagonal] = stored
    return index.astype(np.int64), is_proved


def value(costs: Costs, spec: PermutationSpec, indexed: Indexed) -> float:
    """What permutations are worth."""
    return float(sum(_picked(matrix, spec.index(chain, indexed)) for chain, matrix in costs.items()))


def is_more(new: float, old: float, relative: float = RELATIVE) -> bool:
    """Whether a sum is larger by more than rounding."""
    return new - old > relative * max(abs(new), abs(old))


def best(costs: Costs, spec: PermutationSpec, current: Indexed, check: Check) -> tuple[dict[str, Indices], bool]:
    """The best permutations that are found, never worse than the current ones, and whether one certificate proved them.

    Those of single elements are optimal, and so are those of blocks with expressions of their own for each place. Where
    one expression is shared by the places of several blocks, they are found one after the other from the best that
    each could be worth, and then in turns as long as the sum rises.
    """
    found = {name: current[name] for chain in costs for name in names(chain)}
    if len(costs) == len(found) == 1:
        ((chain, matrix),) = costs.items()
        index, is_proved = assign(matrix)
        return {_root(chain): index}, is_proved
    together = _in_turns(costs, spec, found | _together(costs, spec, check), check)
    improved = _in_turns(costs, spec, found, check)
    if is_more(value(costs, spec, together), value(costs, spec, improved)):
        improved = together
    return improved, False


def _together(costs: Costs, spec: PermutationSpec, check: Check) -> dict[str, Indices]:
    """All levels at once: an outer permutation by what its blocks are worth with the best inside, then the inner."""
    found: dict[str, Indices] = {}
    for part in _independent(costs):
        inside = {name for chain in part if isinstance(chain, Blocks) for name in names(*_insides(chain))}
        outer = next(name for name in map(_root, part) if name not in inside)
        index, _ = assign(_worth(part, outer, spec, check))
        found[outer] = index
        if rest := _reduced(part, outer, index):
            found |= _together(rest, spec, check)
    return found


def _worth(costs: Costs, outer: str, spec: PermutationSpec, check: Check) -> Matrix:
    """What each block is worth at each place with the best arrangement inside, `[place, block]`."""
    count = spec.permutations[outer]
    worth = np.zeros((count, count))
    blocks: dict[Blocks, Matrix] = {}
    for chain, matrix in costs.items():
        if chain == Permuted(outer):
            worth += matrix
        elif isinstance(chain, Blocks) and chain.outer == outer:
            size = len(matrix) // count
            blocks[chain] = matrix.reshape(count, size, count, size)
    if blocks:
        for place in range(count):
            check()
            for block in range(count):
                inside = _summed((chain.at(place), parts[place, :, block]) for chain, parts in blocks.items())
                worth[place, block] += value(inside, spec, _together(inside, spec, check))
    return worth


def _reduced(costs: Costs, outer: str, index: Indices) -> dict[Axis, Matrix]:
    """What remains to be found once it is known where the blocks go."""

    def remaining() -> Iterator[tuple[Axis, Matrix]]:
        for chain, matrix in costs.items():
            if _root(chain) != outer:
                yield chain, matrix
            elif isinstance(chain, Blocks):
                size = len(matrix) // chain.count
                parts = matrix.reshape(chain.count, size, chain.count, size)
                for place, block in enumerate(index):
                    yield chain.at(place), parts[place, :, block]

    return _summed(remaining())


def _in_turns(costs: Costs, spec: PermutationSpec, current: Indexed, check: Check) -> dict[str, Indices]:
    """Each permutation given all others, again and again while the sum rises."""
    found = dict(current)
    for _ in range(_MOST_ROUNDS):
        changed = False
        for name in found:
            check()
            matrix = _sum_of(costs, name, spec, found)
            index, _ = assign(matrix)
            if is_more(_picked(matrix, index), _picked(matrix, found[name])):
                found[name], changed = index, True
        if not changed:
            break
    return found


def _sum_of(costs: Costs, name: str, spec: PermutationSpec, indexed: Indexed) -> Matrix:
    """What it is worth when elements of one permutation change places, all others being as they are."""
    size = spec.permutations[name]
    found = np.zeros((size, size))
    for chain, matrix in costs.items():
        if name in names(chain):
            _add(chain, matrix, name, spec, indexed, found)
    return found


def _add(chain: Axis, matrix: Matrix, name: str, spec: PermutationSpec, indexed: Indexed, found: Matrix) -> None:
    if not isinstance(chain, Blocks):
        found += matrix
        return
    assert chain.outer is not None
    size = len(matrix) // chain.count
    parts = matrix.reshape(chain.count, size, chain.count, size)
    for place, block in enumerate(indexed[chain.outer]):
        inner = chain.at(place)
        if chain.outer == name:
            found[place] += parts[place, np.arange(size), :, spec.index(inner, indexed)].sum(0)
        elif name in names(inner):
            _add(inner, parts[place, :, block], name, spec, indexed, found)


def given(costs: Costs, free: Collection[str], spec: PermutationSpec, indexed: Indexed) -> Costs:
    """What the `free` permutations are worth when all others are as they are, up to a constant."""
    pairs = (pair for each in costs.items() for pair in _given(*each, set(free), spec, indexed))
    return _summed((chain, matrix) for chain, matrix in pairs if chain is not None)


def _given(
    chain: Axis, matrix: Matrix, free: AbstractSet[str], spec: PermutationSpec, indexed: Indexed
) -> Iterator[tuple[Axis | None, Matrix]]:
    """What a chain comes to; None for what does not depend on the free permutations, as a matrix of one number."""
    here = set(names(chain))
    if here <= free:
        yield chain, matrix
        return
    if here.isdisjoint(free):
        yield None, np.array([[_picked(matrix, spec.index(chain, indexed))]])
        return
    assert isinstance(chain, Blocks)
    outer, count, size = _root(chain), chain.count, len(matrix) // chain.count
    parts = matrix.reshape(count, size, count, size)
    if outer not in free:
        for place, block in enumerate(indexed[outer]):
            yield from _given(chain.at(place), parts[place, :, block], free, spec, indexed)
    elif here & free == {outer}:
        worth = np.zeros((count, count))
        _add(chain, matrix, outer, spec, indexed, worth)
        yield Permuted(outer), worth
    else:
        places = range(count)
        found = [[list(_given(chain.at(i), parts[i, :, k], free, spec, indexed)) for k in places] for i in places]
        if len({tuple(inner is None for inner, _ in of_place[0]) for of_place in found}) > 1:
            detail = f"the blocks that {outer} moves hold permutations that stand elsewhere in different ways"
            raise IncompatibleModels(detail, [Problem(detail)])
        for number, (inner, _) in enumerate(found[0][0]):
            whole = np.stack([np.stack([block[number][1] for block in of_place], axis=1) for of_place in found])
            units = count * whole.shape[1]
            if inner is None:
                yield Permuted(outer), whole.reshape(units, units)
            else:
                chains = tuple(of_place[0][number][0] or inner for of_place in found)
                of = chains if isinstance(chain.inner, tuple) else inner
                yield Blocks(outer, count, of), whole.reshape(units, units)


def _summed(pairs: Iterable[tuple[Axis, Matrix]]) -> dict[Axis, Matrix]:
    found: dict[Axis, Matrix] = {}
    for chain, matrix in pairs:
        found[chain] = found[chain] + matrix if chain in found else matrix
    return found


def _independent(costs: Costs) -> list[dict[Axis, Matrix]]:
    """The costs in parts that have no permutation in common."""
    parts = connected(names(chain) for chain in costs)
    found: dict[int, dict[Axis, Matrix]] = {}
    for chain, matrix in costs.items():
        found.setdefault(id(parts[_root(chain)]), {})[chain] = matrix
    return list(found.values())


def _root(chain: Axis) -> str:
    name = chain.outer if isinstance(chain, Blocks) else chain.name if isinstance(chain, Permuted) else None
    assert name is not None, "costs are of permuted elements and named blocks"
    return name


def _insides(chain: Blocks) -> tuple[Axis, ...]:
    return chain.inner if isinstance(chain.inner, tuple) else (chain.inner,)


def _picked(matrix: Matrix, index: Indices) -> float:
    return float(matrix[np.arange(len(index)), index].sum())
