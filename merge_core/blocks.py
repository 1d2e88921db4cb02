"""One plan's blocks: read, measured and merged, wherever the merged rows go.

Whoever calls hands in the pool of threads that measures, and the space that a merged block is put into.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from merge_core import kernels
from merge_core.errors import Canceled, IncompatibleModels, NonFinite, Problem
from merge_core.kernels.plain import rounded
from merge_core.kernels.vectors import Rows
from merge_core.method import Block, Known, Randomness, Stage
from merge_core.plan import Plan, Source, Step, TiedPair
from merge_core.progress import Progress
from merge_core.statistics import Statistic, add_up
from merge_core.weights import Weights

_ALIGNED = 64
CPU = torch.device("cpu")
Span = tuple[int, int]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass
class Blocks:
    """Reads, measures and merges the blocks of a plan on a device.

    `stop` is asked before each block, a true answer raises `Canceled`; `warn` is told what the user should know.
    `stage` is the plan's name where it is one.
    """

    plan: Plan
    checkpoints: Sequence[Weights]
    randomness: Randomness
    progress: Progress = field(default_factory=Progress)
    stop: Callable[[], bool] = lambda: False
    device: torch.device = CPU
    warn: Callable[[str], None] = lambda warning: None
    stage: str = ""

    def __post_init__(self) -> None:
        self.is_over = False
        self._counting = threading.Lock()
        self._space = _Space(self.device)

    # Merging.

    def make(self, step: Step, known: Known, span: Span, out: Tensor, *, reads: float = 1.0) -> Tensor:
        """One block of the output, in its stored dtype, in main memory."""
        start, stop = step.grains.row_range(*span)
        shape = (stop - start, *step.shape[1:]) if step.shape else ()
        rows = out[: math.prod(shape) * step.dtype.itemsize].view(step.dtype.torch).reshape(shape)
        with self._space.at_work():
            if step.method is None:
                self._copy(step, span, rows, reads)
            else:
                stages = step.method.stages(self.plan.scope)
                is_first = not any(stage.reads == 1 and stage.concerns(step.name, known) for stage in stages)
                block = self._block(step, span, check=is_first, out=rows, reads=reads)
                merged = step.method.merge(block, known)
                if merged.data_ptr() != rows.data_ptr():
                    self._round(merged.reshape(shape), rows)
        return self._checked(step, rows, start)

    def _copy(self, step: Step, span: Span, out: Tensor, reads: float) -> None:
        rows = [rows.load() for rows in self._rows(step.sources, step, span, check=True, reads=reads)]
        if rows[0].dtype == out.dtype:
            out.copy_(rows[0], non_blocking=True)
        else:
            self._round(rows[0], out)
        for theirs in rows[1:]:
            if not torch.equal(rows[0], theirs.to(rows[0].dtype)):
                kept = f"{step.reason}, so that of {self._name(step.sources[0])} was kept"
                self.warn(f"{step.name} differs between the models; {kept}")

    def _round(self, values: Tensor, rows: Tensor) -> None:
        """The one rounding into the stored dtype; any NaN becomes the one quiet NaN."""
        if values.dtype != rows.dtype:
            values = rounded(values, rows.dtype)
        if self.plan.recipe.allow_nonfinite and values.is_floating_point():
            values = torch.where(values.isnan(), torch.nan, values)
        rows.copy_(values, non_blocking=True)

    def _checked(self, step: Step, rows: Tensor, start: int) -> Tensor:
        """The merged rows, unless a value does not fit into the stored dtype."""
        if step.dtype.kind != "float" or self.plan.recipe.allow_nonfinite:
            return rows
        if (found := kernels.first_nonfinite(rows)) >= 0:
            name = f"{step.name} of stage {self.stage}" if self.stage else step.name
            detail = (
                f"{name} becomes NaN or infinity at element {found + start * step.grains.width:,} in {step.dtype}; "
                "choose a wider out_dtype or smaller weights"
            )
            raise NonFinite(step.name, "output", detail)
        return rows

    # Measuring.

    def measure_tensor(self, pool: Executor | None, step: Step) -> Known:
        """What one tensor's own statistics come to."""
        known: Known = {}
        if step.method is not None:
            for _ in self.measure_all(pool, [step], step.method.stages("tensor"), known):
                pass
        return known

    def measure_all(
        self,
        pool: Executor | None,
        steps: Sequence[Step],
        stages: Iterable[Stage],
        known: Known,
        finished: Callable[[], None] = lambda: None,
    ) -> Iterator[Stage]:
        """Make the passes of one stage after the other into `known`; yields after each block, `finished` is called
        after each stage.
        """
        is_checked = False
        for stage in stages:
            for _ in self.measure(pool, steps, stage, known, check=not is_checked):
                is_checked = is_checked or stage.reads == 1
                yield stage
            finished()

    def measure(
        self, pool: Executor | None, steps: Sequence[Step], stage: Stage, known: Known, *, check: bool
    ) -> Iterator[None]:
        """Make one stage's pass over the tensors; yields after each block."""
        if concerned := self.concerned(steps, stage, known):
            found: dict[str, Statistic] = {}
            yield from self.observe(pool, concerned, stage, known, found, check=check)
            self.finish(stage, found, known)

    def concerned(self, steps: Sequence[Step], stage: Stage, known: Known) -> list[Step]:
        """The tensors that a stage's pass has to read; from here on the progress reckons with those alone."""
        found = [step for step in steps if stage.needed(known) and stage.concerns(step.name, known)]
        planned = sum(step.stored_bytes for step in steps) if stage.expected else 0
        made = sum(step.stored_bytes for step in found)
        with self._counting:
            self.progress.bytes_read_total += int(stage.reads * made) - int(stage.reads * planned)
        return found

    def observe(
        self,
        pool: Executor | None,
        steps: Sequence[Step],
        stage: Stage,
        known: Known,
        found: dict[str, Statistic],
        *,
        check: bool,
    ) -> Iterator[None]:
        """Add to `found` what a stage observes in some tensors; yields after each block."""
        threads = threading.local()
        parts: list[dict[str, Statistic]] = []

        def observe(job: tuple[Step, Span]) -> None:
            if not hasattr(threads, "found"):
                threads.found = {}
                parts.append(threads.found)
            with self._space.at_work():
                stage.observe(self._block(*job, check=check, reads=stage.reads), known, threads.found)

        for _ in self._in_order(pool, observe, self._prepared(pool, steps)):
            yield
        for part in parts:
            add_up(found, part)

    @staticmethod
    def finish(stage: Stage, found: Mapping[str, Statistic], known: Known) -> None:
        """Let a stage turn what was found into what is known."""
        with np.errstate(all="ignore"):
            stage.finish(found, known)

    def count(self, read: int) -> None:
        """Tell the progress of bytes that another worker read."""
        with self._counting:
            self.progress.bytes_read += read

    def prepare(self, pool: Executor | None, step: Step) -> None:
        """Let the sources find out what they need to know before rows of theirs are computed by many threads."""
        for source in step.reads:
            self.checkpoints[source.model].prepare(source.info, pool)

    def _prepared(self, pool: Executor | None, steps: Iterable[Step]) -> Iterator[tuple[Step, Span]]:
        for step in steps:
            self.prepare(pool, step)
            for span in self.spans(step):
                yield step, span

    def check_tied(self, pool: Executor | None, pair: TiedPair) -> None:
        """Raise if two tensors that a config calls one are not: storing one of them would lose the other."""
        step = Step(
            pair.tensor.name,
            pair.tensor.shape,
            pair.tensor.dtype,
            (Source(pair.model, pair.tensor), Source(pair.model, pair.partner)),
        )

        self.prepare(pool, step)

        def equal(span: Span) -> bool:
            with self._space.at_work():
                one, other = (rows.load() for rows in self._rows(step.sources, step, span, check=True))
                return torch.equal(one, other.to(one.dtype))

        if not all(self._in_order(pool, equal, self.spans(step))):
            detail = (
                f"{self.plan.models[pair.model]}: the config ties {pair.tensor.name} to {pair.partner.name}, but their "
                "stored values differ; set tie_word_embeddings to false in its config.json, or remove the unused one"
            )
            raise IncompatibleModels(detail, [Problem(detail, tensor=pair.tensor.name)])

    # Reading.

    def _block(self, step: Step, span: Span, *, check: bool, out: Tensor | None = None, reads: float = 1.0) -> Block:
        """Some grains from all models at once, to be read when they are used."""
        rows = self._rows(step.reads, step, span, check=check, reads=reads)
        merged, rest = rows[: len(step.merges)], iter(rows[len(step.merges) :])
        given = {name: [None if source is None else next(rest) for source in each] for name, each in step.given.items()}
        base = None if step.base is None else merged.pop(0)
        working = step.working.torch
        return Block(merged, base, step.name, step.grains, span[0], self.randomness, working, out, given)

    def _rows(
        self, sources: Sequence[Source], step: Step, span: Span, *, check: bool, reads: float = 1.0
    ) -> list[Rows]:
        """The sources' rows; at their first reading NaN and infinity are refused."""
        if self.is_over or self.stop():
            raise Canceled("the merge was canceled")
        start, stop = step.grains.row_range(*span)
        ranges = [(0, source.info.rows) if source.small else (start, stop) for source in sources]
        check = check and not self.plan.recipe.allow_nonfinite
        sizes = [
            Weights.row_bytes(source.info) * (last - first)
            for source, (first, last) in zip(sources, ranges, strict=True)
        ]
        with self._counting:
            share = reads * (stop - start) / step.grains.rows
            self.progress.bytes_read += int(share * sum(source.stored_bytes for source in sources))
        spaces = functools.cache(lambda: self._space.take(sizes))
        return [
            self._rows_of(source, step, *ranges[i], lambda i=i: spaces()[i], check=check)  # type: ignore[misc]
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

        def read(run: slice) -> Tensor:
            if self.is_over or self.stop():
                raise Canceled("the merge was canceled")
            rows = checkpoint.rows(info, start + run.start, start + run.stop)
            if check and (found := kernels.first_nonfinite(rows)) >= 0:
                refuse(found + run.start * step.grains.width)
            return rows.to(self.device, non_blocking=True)

        def refuse(element: int) -> None:
            if element < 0:
                checkpoint.rows(info, start, stop)  # says what is wrong
                raise checkpoint.ends_inside(info)
            files = dict.fromkeys(file for file, _, _ in checkpoint.ranges(info))
            file = f"{self._name(source)}/{' or '.join(files)}"
            message = (
                f"{info.name} of {self._name(source)} holds NaN or infinity at element "
                f"{element + start * step.grains.width:,} ({file}); repair the model, or set allow_nonfinite: true to "
                "let it through"
            )
            raise NonFinite(info.name, file, message)

        place = checkpoint.place(info) if self.device == CPU else None
        descriptor, offset = place or (-1, 0)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        return Rows(
            info.dtype.torch,
            shape,
            load,
            descriptor,
            offset + start * Weights.row_bytes(info),
            check,
            refuse,
            None if source.is_whole else read,
        )

    def whole(self, step: Step, *, reads: float) -> Block:
        """A whole tensor from all models, of which runs of rows are read when they are used, `reads` times in all."""
        return self._block(step, (0, step.grains.count), check=False, reads=reads)

    def spans(self, step: Step) -> Iterator[Span]:
        """Runs of whole grains, as long as the plan's blocks."""
        grains = step.grains
        rows = step.block_rows(self.plan.memory.block_elements, on_gpu=self.device != CPU)
        length = max(1, -(-rows // grains.size))
        for first in range(0, grains.count if step.shape == () or all(step.shape) else 0, length):
            yield first, min(first + length, grains.count)

    def _in_order(
        self, pool: Executor | None, function: Callable[[_Job], _Result], jobs: Iterable[_Job]
    ) -> Iterator[_Result]:
        """The results in the order of the jobs, with only a few in the making at once; without a pool one by one."""
        if pool is None:
            yield from map(function, jobs)
            return
        pending: deque[Future[_Result]] = deque()
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > 2 * self.plan.memory.threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _name(self, source: Source) -> str:
        return str(self.plan.models[source.model])


class _Space(threading.local):
    """Each thread's space for the rows it reads, used again for every block; on a GPU pinned, with a stream.

    So while one thread waits for its copies and its arithmetic, another reads the next block and copies it.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Whatever is begun inside is done at the end. NumPy says nothing of NaN: results are checked, or it is let
        through.
        """
        if self._stream is None:
            with np.errstate(all="ignore"):
                yield
            return
        with torch.cuda.stream(self._stream), np.errstate(all="ignore"):
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
