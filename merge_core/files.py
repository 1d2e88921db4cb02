"""Files written once, from front to back, durably."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from merge_core.errors import InsufficientStorage, StorageFailed, WeightsmithError

PAGE = 4096
_STAGED = 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True)
class WrittenFile:
    """One finished file of the artifact."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """A file that is there."""
        with path.open("rb") as file:
            return cls(path.name, os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


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


class PagedFile:
    """A preallocated file, filled in runs from front to back, past the page cache where the file system allows.

    What is written past the cache must be whole pages, in the file and in memory: blocks that are so are written as
    they are, the rest is staged. Nothing has to be flushed at the end, and the cache keeps what is read. Of a page in
    which a run begins or ends only its own bytes are written: the others may be somebody else's.
    """

    def __init__(self, path: Path, size: int, *, is_there: bool = False) -> None:
        """`is_there`: another process made the file, and is to find in the page cache what is written here."""
        self.path, self.size = path, size
        self._descriptors = [os.open(path, os.O_RDWR | (0 if is_there else os.O_CREAT) | os.O_CLOEXEC, 0o644)]
        self._stage = mmap.mmap(-1, _STAGED)
        try:
            if os.fstat(self._cached).st_size < size and not is_there:
                os.posix_fallocate(self._cached, 0, size)
        except OSError as error:
            self.close()
            raise disk_error(error, path.parent, size) from None
        try:
            self._descriptors.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC | (0 if is_there else _DIRECT)))
        except OSError:
            self._descriptors.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        self._staged = 0
        """Bytes that wait behind `_at`, which is on a page's boundary while there are any."""
        self._at = 0
        self._when: deque[tuple[int, Callable[[], None]]] = deque()

    def read(self, start: int, size: int) -> bytes:
        """Bytes that the file holds already."""
        return os.pread(self._cached, size, start)

    def go_to(self, offset: int) -> None:
        """Begin another run at an offset."""
        self.flush()
        self._at = offset

    def append(self, data: memoryview) -> None:
        """Write what fills pages; the rest waits for what follows."""
        if inside := self._at % PAGE:
            head = min(len(data), PAGE - inside)
            self._put(data[:head], self._cached)
            data = data[head:]
        if data and not self._staged and np.frombuffer(data, np.uint8).ctypes.data % PAGE == 0:
            whole = len(data) // PAGE * PAGE
            self._put(data[:whole], self._descriptors[1])
            data = data[whole:]
        while data:
            count = min(len(data), _STAGED - self._staged)
            self._stage[self._staged : self._staged + count] = data[:count]
            self._staged, data = self._staged + count, data[count:]
            if self._staged == _STAGED or not data:
                whole = self._staged // PAGE * PAGE
                with memoryview(self._stage) as stage:
                    self._put(stage[:whole], self._descriptors[1])
                self._stage[: self._staged - whole] = self._stage[whole : self._staged]
                self._staged -= whole
        self._tell()

    def flush(self) -> None:
        """Write what waits, through the page cache, as it does not fill its page."""
        if self._staged:
            with memoryview(self._stage) as stage:
                self._put(stage[: self._staged], self._cached)
            self._staged = 0
        self._tell()

    def when_written(self, offset: int, action: Callable[[], None]) -> None:
        """Do something as soon as all bytes before an offset are in the file; offsets of a run come in order."""
        self._when.append((offset, action))
        self._tell()

    def complete(self) -> None:
        """Write what waits and let the file be durable."""
        self.flush()
        os.fsync(self._cached)
        while self._when:
            self._when.popleft()[1]()
        self.close()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        with contextlib.suppress(BufferError):  # an error on its way up may still hold what could not be written
            self._stage.close()

    @property
    def _cached(self) -> int:
        return self._descriptors[0]

    def _tell(self) -> None:
        while self._when and self._when[0][0] <= self._at:
            self._when.popleft()[1]()

    def _put(self, data: memoryview, descriptor: int) -> None:
        while data:
            try:
                count = os.pwrite(descriptor, data, self._at)
            except OSError as error:
                flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
                if error.errno == errno.EINVAL and flags & _DIRECT:
                    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
                    continue
                raise disk_error(error, self.path.parent, len(data)) from None
            self._at, data = self._at + count, data[count:]


def write_text(path: Path, text: str) -> WrittenFile:
    """Write a small file durably."""
    return write_small(path, text.encode())


def write_small(path: Path, data: bytes) -> WrittenFile:
    """The same of bytes."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, path.parent, len(data)) from None
    return WrittenFile(path.name, len(data), hashlib.sha256(data).hexdigest())


def write_whole(path: Path, data: bytes) -> WrittenFile:
    """Write a file that is there with all its bytes or not at all, durably."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4()}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, path.parent, len(data)) from None
    fsync_folder(path.parent)
    return WrittenFile(path.name, len(data), hashlib.sha256(data).hexdigest())


def write_swiftly(path: Path, data: bytes) -> None:
    """Write a file that is there with all its bytes or not at all, as long as the machine does not fail."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise disk_error(error, path.parent, len(data)) from None


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, also if somebody who is about to stop puts something there meanwhile."""
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


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
