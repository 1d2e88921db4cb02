"""The tensors: measured and merged block by block, written in file order.

A pool of threads reads blocks, measures or merges them; what is merged is handed on in order, so that each file is
hashed and written from front to back by threads of their own while the next blocks are read and merged. All space is
taken once and used again. While one tensor is merged, the next is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merge_core.aligned import Alignment, settle
from merge_core.blocks import CPU, Blocks, Span
from merge_core.errors import Canceled
from merge_core.files import WrittenFile
from merge_core.layout import Slot
from merge_core.merged import MergedWeights
from merge_core.method import Known, Randomness
from merge_core.plan import AlignmentPlan, Plan, Step
from merge_core.progress import Progress, Report
from merge_core.shards import ShardWriter
from merge_core.weights import Weights

_M_ARENA_MAX = -8


@dataclass
class Execution:
    """Carries out a plan on a device; `permutations` are the files of those that were found on the way.

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
    stages: Sequence[MergedWeights] = ()
    alignments: Sequence[tuple[Alignment, AlignmentPlan]] = ()
    permutations: list[WrittenFile] = field(default_factory=list)

    def run(self) -> None:
        """Measure and merge every tensor that is not in the output yet."""
        self._warning = threading.Lock()
        self.blocks = Blocks(
            self.plan, self.checkpoints, self.randomness, self.progress, self.stop, self.device, self.warn
        )
        self.warnings = list(self.writer.journal.get("warnings", []))
        self.progress.tensors_total = len(self.plan.steps)
        self.progress.bytes_read_total = self.plan.input_bytes
        self.progress.bytes_written_total = sum(slot.nbytes for shard in self.plan.shards for slot in shard.slots)
        for stage in self.stages:
            stage.start(
                self.plan.memory, progress=self.progress, stop=self._is_stopped, device=self.device, warn=self.warn
            )
        with _pool(self.plan.memory.threads) as pool:
            if self.alignments:  # before anything is read: rows of aligned models lie nowhere until then
                self.enter("aligning")
                folder, digest = self.writer.folder, self.plan.digest
                self.permutations = settle(self.alignments, folder, digest, self.progress, self.report, self.stop)
            self.enter("checking tied weights" if self.plan.tied else "measuring")
            for pair in self.plan.tied:
                self.blocks.check_tied(pool, pair)
            for stage in self.stages:
                stage.check_tied(pool)
            known = self._measure_model(pool)
            self.enter("merging")
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
                spans: list[Span | None] = list(self.blocks.spans(step)) or [None]
                for span in spans:
                    while not free:
                        if writing:
                            wait, out = writing.popleft()
                            wait()
                            free.append(out)
                        else:
                            hand_on()
                    out = free.popleft()
                    job = None if span is None else pool.submit(self.blocks.make, step, here, span, out)
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
                self.blocks.is_over = True
                raise

    # Measuring.

    def _measure_model(self, pool: ThreadPoolExecutor) -> Known:
        """What the whole model's statistics come to; each stage is remembered in the journal."""
        known: Known = {}
        steps = self.plan.measured
        if self.plan.scope != "model" or not steps or steps[0].method is None:
            return known
        measured = dict(self.writer.journal.get("measured", {"stages": 0, "known": {}}))
        known = dict(measured["known"])

        def finished() -> None:
            measured["stages"] += 1
            self.writer.remember("measured", {"stages": measured["stages"], "known": known})

        stages = steps[0].method.stages("model")[measured["stages"] :]
        for stage in self.blocks.measure_all(pool, steps, stages, known, finished):
            self.enter(f"measuring: {stage.name}")
        for warning in steps[0].method.warnings(known):
            self.warn(warning)
        return known

    def _measure_tensor(self, pool: ThreadPoolExecutor, step: Step, known: Known) -> Known:
        """What is known of one tensor: of the whole model, or what its own statistics come to."""
        self.blocks.prepare(pool, step)
        return known if self.plan.scope == "model" else self.blocks.measure_tensor(pool, step)

    # Around it.

    def _outputs(self) -> list[Tensor]:
        """Space for the blocks that are merged or on their way to the disk, on pages of their own."""
        largest = max((self._block_bytes(step) for step in self.plan.steps), default=0)
        count = self.plan.memory.outputs
        if self.device != CPU:
            return [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        return [torch.frombuffer(mmap.mmap(-1, max(1, largest)), dtype=torch.uint8) for _ in range(count)]

    def _block_bytes(self, step: Step) -> int:
        spans = self.blocks.spans(step)
        first, last = next(spans, (0, 0))
        start, stop = step.grains.row_range(first, last)
        return (stop - start) * step.grains.width * step.dtype.itemsize

    def warn(self, warning: str) -> None:
        """Tell the user something once; a later attempt knows it too."""
        with self._warning:
            if warning in self.warnings:
                return
            self.warnings.append(warning)
            self.writer.remember("warnings", list(self.warnings))

    def _is_stopped(self) -> bool:
        return self.blocks.is_over or self.stop()

    def enter(self, phase: str) -> None:
        """Tell that something else is done from here on."""
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
