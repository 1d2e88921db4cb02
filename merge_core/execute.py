"""The tensors: measured and merged block by block, written in file order.

A pool of threads reads blocks, measures or merges them; what is merged is handed on in order, so that each file is
hashed and written from front to back by threads of their own while the next blocks are read and merged. All space is
taken once and used again. While one tensor is merged, the next is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from merge_core import kernels
from merge_core.errors import Canceled, IncompatibleModels, NonFinite, Problem
from merge_core.kernels.vectors import Rows
from merge_core.layout import Slot
from merge_core.method import Block, Known, Randomness, Stage
from merge_core.plan import WRITING_BLOCKS, Plan, Source, Step, TiedPair
from merge_core.progress import Progress, Report
from merge_core.shards import ShardWriter
from merge_core.statistics import Statistic, add_up
from merge_core.weights import Weights

_M_ARENA_MAX = -8
_ALIGNED = 64
CPU = torch.device("cpu")
_Span = tuple[int, int]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass
class Execution:
    """Carries out a plan on a device.

    `merged` is told of each tensor whose inputs are done with; `stop` is asked between blocks, a true answer raises
    `Canceled`.
    """

    plan: Plan
    checkpoints: Sequence[Weights]
    writer: ShardWriter
    randomness: Randomness
    merged: Callable[[Step], None] = lambda step: None
    progress: Progress = field(default_factory=Progress)
    report: Report = lambda progress: None
    stop: Callable[[], bool] = lambda: False
    device: torch.device = CPU
    warnings: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Measure and merge every tensor that is not in the output yet."""
        self._counting = threading.Lock()
        self._space = _Space(self.device)
        self._is_over = False
        self.warnings = list(self.writer.journal.get("warnings", []))
        self.progress.tensors_total = len(self.plan.steps)
        self.progress.bytes_read_total = self.plan.input_bytes
        self.progress.bytes_written_total = sum(slot.nbytes for shard in self.plan.shards for slot in shard.slots)
        with _pool(self.plan.memory.threads) as pool:
            for pair in self.plan.tied:
                self._check_tied(pool, pair)
            known = self._measure_model(pool)
            self._enter("merging")
            self._merge_all(pool, known)
            self.warnings.sort()
            self.progress.complete()
            self._tick()

    # Merging.

    def _merge_all(self, pool: ThreadPoolExecutor, known: Known) -> None:
        """Merge block after block, of one tensor after the other, and hand them to the writer in order."""
        free = deque(self._outputs())
        merging: deque[tuple[Slot, bool, bool, Future[Tensor] | None, Tensor]] = deque()
        writing: deque[tuple[Callable[[], None], Tensor]] = deque()

        def hand_on() -> None:
            slot, is_first, is_last, merged, out = merging.popleft()
            if is_first:
                self.progress.tensor = slot.name
                self.writer.begin(slot)
            if merged is None:
                free.append(out)
            else:
                rows = merged.result()
                writing.append((self.writer.write(rows), out))
                self.progress.bytes_written += rows.numel() * rows.element_size()
            if is_last:
                self.writer.end()
                self.merged(self.plan.by_name[slot.name])
                self.progress.tensors_done += 1
            self._tick()

        with closing(self._measured(pool, known)) as tensors:
            for slot, here in tensors:
                step = self.plan.by_name[slot.name]
                spans: list[_Span | None] = list(self._spans(step)) or [None]
                for span in spans:
                    while not free:
                        if writing:
                            wait, out = writing.popleft()
                            wait()
                            free.append(out)
                        else:
                            hand_on()
                    out = free.popleft()
                    job = None if span is None else pool.submit(self._make, step, here, span, out)
                    merging.append((slot, span is spans[0], span is spans[-1], job, out))
                    while merging and (merging[0][3] is None or merging[0][3].done()):
                        hand_on()
        while merging:
            hand_on()
        for wait, _ in writing:
            wait()

    def _measured(self, pool: ThreadPoolExecutor, known: Known) -> Generator[tuple[Slot, Known], None, None]:
        """The tensors still to be merged, each with what is known of it; the next is measured meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="measure") as ahead:
            before: tuple[Slot, Future[Known]] | None = None
            try:
                for slot in self.writer.remaining():
                    measuring = ahead.submit(self._measure_tensor, pool, self.plan.by_name[slot.name], known)
                    if before is not None:
                        yield before[0], before[1].result()
                    before = slot, measuring
                if before is not None:
                    yield before[0], before[1].result()
            except BaseException:
                self._is_over = True
                raise

    def _make(self, step: Step, known: Known, span: _Span, out: Tensor) -> Tensor:
        """One block of the output, in its stored dtype, in main memory."""
        start, stop = step.grains.row_range(*span)
        shape = (stop - start, *step.shape[1:]) if step.shape else ()
        rows = out[: math.prod(shape) * step.dtype.itemsize].view(step.dtype.torch).reshape(shape)
        with self._space.at_work():
            if step.method is None:
                self._copy(step, span, rows)
            else:
                is_first = not step.method.stages(self.plan.scope)
                merged = step.method.merge(self._block(step, span, check=is_first, out=rows), known)
                if merged.data_ptr() != rows.data_ptr():
                    self._round(merged.reshape(shape), rows)
        return self._checked(step, rows, start)

    def _copy(self, step: Step, span: _Span, out: Tensor) -> None:
        rows = [rows.load() for rows in self._rows(step.sources, step, span, check=True)]
        if rows[0].dtype == out.dtype:
            out.copy_(rows[0], non_blocking=True)
        else:
            self._round(rows[0], out)
        for theirs in rows[1:]:
            if not torch.equal(rows[0], theirs.to(rows[0].dtype)):
                kept = f"{step.reason}, so that of {self._name(step.sources[0])} was kept"
                self._warn(f"{step.name} differs between the models; {kept}")

    def _round(self, values: Tensor, rows: Tensor) -> None:
        """The one rounding into the stored dtype; any NaN becomes the one quiet NaN."""
        if values.dtype != rows.dtype:
            values = values.to(rows.dtype)
        if self.plan.recipe.allow_nonfinite and values.is_floating_point():
            values = torch.where(values.isnan(), torch.nan, values)
        rows.copy_(values, non_blocking=True)

    def _checked(self, step: Step, rows: Tensor, start: int) -> Tensor:
        """The merged rows, unless a value does not fit into the stored dtype."""
        if step.dtype.kind != "float" or self.plan.recipe.allow_nonfinite:
            return rows
        if (found := kernels.first_nonfinite(rows)) >= 0:
            detail = (
                f"{step.name} becomes NaN or infinity at element {found + start * step.grains.width:,} in "
                f"{step.dtype}; choose a wider out_dtype or smaller weights"
            )
            raise NonFinite(step.name, "output", detail)
        return rows

    # Measuring.

    def _measure_model(self, pool: ThreadPoolExecutor) -> Known:
        """What the whole model's statistics come to; each stage is remembered in the journal."""
        known: Known = {}
        steps = self.plan.measured
        if self.plan.scope != "model" or not steps or steps[0].method is None:
            return known
        stages = steps[0].method.stages("model")
        measured = self.writer.journal.get("measured", {"stages": 0, "known": {}})
        known = dict(measured["known"])
        is_checked = False
        for number, stage in enumerate(stages[measured["stages"] :], start=measured["stages"] + 1):
            self._enter(f"measuring: {stage.name}")
            for _ in self._measure(pool, steps, stage, known, check=not is_checked):
                is_checked = stage.reads == 1
                self._tick()
            self.writer.remember("measured", {"stages": number, "known": known})
        return known

    def _measure_tensor(self, pool: ThreadPoolExecutor, step: Step, known: Known) -> Known:
        """What is known of one tensor: of the whole model, or what its own statistics come to."""
        if self.plan.scope == "model" or step.method is None:
            return known
        known = {}
        is_checked = False
        for stage in step.method.stages("tensor"):
            for _ in self._measure(pool, [step], stage, known, check=not is_checked):
                is_checked = stage.reads == 1
        return known

    def _measure(
        self, pool: ThreadPoolExecutor, steps: Sequence[Step], stage: Stage, known: Known, *, check: bool
    ) -> Iterator[None]:
        """Make one stage's pass over the tensors; yields after each block."""
        concerned = [step for step in steps if stage.needed(known) and stage.concerns(step.name, known)]
        made = sum(step.stored_bytes for step in concerned)
        planned = sum(step.stored_bytes for step in steps) if stage.expected else 0
        with self._counting:
            self.progress.bytes_read_total += int(stage.reads * made) - int(stage.reads * planned)
        if not concerned:
            return
        threads = threading.local()
        parts: list[dict[str, Statistic]] = []

        def observe(job: tuple[Step, _Span]) -> None:
            if not hasattr(threads, "found"):
                threads.found = {}
                parts.append(threads.found)
            with self._space.at_work():
                stage.observe(self._block(*job, check=check, reads=stage.reads), known, threads.found)

        for _ in self._in_order(pool, observe, ((step, span) for step in concerned for span in self._spans(step))):
            yield
        totals = parts[0]
        for part in parts[1:]:
            add_up(totals, part)
        stage.finish(totals, known)

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
            with self._space.at_work():
                one, other = (rows.load() for rows in self._rows(step.sources, step, span, check=True))
                return torch.equal(one, other.to(one.dtype))

        if not all(self._in_order(pool, equal, self._spans(step))):
            detail = (
                f"{self.plan.models[pair.model]}: the config ties {pair.tensor.name} to {pair.partner.name}, but their "
                "stored values differ; set tie_word_embeddings to false in its config.json, or remove the unused one"
            )
            raise IncompatibleModels(detail, [Problem(detail, tensor=pair.tensor.name)])

    # Reading.

    def _block(self, step: Step, span: _Span, *, check: bool, out: Tensor | None = None, reads: float = 1.0) -> Block:
        """Some grains from all models at once, to be read when they are used."""
        rows = self._rows(step.reads, step, span, check=check, reads=reads)
        base = None if step.base is None else rows.pop(0)
        return Block(rows, base, step.name, step.grains, span[0], self.randomness, step.working.torch, out)

    def _rows(
        self, sources: Sequence[Source], step: Step, span: _Span, *, check: bool, reads: float = 1.0
    ) -> list[Rows]:
        """The sources' rows; at their first reading NaN and infinity are refused."""
        if self._is_over or self.stop():
            raise Canceled("the merge was canceled")
        start, stop = step.grains.row_range(*span)
        check = check and not self.plan.recipe.allow_nonfinite
        sizes = [Weights.row_bytes(source.info) * (stop - start) for source in sources]
        with self._counting:
            self.progress.bytes_read += int(reads * sum(sizes))
        spaces = functools.cache(lambda: self._space.take(sizes))
        return [
            self._rows_of(source, step, start, stop, lambda i=i: spaces()[i], check=check)  # type: ignore[misc]
            for i, source in enumerate(sources)
        ]

    def _rows_of(
        self, source: Source, step: Step, start: int, stop: int, space: Callable[[], Tensor], *, check: bool
    ) -> Rows:
        checkpoint, info = self.checkpoints[source.model], source.info
        check = check and info.dtype.kind == "float"

        @functools.cache
        def load() -> Tensor:
            rows = checkpoint.rows(info, start, stop, space())
            if check and (found := kernels.first_nonfinite(rows)) >= 0:
                refuse(found)
            return rows.to(self.device, non_blocking=True)

        def refuse(element: int) -> None:
            if element < 0:
                checkpoint.rows(info, start, stop)  # says what is wrong
                raise checkpoint.ends_inside(info)
            file = f"{self._name(source)}/{info.file}"
            message = (
                f"{info.name} of {self._name(source)} holds NaN or infinity at element "
                f"{element + start * step.grains.width:,} ({file}); repair the model, or set allow_nonfinite: true to "
                "let it through"
            )
            raise NonFinite(info.name, file, message)

        place = checkpoint.place(info) if self.device == CPU else None
        descriptor, offset = place or (-1, 0)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        return Rows(info.dtype.torch, shape, load, descriptor, offset + start * Weights.row_bytes(info), check, refuse)

    def _spans(self, step: Step) -> Iterator[_Span]:
        """Runs of whole grains, as long as the plan's blocks."""
        grains = step.grains
        least = max(1, -(-step.least_rows // grains.size))
        length = max(1, self.plan.memory.block_elements // max(1, least * grains.size * grains.width)) * least
        for first in range(0, grains.count if step.shape == () or all(step.shape) else 0, length):
            yield first, min(first + length, grains.count)

    def _outputs(self) -> list[Tensor]:
        """Space for the blocks that are merged or on their way to the disk, on pages of their own."""
        largest = max((self._block_bytes(step) for step in self.plan.steps), default=0)
        count = self.plan.memory.threads + WRITING_BLOCKS
        if self.device != CPU:
            return [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        return [torch.frombuffer(mmap.mmap(-1, max(1, largest)), dtype=torch.uint8) for _ in range(count)]

    def _block_bytes(self, step: Step) -> int:
        spans = self._spans(step)
        first, last = next(spans, (0, 0))
        start, stop = step.grains.row_range(first, last)
        return (stop - start) * step.grains.width * step.dtype.itemsize

    def _in_order(
        self, pool: ThreadPoolExecutor, function: Callable[[_Job], _Result], jobs: Iterable[_Job]
    ) -> Iterator[_Result]:
        """The results in the order of the jobs, with only a few in the making at once."""
        pending: deque[Future[_Result]] = deque()
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > 2 * self.plan.memory.threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _name(self, source: Source) -> str:
        return str(self.plan.models[source.model])

    def _warn(self, warning: str) -> None:
        with self._counting:
            if warning in self.warnings:
                return
            self.warnings.append(warning)
            self.writer.remember("warnings", list(self.warnings))

    def _enter(self, phase: str) -> None:
        self.progress.phase = phase
        self._tick()

    def _tick(self) -> None:
        if self.stop():
            raise Canceled("the merge was canceled")
        self.report(self.progress)


class _Space(threading.local):
    """Each thread's space for the rows it reads, used again for every block; on a GPU pinned, with a stream.

    So while one thread waits for its copies and its arithmetic, another reads the next block and copies it.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Whatever is begun inside is done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def take(self, sizes: Sequence[int]) -> list[Tensor]:
        """Space of these sizes in bytes, until the thread asks again."""
        aligned = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        if sum(aligned) > self._buffer.numel():
            self._buffer = torch.empty(sum(aligned), dtype=torch.uint8, pin_memory=self._stream is not None)
        parts = torch.split(self._buffer[: sum(aligned)], aligned)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]


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
