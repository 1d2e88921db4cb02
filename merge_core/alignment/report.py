"""What an alignment did, and whether a line joins two models: after the analysis of linear mode connectivity by Ito et
al. (https://arxiv.org/abs/2402.04051).

A permutation moves rows and columns: it turns the singular vectors of a matrix and never changes a singular value. So
aligned models need not come much closer; what makes their average work is that their strong directions agree. Of each
matrix is told how far the models are apart before and after, how much their spectra differ, and

    R = 1/n Σᵢⱼ (uᵢ · u'ⱼ)(vᵢ · v'ⱼ)

over the strong directions of both, 1 if they are the same and about 0 for unrelated ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_core.alignment.permutations import Permuted
from merge_core.alignment.spec import Indexed, PermutationSpec
from merge_core.dtypes import FLOAT32, FLOAT64
from merge_core.errors import Canceled, IncompatibleModels, MemoryLimitExceeded, NonFinite, Problem
from merge_core.headers import TensorInfo
from merge_core.kernels.vectors import RUN_ELEMENTS
from merge_core.matrices import Pieces, reciprocal, runs, singular
from merge_core.progress import Progress, Report
from merge_core.statistics import Grains, GrainSums, grain_sums
from merge_core.weights import Weights

SHARE = 0.3
"""γ: directions with this share of a matrix's largest singular value are strong."""
_RUNS = 8
"""How many runs of a matrix in float64 there are at once while it is read."""


@dataclass(frozen=True)
class Directions:
    """How well the strong singular vectors of two matrices agree.

    `overlap`: R; `left` and `right`: which part of one matrix's strong subspace of outputs and of inputs lies in the
    other's, ‖UᵀU'‖²/n.
    """

    overlap: float
    left: float
    right: float


@dataclass(frozen=True)
class TensorReport:
    """One tensor of two models, before and after the second one was permuted.

    Distances are ‖A − B‖ / √(‖A‖² + ‖B‖²): 0 for the same, 1 for unrelated tensors. `strong`: how many directions of
    each matrix count; `spectra`: ‖σ − σ'‖ / √(‖σ‖² + ‖σ'‖²). None where a tensor is no matrix or was not decomposed.
    """

    tensor: str
    shape: tuple[int, ...]
    distance_before: float
    distance_after: float
    strong: tuple[int, int] | None = None
    spectra: float | None = None
    before: Directions | None = None
    after: Directions | None = None


@dataclass(frozen=True)
class AlignmentReport:
    """Every tensor that the permutations move and that is measured, and the distance over all of them."""

    tensors: tuple[TensorReport, ...]
    distance_before: float
    distance_after: float

    def to_data(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)

    def table(self) -> str:
        """The report as text: a line for every tensor."""
        head = ("tensor", "distance", "after", "spectra", "strong", "R", "after", "left", "after", "right", "after")
        rows: list[tuple[str, ...]] = [head]
        for found in self.tensors:
            cells = [found.tensor, _shown(found.distance_before), _shown(found.distance_after), _shown(found.spectra)]
            cells.append("/".join(map(str, found.strong)) if found.strong else "–")
            for side in ("overlap", "left", "right"):
                cells += [_shown(getattr(each, side, None)) for each in (found.before, found.after)]
            rows.append(tuple(cells))
        rows.append(("all", _shown(self.distance_before), _shown(self.distance_after), *[""] * (len(head) - 3)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *cells in rows:
            numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *numbers]).rstrip())
        return "\n".join(lines)


def analyse(
    reference: Weights,
    model: Weights,
    spec: PermutationSpec,
    indexed: Indexed,
    *,
    share: float = SHARE,
    top: int | None = None,
    decompose: bool = True,
    memory: int | None = None,
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> AlignmentReport:
    """Compare a model with the reference that it was aligned to, before and after the permutations.

    Strong are the singular values of at least `share` (γ) of a matrix's largest, or its `top` largest. Convolutions
    count as matrices of their output channels. Rows are streamed; what a decomposition takes is `decomposition_bytes`,
    and where that is more than `memory` (bytes besides the process itself) nothing is read; without `decompose` only
    distances are found.

    Raises `IncompatibleModels`, `MemoryLimitExceeded`, `NonFinite`, `CheckpointError`, `Canceled`.
    """
    spec.check({name: info.shape for name, info in reference.tensors.items()})
    comparison = _Comparison(reference, model, Permuted(model, spec, indexed), spec, indexed, share, top)
    infos = [info for info in reference.tensors.values() if _is_measured(info, model, spec)]
    needed, worst = analysis_bytes(reference, model, spec)
    if decompose and memory is not None and worst is not None and needed > memory:
        detail = (
            f"to decompose {worst.name} {list(worst.shape)} takes {needed / 2**20:,.0f} MiB, but the report may take "
            f"{memory / 2**20:,.0f} MiB; raise the limit, or ask for distances only"
        )
        raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory", tensor=worst.name)])
    progress = Progress("comparing", tensors_total=len(infos))

    def tick(info: TensorInfo) -> None:
        if stop():
            raise Canceled("the comparison was canceled")
        progress.tensor = info.name
        report(progress)

    found, sums = [], []
    for info in infos:
        tick(info)
        compared, squares = comparison.distances(info, partial(tick, info))
        if decompose and _is_matrix(info):
            compared = comparison.decomposed(compared, info, partial(tick, info))
        found.append(compared)
        sums.append(squares)
        progress.tensors_done += 1
    total = [math.fsum(column) for column in zip(*sums, strict=True)] or [0.0] * 4
    report(progress)
    return AlignmentReport(tuple(found), *_distances(total))


def analysis_bytes(reference: Weights, model: Weights, spec: PermutationSpec) -> tuple[int, TensorInfo | None]:
    """The most memory that decomposing a tensor of two models takes, and which it is."""
    infos = [info for info in reference.tensors.values() if _is_measured(info, model, spec)]
    found = ((decomposition_bytes(info, model.tensors[info.name]), info) for info in infos)
    return max(found, key=lambda each: each[0], default=(0, None))


def decomposition_bytes(*infos: TensorInfo) -> int:
    """Memory that it takes to compare a matrix of several models: those of the short side squared, in float64, with
    what their decomposition needs, runs of rows, and the matrices themselves where they lie down.
    """
    info = infos[0]
    if not _is_matrix(info):
        return 0
    rows, width = info.rows, info.elements // info.rows
    short, run = min(rows, width), min(info.elements, max(RUN_ELEMENTS, width))
    return 8 * (5 * short**2 + _RUNS * run) + (rows < width) * sum(each.nbytes for each in infos)


@dataclass(frozen=True)
class _Comparison:
    reference: Weights
    model: Weights
    permuted: Permuted
    spec: PermutationSpec
    indexed: Indexed
    share: float
    top: int | None

    def distances(self, info: TensorInfo, tick: Callable[[], None]) -> tuple[TensorReport, Sequence[float]]:
        """A tensor's report, and the sums it was made of: ‖A‖², ‖B‖², ‖A − B‖² and, permuted, ‖A − B‖²."""
        theirs, grains, sums = self.model.tensors[info.name], Grains.of(info.shape), GrainSums()
        working = FLOAT64.torch if FLOAT64 in (info.dtype, theirs.dtype) else FLOAT32.torch
        for index in range(grains.count):
            tick()
            start, stop = grains.row_range(index, index + 1)
            ours = self.reference.rows(info, start, stop).to(working).reshape(-1)
            before, after = (
                weights.rows(theirs, start, stop).to(working).reshape(-1) for weights in (self.model, self.permuted)
            )
            squares = torch.stack([ours, before, ours - before, ours - after]).to(torch.float64).square_()
            sums.put(info.name, grains.count, index, grain_sums(squares, max(1, squares.shape[1]))[0])
        total = sums.total().tolist()
        if not all(map(math.isfinite, total)):
            detail = f"{info.name} holds NaN or infinity, so that models cannot be compared"
            raise NonFinite(info.name, str(self.reference.path), detail)
        return TensorReport(info.name, info.shape, *_distances(total)), total

    def decomposed(self, compared: TensorReport, info: TensorInfo, tick: Callable[[], None]) -> TensorReport:
        """The report of a matrix, with its directions."""
        theirs = self.model.tensors[info.name]
        ours = partial(_pieces, self.reference, info, tick)
        before, after = (partial(_pieces, weights, theirs, tick) for weights in (self.model, self.permuted))
        our_values, our_vectors = singular(ours)
        strong = self._strong(our_values)
        our_vectors = our_vectors[:, len(our_values) - strong :].clone()
        values, vectors = singular(before)
        their_strong = self._strong(values)
        vectors = vectors[:, len(values) - their_strong :].clone()
        spectra = math.sqrt(_square(our_values - values) / max(_square(our_values) + _square(values), math.ulp(0)))
        counts = strong, their_strong
        found = replace(compared, strong=counts, spectra=spectra)
        if not all(counts):
            return found
        inverses = reciprocal(our_values[-strong:]), reciprocal(values[-their_strong:])
        moved = vectors[self._short_index(info)]
        return replace(
            found,
            before=_directions(info, ours, before, our_vectors, vectors, inverses),
            after=_directions(info, ours, after, our_vectors, moved, inverses),
        )

    def _strong(self, values: Tensor) -> int:
        """How many of the ascending values count."""
        there = int((values > 0).sum())
        if self.top is not None:
            return min(there, self.top)
        return min(there, int((values >= self.share * values[-1]).sum()))

    def _short_index(self, info: TensorInfo) -> Tensor:
        """Where the elements of a matrix's short side come from."""
        first, *others = (
            np.arange(size) if axis is None else self.spec.index(axis, self.indexed)
            for axis, size in zip(self.spec.axes[info.name], info.shape, strict=True)
        )
        if _is_lying(info):
            return torch.from_numpy(first)
        places = np.broadcast_arrays(*np.ix_(*others))
        return torch.from_numpy(np.ravel_multi_index(tuple(places), info.shape[1:]).reshape(-1))


def _directions(
    info: TensorInfo,
    ours: Pieces,
    theirs: Pieces,
    our_short: Tensor,
    their_short: Tensor,
    inverses: tuple[Tensor, Tensor],
) -> Directions:
    """How the singular vectors agree: those of the short side are known, those of the long side are made in runs."""
    short = our_short.T @ their_short
    long = torch.zeros_like(short)
    our_inverse, their_inverse = inverses
    for (_, mine), (_, other) in zip(ours(), theirs(), strict=True):
        long.addmm_((mine @ our_short * our_inverse).T, other @ their_short * their_inverse)
    count = max(short.shape)
    left, right = (short, long) if _is_lying(info) else (long, short)
    return Directions(float((short * long).sum()) / count, _square(left) / count, _square(right) / count)


def _pieces(weights: Weights, info: TensorInfo, tick: Callable[[], None]) -> Iterator[tuple[slice, Tensor]]:
    """A tensor as a matrix with its long side first; one that lies down is held whole."""
    rows, width = info.rows, info.elements // info.rows
    whole = None
    for run in runs(rows, width):
        tick()
        stored = weights.rows(info, run.start, run.stop).reshape(-1, width)
        if not _is_lying(info):
            yield run, stored.to(torch.float64)
            continue
        if whole is None:
            whole = stored.new_empty(rows, width)
        whole[run] = stored
    if whole is not None:
        for run in runs(width, rows):
            tick()
            yield run, whole[:, run].T.to(torch.float64)


def _is_measured(info: TensorInfo, model: Weights, spec: PermutationSpec) -> bool:
    is_moved = any(axis is not None for axis in spec.axes[info.name])
    is_number = info.dtype.kind == model.tensors[info.name].dtype.kind == "float"
    return is_moved and is_number and info.name not in spec.unmeasured and info.elements > 0


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) > 1 and min(info.rows, info.elements // info.rows) > 1


def _is_lying(info: TensorInfo) -> bool:
    return info.rows < info.elements // info.rows


def _distances(squares: Sequence[float]) -> tuple[float, float]:
    ours, theirs, before, after = squares
    whole = ours + theirs
    return (math.sqrt(before / whole), math.sqrt(after / whole)) if whole else (0.0, 0.0)


def _square(values: Tensor) -> float:
    return float(values.square().sum())


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


class Segment(Mapping[str, Tensor]):
    """The tensors (1 − t) A + t B of two models with the same names and shapes, made when they are asked for.

    Numbers are mixed in float32 (float64 where either is) and stay so; tensors that are no numbers are A's.
    """

    def __init__(self, first: Weights, second: Weights, t: float) -> None:
        self.first, self.second, self.t = first, second, t

    def __getitem__(self, name: str) -> Tensor:
        info, other = self.first.tensors[name], self.second.tensors[name]
        stored = self.first.rows(info, 0, info.rows).reshape(info.shape)
        if not info.dtype.kind == other.dtype.kind == "float":
            return stored
        working = FLOAT64.torch if FLOAT64 in (info.dtype, other.dtype) else FLOAT32.torch
        theirs = self.second.rows(other, 0, other.rows).reshape(info.shape).to(working)
        return stored.to(working) * (1 - self.t) + theirs * self.t

    def __iter__(self) -> Iterator[str]:
        return iter(self.first.tensors)

    def __len__(self) -> int:
        return len(self.first.tensors)


@dataclass(frozen=True)
class Interpolation:
    """What an evaluator said of models on the line between two: `values[name][i]` at `points[i]` in [0, 1]."""

    points: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]

    def barrier(self, name: str = "loss", *, higher_is_better: bool = False) -> float:
        """By how much the line is worse than its ends, mixed alike, where it is worst; 0 if it nowhere is.

        >>> Interpolation((0.0, 0.5, 1.0), {"loss": (1.0, 2.5, 2.0)}).barrier()
        1.0
        """
        values = self.values[name]
        sign = -1 if higher_is_better else 1
        ends = ((1 - t) * values[0] + t * values[-1] for t in self.points)
        return max(sign * (value - expected) for value, expected in zip(values, ends, strict=True))

    def to_data(self) -> dict[str, Any]:
        """The curve as JSON."""
        return {"points": list(self.points), "values": {name: list(values) for name, values in self.values.items()}}


def interpolation(
    evaluate: Callable[[Mapping[str, Tensor]], Mapping[str, float]],
    first: Weights,
    second: Weights,
    *,
    points: int = 11,
    stop: Callable[[], bool] = lambda: False,
) -> Interpolation:
    """Evaluate models on the line between two, ends included; `evaluate` gets a model's tensors by name, which are
    made as it asks for them, and says of each of its measures (`loss`, `accuracy`) what it came to.

    Raises `IncompatibleModels` for models of other tensors, `Canceled`.
    """
    problems = []
    for name in first.tensors.keys() | second.tensors.keys():
        shapes = [weights.tensors[name].shape if name in weights.tensors else None for weights in (first, second)]
        if shapes[0] != shapes[1]:
            told = " and ".join("not there" if shape is None else str(list(shape)) for shape in shapes)
            problems.append(Problem(f"{name} is {told} in the two models", tensor=name))
    if problems:
        raise IncompatibleModels.of(sorted(problems, key=str))
    if points < 2:
        raise ValueError("a line has two ends at least")
    shares = tuple(i / (points - 1) for i in range(points))
    found: dict[str, list[float]] = {}
    for t in shares:
        if stop():
            raise Canceled("the evaluation was canceled")
        for name, value in evaluate(Segment(first, second, t)).items():
            found.setdefault(name, []).append(float(value))
    return Interpolation(shares, {name: tuple(values) for name, values in found.items()})
