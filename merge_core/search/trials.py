"""Trials: what was tried, what it came to, and who says so."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from merge_core.coefficients.pareto import front
from merge_core.coefficients.strategies import Direction, Scored, Values
from merge_core.errors import EvaluationFailed
from merge_core.journal import Journal
from merge_core.recipe import Recipe
from merge_core.search.keys import finite

State = Literal["done", "pruned", "refused"]
_SHOWN = 200
_MOST_METRICS = 64


@dataclass(frozen=True)
class Outcome:
    """What a trial came to: `metrics` of one that is done, and what was told on the way, by the number of the step.

    One that was `pruned` was worse than others on the way; one that was `refused` has no recipe that can be planned,
    `detail` says why.
    """

    state: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[int, float] = field(default_factory=dict)
    detail: str | None = None

    def to_data(self) -> dict[str, Any]:
        steps = {str(step): value for step, value in self.steps.items()}
        return {"state": self.state, "metrics": dict(self.metrics), "steps": steps, "detail": self.detail}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """What `to_data` gave."""
        steps = {int(step): value for step, value in data["steps"].items()}
        return cls(data["state"], data["metrics"], steps, data["detail"])


@dataclass(frozen=True)
class Trial:
    """One set of values. Trials with the same `digest` come to the same: recipe, sources, version and evaluator."""

    number: int
    values: Values
    digest: str

    @property
    def told(self) -> str:
        values = ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.values.items())
        return f"trial {self.number} ({values})"

    def to_data(self) -> dict[str, Any]:
        return {"number": self.number, "values": dict(self.values), "digest": self.digest}


class Pruned(Exception):
    """A trial is not worth going on with."""


@dataclass
class Candidate:
    """A trial to be scored: its recipe, and where it was merged, for evaluators that read a folder.

    `tell` is for those that can score in steps: the first metric, `metric`, as far as it is known after some of the
    data, always the same steps for every candidate. It raises `Pruned` where that is worse than the bar. `stop` is
    asked now and then; a true answer, or whatever it raises, ends the work.
    """

    trial: Trial
    recipe: Recipe
    plan: str
    folder: Path | None
    stop: Callable[[], bool]
    bars: Mapping[int, float]
    metric: str
    direction: Direction
    steps: dict[int, float] = field(default_factory=dict)

    def tell(self, step: int, value: float) -> None:
        self.steps[step] = value
        bar = self.bars.get(step)
        if bar is not None and (value < bar if self.direction == "maximize" else value > bar):
            raise Pruned


class Evaluator(Protocol):
    """Scores candidates. What equal `digest`s say of a candidate is the same."""

    @property
    def digest(self) -> str:
        """What it measures, by what data and settings."""

    @property
    def needs_folder(self) -> bool:
        """Whether the candidate has to be merged into a folder first."""

    def evaluate(self, candidate: Candidate) -> Mapping[str, Any]:
        """The metrics. Raises `EvaluationFailed`, `Pruned`, and `Canceled` where `candidate.stop` says so."""


class Kept(Protocol):
    """Remembers trials."""

    def find(self, digests: Sequence[str]) -> Mapping[str, Outcome]:
        """What is known of these."""

    def begin(self, trials: Sequence[Trial]) -> None:
        """These are tried now, or known."""

    def keep(self, trial: Trial, outcome: Outcome, seconds: float) -> None:
        """From when this returns, the trial is never made again."""


class KeptInJournal:
    """Trials in the journal of an unfinished output."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def find(self, digests: Sequence[str]) -> Mapping[str, Outcome]:
        found = {digest: self._journal.notes.get(f"trial {digest}") for digest in digests}
        return {digest: Outcome.of(data) for digest, data in found.items() if data is not None}

    def begin(self, trials: Sequence[Trial]) -> None:
        """Nothing."""

    def keep(self, trial: Trial, outcome: Outcome, seconds: float) -> None:
        self._journal.note(f"trial {trial.digest}", outcome.to_data())


def checked(answer: object, wanted: Mapping[str, Direction], trial: Trial) -> dict[str, float]:
    """An evaluator's answer as metrics, the wanted ones first. Raises `EvaluationFailed` for anything else."""

    def failed(why: str) -> EvaluationFailed:
        said = json.dumps(answer, ensure_ascii=False, default=repr)
        return EvaluationFailed(f"{trial.told}: {why}; the evaluator answered {said[:_SHOWN]}")

    if not isinstance(answer, Mapping):
        raise failed("metrics are a mapping of names to numbers")
    for name in wanted:
        if name not in answer:
            raise failed(f"there is no {name!r} among the metrics")
        if not finite(answer[name]):
            raise failed(f"{name!r} is not a finite number")
    others = [name for name in answer if isinstance(name, str) and name not in wanted and finite(answer[name])]
    return {name: float(answer[name]) for name in [*wanted, *others[:_MOST_METRICS]]}


def scored(outcome: Outcome, wanted: Mapping[str, Direction]) -> Scored:
    """As strategies take it."""
    if outcome.state != "done":
        return Scored(None)
    return Scored(tuple(outcome.metrics[name] for name in wanted))


def bars_of(outcomes: Sequence[Outcome], direction: Direction) -> dict[int, float]:
    """What a trial has to reach at each step: the median of what those that are done had reached there (the median
    stopping rule of Golovin et al., 2017, Vizier), once there are four.
    """
    done = [outcome.steps for outcome in outcomes if outcome.state == "done"]
    middle = statistics.median_low if direction == "maximize" else statistics.median_high
    steps = sorted({step for each in done for step in each})
    reached = {step: [each[step] for each in done if step in each] for step in steps}
    return {step: middle(values) for step, values in reached.items() if len(values) >= 4}


@dataclass(frozen=True)
class Found:
    """What a search came to: all its trials, those that no other beats, and the best of them by the first metric."""

    trials: Sequence[tuple[Trial, Outcome]]
    front: Sequence[int]
    best: int

    @classmethod
    def of(cls, trials: Sequence[tuple[Trial, Outcome]], wanted: Mapping[str, Direction]) -> Self | None:
        """None: no trial is done. Of equals the first is the best."""
        done = [(trial, outcome) for trial, outcome in trials if outcome.state == "done"]
        if not done:
            return None
        signs = [1.0 if direction == "maximize" else -1.0 for direction in wanted.values()]
        rows = [[sign * outcome.metrics[name] for sign, name in zip(signs, wanted, strict=True)] for _, outcome in done]
        kept = front(rows)
        best = max(kept, key=lambda place: (rows[place], -place))
        return cls(trials, [done[place][0].number for place in kept], done[best][0].number)
