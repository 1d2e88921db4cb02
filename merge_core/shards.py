"""The files: preallocated safetensors shards that are complete or absent.

Bytes arrive in file order and are hashed as they are written: sha256 per file, blake3 per tensor. A journal records
each tensor that is in its file; a killed merge reopens the folder, proves the recorded tensors by their digests and
goes on after the last good one. What other workers wrote is read again for the file's sha256, and proved meanwhile.
Complete files may be delivered elsewhere, and be removed then; the journal knows of those too.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from blake3 import blake3
from torch import Tensor

from merge_core.delivery import Delivery
from merge_core.errors import Canceled, InsufficientStorage, OutputExists, WeightsmithError
from merge_core.files import PagedFile, WrittenFile, nearest_existing, remove_folder, write_text
from merge_core.journal import JOURNAL, Journal
from merge_core.layout import INDEX_NAME, ShardLayout, Slot, index_json
from merge_core.plan import Plan
from merge_core.units import Unit, cut_output

SPARE_BYTES = 64 * 2**20
_READ = 2**22
_TICK_SECONDS = 0.2
_DELIVERED = "delivered"


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """An unfinished output's folder, held alone; removed if a `WeightsmithError` ends the work, kept after a kill.

    Raises `OutputExists` if another merge is at it, or if it holds anything that no merge of ours began.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputExists(f"another merge is writing in {folder}; wait for it or choose another output") from None
        if any(folder.iterdir()) and not (folder / JOURNAL).is_file():
            raise OutputExists(f"{folder} holds files that no merge began; choose another place for unfinished output")
        try:
            yield folder
        except WeightsmithError:
            remove_folder(folder)
            raise
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes a plan's shards into a folder, unit after unit, tensors in file order.

    Usage: for each slot that `enter(unit)` gives, in order: `begin(slot)`, `write(values)` until it is full, then
    `end()`; finally `finish()`. Digests and the disk have a thread each; `write` returns before they are done. A worker
    that shares the merge calls `leave(unit)` after each, and `prove` for those that others wrote. `records` are what
    was finished, for whoever goes on.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        stop: Callable[[], bool] = lambda: False,
        *,
        unit_bytes: int | None = None,
        assists: bool = False,
        delivery: Delivery | None = None,
    ) -> None:
        """`stop` is asked while what an earlier attempt left is read again, which may be a whole model. `assists`:
        another worker made the files, and will finish them. `delivery` is given each file that is complete.
        """
        self.plan, self.folder, self.stop, self.assists = plan, folder, stop, assists
        self._delivery, self.removes = delivery, delivery is not None and delivery.removes
        self._delivering: list[Future[None]] = []
        self.units = cut_output(plan.shards, unit_bytes)
        self.digests: dict[str, str] = {}
        self.resumed = 0
        self.records = Journal(folder / JOURNAL, plan.digest)
        self._files: dict[str, _ShardFile] = {}
        self._shard_of = {slot.name: shard for shard in plan.shards for slot in shard.slots}
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="blake3")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._courier = ThreadPoolExecutor(1, thread_name_prefix="courier")
        self._in_work: tuple[Slot, _ShardFile] | None = None
        self._tensor_hash = blake3()

    @property
    def journal(self) -> Mapping[str, Any]:
        """What an earlier attempt recorded under names of its own (see `remember`)."""
        return self.records.notes

    def remember(self, name: str, value: Any) -> None:
        """Record something that a later attempt need not find out again."""
        self.records.note(name, value)

    def __enter__(self) -> Self:
        if self.assists:
            self.records.read()
            return self
        check_space(self.plan.disk_bytes if self.removes else self.plan.output_bytes, self.folder)
        try:
            self.records.open()
            self.records.clear_folder()
            for shard in self.plan.shards:
                if self.is_gone(shard):
                    (self.folder / shard.file).unlink(missing_ok=True)
        except BaseException:
            self.records.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._delivery is not None:
            self._delivery.give_up()
        for thread in (self._disk, self._hasher, self._digester, self._courier):
            thread.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.data.close()
        self.records.close()

    def make_files(self) -> None:
        """Make all files at once, with their headers, for others to write into."""
        for shard in self.plan.shards:
            if shard.file not in self._files:
                file = PagedFile(self.folder / shard.file, shard.size)
                try:
                    file.append(memoryview(shard.header))
                    file.flush()
                finally:
                    file.close()

    def enter(self, unit: Unit) -> tuple[Slot, ...]:
        """Go to a unit: its tensors that are still to be written. Its file may not be the one that is being filled."""
        if self.is_gone(unit.shard):
            self.digests |= {slot.name: self.records.tensors[slot.name] for slot in unit.slots}
            self.resumed += len(unit.slots)
            return ()
        file = self._file(unit.shard)
        file.is_hashed_by_the_way = unit.place == file.hashed and not self.assists
        proved = [] if self.assists else list(itertools.takewhile(lambda slot: self._prove(file, slot), unit.slots))
        self.resumed += len(proved)
        rest = unit.slots[len(proved) :]
        at = rest[0].begin if rest else unit.end
        if file.at != at:
            file.pending.append(self._disk.submit(file.data.go_to, at))
        file.at = unit.end
        if file.is_hashed_by_the_way:
            file.hashed += 1
        if not rest:
            self._complete_if_hashed(file)
        return rest

    def begin(self, slot: Slot) -> None:
        self._in_work = slot, self._files[self._shard_of[slot.name].file]
        self._tensor_hash = blake3()

    def write(self, values: Tensor) -> Callable[[], None]:
        """Append values, in their stored dtype and row-major order, to the tensor that was begun.

        They must stay as they are until the returned function, which waits for that, has returned.
        """
        assert self._in_work is not None
        _, file = self._in_work
        data = memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        written: list[Future[Any]] = [
            self._digester.submit(self._tensor_hash.update, data),
            self._disk.submit(file.data.append, data),
        ]
        if file.is_hashed_by_the_way:
            written.append(self._hasher.submit(file.sha256.update, data))

        def wait() -> None:
            for future in written:
                future.result()

        return wait

    def end(self) -> None:
        assert self._in_work is not None
        slot, file = self._in_work
        digest = self._digester.submit(self._tensor_hash.hexdigest)

        def record() -> None:
            self.digests[slot.name] = digest.result()
            if not self.assists:
                self.records.tensor(slot.name, digest.result())

        while file.pending and file.pending[0].done():
            file.pending.popleft().result()
        self._check_deliveries()
        file.pending.append(self._disk.submit(file.data.when_written, slot.begin + slot.nbytes, record))
        if slot is file.shard.slots[-1]:
            self._complete_if_hashed(file)

    def leave(self, unit: Unit) -> dict[str, str]:
        """Wait until the unit that was entered is in its file: the digests of its tensors."""
        file = self._file(unit.shard)
        file.pending += [self._hasher.submit(lambda: None), self._disk.submit(file.data.flush)]
        while file.pending:
            file.pending.popleft().result()
        if self.assists:
            del self._files[unit.shard.file]
            file.data.close()
        return {slot.name: self.digests[slot.name] for slot in unit.slots}

    def prove(self, done: Mapping[int, Mapping[str, str]], *, only_first: bool = False) -> tuple[Unit, bool] | None:
        """Read again the next unit of those that are `done`, which names the digests of their tensors, for its file's
        hash; that unit, and whether it is what was recorded.

        Files are hashed from front to back, so that it waits for the units before it. None: there is none now.
        `only_first`: of the first file that is not complete.
        """
        for shard in self.plan.shards:
            units = [unit for unit in self.units if unit.shard is shard]
            hashed = self._files[shard.file].hashed if shard.file in self._files else 0
            if hashed < len(units) and (unit := units[hashed]).number in done:
                file, digests = self._file(shard), done[unit.number]
                sha256 = file.sha256.copy()
                is_right = all(self._is(file, slot, digests.get(slot.name), sha256) for slot in unit.slots)
                if is_right:
                    file.sha256, file.hashed = sha256, file.hashed + 1
                    self.digests |= digests
                    self._complete_if_hashed(file)
                return unit, is_right
            if hashed < len(units) and only_first:
                return None
        return None

    @property
    def is_hashed(self) -> bool:
        """Whether every file is whole, and hashed from its beginning to its end."""
        files = [self._files.get(shard.file) for shard in self.plan.shards]
        return all(file is not None and file.hashed == file.units for file in files)

    def finish(self) -> list[WrittenFile]:
        """Wait for the last byte; write the index where there are several shards. All files, weights and index."""
        files = []
        self.wait_for_deliveries(0)
        for shard in self.plan.shards:
            if self.is_gone(shard):
                files.append(WrittenFile(shard.file, shard.size, self._sha256_delivered(shard.file)))
                continue
            file = self._files[shard.file]
            for future in file.pending:
                future.result()
            files.append(WrittenFile(shard.file, shard.size, file.sha256.hexdigest()))
        if len(self.plan.shards) > 1:
            files.append(write_text(self.folder / INDEX_NAME, index_json(self.plan.shards)))
        return files

    def wait_for_deliveries(self, most: int, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until no more than so many complete files are still to be delivered; `waiting` is called meanwhile.

        All that was handed to the writer must be written without further calls. Raises what a delivery raised.
        """
        while len(self._check_deliveries()) > most:
            if self.stop():
                raise Canceled("the merge was canceled")
            waiting()
            wait_for(self._delivering[:1], timeout=_TICK_SECONDS)

    def _check_deliveries(self) -> list[Future[None]]:
        """The deliveries that are not done yet. Raises what one that is done raised."""
        while self._delivering and self._delivering[0].done():
            self._delivering.pop(0).result()
        return self._delivering

    def _deliver(self, file: _ShardFile, *before: Future[None]) -> None:
        """Deliver a file, unless an earlier attempt did, once what makes it complete is done and the one before it
        delivered.
        """
        assert self._delivery is not None
        for future in before:
            future.result()
        written = WrittenFile(file.shard.file, file.shard.size, file.sha256.hexdigest())
        if self._sha256_delivered(written.path) != written.sha256:
            self._delivery.deliver(self.folder / written.path, written)
            self.remember(f"{_DELIVERED} {written.path}", written.sha256)
        if self.removes:
            self.records.sync()
            (self.folder / written.path).unlink()

    def _sha256_delivered(self, file: str) -> str:
        """The sha256 of a file that was delivered; nothing if it was not."""
        return str(self.journal.get(f"{_DELIVERED} {file}", ""))

    def is_gone(self, shard: ShardLayout) -> bool:
        """Whether a file was delivered and is not to be here any more."""
        is_known = all(slot.name in self.records.tensors for slot in shard.slots)
        return self.removes and is_known and bool(self._sha256_delivered(shard.file))

    def _file(self, shard: ShardLayout) -> _ShardFile:
        if shard.file not in self._files:
            units = sum(unit.shard is shard for unit in self.units)
            file = self._files[shard.file] = _ShardFile(shard, self.folder, units, is_there=self.assists)
            if not self.assists:
                file.data.append(memoryview(shard.header))
                file.at = len(shard.header)
        return self._files[shard.file]

    def _prove(self, file: _ShardFile, slot: Slot) -> bool:
        """Whether the journal has this tensor and the file has its bytes; if so they are hashed as if just written."""
        sha256 = file.sha256.copy() if file.is_hashed_by_the_way else None
        if not self._is(file, slot, self.records.tensors.get(slot.name), sha256):
            return False
        self.digests[slot.name] = self.records.tensors[slot.name]
        file.sha256 = sha256 or file.sha256
        return True

    def _is(self, file: _ShardFile, slot: Slot, digest: str | None, sha256: Any) -> bool:
        """Whether a tensor's bytes are in the file; what is read is added to `sha256`, if there is one."""
        if digest is None:
            return False
        tensor_hash = blake3()
        for start in range(slot.begin, slot.begin + slot.nbytes, _READ):
            if self.stop():
                raise Canceled("the merge was canceled")
            data = file.data.read(start, min(_READ, slot.begin + slot.nbytes - start))
            tensor_hash.update(data)
            if sha256 is not None:
                sha256.update(data)
        return tensor_hash.hexdigest() == digest

    def _complete_if_hashed(self, file: _ShardFile) -> None:
        if file.hashed == file.units:
            complete = self._hasher.submit(lambda: None), self._disk.submit(file.data.complete)
            file.pending += complete
            if self._delivery is not None:
                before = *self._delivering[-1:], *complete
                self._delivering.append(self._courier.submit(self._deliver, file, *before))


class _ShardFile:
    """One shard as it grows: its bytes, its hash, and what its threads have still to do.

    `hashed`: so many of its `units`, from the front, are hashed, or will be as they are written. `at`: where the next
    bytes go.
    """

    def __init__(self, shard: ShardLayout, folder: Path, units: int, *, is_there: bool) -> None:
        self.shard, self.units, self.hashed, self.at = shard, units, 0, -1
        self.is_hashed_by_the_way = False
        self.data = PagedFile(folder / shard.file, shard.size, is_there=is_there)
        self.sha256 = hashlib.sha256(shard.header)
        self.pending: deque[Future[None]] = deque()


def check_space(size: int, folder: Path) -> None:
    """Raise `InsufficientStorage` if so many bytes of output cannot fit beside what is in `folder` already."""
    existing = nearest_existing(folder)
    allocated = (
        sum(file.stat().st_blocks * 512 for file in folder.iterdir() if file.is_file()) if folder.is_dir() else 0
    )
    free = shutil.disk_usage(existing).free + allocated
    if free < size + SPARE_BYTES:
        raise InsufficientStorage(
            f"the output needs {size / 1e9:,.2f} GB, but {existing} has {free / 1e9:,.2f} GB free; "
            "free some space or choose another place"
        )
