"""Files written once, from front to back, durably."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


class PagedFile:
    """A preallocated file, filled from front to back past the page cache where the file system allows.

    What is written past the cache must be whole pages, in the file and in memory: blocks that are so are written as
    they are, the rest is staged. Nothing has to be flushed at the end, and the cache keeps what is read.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._descriptors = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)]
        self._stage = mmap.mmap(-1, _STAGED)
        try:
            os.posix_fallocate(self._cached, 0, size)
        except OSError as error:
            self.close()
            raise disk_error(error, path.parent, size) from None
        try:
            self._descriptors.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC | _DIRECT))
        except OSError:
            self._descriptors.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        self._staged = 0
        self._at = 0
        self._when: deque[tuple[int, Callable[[], None]]] = deque()

    def read(self, start: int, size: int) -> bytes:
        """Bytes that the file holds already."""
        return os.pread(self._cached, size, start)

    def skip_to(self, offset: int) -> None:
        """Go on at an offset; what lies before it is in the file already."""
        self._at = offset // PAGE * PAGE
        tail = self.read(self._at, offset - self._at)
        self._stage[: len(tail)] = tail
        self._staged = len(tail)

    def append(self, data: memoryview) -> None:
        """Write what fills pages; the rest waits for what follows."""
        if not self._staged and np.frombuffer(data, np.uint8).ctypes.data % PAGE == 0:
            whole = len(data) // PAGE * PAGE
            self._put(data[:whole])
            data = data[whole:]
        while data:
            count = min(len(data), _STAGED - self._staged)
            self._stage[self._staged : self._staged + count] = data[:count]
            self._staged, data = self._staged + count, data[count:]
            if self._staged == _STAGED or not data:
                whole = self._staged // PAGE * PAGE
                with memoryview(self._stage) as stage:
                    self._put(stage[:whole])
                self._stage[: self._staged - whole] = self._stage[whole : self._staged]
                self._staged -= whole
        while self._when and self._when[0][0] <= self._at:
            self._when.popleft()[1]()

    def when_written(self, offset: int, action: Callable[[], None]) -> None:
        """Do something as soon as all bytes before an offset are in the file; offsets come in order."""
        self._when.append((offset, action))
        if offset <= self._at:
            self._when.popleft()[1]()

    def complete(self) -> None:
        """Write what waits, give the file its size and let it be durable."""
        if self._staged:
            # As if it filled its page; what lies behind the end is cut off.
            with memoryview(self._stage) as stage:
                self._put(stage[: -(-self._staged // PAGE) * PAGE])
        os.ftruncate(self._cached, self.size)
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

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                count = os.pwrite(self._descriptors[1], data, self._at)
            except OSError as error:
                flags = fcntl.fcntl(self._descriptors[1], fcntl.F_GETFL)
                if error.errno == errno.EINVAL and flags & _DIRECT:
                    fcntl.fcntl(self._descriptors[1], fcntl.F_SETFL, flags & ~_DIRECT)
                    continue
                raise disk_error(error, self.path.parent, len(data)) from None
            self._at, data = self._at + count, data[count:]


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
