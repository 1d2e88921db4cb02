"""How far a merge is, as it is told to whoever waits."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


class Finished:
    """Which places of an order are finished, as runs of them: however many places, the runs are few, because each
    worker goes on where it is. Any thread may add and read.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []
        self._changing = threading.Lock()

    def add(self, begin: int, end: int) -> None:
        """The places from `begin` to before `end` are finished; they may have been before."""
        if begin >= end:
            return
        with self._changing:
            first = bisect_left(self._runs, begin, key=lambda run: run[1])
            last = first
            while last < len(self._runs) and self._runs[last][0] <= end:
                begin, end = min(begin, self._runs[last][0]), max(end, self._runs[last][1])
                last += 1
            self._runs[first:last] = [(begin, end)]

    def runs(self) -> list[tuple[int, int]]:
        """The first place of each run, and the one after its last, in order; between two runs something is missing."""
        with self._changing:
            return list(self._runs)


@dataclass
class Progress:
    """How far a merge is: `phase`, the tensor at work, bytes read and written of how many, and bytes received over a
    network. Of a search: how many trials of how many; of a phase that is taken in steps: how many of these.

    `order`: the names of the output's tensors as they stand in its files, where that is known; `finished`: which of
    these are whole.
    """

    phase: str = "planning"
    tensor: str = ""
    tensors_done: int = 0
    tensors_total: int = 0
    bytes_read: int = 0
    bytes_read_total: int = 0
    bytes_written: int = 0
    bytes_written_total: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    trials_done: int = 0
    trials_total: int = 0
    steps_done: int = 0
    steps_total: int = 0
    started: float = field(default_factory=time.monotonic)
    order: Sequence[str] = ()
    finished: Finished = field(default_factory=Finished)

    def __post_init__(self) -> None:
        self._receiving = threading.Lock()

    def receive(self, count: int) -> None:
        """So many bytes came over the network, to whichever thread."""
        with self._receiving:
            self.bytes_received += count

    def complete(self) -> None:
        """All is done, also what an earlier attempt had done already and what proved needless to read."""
        self.tensors_done = self.tensors_total
        self.bytes_read_total, self.bytes_written_total = self.bytes_read, self.bytes_written

    @property
    def fraction(self) -> float:
        if self.trials_total:
            return min(1.0, self.trials_done / self.trials_total)
        if self.steps_total:
            return min(1.0, self.steps_done / self.steps_total)
        total = self.bytes_read_total + self.bytes_written_total
        return min(1.0, (self.bytes_read + self.bytes_written) / total) if total else 0.0

    @property
    def rate(self) -> float:
        """Bytes read and written per second."""
        return (self.bytes_read + self.bytes_written) / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        if self.trials_total or self.steps_total:
            done, total = (
                (self.trials_done, self.trials_total) if self.trials_total else (self.steps_done, self.steps_total)
            )
            passed, left = time.monotonic() - self.started, total - done
            return passed / done * max(left, 0) if done else None
        left = self.bytes_read_total + self.bytes_written_total - self.bytes_read - self.bytes_written
        return max(left, 0) / self.rate if self.rate > 0 and self.fraction > 0 else None


Report = Callable[[Progress], None]
