"""Merges on read, on the shelf `views` of our own Hub: blocks of weights are computed when somebody asks for them.

A view is a job whose artifact is everything but the weights. Few are open at a time, each under a share of the memory
that the settings give; blocks that were computed are kept as long as there is room, and whoever asks for one that is
being computed waits for that.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter

from app.errors import HttpProblem
from app.repos import COMMIT_DIGITS, Repo, RepoFile
from merge_core.errors import CheckpointError, IncompatibleModels, StorageFailed
from workers.hub.opening import HubOptions, JobHub
from workers.jobs import FINISHED, JobKind, JobState
from workers.queue import Queue
from workers.settings import HELD_BY_READERS, VIEWS_AT_ONCE
from workers.tables import Job

if TYPE_CHECKING:
    from merge_core.on_demand import OnDemand, Piece

MOST_READERS = 32
"""Answers that are computed at a time, each of which holds a few blocks."""
_AHEAD = 2
"""Blocks that are computed for a reader before it asks for them."""
_LARGE = 2**22
"""A block of more bytes, which is mostly a whole tensor, is not computed ahead."""
_CHUNK = 2**20
_THREADS = 8
"""Threads that wait for blocks, which other routes do not miss; who waits longest for one gets the next."""
_RETRY = {"Retry-After": "5"}
log = logging.getLogger(__name__)


class ViewRepo(Repo):
    """A view that is prepared."""

    def __init__(self, job: Job, views: Views) -> None:
        self._job, self._views = job, views
        self.id, self.title = f"{JobKind.VIEW.plural}/{job.id}", f"view {job.id}"
        self.created_at, self.made_at = job.created_at, job.finished_at or job.created_at
        digest = str(job.plan.get("digest"))
        small = {
            file["path"]: RepoFile(file["path"], file["size"], etag=file["sha256"], sha256=file["sha256"])
            for file in job.files
        }
        self._weights = {
            shard["file"]: RepoFile(shard["file"], shard["size"], etag=_digits(digest, shard["file"]))
            for shard in job.plan.get("shards", ())
        }
        self.files = dict(sorted((small | self._weights).items()))
        self.commit = _digits(digest, *(file.etag for file in small.values()))

    def read(self, path: str, start: int, end: int) -> Iterator[bytes]:
        if path in self._weights:
            try:
                return self._views.read(self._job, path, start, end)
            except (IncompatibleModels, CheckpointError) as error:
                raise HttpProblem("gone", f"view {self._job.id} cannot be computed any more: {error}") from None
        return self._views.queue.artifacts.read(self._job.id, path, start, end)

    def is_there(self, path: str) -> bool:
        stored = self._views.queue.artifacts
        return path in self._weights or stored.files(self._job.id).get(path) == self.files[path].size

    @property
    def threads(self) -> CapacityLimiter:
        return self._views.threads


def _digits(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:COMMIT_DIGITS]


class ViewShelf:
    """The views that can be read."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def find(self, name: str, owner: str) -> Repo | None:
        """As `Shelf.find`; raises a problem for a view that is not prepared yet, or never will be."""
        job = self._views.queue.store.find(name, owner, JobKind.VIEW)
        if job is None:
            return None
        if job.state == JobState.SUCCEEDED:
            return ViewRepo(job, self._views)
        if JobState(job.state) not in FINISHED:
            detail = f"view {job.id} is being prepared ({job.phase or job.state}); ask again"
            raise HttpProblem("preparing", detail, headers=_RETRY)
        raise HttpProblem("invalid-state", f"view {job.id} is {job.state}, so that it cannot be read; see its error")

    def page(self, owner: str, limit: int, before: str | None) -> Sequence[Repo]:
        """As `Shelf.page`."""
        done = (JobState.SUCCEEDED,)
        jobs = self._views.queue.store.page(owner=owner, kind=JobKind.VIEW, states=done, limit=limit, before=before)
        return [ViewRepo(job, self._views) for job in jobs]


class Views:
    """Computes what is read of views, for any number of threads."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.settings = queue, queue.store.settings
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._changing = threading.Lock()
        self._readers = self._held = 0
        self.threads = CapacityLimiter(_THREADS)
        self._blocks = _Blocks(self.settings.view_cache)
        self._is_closed = False

    def close(self) -> None:
        """Give up whatever is being computed."""
        self._is_closed = True
        with self._changing:
            left = list(self._open.values())
            self._open.clear()
        for each in left:
            each.close()

    def read(self, job: Job, path: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes of a file of weights, computed as they are asked for.

        Raises `WeightsmithError` where the view cannot be opened any more, or a problem where too many are being read.
        """
        opened = self._enter(job)
        held = 0
        try:
            made = opened.made(self)
            made.check_unchanged()
            block = made.largest_block
            ahead = _AHEAD if block <= _LARGE else 0
            held = self._hold((1 + ahead) * block)
            return _Reading(self._computed(opened, path, start, end, ahead), lambda: self._leave(opened, held))
        except BaseException:
            self._leave(opened, held)
            raise

    def _hold(self, size: int) -> int:
        """Let a reader hold so many bytes of blocks, or alone any number."""
        with self._changing:
            if self._held and self._held + size > HELD_BY_READERS:
                detail = "the blocks that others are reading take all the memory there is for them; ask again"
                raise HttpProblem("too-many-readers", detail, headers=_RETRY)
            self._held += size
            return size

    def _enter(self, job: Job) -> _Opened:
        """Take a view for a reader, which has to give it back."""
        evicted: _Opened | None = None
        with self._changing:
            if self._is_closed:
                raise HttpProblem("too-many-readers", "the service is stopping", headers=_RETRY)
            if self._readers >= MOST_READERS:
                detail = f"{MOST_READERS} answers are being computed; ask again"
                raise HttpProblem("too-many-readers", detail, headers=_RETRY)
            if job.id not in self._open:
                idle = [name for name, each in self._open.items() if not each.readers]
                if len(self._open) >= VIEWS_AT_ONCE and not idle:
                    detail = f"{VIEWS_AT_ONCE} other views are being read, which is as many as can be; ask again"
                    raise HttpProblem("too-many-readers", detail, headers=_RETRY)
                if len(self._open) >= VIEWS_AT_ONCE:
                    evicted = self._open.pop(idle[0])
                self._open[job.id] = _Opened(job)
            self._open.move_to_end(job.id)
            opened = self._open[job.id]
            opened.readers += 1
            self._readers += 1
        if evicted is not None:
            evicted.close()
        return opened

    def _leave(self, opened: _Opened, held: int) -> None:
        with self._changing:
            self._held -= held
            opened.readers -= 1
            self._readers -= 1
            if opened.failed and self._open.get(opened.job.id) is opened:
                del self._open[opened.job.id]

    def _computed(self, opened: _Opened, path: str, start: int, end: int, ahead: int) -> Iterator[bytes]:
        made = opened.made(self)
        coming: deque[tuple[Piece, Future[bytes]]] = deque()

        def first() -> Iterator[bytes]:
            piece, future = coming.popleft()
            data = memoryview(future.result())[max(start - piece.begin, 0) : end - piece.begin]
            for at in range(0, len(data), _CHUNK):
                yield bytes(data[at : at + _CHUNK])

        for piece in made.pieces(path, start, end):
            coming.append((piece, self._block(opened, made, piece)))
            if len(coming) > ahead:
                yield from first()
        while coming:
            yield from first()

    def _block(self, opened: _Opened, made: OnDemand, piece: Piece) -> Future[bytes]:
        """A block that is kept, or being computed, or will be."""

        def compute() -> bytes:
            data = b"".join(bytes(data) for _, data in made.make([piece], stop=lambda: opened.is_closed))
            made.check_unchanged()
            return data

        return self._blocks.get((opened.job.id, piece.file, piece.begin), lambda: opened.pool.submit(compute))

    def folder_of(self, job: Job) -> Path:
        """What was prepared of a view, on this machine's disk."""
        from merge_core.on_demand import PREPARED

        folder = self.settings.cache / "views" / job.id
        folder.mkdir(parents=True, exist_ok=True)
        for file in job.files:
            name, target = file["path"], folder / file["path"]
            is_wanted = name == PREPARED or name.startswith("alignment")
            if is_wanted and not (target.is_file() and target.stat().st_size == file["size"]):
                new = target.with_name(f".{threading.get_ident()}-{name}")
                new.write_bytes(b"".join(self.queue.artifacts.read(job.id, name, 0, file["size"])))
                new.rename(target)
        return folder


class _Reading:
    """What a reader gets, which gives the view back at its end, also where it is never begun."""

    def __init__(self, parts: Iterator[bytes], leave: Callable[[], None]) -> None:
        self._parts, self._leave, self._left = parts, leave, threading.Lock()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._parts)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._left.acquire(blocking=False):
            self._leave()

    def __del__(self) -> None:
        self.close()


class _Opened:
    """A view that is open, or about to be: the first reader opens it, others wait for that."""

    def __init__(self, job: Job) -> None:
        self.job, self.readers, self.is_closed, self.failed = job, 0, False, False
        self._opening, self._stack = threading.Lock(), ExitStack()
        self._made: OnDemand | None = None
        self.pool: ThreadPoolExecutor

    def made(self, views: Views) -> OnDemand:
        """The view's merge. Raises `WeightsmithError`."""
        with self._opening:
            if self._made is None:
                try:
                    self._made = self._open(views)
                except BaseException:
                    self.failed = True
                    raise
            return self._made

    def _open(self, views: Views) -> OnDemand:
        import torch

        from merge_core.recipe import Recipe
        from merge_core.views import opened_view

        torch.set_num_threads(1)  # and so it stays, whichever view is closed first
        settings = views.settings
        recipe = Recipe.from_data(self.job.recipe)
        threads = recipe.limits.threads or settings.threads
        hub = JobHub(views.queue.store, self.job.owner, HubOptions.of(self.job.hub), self.job.resolved, self._is_closed)
        how: dict[str, Any] = {"roots": hub.roots, "memory": settings.memory_of_view, "threads": threads}
        try:
            folder = views.folder_of(self.job)
        except (OSError, FileNotFoundError) as error:
            raise StorageFailed(f"what was prepared of view {self.job.id} cannot be read: {error}") from None
        digest = str(self.job.plan.get("digest"))
        made = self._stack.enter_context(opened_view(recipe, folder, digest, stop=self._is_closed, **how))
        self.pool = self._stack.enter_context(ThreadPoolExecutor(made.plan.memory.threads, f"view {self.job.id}"))
        log.info("opened to be read", extra={"job_id": self.job.id})
        return made

    def _is_closed(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True
        with self._opening:
            self._stack.close()


class _Blocks:
    """Blocks by place, in so many bytes; the longest unused go first. One that is being computed is computed once."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._kept: OrderedDict[Any, bytes] = OrderedDict()
        self._making: dict[Any, Future[bytes]] = {}
        self._changing = threading.Lock()

    def get(self, place: Any, make: Callable[[], Future[bytes]]) -> Future[bytes]:
        """The block of a place, from `make` if it is not there."""
        with self._changing:
            if place in self._kept:
                self._kept.move_to_end(place)
                found: Future[bytes] = Future()
                found.set_result(self._kept[place])
                return found
            if place in self._making:
                return self._making[place]
            future = self._making[place] = make()
        future.add_done_callback(lambda done: self._made(place, done))
        return future

    def _made(self, place: Any, future: Future[bytes]) -> None:
        with self._changing:
            self._making.pop(place, None)
            if future.cancelled() or future.exception() is not None or len(future.result()) > self._most:
                return
            self._kept[place] = future.result()
            self._size += len(self._kept[place])
            while self._size > self._most:
                self._size -= len(self._kept.popitem(last=False)[1])
