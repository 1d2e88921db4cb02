"""A merge that was planned and never run: any rows of any tensor, any bytes of any file, computed when they are read.

Names, sizes and headers of the files are exact from the plan. Everything else is made block by block, in the blocks of
the plan, and only where it is touched: the bytes are those that `merge` writes. What all tensors depend on (statistics
of a whole model, permutations, whether tied tensors are equal) is found out once, before the first, and kept in a
folder.

Usage:

    with on_demand(recipe, "scratch") as made:
        made.read("model.safetensors", 0, 4096)
"""

from __future__ import annotations

import bisect
import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from merge_core import kernels
from merge_core.aligned import Alignment, settle
from merge_core.blocks import Span
from merge_core.errors import Canceled, Problem, RecipeError
from merge_core.execute import pool_of, share_one_heap
from merge_core.files import disk_error
from merge_core.journal import Journal
from merge_core.layout import INDEX_NAME, index_json
from merge_core.memory import BLOCK_ELEMENTS
from merge_core.merge import opened, opened_patches, planned
from merge_core.merged import MergedWeights
from merge_core.plan import AlignmentPlan, Plan, Step
from merge_core.progress import Progress, Report
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.snapshots import Supply, supplied
from merge_core.weights import Weights

PREPARED = "prepared.jsonl"
"""Where a folder keeps what the whole model's statistics came to; only of the same plan does it count."""
Stop = Callable[[], bool]


@contextmanager
def on_demand(
    recipe: Recipe,
    folder: str | Path,
    *,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    block_elements: int | None = None,
    max_shard_size: int | None = None,
    stop: Stop = lambda: False,
) -> Iterator[OnDemand]:
    """Open a merge to be computed as it is read; the parameters are those of `merge`.

    `folder` (made if it is not there) keeps what has to be found out once, for whoever opens the same plan again. The
    whole process stays within the plan's peak of memory, however many threads read. Raises `WeightsmithError`:
    `RecipeError` for what has no size before it is made.
    """
    folder = Path(folder).absolute()
    share_one_heap()
    try:
        with opened(recipe, roots) as checkpoints, opened_patches(recipe, roots) as patches:
            plan, models, stages, alignments = planned(
                recipe,
                checkpoints,
                patches,
                roots,
                memory=memory,
                threads=threads,
                block_elements=block_elements or BLOCK_ELEMENTS,
                max_shard_size=max_shard_size,
            )
            if plan.difference is not None:
                detail = f"how large the file of a {plan.difference.kind} is, is known only once it was made; run it"
                raise RecipeError.of([Problem(detail, "#/outputs")])
            inputs = [models[model] for model in plan.models]
            folder.mkdir(parents=True, exist_ok=True)
            progress = Progress()
            with (
                supplied(roots, plan.memory.window, stop, progress.receive) as supply,
                pool_of(plan.memory.threads) as pool,
                OnDemand(plan, inputs, stages, alignments, folder, pool, stop, progress, supply) as made,
            ):
                yield made
    except OSError as error:
        raise disk_error(error, Path(error.filename or folder), 0) from error


@dataclass(frozen=True)
class Piece:
    """Bytes `begin` to `end` of a file, which are made at once: its beginning, or a block of one tensor."""

    file: str
    begin: int
    end: int
    step: Step | None = None
    span: Span = (0, 0)


class OnDemand:
    """The output of a plan, to be read by any number of threads at once; `on_demand` opens one.

    `warnings` is what the user should know, as far as it was found out; `largest_block`, bytes of one at most.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Weights],
        stages: Sequence[MergedWeights],
        alignments: Sequence[tuple[Alignment, AlignmentPlan]],
        folder: Path,
        pool: ThreadPoolExecutor,
        stop: Stop,
        progress: Progress,
        supply: Supply | None,
    ) -> None:
        self.plan, self.inputs, self.stages, self.folder = plan, tuple(inputs), tuple(stages), folder
        self.warnings = list(plan.warnings)
        self.progress, self.supply = progress, supply
        self._alignments, self._pool, self._stop = alignments, pool, stop
        self._shards = {shard.file: shard for shard in plan.shards}
        self._index = index_json(plan.shards).encode() if len(plan.shards) > 1 else b""
        self._places = {slot.name: (shard, slot) for shard in plan.shards for slot in shard.slots}
        self._merged = MergedWeights("", plan, inputs)
        self._is_closed = self._is_prepared = False
        self._preparing, self._measuring, self._warning = threading.Lock(), threading.Lock(), threading.Lock()
        for stage in (*stages, self._merged):
            stage.start(plan.memory, progress=self.progress, stop=self._is_stopped, warn=self._warn)
        self.largest_block = max(map(self._most_bytes, plan.steps), default=0)
        self._space = _Space(plan.memory.outputs, self.largest_block)
        if any(step.is_fused for made in (plan, *plan.stages.values()) for step in made.steps):
            kernels.load()

    def __enter__(self) -> OnDemand:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        self._space.close()

    # What there is.

    @property
    def sizes(self) -> Mapping[str, int]:
        """The files of weights, and the index where there is one: bytes by name."""
        index = {INDEX_NAME: len(self._index)} if self._index else {}
        return {shard.file: shard.size for shard in self.plan.shards} | index

    @property
    def compared(self) -> Mapping[ModelRef, Weights]:
        """The models that are read to bring others into their order, where that is to be found."""
        found = [alignment for alignment, plan in self._alignments if not plan.are_stored]
        return {ref: weights for alignment in found for ref, weights in alignment.models.items()}

    def place(self, tensor: str) -> tuple[str, int, int]:
        """Where a tensor's bytes lie: file, begin and end. Raises `KeyError`."""
        shard, slot = self._places[tensor]
        return shard.file, slot.begin, slot.begin + slot.nbytes

    def pieces(self, file: str, begin: int = 0, end: int | None = None) -> Iterator[Piece]:
        """What has to be made for these bytes of a file, in order. Raises `KeyError`."""
        end = self.sizes[file] if end is None else end
        beginning = self._beginning(file)
        if begin < min(end, len(beginning)):
            yield Piece(file, 0, len(beginning))
        slots = self._shards[file].slots if file in self._shards else ()
        first = max(0, bisect.bisect_right([slot.begin for slot in slots], begin) - 1)
        for slot in slots[first:]:
            if slot.begin >= end:
                return
            step = self.plan.by_name[slot.name]
            row = slot.nbytes // max(1, step.grains.rows)
            for span in self._merged.spans(step) if slot.nbytes else ():
                start, stop = (slot.begin + row * number for number in step.grains.row_range(*span))
                if start >= end:
                    return
                if stop > begin:
                    yield Piece(file, start, stop, step, span)

    # Reading.

    def read(
        self, file: str, begin: int = 0, end: int | None = None, *, stop: Stop = lambda: False
    ) -> Iterator[memoryview]:
        """Bytes `begin` to `end` of a file, in parts, each good until the next is asked for. Raises `KeyError`."""
        end = self.sizes[file] if end is None else min(end, self.sizes[file])
        with closing(self.make(self.pieces(file, begin, end), stop=stop)) as made:
            for piece, data in made:
                yield data[max(begin - piece.begin, 0) : end - piece.begin]

    def tensor(self, name: str, *, stop: Stop = lambda: False) -> Iterator[memoryview]:
        """All bytes of a tensor, in the same way. Raises `KeyError`."""
        return self.read(*self.place(name), stop=stop)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor in its stored dtype, `[stop - start, *shape[1:]]`; all of a 0-d tensor.
        Raises `KeyError`.
        """
        file, begin, end = self.place(name)
        step = self.plan.by_name[name]
        stop = step.grains.rows if stop is None else stop
        row = (end - begin) // max(1, step.grains.rows)
        data = bytearray().join(self.read(file, begin + start * row, begin + stop * row))
        shape = (stop - start, *step.shape[1:]) if step.shape else ()
        if not data:
            return torch.empty(shape, dtype=step.dtype.torch)
        return torch.frombuffer(data, dtype=torch.uint8).view(step.dtype.torch).reshape(shape)

    def make(
        self, pieces: Iterable[Piece], *, stop: Stop = lambda: False
    ) -> Generator[tuple[Piece, memoryview], None, None]:
        """Make pieces, in their order; the bytes of each are good until the next is asked for.

        While one is looked at, the next are made, as far as there is space that nobody else waits for. `stop` is asked
        between them; a true answer raises `Canceled`.
        """
        self.prepare()
        making: deque[tuple[Piece, Future[Tensor], Tensor]] = deque()
        measured: Step | None = None

        def first() -> Iterator[tuple[Piece, memoryview]]:
            piece, future, _ = making[0]
            yield piece, _bytes_of(future.result())
            self._space.give_back(making.popleft()[2])

        try:
            for piece in pieces:
                if stop() or self._is_stopped():
                    raise Canceled("reading was given up")
                if piece.step is None:
                    while making:
                        yield from first()
                    yield piece, memoryview(self._beginning(piece.file))
                    continue
                if piece.step is not measured:
                    measured = piece.step
                    self._measure(measured)
                while (space := self._space.take(patiently=not making)) is None:
                    yield from first()
                making.append((piece, self._pool.submit(self._merged.make, piece.step, piece.span, space), space))
                if len(making) > self.plan.memory.threads:
                    yield from first()
            while making:
                yield from first()
        finally:
            for _, future, space in making:
                if not future.cancel():
                    future.exception()  # until then its space is written to
                self._space.give_back(space)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a source is no longer the file whose header was read: what was made since it
        changed is of no merge.
        """
        for weights in (*self.inputs, *self.compared.values()):
            weights.check_unchanged()

    # Preparing.

    @property
    def needs_preparing(self) -> bool:
        """Whether something has to be found out that takes reading more than what is asked for."""
        plans = (self.plan, *self.plan.stages.values())
        is_measured = any(plan.passes_before for plan in plans)
        return (
            is_measured or any(plan.tied for plan in plans) or any(not plan.are_stored for _, plan in self._alignments)
        )

    def prepare(self, report: Report = lambda progress: None) -> None:
        """Find out what all tensors depend on, if that is not in the folder. A kill loses one pass at most.

        Raises `IncompatibleModels` if tied tensors differ, and what a merge raises.
        """
        if self._is_prepared:
            return
        with self._preparing:
            if not self._is_prepared:
                self._prepare(report)
                self._is_prepared = True

    def _prepare(self, report: Report) -> None:
        if not self.needs_preparing:
            return
        self.progress.bytes_read_total = self.plan.input_bytes
        with closing(Journal(self.folder / PREPARED, self.plan.digest)) as kept:
            kept.open()

            def enter(phase: str) -> None:
                self.progress.phase = phase
                tick()

            def tick() -> None:
                if self._is_stopped():
                    raise Canceled("preparing was given up")
                report(self.progress)

            for warning in kept.notes.get("warnings", []):
                self._warn(warning)
            if self._alignments:
                enter("aligning")
                settle(self._alignments, self.folder, self.plan.digest, self.progress, report, self._is_stopped)
            made = (*self.stages, self._merged)
            if not kept.notes.get("tied"):
                enter("checking tied weights")
                for each in made:
                    each.check_tied(self._pool)
                kept.note("tied", True)
            for number, each in enumerate(made):
                name = f"measured {number}"
                remember = lambda measured, name=name: kept.note(name, measured)  # noqa: E731
                for stage in each.measure_model(self._pool, kept.notes.get(name), remember):
                    self.progress.phase = f"measuring: {stage.name}"
                    tick()
            kept.note("warnings", list(self.warnings))

    def _measure(self, step: Step) -> None:
        """Find out what one tensor depends on, with all threads; one tensor after the other, as the plan reckons."""
        with self._measuring:
            self._merged.prepare(self._merged.tensors[step.name], self._pool)

    # Around it.

    def _beginning(self, file: str) -> bytes:
        """The bytes that are there without computing: a shard's header, all of the index. Raises `KeyError`."""
        return self._index if file == INDEX_NAME and self._index else self._shards[file].header

    def _most_bytes(self, step: Step) -> int:
        start, stop = step.grains.row_range(*next(self._merged.spans(step), (0, 0)))
        return (stop - start) * max(1, step.grains.width) * step.dtype.itemsize

    def _warn(self, warning: str) -> None:
        with self._warning:
            if warning not in self.warnings:
                self.warnings.append(warning)

    def _is_stopped(self) -> bool:
        return self._is_closed or self._stop()


class _Space:
    """So many spaces for blocks, made when they are first needed and used again; who waits longest gets the next."""

    def __init__(self, count: int, size: int) -> None:
        self._left, self._size = count, max(1, size)
        self._free: list[Tensor] = []
        self._waiting: deque[Future[Tensor]] = deque()
        self._changing = threading.Lock()

    def take(self, *, patiently: bool) -> Tensor | None:
        """A space, sooner or later; or, if not `patiently`, None where there is none that nobody waits for."""
        with self._changing:
            if self._free:
                return self._free.pop()
            if self._left:
                self._left -= 1
                return torch.frombuffer(mmap.mmap(-1, self._size), dtype=torch.uint8)
            if not patiently:
                return None
            turn = Future[Tensor]()
            self._waiting.append(turn)
        return turn.result()

    def give_back(self, space: Tensor) -> None:
        with self._changing:
            if self._waiting:
                self._waiting.popleft().set_result(space)
            else:
                self._free.append(space)

    def close(self) -> None:
        """Whoever waits learns that it is in vain."""
        with self._changing:
            while self._waiting:
                self._waiting.popleft().set_exception(Canceled("reading was given up"))


def _bytes_of(rows: Tensor) -> memoryview:
    return memoryview(rows.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
