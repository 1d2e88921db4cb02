"""How far a merge is, as it is told to whoever waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a merge is: `phase`, the tensor at work, bytes read and written of how many, and bytes received over a
    network.
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
    started: float = field(default_factory=time.monotonic)

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
        total = self.bytes_read_total + self.bytes_written_total
        return min(1.0, (self.bytes_read + self.bytes_written) / total) if total else 0.0

    @property
    def rate(self) -> float:
        """Bytes read and written per second."""
        return (self.bytes_read + self.bytes_written) / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        left = self.bytes_read_total + self.bytes_written_total - self.bytes_read - self.bytes_written
        return max(left, 0) / self.rate if self.rate > 0 and self.fraction > 0 else None


Report = Callable[[Progress], None]
