"""The tensors: measured and merged block by block, written in file order.

A pool of threads reads blocks, measures or merges them; what is merged is handed on in order, so that each file is
hashed and written from front to back by threads of their own while the next blocks are read and merged. All space is
taken once and used again. While one tensor is merged, the next are measured.

Where a merge is shared, each worker does this for the units it takes (`units.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merge_core.aligned import Alignment, settle
from merge_core.blocks import CPU, Blocks, Span
from merge_core.errors import Canceled
from merge_core.files import WrittenFile, remove_folder
from merge_core.layout import Slot
from merge_core.merged import MergedWeights
from merge_core.method import Known, Randomness
from merge_core.plan import AlignmentPlan, Plan, Step
from merge_core.progress import Progress, Report
from merge_core.shards import ShardWriter
from merge_core.snapshots import Range, Supply
from merge_core.statistics import Statistic, add_up
from merge_core.units import (
    FOLDER,
    MERGING,
    Alone,
    Result,
    Share,
    Unit,
    cut_steps,
    fingerprint,
    keep_measured,
    kept_measured,
    measured_file,
)
from merge_core.weights import Weights

_M_ARENA_MAX = -8
_NOTHING_MEASURED: Mapping[str, Any] = {"stages": 0, "known": {}}


@dataclass
class Execution:
    """Carries out a plan on a device; `permutations` are the files of those that were found on the way.

    `merged` is told of each tensor whose inputs are done with; `stop` is asked between blocks, a true answer raises
    `Canceled`. `share` says who does which unit: whoever leads calls `run`, others `assist`. `supply` is told what will
    be read.
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
    share: Share = field(default_factory=Alone)
    supply: Supply | None = None

    def run(self) -> None:
        """Measure and merge every tensor that is not in the output yet."""
        self._begin()
        if self.writer.records.is_new:
            self.share.forget()
        with pool_of(self.plan.memory.threads) as pool:
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
            self.enter("finishing")
            self.warnings.sort()
            self.progress.complete()
            self._tick()

    def assist(self) -> None:
        """Take units of whatever phase is open, until there is nothing more to do."""
        self._begin()
        stages = self.plan.passes_before
        with pool_of(self.plan.memory.threads) as pool:
            while True:
                self.writer.records.read()
                measured = self.writer.journal.get("measured", _NOTHING_MEASURED)
                number, known = measured["stages"], dict(measured["known"])
                if number == len(stages):
                    self._merge_all(pool, known)
                else:
                    concerned = self.blocks.concerned(self.plan.measured, stages[number], known)
                    runs = cut_steps(concerned, self.share.unit_bytes if self._is_shared else None)
                    for _ in self._observed(pool, number, runs, known, {}, check=True):
                        self._tick()
                if not self.share.wait():
                    return

    def _begin(self) -> None:
        self._warning = threading.Lock()
        self.blocks = Blocks(
            self.plan, self.checkpoints, self.randomness, self.progress, self.stop, self.device, self.warn
        )
        self.warnings = list(self.writer.journal.get("warnings", []))
        self.progress.tensors_total = len(self.plan.steps)
        self.progress.order = tuple(slot.name for unit in self.writer.units for slot in unit.slots)
        self._places = {name: place for place, name in enumerate(self.progress.order)}
        self.progress.bytes_read_total = self.plan.input_bytes
        self.progress.bytes_written_total = sum(slot.nbytes for shard in self.plan.shards for slot in shard.slots)
        for stage in self.stages:
            stage.start(
                self.plan.memory, progress=self.progress, stop=self._is_stopped, device=self.device, warn=self.warn
            )
        self._fingerprint = fingerprint(self.plan, self.share.unit_bytes, self.writer.folder, self.device.type)
        total = sum(unit.end - unit.begin for unit in self.writer.units)
        self._is_shared = self.share.unit_bytes is not None and total > self.share.unit_bytes
        self._mine: set[tuple[str, int]] = set()

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
                self.progress.finished.add(self._places[slot.name], self._places[slot.name] + 1)
            self._tick()

        with closing(self._measured(pool, known)) as tensors:
            for measured in tensors:
                if measured is None:
                    while merging:
                        hand_on()
                    continue
                slot, here = measured
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

    def _measured(self, pool: ThreadPoolExecutor, known: Known) -> Generator[tuple[Slot, Known] | None, None, None]:
        """The tensors still to be merged, each with what is known of it; the next are measured meanwhile.

        None: all so far must be handed on before there is more.
        """
        most = self.plan.memory.ahead
        with ThreadPoolExecutor(most, thread_name_prefix="measure") as ahead:
            before = deque[tuple[Slot, Future[Known]]]()
            try:
                for slot in self._slots():
                    if slot is not None:
                        measuring = ahead.submit(self._measure_tensor, pool, self.plan.by_name[slot.name], known)
                        before.append((slot, measuring))
                    while len(before) > (0 if slot is None else most):
                        done, found = before.popleft()
                        yield done, found.result()
                    if slot is None:
                        yield None
                for done, found in before:
                    yield done, found.result()
            except BaseException:
                self.blocks.is_over = True
                raise

    def _slots(self) -> Iterator[Slot | None]:
        """The tensors that are this worker's to write, unit after unit; None where a unit has to be whole first."""
        units, writer = self.writer.units, self.writer
        share = self.share if self._is_shared else Alone()
        phase = self._phase(MERGING)
        if not writer.assists:
            if self._is_shared:
                writer.make_files()
            share.open(phase, len(units))
        while True:
            if not writer.assists:
                self._prove_others(phase, only_first=True)
            if (number := share.take(phase)) is not None:
                if writer.removes:
                    yield None
                    self._make_room()
                self._expect_units(number)
                read = self.progress.bytes_read
                yield from self._enter(units[number])
                if self._is_shared:
                    yield None
                    digests = writer.leave(units[number])
                    self._done(phase, number, {"tensors": digests, "read": self.progress.bytes_read - read})
            elif writer.assists or not self._is_shared:
                return
            elif not self._prove_others(phase):
                if writer.is_hashed:
                    return
                self.share.wait()
                self._tick()

    def _enter(self, unit: Unit) -> Sequence[Slot]:
        """The tensors of a unit that are still to be written; what an earlier attempt wrote is finished."""
        rest = self.writer.enter(unit)
        first = self._places[unit.slots[0].name]
        self.progress.finished.add(first, first + len(unit.slots) - len(rest))
        return rest

    def _make_room(self) -> None:
        """Wait until the file that comes next is only the second on the disk; all before it must be handed on."""

        def waiting() -> None:
            self.enter("uploading")

        self.writer.wait_for_deliveries(1, waiting)
        self.enter("merging")

    def _prove_others(self, phase: str, *, only_first: bool = False) -> bool:
        """Hash what other workers wrote, as far as it goes; whether there was anything."""
        any_ = False
        while self._is_shared:
            results = self._told(phase)
            found = self.writer.prove({number: result["tensors"] for number, result in results}, only_first=only_first)
            if found is None:
                break
            unit, is_right = found
            any_ = True
            if not is_right:
                self.share.again(phase, unit.number)
            self._tick()
        return any_

    # Measuring.

    def _measure_model(self, pool: ThreadPoolExecutor) -> Known:
        """What the whole model's statistics come to; each stage is remembered in the journal."""
        measured = self.writer.journal.get("measured", _NOTHING_MEASURED)
        known: Known = dict(measured["known"])
        stages, steps = self.plan.passes_before, self.plan.measured
        is_checked = False
        for number, stage in enumerate(stages):
            if number < measured["stages"]:
                continue
            if concerned := self.blocks.concerned(steps, stage, known):
                self.enter(f"measuring: {stage.name}")
                found: dict[str, Statistic] = {}
                runs = cut_steps(concerned, self.share.unit_bytes if self._is_shared else None)
                for _ in self._observed(pool, number, runs, known, found, check=not is_checked):
                    self._tick()
                self.blocks.finish(stage, found, known)
                is_checked = is_checked or stage.reads == 1
            self.writer.remember("measured", {"stages": number + 1, "known": known})
            remove_folder(self.writer.folder / FOLDER)
        for warning in self.plan.warnings_of(known):
            self.warn(warning)
        return known

    def _observed(
        self,
        pool: ThreadPoolExecutor,
        number: int,
        runs: Sequence[Sequence[Step]],
        known: Known,
        found: dict[str, Statistic],
        *,
        check: bool,
    ) -> Iterator[None]:
        """Make a stage's pass over units of tensors; whoever leads adds up all that was `found`."""
        stage, leads = self.plan.passes_before[number], not self.writer.assists
        phase = self._phase(f"measuring {number}: {stage.name}")
        if len(runs) < 2:
            if leads:
                self._expect(runs[0] if stage.reads else ())
                yield from self.blocks.observe(pool, runs[0], stage, known, found, check=check)
            return
        if leads:
            (self.writer.folder / FOLDER).mkdir(exist_ok=True)
            self.share.open(phase, len(runs))
        added: set[int] = set()
        while len(added) < len(runs):
            if (unit := self.share.take(phase)) is not None:
                self._expect([*runs[unit], *(runs[unit + 1] if leads and unit + 1 < len(runs) else ())])
                read, part = self.progress.bytes_read, dict[str, Statistic]()
                yield from self.blocks.observe(pool, runs[unit], stage, known, part, check=check)
                digest = keep_measured(measured_file(self.writer.folder, number, unit), part)
                self._done(phase, unit, {"statistics": digest, "read": self.progress.bytes_read - read})
                if leads:
                    add_up(found, part)
                    added.add(unit)
                continue
            if not leads:
                return
            missing = [(unit, result) for unit, result in self._told(phase) if unit not in added]
            for unit, result in missing:
                path = measured_file(self.writer.folder, number, unit)
                kept = kept_measured(path, result["statistics"])
                if kept is None:
                    self.share.again(phase, unit)
                else:
                    add_up(found, kept)
                    added.add(unit)
                yield
            if not missing:
                self.share.wait()
                yield

    def _measure_tensor(self, pool: ThreadPoolExecutor, step: Step, known: Known) -> Known:
        """What is known of one tensor: of the whole model, or what its own statistics come to."""
        self.blocks.prepare(pool, step)
        return known if self.plan.scope == "model" else self.blocks.measure_tensor(pool, step)

    # What lies elsewhere.

    def _expect_units(self, number: int) -> None:
        """Tell the supply what merging a unit reads, and what will most likely come after it."""
        units = self.writer.units
        if self.supply is not None and (self._is_shared or number == 0):
            following = (number, number + (-1 if self.writer.assists else 1)) if self._is_shared else range(len(units))
            coming = [units[each] for each in following if 0 <= each < len(units)]
            slots = [slot for unit in coming if not self.writer.is_gone(unit.shard) for slot in unit.slots]
            there = self.writer.records.tensors
            steps = [self.plan.by_name[slot.name] for slot in slots if slot.name not in there]
            self._expect(steps, with_measuring=self.plan.scope == "tensor")

    def _expect(self, steps: Sequence[Step], *, with_measuring: bool = False) -> None:
        """Tell the supply which tensors will be read, in this order."""
        if self.supply is not None:
            self.supply.expect(
                (step.name, self._stand_in_ranges(step))
                for step in steps
                for _ in range(1 + (self._passes(step) if with_measuring else 0))
            )

    @staticmethod
    def _passes(step: Step) -> int:
        stages = step.method.stages("tensor") if step.method is not None else ()
        return sum(stage.expected and stage.reads > 0 for stage in stages)

    def _stand_in_ranges(self, step: Step) -> list[Range]:
        found: list[Range] = []
        for source in step.reads:
            weights = self.checkpoints[source.model]
            ranges = ((weights.shards[name], begin, end) for name, begin, end in weights.ranges(source.info))
            found += [(shard.path, begin, end) for shard, begin, end in ranges if shard.is_stand_in]
        return found

    # Sharing.

    def _phase(self, title: str) -> str:
        return f"{title[:80]} {self._fingerprint}"

    def _done(self, phase: str, number: int, result: dict[str, Any]) -> None:
        """Record a unit, with what the user should know of it."""
        self.share.done(phase, number, result | {"warnings": list(self.warnings)})
        self._mine.add((phase, number))

    def _told(self, phase: str) -> list[tuple[int, Result]]:
        """The units of a phase that are done; what is news of others counts in the progress."""
        results = sorted(self.share.results(phase).items())
        for number, result in results:
            if (phase, number) not in self._mine:
                self._mine.add((phase, number))
                self.blocks.count(result["read"])
                for warning in result["warnings"]:
                    self.warn(warning)
                if "tensors" in result:
                    self._count_unit(self.writer.units[number])
        return results

    def _count_unit(self, unit: Unit) -> None:
        for slot in unit.slots:
            self.merged(self.plan.by_name[slot.name])
        self.progress.tensors_done += len(unit.slots)
        first = self._places[unit.slots[0].name]
        self.progress.finished.add(first, first + len(unit.slots))
        self.progress.bytes_written += unit.end - unit.begin

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
            if not self.writer.assists:
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
def pool_of(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone: torch's own threads would only get in one another's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
