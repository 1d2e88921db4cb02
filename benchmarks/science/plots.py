"""What seeds gave, drawn: a dot for each and a stroke at their mean; and means as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from app.drawing.charts import Curve, Scale, plot
from app.drawing.colours import of_model
from app.drawing.svg import Drawing, shown, ticks, width_of
from benchmarks.science.harness import Numbers, mean

_ROW, _WIDTH = 22.0, 340.0


def dots(named: Mapping[str, Sequence[float]], label: str, *, across: str) -> Drawing:
    """A row for each name, on a common axis."""
    left = max(map(width_of, named)) + 12
    bottom = 10 + _ROW * len(named)
    drawing = Drawing(left + _WIDTH + 24, bottom + 48, label, is_fluid=True)
    values = [value for group in named.values() for value in group]
    low, high = min(values), max(values)
    wide = 0.04 * (high - low) or 0.01
    scale = Scale(low - wide, high + wide)

    def at(value: float) -> float:
        return left + scale.place(value) * _WIDTH

    for tick in ticks(scale.low, scale.high, 7):
        drawing.line(at(tick), 6, at(tick), bottom)
        drawing.text(at(tick), bottom + 12, shown(tick), anchor="middle", css="soft small")
    drawing.line(left, bottom, left + _WIDTH, bottom, css="axis")
    drawing.text(left + _WIDTH / 2, bottom + 32, across, anchor="middle", css="soft")
    colour, _ = of_model(0)
    for place, (name, group) in enumerate(named.items()):
        y = 10 + _ROW * (place + 0.5)
        drawing.text(left - 8, y, name, anchor="end")
        middle = at(fmean(group))
        drawing.line(middle, y - 8, middle, y + 8, css="asked")
        for seed, value in enumerate(group):
            drawing.dot(at(value), y, colour, f"{name}, seed {seed}: {shown(value)}")
    return drawing


def scores(runs: Sequence[Numbers], names: Mapping[str, str], label: str, *, across: str) -> Drawing:
    """Some numbers of all seeds, each by the name that it is to have in the drawing."""
    return dots({title: [run[name] for run in runs] for name, title in names.items()}, label, across=across)


def curves(
    runs: Sequence[Numbers],
    named: Mapping[str, Mapping[float, str]],
    label: str,
    *,
    across: str,
    up: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Drawing:
    """Means over the seeds: for each curve, where on the axis each number stands."""
    lines = [Curve(title, [(x, mean(runs, name)) for x, name in points.items()]) for title, points in named.items()]
    return plot(lines, label, across=across, up=up, dots=True, log_x=log_x, log_y=log_y)
