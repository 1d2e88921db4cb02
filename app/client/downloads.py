"""Files from a service: in parallel, going on where they broke, and there only once their sha256 is right."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

from app.client.errors import Damaged, Refused, ServiceError, Unreachable
from app.client.objects import File
from app.client.transport import TRY_AGAIN, Transport

PIECE = 2**20
AT_ONCE = 4
Arrived = Callable[[int], None]


def download(transport: Transport, path: str, files: Sequence[File], folder: Path, arrived: Arrived) -> list[Path]:
    """Bring files, which are below the URL path `path`, into a folder; where they are then.

    `arrived` is told bytes as they come, also those that an earlier run left; a negative number where they were wrong.
    What breaks is continued, by the next call too. Raises `ServiceError`, and `OSError` for the disk.
    """
    targets = [_target(folder, file) for file in files]
    if len(set(targets)) < len(targets):
        raise Damaged(f"{transport.url} names a file twice")
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as pool:
        coming = [
            pool.submit(_Download(transport, f"{path}/{quote(file.path)}", file, target, arrived, stop).run)
            for file, target in zip(files, targets, strict=True)
        ]
        try:
            for each in coming:
                each.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return targets


def _target(folder: Path, file: File) -> Path:
    """Where a file goes. Raises `Damaged` for a name that leads out of the folder."""
    parts = PurePosixPath(file.path).parts
    odd = not parts or PurePosixPath(file.path).is_absolute() or ".." in parts or not file.path.isprintable()
    if not odd and "\\" not in file.path:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A symlink that is in the folder already may lead elsewhere too.
        if target.parent.resolve().is_relative_to(folder.resolve()):
            return target
    raise Damaged(
        f"the service names a file {file.path[:200]!r}, which would not be below {folder}; nothing was written"
    )


class _Download:
    """One file on its way."""

    def __init__(
        self, transport: Transport, url: str, file: File, target: Path, arrived: Arrived, stop: threading.Event
    ) -> None:
        self._transport, self._url, self._file, self._target = transport, url, file, target
        self._arrived, self._stop = arrived, stop
        self._digest, self._offset = hashlib.sha256(), 0

    def run(self) -> None:
        if self._is_there():
            self._arrived(self._file.size)
            return
        partial = self._target.with_name(f".{self._target.name}.{self._file.sha256[:16]}.partial")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, 0o666), "r+b") as stream:
            self._hold(stream)
            self._take_over(stream)
            self._complete(stream)
            stream.flush()
            os.fsync(stream.fileno())
            partial.rename(self._target)

    def _is_there(self) -> bool:
        if self._target.is_symlink() or not self._target.is_file() or self._target.stat().st_size != self._file.size:
            return False
        with self._target.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == self._file.sha256

    def _hold(self, stream: BinaryIO) -> None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(f"{self._target} is being downloaded already, by another call or process") from None

    def _take_over(self, stream: BinaryIO) -> None:
        """Count what an earlier run left."""
        while piece := stream.read(PIECE):
            self._count(piece)

    def _complete(self, stream: BinaryIO) -> None:
        patience, from_scratch = self._transport.patience(), self._offset == 0
        while True:
            if self._offset >= self._file.size:
                if self._offset == self._file.size and self._digest.hexdigest() == self._file.sha256:
                    return
                self._start_over(stream)
                if from_scratch:
                    raise Damaged(f"{self._file.path} arrived damaged (its sha256 differs); download it again")
                from_scratch = True
            before = self._offset
            try:
                self._fetch(stream)
                if self._offset < self._file.size:
                    raise Unreachable(f"{self._transport.url} sent {self._file.path} in part")
            except ServiceError as error:
                if self._stop.is_set():
                    raise
                if isinstance(error, Refused) and error.status == 416:
                    self._start_over(stream)
                elif isinstance(error, Refused) and error.status not in TRY_AGAIN:
                    raise
                if self._offset > before:
                    patience.renew()
                patience.spend(error)

    def _fetch(self, stream: BinaryIO) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self._offset:
            headers |= {"Range": f"bytes={self._offset}-", "If-Range": f'"{self._file.sha256}"'}
        with self._transport.stream("GET", self._url, elsewhere=True, headers=headers) as response:
            went_on = response.headers.get("content-range", "").startswith(f"bytes {self._offset}-")
            if self._offset and not (response.status_code == 206 and went_on):
                self._start_over(stream)
            stream.seek(self._offset)
            for piece in response.iter_bytes():
                stream.write(piece)
                self._count(piece)
                if self._stop.is_set():
                    raise ServiceError(f"the download of {self._file.path} was stopped")
                if self._offset > self._file.size:
                    break

    def _count(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._offset += len(piece)
        self._arrived(len(piece))

    def _start_over(self, stream: BinaryIO) -> None:
        stream.seek(0)
        stream.truncate()
        self._arrived(-self._offset)
        self._digest, self._offset = hashlib.sha256(), 0
