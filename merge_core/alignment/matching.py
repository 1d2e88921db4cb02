"""Weight matching: the permutations of a model's neurons that bring it closest to another model.

    maximise Σ ⟨A, π(B)⟩ over permutations π, which is to minimise ‖A − π(B)‖²

by coordinate descent: one permutation after the other is solved for exactly while the others stay, in a random order,
until none gains anything more. Permutations that share no tensor are solved for at the same time.

Git Re-Basin, https://arxiv.org/abs/2209.04836, algorithms 1 (two models) and 2 (many).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from merge_core.alignment.assignment import RELATIVE, best, is_more, value
from merge_core.alignment.costs import EXACT, Bundle, Distance, Products, bundles, measured_tensors, working_bytes
from merge_core.alignment.mean import MeanOf
from merge_core.alignment.permutations import Permuted
from merge_core.alignment.spec import Indexed, Indices, PermutationSpec, names
from merge_core.errors import Canceled
from merge_core.progress import Progress, Report
from merge_core.random import permutation, stream_key
from merge_core.weights import Weights

MOST_SWEEPS = 100
_RELATIVE_IN_FLOAT32 = 1e-7
"""Where products are added up in float32, less than this share more is no progress."""
_TICK_SECONDS = 0.2


@dataclass(frozen=True)
class Matching:
    """What was found: the permutations; how far each measured tensor was from the reference's `before` and is `after`;
    in which orders the bundles of permutations were visited; how many were solved for, and how often the free
    certificate proved the solution.
    """

    indexed: Mapping[str, Indices]
    before: Mapping[str, Distance]
    after: Mapping[str, Distance]
    visit_orders: tuple[tuple[int, ...], ...] = ()
    solved: int = 0
    certified: int = 0

    @property
    def l2_before(self) -> float:
        """‖A − B‖ over all measured tensors, before anything was permuted."""
        return _norm(self.before)

    @property
    def l2_after(self) -> float:
        """‖A − π(B)‖ over all measured tensors."""
        return _norm(self.after)


def _norm(distances: Mapping[str, Distance]) -> float:
    return math.sqrt(math.fsum(distance.difference for distance in distances.values()))


@dataclass(frozen=True)
class Work:
    """How a matching is run; none of it changes what is found.

    `threads`: how many compute (None: as many as there are processors). `memory`: bytes for what
    `matching_bytes` counts; permutations wait until there is room (None: any). `report` is told about `progress`, and
    `stop` asked whether to end, a few times a second; an assignment that is being solved for then goes on
    alone, to no effect.
    """

    threads: int | None = None
    memory: int | None = None
    progress: Progress = field(default_factory=Progress)
    report: Report = lambda progress: None
    stop: Callable[[], bool] = lambda: False

    @property
    def workers(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def matching_bytes(spec: PermutationSpec, reference: Weights, model: Weights, threads: int) -> tuple[int, str]:
    """The least memory that matching two models takes, from their headers, and for which permutation: the largest
    matrices of costs, and what so many threads read and multiply at once. Raises `IncompatibleModels`.
    """
    measured = measured_tensors(spec, reference, model)
    working = working_bytes(spec, measured, reference, model, threads)
    largest = max(bundles(spec, measured), key=lambda bundle: bundle.nbytes, default=None)
    return (working, "") if largest is None else (largest.nbytes + working, largest.names[0])


def match(
    spec: PermutationSpec,
    reference: Weights,
    model: Weights,
    *,
    initial: Indexed | None = None,
    seed: int = 0,
    max_sweeps: int = MOST_SWEEPS,
    visit_orders: Sequence[Sequence[int]] | None = None,
    work: Work | None = None,
) -> Matching:
    """The permutations of `model` that bring it closest to `reference`, found from `initial` (None: as it is).

    `visit_orders`: instead of random orders, one for each sweep, of bundles of permutations in the spec's order (every
    permutation is one, unless it stands inside another's blocks). Raises `IncompatibleModels`, `NonFinite`, `Canceled`.
    """
    work = work or Work()
    with _Matcher(spec, reference, model, work) as matcher:
        start = {**spec.identity(), **(initial or {})}
        found = matcher.find(start, seed, max_sweeps, visit_orders)
        before = matcher.distances(spec.identity())
        after = before | matcher.distances(found.indexed, matcher.touched(found.indexed))
    return Matching(found.indexed, before, after, found.visit_orders, found.solved, found.certified)


@dataclass(frozen=True)
class ManyMatched:
    """The permutations of each model, those of the first leaving it as it is, and how often each was matched."""

    indexed: tuple[Mapping[str, Indices], ...]
    rounds: int


def match_many(
    spec: PermutationSpec,
    models: Sequence[Weights],
    *,
    seed: int = 0,
    max_rounds: int = MOST_SWEEPS,
    work: Work | None = None,
) -> ManyMatched:
    """Permutations of three or more models that bring all close to their mean: MergeMany.

    Each in turn, in a random order, is matched to the mean of the others, until none comes closer. What is found is the
    same up to one permutation of all, so it is given such that the first model stays as it is.
    """
    work = work or Work()
    found: list[Indexed] = [spec.identity() for _ in models]
    for rounds in range(1, max_rounds + 1):
        has_moved = False
        for number in permutation(stream_key(seed, rounds, "order of models"), len(models)).tolist():
            others = [Permuted(model, spec, found[i]) for i, model in enumerate(models) if i != number]
            with _Matcher(spec, MeanOf(others), models[number], work) as matcher:
                step = matcher.find(found[number], stream_key(seed, rounds, f"model {number}"), MOST_SWEEPS, None)
            has_moved |= step.moved > 0
            found[number] = step.indexed
        if not has_moved:
            break
    back = spec.inverse(found[0])
    return ManyMatched(tuple(spec.then(indexed, back) for indexed in found), rounds)


@dataclass
class _Found:
    indexed: dict[str, Indices]
    visit_orders: tuple[tuple[int, ...], ...] = ()
    solved: int = 0
    certified: int = 0
    moved: int = 0


class _Matcher:
    """Coordinate descent on two models. Bundles are solved for by threads of their own, which let others multiply."""

    def __init__(self, spec: PermutationSpec, reference: Weights, model: Weights, work: Work) -> None:
        self.spec, self.reference, self.model, self.work = spec, reference, model, work
        self.measured = measured_tensors(spec, reference, model)
        self.bundles = bundles(spec, self.measured)
        self._is_over = False
        self._counting = threading.Lock()
        largest = max((bundle.nbytes for bundle in self.bundles), default=0)
        working = working_bytes(spec, self.measured, reference, model, work.workers)
        self._room = _Room(None if work.memory is None else max(largest, work.memory - working))
        self._owners = {name: number for number, bundle in enumerate(self.bundles) for name in bundle.names}
        self._neighbors = [self._neighbors_of(number) for number in range(len(self.bundles))]
        self._versions = [0] * len(self.bundles)
        self._seen: list[list[int] | None] = [None] * len(self.bundles)

    def _neighbors_of(self, number: int) -> list[int]:
        """The bundles on which depends what the permutations of one are worth."""
        here = self.bundles[number]
        others = {name for term in here.terms for name in names(term.chain)}
        for tensor, place in {(term.tensor, term.axis) for term in here.terms}:
            axes = (axis for i, axis in enumerate(self.spec.axes[tensor]) if i != place and axis is not None)
            others.update(names(*axes))
        return sorted({self._owners[name] for name in others if name in self._owners} - {number})

    def __enter__(self) -> _Matcher:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._multiplying = _pool(self.work.workers, "multiply")
        self._solving = _pool(self.work.workers, "match")
        self._products = Products(
            self.spec, self.reference, self.model, self._multiplying, self._check, lambda tensor: self._read([tensor])
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over = True
        # Nothing can interrupt an assignment, and that of a wide layer takes half a minute: a cancel leaves it alone.
        self._solving.shutdown(wait=kind is None, cancel_futures=True)
        self._multiplying.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads)

    def find(self, start: Indexed, seed: int, max_sweeps: int, visit_orders: Sequence[Sequence[int]] | None) -> _Found:
        """Visit all bundles again and again, until a sweep gains nothing."""
        found = _Found(dict(start))
        orders: list[tuple[int, ...]] = []
        for sweep in range(max_sweeps if visit_orders is None else len(visit_orders)):
            if visit_orders is None:
                order = permutation(stream_key(seed, sweep, "order of permutations"), len(self.bundles)).tolist()
            else:
                order = list(visit_orders[sweep])
            orders.append(tuple(order))
            before = found.moved
            self._sweep(order, found)
            if found.moved == before:
                break
        found.visit_orders = tuple(orders)
        return found

    def _sweep(self, order: Sequence[int], found: _Found) -> None:
        """Visit each bundle once, as if one after the other: each waits only for neighbours that come before it."""
        with self._counting:
            terms = (term for number in order for term in self.bundles[number].terms)
            self.work.progress.bytes_read_total += sum(self._bytes_of(term.tensor) for term in terms)
            self.work.progress.tensors_total += len(order)
        visits: dict[int, Future[None]] = {}
        for number in order:
            earlier = [visits[other] for other in self._neighbors[number] if other in visits]
            visits[number] = self._solving.submit(self._visit, number, earlier, found)
        self._wait(list(visits.values()))

    def _visit(self, number: int, earlier: Sequence[Future[None]], found: _Found) -> None:
        self._check()
        for visit in earlier:
            visit.result()
        bundle = self.bundles[number]
        versions = [self._versions[other] for other in self._neighbors[number]]
        has_moved, proved = False, False
        if is_due := self._seen[number] != versions:
            self._seen[number] = versions
            with self._room.taken(bundle.nbytes, self._check):
                has_moved, proved = self._solve(bundle, found.indexed)
            self._versions[number] += has_moved
        else:
            self._read(term.tensor for term in bundle.terms)
        with self._counting:
            found.solved, found.certified = found.solved + is_due, found.certified + proved
            found.moved += has_moved
            self.work.progress.tensor = bundle.names[0]
            self.work.progress.tensors_done += 1

    def _solve(self, bundle: Bundle, indexed: dict[str, Indices]) -> tuple[bool, bool]:
        """Take the best permutations of a bundle given all others: whether that gains more than rounding could, and
        whether the certificate proved them.
        """
        costs = self._products.costs(bundle, indexed)
        found, is_proved = best(costs, self.spec, indexed, self._check)
        new, old = (value(costs, self.spec, {**indexed, **each}) for each in (found, {}))
        is_exact = all(len(matrix) <= EXACT for matrix in costs.values())
        if not is_more(new, old, RELATIVE if is_exact else _RELATIVE_IN_FLOAT32):
            return False, is_proved
        indexed.update(found)
        return True, is_proved

    def touched(self, indexed: Indexed) -> list[str]:
        """The measured tensors that permutations move."""
        return [name for name in self.measured if any(each is not None for each in self.spec.indices(name, indexed))]

    def distances(self, indexed: Indexed, tensors: Sequence[str] | None = None) -> dict[str, Distance]:
        """How far tensors are from the reference's (None: all that are measured)."""
        wanted = self.measured if tensors is None else tensors
        with self._counting:
            self.work.progress.bytes_read_total += sum(map(self._bytes_of, wanted))

        futures = [self._multiplying.submit(self._products.distance, name, indexed) for name in wanted]
        self._wait(futures)
        return {name: future.result() for name, future in zip(wanted, futures, strict=True)}

    def _wait(self, futures: Sequence[Future[None]] | Sequence[Future[Distance]]) -> None:
        """Report and listen while others work; raises what the first of them raised."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_TICK_SECONDS)  # type: ignore[assignment, arg-type]
            self.work.report(self.work.progress)
            if self.work.stop():
                self._is_over = True
                raise Canceled("the matching was canceled")
            if any(future.exception() is not None for future in done):
                self._is_over = True
                break
        errors = [future.exception() for future in futures if not future.cancel()]
        raised = [error for error in errors if error is not None]
        if raised:
            raise min(raised, key=lambda error: isinstance(error, Canceled))

    def _check(self) -> None:
        if self._is_over:
            raise Canceled("the matching was canceled")

    def _read(self, tensors: Iterable[str]) -> None:
        with self._counting:
            self.work.progress.bytes_read += sum(map(self._bytes_of, tensors))

    def _bytes_of(self, tensor: str) -> int:
        return self.reference.tensors[tensor].nbytes + self.model.tensors[tensor].nbytes


class _Room:
    """Memory that is shared out: whoever wants some waits until so much is left, or all of it is."""

    def __init__(self, size: int | None) -> None:
        self._size, self._used, self._changed = size, 0, threading.Condition()

    @contextmanager
    def taken(self, size: int, check: Callable[[], None]) -> Iterator[None]:
        with self._changed:
            while self._size is not None and self._used and self._used + size > self._size:
                self._changed.wait(_TICK_SECONDS)
                check()
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def _pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads that each compute alone: what comes out must not depend on how many there are."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,))
