"""Models straight from a Hub: ranges of their files in a window of memory, fetched ahead in the order of the plan.

The window is cut into chunks. What the plan will read next, as far as it fits into the window, is fetched on a few
connections, neighbours together, and stays until it has been read as often as was announced. Whatever else is asked
for comes first. Nothing of the inputs is on any disk. A file that came from front to back is proved by its sha256.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_core.errors import Canceled, WeightsmithError
from merge_core.memory import FLOOR_BYTES
from merge_core.snapshots import OpenFile, Range
from workers.hub.client import HubClient
from workers.hub.errors import HubLied
from workers.hub.ranges import PATIENCE, RangeReader, RemoteFile, never

CONNECTIONS = 4
LEAST_WINDOW, MOST_WINDOW = 16 * 2**20, 512 * 2**20
"""A tensor of all models that does not fit in has to come again for each pass over it."""
_LEAST_CHUNK, _MOST_CHUNK = 2**18, 2**23
_CHUNKS = 32
"""That a window has, if they are not too small or too large then."""
_TOGETHER = 4
"""Chunks that are asked for at once."""
_LOOK = 0.1
"""Seconds after which who waits asks whether to stop."""

Key = tuple[Path, int]
"""A chunk: which file, and the how-manieth of it."""


@dataclass
class _Chunk:
    """A chunk in the window. `size` bytes of its `space` will be there; `users` are copying or hashing it."""

    space: memoryview
    size: int
    is_there: bool = False
    users: int = 0


@dataclass
class _Use:
    """That so many bytes of a chunk will be read for a tensor."""

    tensor: str
    key: Key
    left: int


@dataclass
class _Proof:
    """How far a file was hashed from its beginning."""

    sha256: Any = field(default_factory=hashlib.sha256)
    hashed: int = 0
    is_at_work: bool = False


class Streamed:
    """Supplies ranges (`merge_core.snapshots.Supply`). `files`: what stand-ins stand for."""

    in_files = False

    def __init__(self, client: HubClient, files: Mapping[Path, RemoteFile], *, patience: float = PATIENCE) -> None:
        self._client, self._files, self._patience = client, files, patience
        self._changed = threading.Condition()
        self._stop: Callable[[], bool] = never
        self._reader = RangeReader(client)
        self._threads: list[threading.Thread] = []
        self._ended = True
        self._failed: WeightsmithError | None = None
        self._chunk = _LEAST_CHUNK
        self._free: list[memoryview] = []
        self._there: dict[Key, _Chunk] = {}  # the longest unused first
        self._urgent: Counter[Key] = Counter()
        self._announced: Iterator[_Use] = iter(())
        self._uses: deque[_Use] = deque()
        self._latest, self._repeated = "", set[str]()
        self._kept: dict[Key, str] = {}
        """Chunks that were read as often as was announced, of tensors that may take another pass nevertheless."""
        self._proofs: dict[Path, _Proof] = {}

    def window(self, limit: int) -> int:
        return max(LEAST_WINDOW, min(MOST_WINDOW, (limit - FLOOR_BYTES) // 2))

    def begin(self, window: int, *, stop: Callable[[], bool], received: Callable[[int], None]) -> None:
        self._chunk = max(_LEAST_CHUNK, min(_MOST_CHUNK, 1 << (window // _CHUNKS).bit_length() - 1))
        self._stop, self._ended, self._failed = stop, False, None
        whole = memoryview(mmap.mmap(-1, window // self._chunk * self._chunk))
        self._free = [whole[at : at + self._chunk] for at in range(0, len(whole), self._chunk)]
        self._there, self._uses, self._announced, self._kept = {}, deque(), iter(()), {}
        self._reader = RangeReader(self._client, received=received, patience=self._patience)
        self._threads = [threading.Thread(target=self._fetch, name=f"hub-{i}", daemon=True) for i in range(CONNECTIONS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._reader.end()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        # Who is waiting for a server that says nothing ends when that connection does.
        for thread in self._threads:
            thread.join(_LOOK)
        self._there, self._free = {}, []

    def open(self, file: Path) -> OpenFile:
        raise NotImplementedError("what is streamed is never a file")

    def expect(self, reads: Iterable[tuple[str, Sequence[Range]]]) -> None:
        with self._changed:
            self._uses.clear()
            self._kept.clear()
            self._announced = (use for tensor, ranges in reads for use in self._cut(tensor, ranges))
            self._changed.notify_all()

    def done(self, tensor: str) -> None:
        with self._changed:
            self._uses = deque(use for use in self._uses if use.tensor != tensor)
            self._kept = {key: each for key, each in self._kept.items() if each != tensor}
            self._repeated.discard(tensor)
            self._changed.notify_all()

    def read(self, file: Path, offset: int, space: memoryview) -> None:
        done = 0
        while done < len(space):
            number, inside = divmod(offset + done, self._chunk)
            size = min(self._chunk - inside, len(space) - done)
            key = (file, number)
            chunk = self._taken(key)
            try:
                space[done : done + size] = chunk.space[inside : inside + size]
            finally:
                self._put_back(key, chunk, size)
            done += size

    def sha256(self, file: Path) -> tuple[str, bool]:
        self._raise_failure()
        remote, proof = self._files[file], self._proofs.get(file)
        return remote.sha256 or "", proof is not None and proof.hashed == remote.size

    # Whoever reads.

    def _taken(self, key: Key) -> _Chunk:
        """A chunk that stays until it is put back; waits for it."""
        with self._changed:
            if (chunk := self._there.get(key)) is None or not chunk.is_there:
                self._urgent[key] += 1
                try:
                    self._changed.notify_all()
                    while (chunk := self._there.get(key)) is None or not chunk.is_there:
                        self._raise_failure()
                        if self._ended or self._stop():
                            raise Canceled("the merge was canceled")
                        self._changed.wait(_LOOK)
                finally:
                    self._urgent[key] -= 1
                    if not self._urgent[key]:
                        del self._urgent[key]
            chunk.users += 1
            self._there[key] = self._there.pop(key)
            return chunk

    def _put_back(self, key: Key, chunk: _Chunk, size: int) -> None:
        with self._changed:
            chunk.users -= 1
            for use in self._uses:
                if use.key == key:
                    use.left -= size
                    if use.left <= 0:
                        self._uses.remove(use)
                        if use.tensor in self._repeated:
                            self._kept[key] = use.tensor
                    break
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise self._failed

    # What comes next.

    def _cut(self, tensor: str, ranges: Sequence[Range]) -> Iterator[_Use]:
        """The chunks of a tensor's ranges, all models' side by side, as blocks are read."""
        if tensor == self._latest:
            self._repeated.add(tensor)
        self._latest = tensor
        uses: list[tuple[float, _Use]] = []
        for file, begin, end in ranges:
            first, last = begin // self._chunk, -(-end // self._chunk)
            for number in range(first, last):
                left = min(end, (number + 1) * self._chunk) - max(begin, number * self._chunk)
                uses.append(((number - first) / (last - first), _Use(tensor, (file, number), left)))
        yield from (use for _, use in sorted(uses, key=lambda each: each[0]))

    def _look_ahead(self) -> dict[Key, None]:
        """The chunks that are read next, in order, as many as the window holds besides some that are kept."""
        slots = len(self._free) + len(self._there)
        slots -= min(slots // 2, sum(key in self._there for key in self._kept))
        ahead = dict.fromkeys(use.key for use in self._uses)
        while len(ahead) < slots and (use := next(self._announced, None)) is not None:
            self._uses.append(use)
            ahead[use.key] = None
        return ahead

    # Whoever fetches.

    def _fetch(self) -> None:
        while True:
            with self._changed:
                run = None
                while not self._is_over and (run := self._next_run()) is None:
                    self._changed.wait(_LOOK)
                if run is None or self._is_over:
                    return
                chunks = [self._there[key] for key in run]
            try:
                self._fill(run, chunks)
            except WeightsmithError as error:
                with self._changed:
                    self._failed = self._failed or error
                    self._changed.notify_all()
                return
            except Exception as error:
                with self._changed:
                    self._failed = self._failed or self._client.unavailable(str(run[0][0].name), type(error).__name__)
                    self._changed.notify_all()
                raise

    @property
    def _is_over(self) -> bool:
        return self._ended or self._failed is not None

    def _next_run(self) -> list[Key] | None:
        """Chunks to fetch that lie behind one another, each given a place in the window; None: nothing to do now."""
        ahead = self._look_ahead()
        for key in (*self._urgent, *ahead):
            if key in self._there:
                continue
            if not self._place(key, ahead, is_urgent=key in self._urgent):
                return None
            run = [key]
            while len(run) < _TOGETHER and (following := (key[0], key[1] + len(run))) not in self._there:
                if following not in ahead or not self._place(following, ahead, is_urgent=False):
                    break
                run.append(following)
            return run
        return None

    def _place(self, key: Key, ahead: Mapping[Key, None], *, is_urgent: bool) -> bool:
        """Make a place for a chunk; what nobody expects goes for it, or for an urgent one what is expected last. Half
        of the window may be kept for further passes.
        """
        if not self._free:
            idle = [each for each, chunk in self._there.items() if chunk.is_there and not chunk.users]
            idle = [each for each in idle if each not in self._urgent]
            unexpected = next((each for each in idle if each not in ahead and each not in self._kept), None)
            if unexpected is None and (is_urgent or 2 * len(self._kept) > len(self._there)):
                unexpected = next((each for each in idle if each not in ahead), None)
            if unexpected is None and is_urgent:
                order = {each: place for place, each in enumerate(ahead)}
                unexpected = max(idle, key=lambda each: order.get(each, -1), default=None)
            if unexpected is None:
                return False
            self._free.append(self._there.pop(unexpected).space)
            self._kept.pop(unexpected, None)
        remote = self._files[key[0]]
        self._there[key] = _Chunk(self._free.pop(), min(self._chunk, remote.size - key[1] * self._chunk))
        return True

    def _fill(self, run: Sequence[Key], chunks: Sequence[_Chunk]) -> None:
        """Fetch chunks of a file that lie behind one another."""
        (file, first), remote = run[0], self._files[run[0][0]]

        def filled(count: int) -> None:
            with self._changed:
                chunks[count - 1].is_there = True
                self._changed.notify_all()

        self._reader.read(remote, first * self._chunk, [chunk.space[: chunk.size] for chunk in chunks], filled)
        self._prove(file, remote)

    # Proof.

    def _prove(self, file: Path, remote: RemoteFile) -> None:
        """Hash what follows on what was hashed of a file, as far as it is there."""
        while True:
            with self._changed:
                proof = self._proofs.setdefault(file, _Proof())
                key = (file, proof.hashed // self._chunk)
                chunk = self._there.get(key)
                if proof.is_at_work or proof.hashed == remote.size or chunk is None or not chunk.is_there:
                    return
                proof.is_at_work, chunk.users = True, chunk.users + 1
            try:
                proof.sha256.update(chunk.space[: chunk.size])
                proof.hashed += chunk.size
            finally:
                with self._changed:
                    proof.is_at_work, chunk.users = False, chunk.users - 1
                    self._changed.notify_all()
            if proof.hashed == remote.size and proof.sha256.hexdigest() != remote.sha256:
                raise HubLied(remote.name, "came with other bytes than the Hub's own sha256 of it says")
