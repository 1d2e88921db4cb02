"""What the trials of a search look like: the best score so far, and the front of several metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from app.drawing import charts
from app.drawing.charts import Series
from app.drawing.svg import Drawing, clipped, shown
from merge_core.coefficients.pareto import front
from merge_core.coefficients.strategies import MODELS, Direction

_MOST_DOTS = 800
_MOST_WORDS = 120
_FAR, _TINY = 30.0, 1e-30
"""Scores whose ratio is larger than this are drawn on a logarithmic axis, unless they are beyond all measure."""


@dataclass(frozen=True)
class Tried:
    """A trial: `values` and `metrics` by their names; `metrics` only of one that is done."""

    number: int
    state: str
    values: Mapping[str, Any]
    metrics: Mapping[str, float]
    seconds: float | None = None
    detail: str | None = None


class Trials:
    """The trials of a search, in order, as far as it is. `wanted`: the metrics that count and their directions;
    `models`: what a soup's numbers stand for.
    """

    def __init__(self, trials: Sequence[Tried], wanted: Mapping[str, Direction], models: Sequence[str] = ()) -> None:
        self.all, self.wanted, self.models = trials, wanted, models
        self.done = [each for each in trials if each.state == "done" and all(name in each.metrics for name in wanted)]

    @cached_property
    def front(self) -> list[Tried]:
        """Those that no other beats in all metrics."""
        return [self.done[place] for place in front([self._ranked(each) for each in self.done])] if self.wanted else []

    @property
    def best(self) -> Tried | None:
        """Of the front the best by the first metric; of equals the first."""
        return max(self.front, key=lambda each: (self._ranked(each), -each.number), default=None)

    @property
    def by_score(self) -> list[Tried]:
        """The best first; then those that have no score."""
        ranked = sorted(self.done, key=lambda each: (self._ranked(each), -each.number), reverse=True)
        numbers = {each.number for each in ranked}
        return ranked + [each for each in self.all if each.number not in numbers]

    def count(self, state: str) -> int:
        return sum(each.state == state for each in self.all)

    def words(self, values: Mapping[str, Any]) -> str:
        """Values as people read them."""
        told = ", ".join(f"{name} = {self.word(name, value)}" for name, value in values.items())
        return clipped(told, _MOST_WORDS)

    def word(self, name: str, value: Any) -> str:
        """One of the values: a number, a choice, or the models of a soup."""
        if name == MODELS and isinstance(value, list):
            return " + ".join(self.models[each] if each < len(self.models) else str(each) for each in value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return shown(value) if is_number else value if isinstance(value, str) else json.dumps(value)

    def drawings(self) -> Iterator[tuple[str, str, Drawing]]:
        """Each with its name and heading: a curve for each metric, then the front of the first and each other."""
        if not self.done:
            return
        names = list(self.wanted)
        for place, name in enumerate(names):
            yield f"curve-{place}", f"{name}, trial by trial", self.curve(name)
        for place, name in enumerate(names[1:], 1):
            yield f"front-{place}", f"{names[0]} against {name}", self.scatter(names[0], name)

    def curve(self, metric: str) -> Drawing:
        """The best of a metric after each trial, and what each trial came to."""
        better: Callable[[float, float], float] = max if self.wanted[metric] == "maximize" else min
        so_far: list[tuple[float, float]] = []
        for each in self.done:
            value = each.metrics[metric]
            so_far.append((each.number, better(value, so_far[-1][1]) if so_far else value))
        series = [self._dots("a trial", _thinned(self.done), lambda each: (each.number, each.metrics[metric]))]
        series.append(Series("the best so far", so_far, line="steps"))
        label = f"The best {metric} so far, over {len(self.done)} trials: from {shown(so_far[0][1])} to"
        label += f" {shown(so_far[-1][1])}"
        up = f"{clipped(metric, 24)} ({'more' if better is max else 'less'} is better)"
        return charts.chart(series, label, across="trial", up=up, log_y=self._is_wide(metric), whole_x=True)

    def scatter(self, one: str, other: str) -> Drawing:
        """Two metrics of each trial; those that no other beats are joined."""

        def at(each: Tried) -> tuple[float, float]:
            return each.metrics[one], each.metrics[other]

        kept = {each.number for each in self.front}
        rest = [each for each in self.done if each.number not in kept]
        ahead = sorted(self.front, key=at)
        line = "straight" if len(self.wanted) == 2 else ""
        series = [
            self._dots("a trial", _thinned(rest), at),
            self._dots("no other trial beats it", ahead, at, line=line),
        ]
        label = f"{one} against {other} of {len(self.done)} trials, {len(ahead)} of which no other beats"
        return charts.chart(
            series,
            label,
            across=self._axis(one),
            up=self._axis(other),
            log_x=self._is_wide(one),
            log_y=self._is_wide(other),
        )

    def _axis(self, metric: str) -> str:
        return f"{clipped(metric, 24)} ({'more' if self.wanted[metric] == 'maximize' else 'less'} is better)"

    def _dots(
        self, name: str, trials: Sequence[Tried], at: Callable[[Tried], tuple[float, float]], line: Any = ""
    ) -> Series:
        return Series(name, [at(each) for each in trials], [self._title(each) for each in trials], line)

    def _title(self, each: Tried) -> str:
        scores = ", ".join(f"{name} {shown(each.metrics[name])}" for name in self.wanted)
        return f"trial {each.number}: {scores}; {self.words(each.values)}"

    def _ranked(self, each: Tried) -> tuple[float, ...]:
        return tuple(
            each.metrics[name] if direction == "maximize" else -each.metrics[name]
            for name, direction in self.wanted.items()
        )

    def _is_wide(self, metric: str) -> bool:
        values = [each.metrics[metric] for each in self.done]
        return min(values) > _TINY and _FAR < max(values) / min(values) < 1 / _TINY


def _thinned(trials: Sequence[Tried]) -> Sequence[Tried]:
    """Of very many an even selection: a drawing shows no more."""
    step = -(-len(trials) // _MOST_DOTS)
    return trials[::step] if step > 1 else trials
