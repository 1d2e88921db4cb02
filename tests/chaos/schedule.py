"""What happens when: waves of jobs and faults, all drawn from one seed before anything runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tests.chaos.faults import Fault
from tests.chaos.merges import Case
from tests.chaos.world import World
from workers.jobs import FINISHED
from workers.tables import Job

T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """When a fault happens: before there are jobs, after so many seconds, once a job is so far, has entered so many
    phases, or is in that phase.
    """

    kind: str
    value: float
    after: float = 0.0
    phase: str = ""

    @classmethod
    def draw(cls, rng: random.Random) -> Moment:
        kind = rng.choices(["before", "at", "fraction", "phase"], [10, 20, 40, 30])[0]
        if kind in ("before", "at"):
            return cls(kind, 0, round(rng.uniform(0, 5), 2) if kind == "at" else 0.0)
        if kind == "fraction":
            return cls(kind, round(rng.uniform(0, 1), 2))
        return cls(kind, rng.randint(1, 3), round(rng.uniform(0, 0.4), 2))

    @property
    def is_before(self) -> bool:
        return self.kind == "before"

    def has_come(self, jobs: Sequence[Job], phases: int) -> bool:
        """Whether to begin counting `after`; where no job is left to wait for, it has."""
        if self.kind == "at" or all(job.state in FINISHED for job in jobs):
            return True
        if self.kind == "in":
            return any((job.phase or job.state) == self.phase for job in jobs)
        if self.kind == "phase":
            return phases >= self.value
        return any(float(job.progress.get("fraction") or 0) >= self.value and job.progress for job in jobs)

    def __str__(self) -> str:
        then = {"fraction": f"{self.value:.0%} done", "phase": f"phase {self.value:.0f}", "in": self.phase}.get(
            self.kind, self.kind
        )
        return then + (f" + {self.after:.2f} s" if self.after else "")


@dataclass(frozen=True)
class Planned:
    """A fault and its moment; `seed` decides whom it meets."""

    fault: Fault
    moment: Moment
    seed: int


@dataclass(frozen=True)
class Wave:
    """Jobs that are sent together, and what happens to them."""

    cases: tuple[Case, ...]
    faults: tuple[Planned, ...]

    def __str__(self) -> str:
        faults = "; ".join(f"{planned.moment}: {planned.fault}" for planned in self.faults)
        return f"{' | '.join(case.title for case in self.cases)}  ←  {faults}"


def draw(seed: int, merges: int, cases: Sequence[Case], kinds: Sequence[type[Fault]], world: World) -> list[Wave]:
    """Waves with so many jobs in all. Every case and every fault has its turn before one comes again."""
    rng = random.Random(seed)
    next_case, next_kind = _Deck(cases, rng), _Deck(kinds, rng)
    waves = []
    while merges:
        count = min(merges, rng.choices([1, 2, 3], [60, 30, 10])[0])
        merges -= count
        faults = []
        for _ in range(rng.choices([1, 2, 3], [50, 35, 15])[0]):
            # Drawn in any case, so that the schedules of one seed are alike on every broker and database.
            kind = next_kind.draw()
            planned = Planned(kind.draw(rng), Moment.draw(rng), rng.randrange(2**32))
            faults += [planned] if kind.fits(world) else []
        waves.append(Wave(tuple(next_case.draw() for _ in range(count)), tuple(faults)))
    return waves


class _Deck(Generic[T]):
    """Cards that are shuffled again when all were drawn."""

    def __init__(self, cards: Sequence[T], rng: random.Random) -> None:
        self._cards, self._rng, self._left = cards, rng, iter(())  # type: Sequence[T], random.Random, Iterator[T]

    def draw(self) -> T:
        for card in self._left:
            return card
        self._left = iter(self._rng.sample(self._cards, len(self._cards)))
        return next(self._left)
