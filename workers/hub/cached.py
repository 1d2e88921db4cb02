"""Models from a Hub as whole files, in an ordinary Hugging Face cache that all jobs share.

Files are downloaded by huggingface_hub, by Xet where the Hub has it, some ahead in the order of the plan, and proved by
their sha256 once. The cache is kept to a size: what was not opened for the longest time goes first, in whichever
process it was. A file that is open stays so, as the bytes of what was removed are there until the last one closes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge_core.errors import Canceled, InsufficientStorage
from merge_core.snapshots import OpenFile, Range
from workers.hub.client import HubClient
from workers.hub.errors import HubLied, HubUnavailable
from workers.hub.ranges import PATIENCE, RemoteFile, never

DOWNLOADS = 2
"""At once."""
AHEAD_SHARE = 4
"""A file is fetched ahead as long as those that wait take no more than the cache's size by this."""
YOUNG_SECONDS = 6 * 3600.0
"""A download that nobody finished is rubbish after so long."""
_LOOK = 0.1
_READ = 2**22
_PAUSE = 2.0


class Cached:
    """Supplies whole files (`merge_core.snapshots.Supply`). `files`: what stand-ins stand for."""

    in_files = True

    def __init__(
        self,
        client: HubClient,
        files: Mapping[Path, RemoteFile],
        *,
        most_bytes: int,
        reserve: int = 0,
        patience: float = PATIENCE,
    ) -> None:
        """`most_bytes` is the size of the cache, `reserve` what is left free of the disk."""
        self._client, self._files, self._patience = client, files, patience
        self._cache = HubCache(client.folder / "cache", most_bytes, reserve)
        self._lock = threading.Lock()
        self._stop: Callable[[], bool] = never
        self._received: Callable[[int], None] = lambda count: None
        self._ended = True
        self._pool: ThreadPoolExecutor | None = None
        self._wanted: dict[Path, set[str]] = {}
        """By file, in the order in which they are needed, the tensors that will be read from it."""
        self._coming: dict[Path, Future[Path]] = {}
        self._open: dict[Path, OpenFile] = {}
        self._proved: set[Path] = set()

    def window(self, limit: int) -> int:
        return 0

    def begin(self, window: int, *, stop: Callable[[], bool], received: Callable[[int], None]) -> None:
        self._stop, self._received, self._ended = stop, received, False
        self._pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="hub")

    def end(self) -> None:
        self._ended = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._open, self._coming, self._wanted = {}, {}, {}

    def read(self, file: Path, offset: int, space: memoryview) -> None:
        raise NotImplementedError("what is cached is read from its file")

    def expect(self, reads: Iterable[tuple[str, Sequence[Range]]]) -> None:
        wanted: dict[Path, set[str]] = {}
        for tensor, ranges in reads:
            for file, _, _ in ranges:
                wanted.setdefault(file, set()).add(tensor)
        with self._lock:
            self._wanted = wanted
        self._look_ahead()

    def done(self, tensor: str) -> None:
        with self._lock:
            for file in [file for file, tensors in self._wanted.items() if tensor in tensors]:
                self._wanted[file].discard(tensor)
                if not self._wanted[file]:
                    del self._wanted[file]
                    self._open.pop(file, None)
        self._look_ahead()

    def open(self, file: Path) -> OpenFile:
        with self._lock:
            if (found := self._open.get(file)) is not None:
                return found
        while True:
            place = self._awaited(file)
            try:
                opened = OpenFile(os.open(place, os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError:  # removed by another process in this moment
                with self._lock:
                    self._coming.pop(file, None)
                continue
            break
        with self._lock:
            found = self._open.setdefault(file, opened)
            self._coming.pop(file, None)
        self._cache.touch(place)
        self._look_ahead()
        return found

    def sha256(self, file: Path) -> tuple[str, bool]:
        return self._files[file].sha256 or "", file in self._proved

    def _awaited(self, file: Path) -> Path:
        coming = self._start(file)
        while True:
            if self._ended or self._stop():
                raise Canceled("the merge was canceled")
            with contextlib.suppress(TimeoutError):
                return coming.result(_LOOK)

    def _start(self, file: Path) -> Future[Path]:
        with self._lock:
            if self._pool is None or self._ended:
                raise Canceled("the merge was canceled")
            if file not in self._coming:
                self._coming[file] = self._pool.submit(self._fetched, file)
            return self._coming[file]

    def _look_ahead(self) -> None:
        """Fetch the files that come next, as far as that leaves the cache room for those that are open."""
        with self._lock:
            room = self._cache.most_bytes // AHEAD_SHARE
            following = [file for file in self._wanted if file not in self._open]
            starting = []
            for file in following:
                room -= self._files[file].size
                if room < 0:
                    break
                if file not in self._coming:
                    starting.append(file)
        for file in starting:
            with contextlib.suppress(Canceled):
                self._start(file)

    def _fetched(self, file: Path) -> Path:
        """Where the whole file is, in the cache, proved."""
        remote = self._files[file]
        until, heard = time.monotonic() + self._patience, [0]
        while True:
            try:
                place = self._cache.fetch(self._client, remote, self._count(heard), self._in_use)
                break
            except HubUnavailable:
                if heard[0]:
                    until, heard[0] = time.monotonic() + self._patience, 0
                if time.monotonic() + _PAUSE > until:
                    raise
                self._pause(_PAUSE)
        self._proved.add(file)
        return place

    def _in_use(self) -> set[tuple[int, int]]:
        """The files that are open, by device and inode. Those that are no longer in the cache are not kept open: their
        bytes are on the disk for as long as somebody reads them.
        """
        with self._lock:
            found = {file: os.fstat(opened) for file, opened in self._open.items()}
            self._open = {file: opened for file, opened in self._open.items() if found[file].st_nlink}
            return {(each.st_dev, each.st_ino) for each in found.values()}

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._check()
            time.sleep(_LOOK)

    def _check(self) -> None:
        if self._ended:
            raise Canceled("the merge was canceled")

    def _count(self, heard: list[int]) -> Callable[[int], None]:
        def count(received: int) -> None:
            self._check()
            heard[0] += received
            self._received(received)

        return count


class HubCache:
    """A Hugging Face cache of at most so many bytes, which any number of processes use."""

    def __init__(self, folder: Path, most_bytes: int, reserve: int = 0) -> None:
        self.folder, self.most_bytes, self._reserve = folder, most_bytes, reserve

    def fetch(
        self,
        client: HubClient,
        file: RemoteFile,
        received: Callable[[int], None],
        in_use: Callable[[], Collection[tuple[int, int]]] = set,
    ) -> Path:
        """Where a file is, whole and proved. Raises one of `workers.hub.errors`, `InsufficientStorage`, or whatever
        `received` raises, which is told of bytes as they come. What is `in_use`, by device and inode, is removed last.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        api = client.api
        from huggingface_hub import hf_hub_download

        *kind, owner, name = file.repo.split("/")

        if not (found := self._pointer(file)).exists():
            self._make_room(file, in_use())
            in_use()
            with client.told(file.name):
                got = hf_hub_download(
                    f"{owner}/{name}",
                    file.path,
                    repo_type="dataset" if kind else "model",
                    revision=file.commit,
                    cache_dir=self.folder,
                    endpoint=client.endpoint,
                    token=api.token,
                    library_name=api.library_name,
                    library_version=api.library_version,
                    tqdm_class=_meter(received),
                )
            if Path(got) != found:
                raise HubLied(file.name, f"came from another commit than {file.commit}")
        self._prove(found, file, received)
        return found

    def touch(self, place: Path) -> None:
        """Remember that a file was used now."""
        with contextlib.suppress(OSError):
            os.utime(place)

    def _pointer(self, file: RemoteFile) -> Path:
        """Where huggingface_hub puts a file of a commit."""
        repo = file.repo if file.repo.count("/") > 1 else f"models/{file.repo}"
        return self.folder / repo.replace("/", "--") / "snapshots" / file.commit / file.path

    def _prove(self, place: Path, file: RemoteFile, received: Callable[[int], None]) -> None:
        """Raise `HubLied`, and remove the file, if it is not what the Hub lists; what was proved once stays so."""
        real = place.resolve()
        try:
            found = real.stat()
        except FileNotFoundError:
            raise HubUnavailable(file.name, "was removed from the cache in the moment in which it came") from None
        mark = self.folder / ".proved" / f"{file.sha256}"
        stamp = f"{found.st_size} {found.st_ino}"
        with contextlib.suppress(OSError):
            if mark.read_text() == stamp:
                return
        digest = hashlib.sha256()
        if found.st_size == file.size:
            with real.open("rb") as stream:
                while data := stream.read(_READ):
                    digest.update(data)
                    received(0)
        if found.st_size != file.size or digest.hexdigest() != file.sha256:
            place.unlink(missing_ok=True)
            real.unlink(missing_ok=True)
            raise HubLied(file.name, "came with other bytes than the Hub's own sha256 of it says")
        with contextlib.suppress(OSError):
            mark.parent.mkdir(exist_ok=True)
            mark.write_text(stamp)

    def _make_room(self, file: RemoteFile, in_use: Collection[tuple[int, int]]) -> None:
        """Remove what was not used for the longest time until a file fits. Raises `InsufficientStorage`."""
        with self._alone():
            found = [(each, (stat.st_dev, stat.st_ino) in in_use, stat) for each, stat in self._blobs()]
            blobs = sorted(found, key=lambda each: (each[1], each[2].st_mtime))
            taken = sum(stat.st_size for *_, stat in blobs)
            while taken + file.size > self.most_bytes or self._free() < file.size + self._reserve:
                if not blobs:
                    break
                blob, _, stat = blobs.pop(0)
                self._remove(blob)
                taken -= stat.st_size
        if self._free() < file.size + self._reserve:
            raise InsufficientStorage(
                f"{file.name} has {file.size / 1e9:,.2f} GB, more than {self.folder} has room for; free some space, or "
                "set WEIGHTSMITH_HUB_MODE to streamed, which keeps nothing on the disk"
            )

    def _blobs(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Every file's place, and what is known of it. What nobody finished downloading goes."""
        now = time.time()
        for blob in self.folder.glob("*--*/blobs/*"):
            with contextlib.suppress(FileNotFoundError):
                found = blob.stat()
                if blob.name.endswith(".incomplete") and now - found.st_mtime > YOUNG_SECONDS:
                    blob.unlink()
                elif not blob.name.endswith(".incomplete"):
                    yield blob, found

    @staticmethod
    def _remove(blob: Path) -> None:
        """Remove a file and whatever points to it."""
        for pointer in (blob.parent.parent / "snapshots").rglob("*"):
            if pointer.is_symlink() and pointer.resolve() == blob.resolve():
                pointer.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / ".room.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _meter(received: Callable[[int], None]) -> Any:
    """A progress bar that nobody sees and that tells how many bytes came."""
    from huggingface_hub.utils.tqdm import tqdm

    class Meter(tqdm):
        """Told of bytes that were written, and by some of those that came over the network, which may be fewer."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **{**named, "disable": True})  # type: ignore[no-untyped-call]
            self.written = self.came = self.counted = 0

        def update(self, n: float | None = 1) -> None:
            self.written += int(n or 0)
            self._tell()

        def update_transfer(self, n: float | None = 1) -> None:
            self.came += int(n or 0)
            self._tell()

        def _tell(self) -> None:
            news = max(0, max(self.written, self.came) - self.counted)
            self.counted += news
            received(news)

    return Meter
