"""The tensors: measured and merged block by block, written in file order.

Blocks are worked on by a pool of threads and consumed in order, so that one thread writes and hashes each file from
front to back.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from merge_core.checkpoint import Checkpoint
from merge_core.errors import Canceled, IncompatibleModels, NonFinite, Problem
from merge_core.layout import Slot
from merge_core.method import Block, Known, Randomness, Stage
from merge_core.plan import Plan, Source, Step, TiedPair
from merge_core.progress import Progress, Report
from merge_core.shards import ShardWriter
from merge_core.statistics import Statistic, add_up

_M_ARENA_MAX = -8
_Span = tuple[int, int]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass
class Execution:
    """Carries out a plan. `stop` is asked between blocks; a true answer raises `Canceled`."""

    plan: Plan
    checkpoints: Sequence[Checkpoint]
    writer: ShardWriter
    randomness: Randomness
    progress: Progress = field(default_factory=Progress)
    report: Report = lambda progress: None
    stop: Callable[[], bool] = lambda: False
    warnings: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Measure and merge every tensor that is not in the output yet."""
        self.warnings = list(self.writer.journal.get("warnings", []))
        self.progress.tensors_total = len(self.plan.steps)
        self.progress.bytes_read_total = self.plan.input_bytes
        self.progress.bytes_written_total = sum(slot.nbytes for shard in self.plan.shards for slot in shard.slots)
        with _pool(self.plan.memory.threads) as pool:
            for pair in self.plan.tied:
                self._check_tied(pool, pair)
            known = self._measure_model(pool)
            self._enter("merging")
            for slot in self.writer.remaining():
                self._make(pool, slot, known)
            self.progress.complete()
            self._tick()

    def _make(self, pool: ThreadPoolExecutor, slot: Slot, known: Known) -> None:
        step = self.plan.by_name[slot.name]
        self.progress.tensor = step.name
        self.writer.begin(slot)
        if step.method is None:
            blocks = self._in_order(pool, lambda span: self._copy(step, span), self._spans(step))
        else:
            if self.plan.scope == "tensor":
                known = {}
                self._measure(pool, [step], step.method.stages("tensor"), known)
            method = step.method
            blocks = self._in_order(pool, lambda span: self._merge(step, method.merge, known, span), self._spans(step))
        for rows in blocks:
            self.writer.write(rows)
            self.progress.bytes_written += rows.numel() * rows.element_size()
            self._tick()
        self.writer.end(slot)
        self.progress.tensors_done += 1
        self._tick()

    def _measure_model(self, pool: ThreadPoolExecutor) -> Known:
        """What the whole model's statistics come to; each stage is remembered in the journal."""
        known: Known = {}
        steps = self.plan.measured
        if self.plan.scope != "model" or not steps or steps[0].method is None:
            return known
        stages = steps[0].method.stages("model")
        measured = self.writer.journal.get("measured", {"stages": 0, "known": {}})
        known = dict(measured["known"])
        for number, stage in enumerate(stages[measured["stages"] :], start=measured["stages"] + 1):
            self._measure(pool, steps, [stage], known)
            self.writer.remember("measured", {"stages": number, "known": known})
        return known

    def _measure(self, pool: ThreadPoolExecutor, steps: Sequence[Step], stages: Iterable[Stage], known: Known) -> None:
        """Make the stages' passes over the tensors, one stage after the other."""
        for stage in stages:
            if not stage.needed(known):
                self.progress.bytes_read_total -= sum(source.info.nbytes for step in steps for source in step.reads)
                continue
            self._enter(f"measuring: {stage.name}")
            jobs = ((step, span) for step in steps for span in self._spans(step))

            def observe(job: tuple[Step, _Span], stage: Stage = stage) -> dict[str, Statistic]:
                return stage.observe(self._block(*job), known)

            totals: dict[str, Statistic] = {}
            for found in self._in_order(pool, observe, jobs):
                add_up(totals, found)
                self._tick()
            stage.finish(totals, known)
        self._enter("merging")

    def _merge(self, step: Step, merge: Callable[[Block, Known], Tensor], known: Known, span: _Span) -> Tensor:
        block = self._block(step, span)
        return self._rounded(step, merge(block, known).reshape(block.models.shape[1:]), span)

    def _copy(self, step: Step, span: _Span) -> Tensor:
        original, *others = step.sources
        rows = self._rows(original, step, span)
        for other in others:
            if not torch.equal(rows, self._rows(other, step, span).to(rows.dtype)):
                warning = (
                    f"{step.name} differs between the models; {step.reason}, so that of {self._name(original)} was kept"
                )
                self._warn(warning)
        return self._rounded(step, rows, span) if rows.dtype != step.dtype.torch else rows

    def _block(self, step: Step, span: _Span) -> Block:
        """The rows of some grains from all models at once, in the working dtype."""
        first, last = span
        start, stop = step.grains.row_range(first, last)
        shape = (stop - start, *step.shape[1:]) if step.shape else ()
        models = torch.empty((len(step.sources), *shape), dtype=step.working.torch)
        for row, source in zip(models, step.sources, strict=True):
            row.copy_(self._rows(source, step, span))
        base = None if step.base is None else self._rows(step.base, step, span).to(step.working.torch)
        return Block(models, base, step.name, step.grains, first, self.randomness)

    def _rows(self, source: Source, step: Step, span: _Span) -> Tensor:
        if self.stop():
            raise Canceled("the merge was canceled")
        start, stop = step.grains.row_range(*span)
        rows = self.checkpoints[source.model].rows(source.info, start, stop)
        self.progress.bytes_read += rows.numel() * rows.element_size()
        if source.info.dtype.kind == "float" and not self.plan.recipe.allow_nonfinite and not _is_finite(rows):
            element = _first_nonfinite(rows) + start * step.grains.width
            file = f"{self._name(source)}/{source.info.file}"
            message = (
                f"{source.info.name} of {self._name(source)} holds NaN or infinity at element {element:,} ({file}); "
                "repair the model, or set allow_nonfinite: true to let it through"
            )
            raise NonFinite(source.info.name, file, message)
        return rows

    def _rounded(self, step: Step, values: Tensor, span: _Span) -> Tensor:
        """The one rounding into the stored dtype; a value that does not fit there is refused."""
        stored = values.to(step.dtype.torch)
        if step.dtype.kind == "float" and not self.plan.recipe.allow_nonfinite and not _is_finite(stored):
            start, _ = step.grains.row_range(*span)
            element = _first_nonfinite(stored) + start * step.grains.width
            detail = (
                f"{step.name} becomes NaN or infinity at element {element:,} in {step.dtype}; "
                "choose a wider out_dtype or smaller weights"
            )
            raise NonFinite(step.name, "output", detail)
        return stored

    def _check_tied(self, pool: ThreadPoolExecutor, pair: TiedPair) -> None:
        """Raise if two tensors that a config calls one are not: storing one of them would lose the other."""
        self._enter("checking tied weights")
        step = Step(
            pair.tensor.name,
            pair.tensor.shape,
            pair.tensor.dtype,
            (Source(pair.model, pair.tensor), Source(pair.model, pair.partner)),
        )

        def equal(span: _Span) -> bool:
            one, other = (self._rows(source, step, span) for source in step.sources)
            return torch.equal(one, other.to(one.dtype))

        if not all(self._in_order(pool, equal, self._spans(step))):
            detail = (
                f"{self.plan.models[pair.model]}: the config ties {pair.tensor.name} to {pair.partner.name}, but their "
                "stored values differ; set tie_word_embeddings to false in its config.json, or remove the unused one"
            )
            raise IncompatibleModels(detail, [Problem(detail, tensor=pair.tensor.name)])

    def _spans(self, step: Step) -> Iterator[_Span]:
        """Runs of whole grains, as long as the plan's blocks."""
        grains = step.grains
        length = max(1, self.plan.memory.block_elements // max(1, grains.size * grains.width))
        for first in range(0, grains.count if step.shape == () or all(step.shape) else 0, length):
            yield first, min(first + length, grains.count)

    def _in_order(
        self, pool: ThreadPoolExecutor, function: Callable[[_Job], _Result], jobs: Iterable[_Job]
    ) -> Iterator[_Result]:
        """The results in the order of the jobs, with only a few in the making at once."""
        pending: deque[Future[_Result]] = deque()
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > self.plan.memory.threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _name(self, source: Source) -> str:
        return str(self.plan.models[source.model])

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)
            self.writer.remember("warnings", list(self.warnings))

    def _enter(self, phase: str) -> None:
        self.progress.phase = phase
        self._tick()

    def _tick(self) -> None:
        if self.stop():
            raise Canceled("the merge was canceled")
        self.report(self.progress)


def share_one_heap() -> None:
    """Let all threads allocate from one heap, where the C library is glibc.

    Its heap per thread keeps what another thread cannot use: blocks of tens of megabytes, freed in another order than
    they were taken, doubled the peak that the plan promises.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone: torch's own threads would only get in one another's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _first_nonfinite(values: Tensor) -> int:
    return int((~torch.isfinite(values)).flatten().nonzero()[0])
