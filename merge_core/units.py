"""Units: what one worker takes of a merge, and what those who share a merge have to agree on.

One worker leads: it opens phases, takes units from the front, adds up what was measured and finishes the files. Others
assist: they take units from the back. Units are made from the plan alone, so that they are the same on every worker.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from merge_core.documents import canonical_json
from merge_core.files import write_swiftly
from merge_core.layout import ShardLayout, Slot
from merge_core.plan import Plan, Step
from merge_core.statistics import Statistic, load_statistics, save_statistics

FOLDER = "units"
"""Where in the unfinished output lies what units measured."""
MERGING = "merging"
_MOST_PARTS = 64
"""Units of a phase that measures, each of which leaves a file."""
_READ_PER_WRITTEN = 4
"""Bytes that are read in a unit that measures for those that are written in one that merges."""
_SHARES, _WORTH_IT = 16, 2**26
"""Into how many units an output is cut, if they have so many bytes each."""

Result = Mapping[str, Any]
"""What a unit came to, as plain data."""


@dataclass(frozen=True)
class Unit:
    """Some output tensors that follow one another in a file; `place`: which of the file's units it is."""

    number: int
    shard: ShardLayout
    place: int
    slots: tuple[Slot, ...]

    @property
    def begin(self) -> int:
        return self.slots[0].begin

    @property
    def end(self) -> int:
        return self.slots[-1].begin + self.slots[-1].nbytes


class Share(Protocol):
    """Who does which unit of a merge. Every answer may be an exception of its own, which ends the work.

    `unit_bytes`: about how many bytes of output make a unit; None where nobody else can take one.
    """

    unit_bytes: int | None

    def forget(self) -> None:
        """Nothing that units came to so far is left: the folder is a new one."""

    def open(self, phase: str, count: int) -> None:
        """Let others take units of a phase, those numbered from 0 that are not done yet."""

    def take(self, phase: str) -> int | None:
        """A unit that is this worker's from now on; None: there is none to be had now."""

    def done(self, phase: str, number: int, result: Result) -> None:
        """Record what a unit that was taken came to, which counts for all."""

    def results(self, phase: str) -> Mapping[int, Result]:
        """The units that are done, whoever did them."""

    def again(self, phase: str, number: int) -> None:
        """A unit that counted as done is not, and is to be done by whoever leads."""

    def wait(self) -> bool:
        """Let others get on; False: there will be nothing more to do here."""

    def prove(self) -> None:
        """Raise unless this worker still leads at this moment."""


class Alone:
    """All units are this worker's."""

    unit_bytes: int | None = None

    def __init__(self) -> None:
        self._units: Iterator[int] = iter(())

    def forget(self) -> None:
        """Nothing."""

    def open(self, phase: str, count: int) -> None:
        self._units = iter(range(count))

    def take(self, phase: str) -> int | None:
        return next(self._units, None)

    def done(self, phase: str, number: int, result: Result) -> None:
        """Nothing."""

    def results(self, phase: str) -> Mapping[int, Result]:
        return {}

    def again(self, phase: str, number: int) -> None:
        """Nothing."""

    def wait(self) -> bool:
        return False

    def prove(self) -> None:
        """Nothing."""


def cut_output(shards: Sequence[ShardLayout], unit_bytes: int | None) -> tuple[Unit, ...]:
    """The units of the output, of at most about `unit_bytes`, in file order; None: one for each file."""
    units: list[Unit] = []
    most = None if unit_bytes is None else _fair(sum(slot.nbytes for each in shards for slot in each.slots), unit_bytes)
    for shard in shards:
        runs: list[list[Slot]] = [[]]
        for slot in shard.slots:
            if most is not None and runs[-1] and sum(each.nbytes for each in runs[-1]) >= most:
                runs.append([])
            runs[-1].append(slot)
        for place, run in enumerate(run for run in runs if run):
            units.append(Unit(len(units), shard, place, tuple(run)))
    return tuple(units)


def cut_steps(steps: Sequence[Step], unit_bytes: int | None) -> list[list[Step]]:
    """The units of a pass over some tensors, by the bytes that are read for them; None: all in one."""
    if unit_bytes is None:
        return [list(steps)]
    total = sum(step.stored_bytes for step in steps)
    unit = _READ_PER_WRITTEN * _fair(total // _READ_PER_WRITTEN, unit_bytes)
    most = max(unit, -(-total // _MOST_PARTS))
    runs: list[list[Step]] = [[]]
    filled = 0
    for step in steps:
        if runs[-1] and filled + step.stored_bytes > most:
            runs.append([])
            filled = 0
        runs[-1].append(step)
        filled += step.stored_bytes
    return runs


def _fair(total: int, most: int) -> int:
    """The size of a unit: small enough to be shared out evenly, large enough to be worth its handing over."""
    return min(most, max(total // _SHARES, _WORTH_IT))


def fingerprint(plan: Plan, unit_bytes: int | None, folder: Path, device: str) -> str:
    """The same for workers that may share a merge: the same plan, units and folder.

    Where a method's bytes depend on the machine, it must be the same machine and kind of device too.
    """
    where = [socket.gethostname(), device] if plan.exact_on == "this machine" else []
    text = canonical_json([plan.digest, unit_bytes, folder.name, *where])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measured_file(folder: Path, stage: int, number: int) -> Path:
    """Where a unit's part of a stage's statistics is kept."""
    return folder / FOLDER / f"{stage}-{number}.statistics"


def keep_measured(path: Path, found: Mapping[str, Statistic]) -> str:
    """Keep statistics in a file; the digest that proves it."""
    data = save_statistics(found)
    write_swiftly(path, data)
    return blake3(data).hexdigest()


def kept_measured(path: Path, digest: str) -> dict[str, Statistic] | None:
    """What was kept, unless it is not what was recorded."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return load_statistics(data) if blake3(data).hexdigest() == digest else None
