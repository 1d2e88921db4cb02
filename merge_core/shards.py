"""The files: preallocated safetensors shards that are complete or absent.

Bytes arrive in file order and are hashed as they are written: sha256 per file, blake3 per tensor. A journal records
each tensor that is in its file; a killed merge reopens the folder, proves the recorded tensors by their digests and
goes on after the last good one.
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
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from blake3 import blake3
from torch import Tensor

from merge_core.errors import Canceled, InsufficientStorage, OutputExists, WeightsmithError
from merge_core.files import PagedFile, WrittenFile, nearest_existing, write_text
from merge_core.journal import JOURNAL, Journal
from merge_core.layout import INDEX_NAME, ShardLayout, Slot, index_json
from merge_core.plan import Plan

SPARE_BYTES = 64 * 2**20
_READ = 2**22


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
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a merge is at work in an unfinished output's folder now."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class ShardWriter:
    """Writes a plan's shards into a folder, one after the other, tensors in file order.

    Usage: for each slot of `remaining()`, in order: `begin(slot)`, `write(values)` until it is full, then `end()`;
    finally `finish()`. Digests and the disk have a thread each; `write` returns before they are done. `records` are
    what was finished, for whoever goes on.
    """

    def __init__(self, plan: Plan, folder: Path, stop: Callable[[], bool] = lambda: False) -> None:
        """`stop` is asked while what an earlier attempt left is read again, which may be a whole model."""
        self.plan, self.folder, self.stop = plan, folder, stop
        self.digests: dict[str, str] = {}
        self.resumed = 0
        self.records = Journal(folder / JOURNAL, plan.digest)
        self._files: dict[str, _ShardFile] = {}
        self._shard_of = {slot.name: shard for shard in plan.shards for slot in shard.slots}
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="blake3")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
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
        check_space(self.plan.output_bytes, self.folder)
        try:
            self.records.open()
            self.records.clear_folder()
        except BaseException:
            self.records.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in (self._disk, self._hasher, self._digester):
            thread.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.data.close()
        self.records.close()

    def remaining(self) -> Iterator[Slot]:
        """The tensors still to be written. Asking for one opens its file, which may be before the last is full."""
        for shard in self.plan.shards:
            file = self._files[shard.file] = _ShardFile(shard, self.folder)
            file.data.append(memoryview(shard.header))
            proved = list(itertools.takewhile(lambda slot: self._prove(file, slot), shard.slots))  # noqa: B023
            if proved:
                file.data.skip_to(proved[-1].begin + proved[-1].nbytes)
                self.resumed += len(proved)
            if len(proved) == len(shard.slots):
                self._complete(file)
            yield from shard.slots[len(proved) :]

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
            self._hasher.submit(file.sha256.update, data),
            self._digester.submit(self._tensor_hash.update, data),
            self._disk.submit(file.data.append, data),
        ]

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
            self.records.tensor(slot.name, digest.result())

        while file.pending and file.pending[0].done():
            file.pending.popleft().result()
        file.pending.append(self._disk.submit(file.data.when_written, slot.begin + slot.nbytes, record))
        if slot is file.shard.slots[-1]:
            self._complete(file)

    def finish(self) -> list[WrittenFile]:
        """Wait for the last byte; write the index where there are several shards. All files, weights and index."""
        files = []
        for shard in self.plan.shards:
            file = self._files[shard.file]
            for future in file.pending:
                future.result()
            files.append(WrittenFile(shard.file, shard.size, file.sha256.hexdigest()))
        if len(self.plan.shards) > 1:
            files.append(write_text(self.folder / INDEX_NAME, index_json(self.plan.shards)))
        return files

    def _prove(self, file: _ShardFile, slot: Slot) -> bool:
        """Whether the journal has this tensor and the file has its bytes; if so they are hashed as if just written."""
        wanted = self.records.tensors.get(slot.name)
        if wanted is None:
            return False
        file_hash, tensor_hash = file.sha256.copy(), blake3()
        for start in range(slot.begin, slot.begin + slot.nbytes, _READ):
            if self.stop():
                raise Canceled("the merge was canceled")
            data = file.data.read(start, min(_READ, slot.begin + slot.nbytes - start))
            tensor_hash.update(data)
            file_hash.update(data)
        if tensor_hash.hexdigest() != wanted:
            return False
        self.digests[slot.name], file.sha256 = wanted, file_hash
        return True

    def _complete(self, file: _ShardFile) -> None:
        file.pending += [self._hasher.submit(lambda: None), self._disk.submit(file.data.complete)]


class _ShardFile:
    """One shard as it grows: its bytes, its hash, and what its threads have still to do."""

    def __init__(self, shard: ShardLayout, folder: Path) -> None:
        self.shard = shard
        self.data = PagedFile(folder / shard.file, shard.size)
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
