"""What becomes of input files besides being merged: their sha256 for the lock, and their place in the page cache.

A file is hashed behind the merge, while it is still in memory, so that no disk reads it twice; a file hashed before, by
any merge that was given the same cache folder, is not hashed again. Where the inputs are larger than memory, what is
done with leaves the page cache at once, and other programs keep theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from merge_core.errors import Canceled
from merge_core.files import PAGE
from merge_core.headers import Shard
from merge_core.plan import Plan, Source, Step
from merge_core.snapshots import Supply
from merge_core.weights import Weights

_READ = 2**20
_WORTH_A_TASK = 2**26
_SETTLED_NS = 2 * 10**9
"""A file changed so short a time ago could change again without a new time stamp: its hash is not kept."""


@dataclass
class _File:
    """One input file: how far it is merged and hashed, in bytes from its start."""

    shard: Shard
    descriptor: int
    known: str | None = None
    merged: int = 0
    hashed: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)
    task: Future[None] | None = None


class Sources:
    """The input files of a merge while it is made. `cache`: where hashes are kept, if anywhere."""

    def __init__(
        self,
        checkpoints: Sequence[Weights],
        read: Iterable[tuple[int, str]],
        *,
        threads: int,
        output_bytes: int,
        cache: Path | None,
        stop: Callable[[], bool],
        supply: Supply | None = None,
    ) -> None:
        """`read`: which files of which checkpoints; `output_bytes`: what is written meanwhile; `supply`: of the files
        that are here by stand-ins.
        """
        self._supply = supply
        self._elsewhere: dict[Path, Shard] = {}
        self.notes: list[str] = []
        """What the user should know of the hashes, once there are `result`s."""
        self._cache, self._stop, self._closed, self._opened_ns = cache, stop, False, time.time_ns()
        self._hashing = ThreadPoolExecutor(threads, thread_name_prefix="sources")
        self._checkpoints = checkpoints
        self._files: dict[Path, _File] = {}
        for model, name in sorted(set(read)):
            shard = checkpoints[model].shards[name]
            if shard.is_stand_in:
                self._elsewhere[shard.path] = shard
            elif shard.path not in self._files:
                self._files[shard.path] = _File(shard, checkpoints[model].descriptor(name), self._kept(shard))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._most_behind = memory // 4
        self._leave_cache = sum(file.shard.size for file in self._files.values()) + output_bytes > memory

    @classmethod
    def of(
        cls,
        plan: Plan,
        checkpoints: Sequence[Weights],
        cache: Path | None,
        stop: Callable[[], bool],
        beside: Sequence[Weights] = (),
        supply: Supply | None = None,
    ) -> Self:
        """The files that a plan's steps read, and all those of what is read `beside`."""
        tied = [Source(pair.model, info) for pair in plan.tied for info in (pair.tensor, pair.partner)]
        sources = [*(source for step in plan.steps for source in step.reads), *tied]
        read = {
            (source.model, name) for source in sources for name, _, _ in checkpoints[source.model].ranges(source.info)
        }
        read |= {(model, name) for model, weights in enumerate(checkpoints) for name in weights.always_read()}
        read |= {(model, name) for model, weights in enumerate(beside, len(checkpoints)) for name in weights.shards}
        return cls(
            [*checkpoints, *beside],
            read,
            threads=plan.memory.threads,
            output_bytes=plan.output_bytes,
            cache=cache,
            stop=stop,
            supply=supply,
        )

    @classmethod
    def whole(
        cls,
        checkpoints: Sequence[Weights],
        *,
        threads: int,
        cache: Path | None,
        stop: Callable[[], bool],
        supply: Supply | None = None,
    ) -> Self:
        """All files of some models, only to be hashed."""
        read = [(model, name) for model, weights in enumerate(checkpoints) for name in weights.shards]
        return cls(checkpoints, read, threads=threads, output_bytes=0, cache=cache, stop=stop, supply=supply)

    def merged(self, step: Step) -> None:
        """A tensor's inputs are done with; waits if hashing is too far behind for the page cache to hold."""
        for source in step.reads:
            weights = self._checkpoints[source.model]
            for name, begin, end in weights.ranges(source.info):
                if (file := self._files.get(weights.shards[name].path)) is not None:
                    self._merged(file, begin, end)
        if self._supply is not None:
            self._supply.done(step.name)
        if self._behind() > self._most_behind:
            for file in self._files.values():
                if file.task is not None:
                    file.task.result()

    def _merged(self, file: _File, begin: int, end: int) -> None:
        if file.known is None:
            file.merged = max(file.merged, end)
            if file.merged - file.hashed >= _WORTH_A_TASK and (file.task is None or file.task.done()):
                file.task = self._hashing.submit(self._hash, file, file.merged)
        elif self._leave_cache:
            self._drop(file, begin, end)

    def result(self) -> dict[Path, str]:
        """File → sha256; waits for the last one. Raises `CheckpointError` for one that is not what its origin has."""
        unknown = [file for file in self._files.values() if file.known is None]
        for file in unknown:
            if file.task is not None:
                file.task.result()
        for task in [self._hashing.submit(self._hash, file, file.shard.size) for file in unknown]:
            task.result()
        for file in unknown:
            file.known = file.sha256.hexdigest()
            self._keep(file)
        return {path: file.known or "" for path, file in self._files.items()} | self._of_stand_ins()

    def _of_stand_ins(self) -> dict[Path, str]:
        """What the origins of stand-ins say, which all who read a file whole have proved."""
        found: dict[Path, str] = {}
        unproved: Counter[str] = Counter()
        for path, shard in self._elsewhere.items():
            assert self._supply is not None and shard.snapshot is not None
            found[path], is_proved = self._supply.sha256(path)
            unproved[shard.snapshot.name] += not is_proved
        self.notes = [
            f"{name}: the sha256 of {count} {'file' if count == 1 else 'files'} is as the Hub says, since no worker "
            "read every byte"
            for name, count in unproved.items()
            if count
        ]
        return found

    def close(self) -> None:
        self._closed = True
        self._hashing.shutdown(wait=True, cancel_futures=True)

    def _behind(self) -> int:
        return sum(max(0, file.merged - file.hashed) for file in self._files.values() if file.known is None)

    def _hash(self, file: _File, end: int) -> None:
        space = _space_of_this_thread()
        view = memoryview(space)
        begin = file.hashed
        while file.hashed < end:
            if self._closed or self._stop():
                raise Canceled("the merge was canceled")
            part = view[file.hashed % PAGE :][: min(_READ, end - file.hashed)]  # see `kernels.tiles.window`
            count = os.preadv(file.descriptor, [part], file.hashed)
            if count == 0:
                return  # the file became shorter, which `Weights.check_unchanged` tells
            file.sha256.update(part[:count])
            file.hashed += count
        if self._leave_cache:
            self._drop(file, begin, end)

    @staticmethod
    def _drop(file: _File, begin: int, end: int) -> None:
        os.posix_fadvise(file.descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _path(self, shard: Shard) -> Path | None:
        """Where the hash of a file is kept: a new name whenever the file is another or was changed."""
        if self._cache is None:
            return None
        name = f"{shard.device}-{shard.inode}-{shard.size}-{shard.mtime_ns}-{shard.ctime_ns}"
        return self._cache / "sha256" / name

    def _kept(self, shard: Shard) -> str | None:
        path = self._path(shard)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path is not None and re.fullmatch("[0-9a-f]{64}", digest := path.read_text()):
                return digest
        return None

    def _keep(self, file: _File) -> None:
        path = self._path(file.shard)
        is_settled = self._opened_ns - max(file.shard.mtime_ns, file.shard.ctime_ns) > _SETTLED_NS
        if path is None or file.known is None or not is_settled or not file.shard.is_still(os.fstat(file.descriptor)):
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{uuid.uuid4()}")
            new.write_text(file.known)
            new.rename(path)


_threads = threading.local()


def _space_of_this_thread() -> mmap.mmap:
    if not hasattr(_threads, "space"):
        _threads.space = mmap.mmap(-1, _READ + PAGE)
    return _threads.space  # type: ignore[no-any-return]
