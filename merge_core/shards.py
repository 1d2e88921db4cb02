"""The files: preallocated safetensors shards that are complete or absent.

Bytes arrive in file order and are hashed as they are written: sha256 per tensor and per file. A journal records each
finished tensor; a killed merge reopens the folder, proves the recorded tensors by their digests and goes on after the
last good one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from merge_core.errors import InsufficientStorage, OutputExists, StorageFailed, WeightsmithError
from merge_core.layout import INDEX_NAME, ShardLayout, Slot, index_json
from merge_core.plan import Plan

JOURNAL = "journal.jsonl"
SPARE_BYTES = 64 * 2**20
_READ = 2**22


@dataclass(frozen=True)
class WrittenFile:
    """One finished file of the artifact."""

    path: str
    size: int
    sha256: str


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

    Usage: for each slot of `remaining()`, call `begin(slot)`, `write(bytes)` until it is full, then `end()`; finally
    `finish()`.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.digests: dict[str, str] = {}
        self.files: list[WrittenFile] = []
        self.resumed = 0
        self._journal = _Journal(folder / JOURNAL, plan.digest)
        self._descriptor: int | None = None
        self._file_hash = hashlib.sha256()
        self._tensor_hash = hashlib.sha256()
        self._at = 0

    @property
    def journal(self) -> Mapping[str, Any]:
        """What an earlier attempt recorded under names of its own (see `remember`)."""
        return self._journal.notes

    def remember(self, name: str, value: Any) -> None:
        """Record something that a later attempt need not find out again."""
        self._journal.note(name, value)

    def __enter__(self) -> Self:
        check_space(self.plan, self.folder)
        self._journal.open()
        if self._journal.is_new:
            for left in self.folder.iterdir():
                if left.name != JOURNAL:
                    left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._journal.close()

    def remaining(self) -> Iterator[Slot]:
        """The tensors still to be written; between two of them files are opened, closed and hashed."""
        for shard in self.plan.shards:
            self._open(shard)
            good = True
            for slot in shard.slots:
                good = good and self._prove(slot)
                if not good:
                    yield slot
            self._complete(shard)

    def begin(self, slot: Slot) -> None:
        self._at = slot.begin
        self._tensor_hash = hashlib.sha256()

    def write(self, values: Tensor) -> None:
        """Append values, in their stored dtype and row-major order, to the tensor that was begun."""
        data = memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._put(data)
        self._file_hash.update(data)
        self._tensor_hash.update(data)

    def end(self, slot: Slot) -> None:
        self.digests[slot.name] = self._tensor_hash.hexdigest()
        self._journal.tensor(slot.name, self.digests[slot.name])

    def finish(self) -> list[WrittenFile]:
        """Write the index where there are several shards; all files of the output, weights and index."""
        if len(self.plan.shards) > 1:
            self.files.append(write_text(self.folder / INDEX_NAME, index_json(self.plan.shards)))
        return self.files

    def _open(self, shard: ShardLayout) -> None:
        path = self.folder / shard.file
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(self._descriptor, 0, shard.size)
        except OSError as error:
            raise disk_error(error, self.folder, shard.size) from None
        self._at = 0
        self._file_hash = hashlib.sha256(shard.header)
        self._put(memoryview(shard.header))

    def _complete(self, shard: ShardLayout) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, shard.size)
        os.fsync(self._descriptor)
        self._close()
        self.files.append(WrittenFile(shard.file, shard.size, self._file_hash.hexdigest()))

    def _put(self, data: memoryview) -> None:
        assert self._descriptor is not None
        while data:
            try:
                count = os.pwrite(self._descriptor, data, self._at)
            except OSError as error:
                raise disk_error(error, self.folder, len(data)) from None
            self._at, data = self._at + count, data[count:]

    def _prove(self, slot: Slot) -> bool:
        """Whether the journal has this tensor and the file has its bytes; if so they are hashed as if just written."""
        wanted = self._journal.tensors.get(slot.name)
        if wanted is None or self._descriptor is None:
            return False
        before, digest = self._file_hash.copy(), hashlib.sha256()
        for start in range(slot.begin, slot.begin + slot.nbytes, _READ):
            data = os.pread(self._descriptor, min(_READ, slot.begin + slot.nbytes - start), start)
            digest.update(data)
            self._file_hash.update(data)
        if digest.hexdigest() != wanted:
            self._file_hash = before
            return False
        self.digests[slot.name] = wanted
        self.resumed += 1
        return True

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Journal:
    """Lines of JSON, appended as things are finished; only a journal of the same plan counts."""

    def __init__(self, path: Path, plan_digest: str) -> None:
        self.path, self.plan_digest = path, plan_digest
        self.tensors: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        self.is_new = True
        self._descriptor: int | None = None

    def open(self) -> None:
        lines = self._read()
        self.is_new = not lines or lines[0].get("plan") != self.plan_digest
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if self.is_new:
            os.ftruncate(self._descriptor, 0)
            self._append({"plan": self.plan_digest})
            return
        for line in lines[1:]:
            if "tensor" in line:
                self.tensors[line["tensor"]] = line["sha256"]
            elif "note" in line:
                self.notes[line["note"]] = line["value"]

    def tensor(self, name: str, digest: str) -> None:
        self._append({"tensor": name, "sha256": digest})

    def note(self, name: str, value: Any) -> None:
        self.notes[name] = value
        self._append({"note": name, "value": value})

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._descriptor is not None
        text = json.dumps(line)
        try:
            # A line begins with its newline, so that one cut short by a kill spoils nothing that follows.
            os.write(self._descriptor, f"\n{_seal(text)} {text}".encode())
        except OSError as error:
            raise disk_error(error, self.path.parent, len(text)) from None

    def _read(self) -> list[dict[str, Any]]:
        """The lines that are as they were written; one that was torn or changed counts as never written."""
        if not self.path.is_file():
            return []
        sealed = [line.partition(" ") for line in self.path.read_text(errors="replace").split("\n")]
        return [json.loads(text) for seal, _, text in sealed if text and seal == _seal(text)]


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def write_text(path: Path, text: str) -> WrittenFile:
    """Write a small file durably."""
    data = text.encode()
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, path.parent, len(data)) from None
    return WrittenFile(path.name, len(data), hashlib.sha256(data).hexdigest())


def check_space(plan: Plan, folder: Path) -> None:
    """Raise `InsufficientStorage` if the output cannot fit beside what is in `folder` already."""
    existing = nearest_existing(folder)
    allocated = (
        sum(file.stat().st_blocks * 512 for file in folder.iterdir() if file.is_file()) if folder.is_dir() else 0
    )
    free, needed = shutil.disk_usage(existing).free + allocated, plan.output_bytes + SPARE_BYTES
    if free < needed:
        raise InsufficientStorage(
            f"the output needs {plan.output_bytes / 1e9:,.2f} GB, but {existing} has {free / 1e9:,.2f} GB free; "
            "free some space or choose another place"
        )


def nearest_existing(path: Path) -> Path:
    """The path itself or the closest folder above it that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, folder: Path, wanted: int) -> WeightsmithError:
    """What an error of the file system means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InsufficientStorage(
            f"the disk filled up while {wanted:,} bytes were to be written in {folder}; free some space and try again"
        )
    return StorageFailed(f"{folder} could not be written: {error.strerror or error}")
