"""The few operations that carry the load, each in two forms that give the same bits.

`plain.py` is torch, runs on any device and says what is meant; `compiled.py` is numba and makes a CPU merge at the
speed of its disk. The compiled form serves float32 arithmetic on bfloat16, float16 and float32 rows in main memory,
where numba is installed; `WEIGHTSMITH_KERNELS=plain` in the environment does without it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_core import random
from merge_core.kernels import plain
from merge_core.kernels.arguments import PAGE, Operands, Places
from merge_core.kernels.vectors import KEEP_ALL_TIES, Numbers, Rows, TaskVectors
from merge_core.statistics import Sums

Vote = Literal["plus", "majority"]
Average = Literal["sum", "weight", "count", "max", "shared"]
_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_VOTES = {None: 0, "plus": 1, "majority": 2}
_AVERAGES = {"sum": 0, "weight": 1, "count": 2, "max": 3, "shared": 4}
_NEVER = -1.0


@functools.cache
def are_compiled() -> bool:
    """Whether this process has the compiled form."""
    return os.environ.get("WEIGHTSMITH_KERNELS") != "plain" and importlib.util.find_spec("numba") is not None


def serve(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether the compiled form serves tensors of these formats."""
    return are_compiled() and all(dtype in _CODES for dtype in dtypes)


def linear(
    sources: Sequence[Rows], weights: Numbers, divisor: float, working: torch.dtype, grain: int, out: Tensor | None
) -> Tensor:
    """Σᵢ wᵢ xᵢ / divisor: `[rows, ...]`, in the working dtype or rounded into `out`.

    >>> rows = [Rows.of(torch.tensor([1.0, 2.0])), Rows.of(torch.tensor([3.0, 6.0]))]
    >>> linear(rows, (1.0, 1.0), 2.0, torch.float32, 65536, None)
    tensor([2., 4.])
    """
    target = _target(sources, working, out)
    if target is None:
        return plain.linear(sources, weights, divisor, working)
    with _places(sources, grain) as places:
        _compiled("linear")(
            places,
            np.array(weights, np.float32),
            np.float32(divisor),
            sources[0].elements,
            grain,
            target.data_ptr(),
            _CODES[target.dtype],
        )
    return target


def values(vectors: TaskVectors) -> Tensor:
    """The task vectors, sparse and scaled: `[models, rows, ...]`, working dtype."""
    return plain.values(vectors)


def combine(
    vectors: TaskVectors,
    *,
    scale: float,
    average: Average = "sum",
    weights: Numbers = (1.0,),
    vote: Vote | None = None,
    majority: int = 0,
) -> Tensor:
    """θ₀ + λ · the task vectors combined: `[rows, ...]`, in the working dtype or rounded into `vectors.out`.

    Without a `vote` all entries are combined, else those whose sign the sum has; a sum of zero elects + (`"plus"`) or
    the sign `majority`. `average`: the sum, that divided by the `weights` of the entries, by their number (with a vote
    only), or the entry of the largest magnitude, of equal ones the first. Without a vote it may also be "shared": the
    mean of the entries that are not 0, and where there is only one, that times its weight.
    """
    weights = weights if len(weights) == len(vectors) else weights * len(vectors)
    sources = (vectors.base, *vectors.models)
    target = _target(sources, vectors.working, vectors.out) if _has_compiled_form(vectors) else None
    if target is None:
        return plain.combine(vectors, vote, majority, average, weights, scale)
    draws = vectors.draws if _is_sparse(vectors) else None
    marks = None if draws is None else draws.marks.take(_marked(vectors))
    with _operands(vectors, marks, has_marks=marks is not None) as operands:
        _compiled("combine")(
            operands,
            _VOTES[vote],
            np.float32(majority),
            _AVERAGES[average],
            np.array(weights, np.float32),
            np.float32(scale),
            target.data_ptr(),
            _CODES[target.dtype],
        )
    return target


def votes(vectors: TaskVectors) -> tuple[int, int]:
    """How many elements of the summed task vectors are above and below zero."""
    if not _is_served(vectors):
        return plain.votes(vectors)
    with _operands(vectors) as operands:
        found = np.zeros(2, np.int64)
        _compiled("votes")(operands, found)
    return int(found[0]), int(found[1])


def overlaps(vectors: TaskVectors) -> NDArray[np.int64]:
    """How many entries of each model are not 0, where no other model's are and where others' are: `[models, 2]`."""
    if not _is_served(vectors):
        return plain.overlaps(vectors)
    found = np.zeros((len(vectors), 2), np.int64)
    with _operands(vectors) as operands:
        _compiled("overlaps")(operands, found)
    return found


def near_swap(vectors: TaskVectors, t: float) -> Tensor:
    """The base, moved to the only model by t / |δ|, at most by 1 and at least by 0: `[rows, ...]`, in the working dtype
    or rounded into `vectors.out`.
    """
    target = _target((vectors.base, *vectors.models), vectors.working, vectors.out)
    if target is None:
        return plain.near_swap(vectors, t)
    with _operands(vectors) as operands:
        _compiled("near_swap")(operands, np.float32(t), target.data_ptr(), _CODES[target.dtype])
    return target


def high_digits(vectors: TaskVectors, found: NDArray[np.int64]) -> None:
    """Add up how often each value of the high 16 bits of |δ| in float32 occurs: `found` `[models, 2**15]`."""
    if not _is_served(vectors):
        return plain.high_digits(vectors, found)
    with _operands(vectors) as operands:
        _compiled("high_digits")(operands, found)
    return None


def low_digits(vectors: TaskVectors, buckets: Sequence[int], found: NDArray[np.int64]) -> None:
    """Add up how often each value of the low 16 bits occurs where the high ones are the bucket.

    `found` is `[buckets, 2**16]`; the buckets are one per model, or one after the other, the models in turns.
    """
    if not _is_served(vectors):
        return plain.low_digits(vectors, buckets, found)
    with _operands(vectors) as operands:
        _compiled("low_digits")(operands, np.array(buckets, np.int64), found)
    return None


def sampled_digits(vectors: TaskVectors, every: int, found: NDArray[np.int64]) -> None:
    """`high_digits` of one in so many runs of elements, where that saves reading the others; else of none."""
    if _is_served(vectors):
        with _operands(vectors) as operands:
            _compiled("sampled_digits")(operands, every, found)


def bracket(
    vectors: TaskVectors,
    lows: Sequence[int],
    highs: Sequence[int],
    candidates: Sequence[int],
    digits: NDArray[np.int64],
    above: NDArray[np.int64],
    equal: NDArray[np.int64],
) -> None:
    """Add up how many |δ| have high digits of `highs` and more (`above`, `[ranges]`), and how often each value occurs
    whose high digits are from `lows` on and less (`digits`, `[ranges, values]`).

    Those equal to the range's candidate, the least value of some high digits inside, are not among `digits`, but in
    `equal`, `[ranges, grains]`. The ranges are one per model, or one after the other, the models in turns.
    """
    if not _is_served(vectors):
        return plain.bracket(vectors, lows, highs, candidates, digits, above, equal)
    with _operands(vectors) as operands:
        _compiled("bracket")(
            operands,
            np.array(lows, np.int64),
            np.array(highs, np.int64),
            np.array(candidates, np.int64),
            digits,
            above,
            equal,
        )
    return None


def ties(vectors: TaskVectors, thresholds: Numbers) -> NDArray[np.int64]:
    """How many |δ| in float32 equal a threshold, in each grain: `[thresholds, grains]`.

    The thresholds are one per model, or one after the other, the models in turns.
    """
    if not _is_served(vectors):
        return plain.ties(vectors, thresholds)
    found = np.empty((len(thresholds), math.ceil(vectors.elements / vectors.grain)), np.int64)
    with _operands(vectors) as operands:
        _compiled("ties")(operands, np.array(thresholds, np.float32), found)
    return found


def gram(sources: Sequence[Rows], working: torch.dtype, grain: int, base: Rows | None = None) -> Sums:
    """Inner products of all pairs (0,0), (0,1), …, (1,1), … of rows: `[grains, pairs]`, float64.

    With a `base`, of the rows less the base, each difference rounded to the working dtype.
    """
    if base is not None and not sources:
        return np.empty((math.ceil(base.elements / grain), 0))
    every = sources if base is None else [base, *sources]
    if not _are_served(every, working):
        return plain.gram(sources, working, grain, base)
    pairs = len(sources) * (len(sources) + 1) // 2
    found = np.empty((math.ceil(sources[0].elements / grain), pairs), np.float64)
    with _places(every, grain) as places:
        _compiled("gram")(places, base is not None, sources[0].elements, grain, found)
    return found


def absolute_sums(vectors: TaskVectors) -> Sums:
    """Σ|δ| of the plain task vectors, then of what is left of them: `[grains, 2 · models]`, float64."""
    if not _is_served(vectors, by_rank=True):
        return plain.absolute_sums(vectors)
    grains = math.ceil(vectors.elements / vectors.grain)
    found = np.empty((grains, 2 * len(vectors)), np.float64)
    draws = vectors.draws if _is_sparse(vectors) else None
    marks = None if draws is None else draws.marks.space(grains, len(vectors), -(-vectors.grain // 8))
    with _operands(vectors, marks) as operands:
        _compiled("absolute_sums")(operands, found)
    if draws is not None and marks is not None:
        draws.marks.put(_marked(vectors), marks)
    return found


def low_rank(stored: Tensor, left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """out = stored + scale · left · right: `[rows, width]`, with thin `[rows, rank]` and `[rank, width]`, all in main
    memory; the arithmetic is in the dtype of `out`, which the thin ones have.

    >>> out = torch.empty(1, 2)
    >>> low_rank(torch.ones(1, 2), torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]]), 0.5, out)
    >>> out
    tensor([[4., 5.]])
    """
    if not serve((stored.dtype, out.dtype)) or out.dtype != torch.float32 or not out.is_contiguous():
        return plain.low_rank(stored, left, right, scale, out)
    _compiled("low_rank")(
        stored.data_ptr(),
        _CODES[stored.dtype],
        left.contiguous().numpy(),
        right.contiguous().numpy(),
        np.float32(scale),
        out.numpy(),
    )
    return None


def first_nonfinite(rows: Tensor) -> int:
    """The first NaN or infinity, −1 if there is none."""
    if not (are_compiled() and rows.is_cpu and rows.dtype in _CODES and rows.is_contiguous()):
        return plain.first_nonfinite(rows)
    found = np.empty(1, np.int64)
    _compiled("find_nonfinite")(rows.data_ptr(), _CODES[rows.dtype], rows.numel(), found)
    return int(found[0])


def uniform(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) for the element indices from `start`: `[count]`, float32, multiples of 2⁻²⁴."""
    if not (are_compiled() and device.type == "cpu"):
        return random.uniform(key, start, count, device)
    out = torch.empty(count, dtype=torch.float32)
    _compiled("uniform")(np.uint64(key), start, out.numpy())
    return out


def load() -> None:
    """Load the compiled form's linker now rather than at the first block."""
    if are_compiled():
        first_nonfinite(torch.zeros(1))


def prepare() -> None:
    """Compile every kernel, so that later processes only load them; they stay beside the sources."""
    if not are_compiled():
        return
    rows = [Rows.of(torch.zeros(8)) for _ in range(2)]
    vectors = TaskVectors(rows[0], (rows[1],), torch.float32)
    digits, few = np.zeros((1, 2**16), np.int64), np.zeros(1, np.int64)
    linear(rows, (1.0, 1.0), 1.0, torch.float32, 8, None)
    combine(vectors, scale=1.0)
    votes(vectors)
    overlaps(vectors)
    near_swap(vectors, 1.0)
    high_digits(vectors, digits)
    sampled_digits(vectors, 1, digits)
    bracket(vectors, (0,), (1,), (0,), digits, few, np.zeros((1, 1), np.int64))
    low_digits(vectors, (0,), digits)
    ties(vectors, (0.0,))
    gram(rows, torch.float32, 8)
    absolute_sums(vectors)
    low_rank(torch.zeros(1, 8), torch.zeros(1, 1), torch.zeros(1, 8), 1.0, torch.zeros(1, 8))
    first_nonfinite(torch.zeros(8))
    uniform(0, 0, 8, torch.device("cpu"))
    importlib.import_module("merge_core.kernels.scores").prepare()


def _compiled(name: str) -> Callable[..., None]:
    from merge_core.kernels import machine_code  # which needs what numba needs

    return machine_code.kernel("merge_core.kernels.compiled", name)


def _are_served(sources: Sequence[Rows], working: torch.dtype) -> bool:
    return (
        are_compiled()
        and working == torch.float32
        and all(source.dtype in _CODES and (source.descriptor >= 0 or _in_memory(source)) for source in sources)
    )


def _in_memory(source: Rows) -> bool:
    tensor = source.load()
    return tensor.is_cpu and tensor.is_contiguous()


def _is_served(vectors: TaskVectors, *, by_rank: bool = False) -> bool:
    """Whether a kernel serves these; not all know of places in rows."""
    if vectors.rank_rates is not None and not by_rank:
        return False
    return _has_compiled_form(vectors) and _are_served((vectors.base, *vectors.models), vectors.working)


def _has_compiled_form(vectors: TaskVectors) -> bool:
    """Whether random numbers can be drawn by key where they are needed, and no row is longer than a grain."""
    ranks = vectors.rank_rates
    if ranks is not None and (ranks.width * ranks.stride > vectors.grain or vectors.drop_rates is not None):
        return False
    return not _is_drawn(vectors) or (vectors.draws is not None and vectors.draws.key(vectors.tensor, 0) is not None)


def _marked(vectors: TaskVectors) -> Hashable:
    """By what the marks of a block are known."""
    return vectors.drop_rates, vectors.rank_rates, vectors.tensor, vectors.start, vectors.elements


def _is_sparse(vectors: TaskVectors) -> bool:
    """Whether something is dropped."""
    return vectors.drop_rates is not None or vectors.rank_rates is not None


def _is_drawn(vectors: TaskVectors) -> bool:
    ranks = vectors.rank_rates
    return vectors.drop_rates is not None or (ranks is not None and ranks.is_drawn)


def _target(sources: Sequence[Rows], working: torch.dtype, out: Tensor | None) -> Tensor | None:
    """Where the compiled form writes; None where only the plain one serves."""
    if not _are_served(sources, working) or (out is not None and out.dtype not in _CODES):
        return None
    return torch.empty(sources[0].shape, dtype=torch.float32) if out is None else out.reshape(sources[0].shape)


@contextmanager
def _places(sources: Sequence[Rows], grain: int) -> Iterator[Any]:
    """Where the sources are, for one call of a compiled kernel; raises what it found wrong with them."""
    in_files = any(source.descriptor >= 0 for source in sources)
    places = Places(
        descriptors=np.array([source.descriptor for source in sources], np.int64),
        offsets=np.array(
            [source.offset if source.descriptor >= 0 else source.load().data_ptr() for source in sources], np.int64
        ),
        codes=np.array([_CODES[source.dtype] for source in sources], np.int64),
        checked=np.array([source.checked for source in sources], np.uint8),
        space=_threads.take(len(sources), min(grain, sources[0].elements) * 4 if in_files else 0),
        refused=np.zeros(2, np.int64),
    )
    yield places
    number, element = places.refused.tolist()
    if number:
        sources[number - 1].refuse(element)


class _Space(threading.local):
    """Each thread's space for one grain of every source, used again for every block."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, sources: int, size: int) -> NDArray[np.uint8]:
        """`[sources, size and a page]`, each row on a page, until the thread asks again."""
        size = (-(-size // PAGE) + 1) * PAGE if size else 0
        if self._buffer.size < sources * size:
            whole = np.empty(sources * size + PAGE, np.uint8)
            self._buffer = whole[-whole.ctypes.data % PAGE :][: sources * size]
        return self._buffer[: sources * size].reshape(sources, size)


_threads = _Space()


@contextmanager
def _operands(
    vectors: TaskVectors, marks: NDArray[np.uint8] | None = None, *, has_marks: bool = False
) -> Iterator[Any]:
    count = len(vectors)
    drops = vectors.drop_rates or (0.0,) * count
    ranks = vectors.rank_rates
    # The least number that is not dropped, as a multiple of 2⁻²⁴.
    below = [math.ceil(float(np.float32(rate)) * 2**24) or -1 for rate in drops]
    keys = [
        vectors.draws.key(vectors.tensor, model) if vectors.draws is not None and _is_drawn(vectors) else 0
        for model in range(count)
    ]
    ties_ = np.array([part or (KEEP_ALL_TIES,) * count for part in (vectors.ties, vectors.ceiling_ties)], np.int64)
    factors = np.array(vectors.factors or ((1.0,) * count,), np.float32)
    with _places((vectors.base, *vectors.models), vectors.grain) as places:
        yield Operands(
            places=places,
            elements=vectors.elements,
            grain=vectors.grain,
            start=vectors.start,
            keys=np.array(keys, np.uint64),
            drop_below=np.array(below, np.int64),
            rank_below=np.zeros((count, 0), np.int32) if ranks is None else ranks.below,
            rank_stride=1 if ranks is None else ranks.stride,
            marks=np.empty((0, 0, 0), np.uint8) if marks is None else marks,
            has_marks=has_marks,
            divisors=np.array(vectors.divisors or (1.0,) * count, np.float32),
            thresholds=np.array(vectors.thresholds or (_NEVER,) * count, np.float32),
            ceilings=np.array(vectors.ceilings or (_NEVER,) * count, np.float32),
            ties_from=np.ascontiguousarray(ties_[:, :, 0]),
            ties_left=np.ascontiguousarray(ties_[:, :, 1]),
            factors=np.ascontiguousarray(factors.T),
        )
