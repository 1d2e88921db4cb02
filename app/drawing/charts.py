"""The kinds of drawings: heat maps, matrices, histograms, curves, dots, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from app.drawing.colours import diverging, ink_on, of_model, sequential
from app.drawing.svg import Drawing, clipped, log_ticks, shown, ticks, width_of

_CELL = 22.0
_LABEL = 40
"""Characters of a label at most."""
_WIDTH, _HEIGHT, _LEFT, _TOP = 340.0, 190.0, 60.0, 12.0
"""Of what is between the axes of a plot, and what is left and above of it."""
_LARGEST = 1e300
"""What is larger is drawn here: differences of larger numbers are no numbers."""


@dataclass(frozen=True)
class Scale:
    """How numbers become colours, from `low` to `high`, in equal steps or in equal ratios."""

    low: float
    high: float
    kind: Literal["linear", "log", "diverging"] = "linear"

    def colour(self, value: float) -> str:
        return self.shade(self.place(value))

    def shade(self, share: float) -> str:
        """The colour of a place on the scale, 0 to 1."""
        return diverging(2 * share - 1) if self.kind == "diverging" else sequential(share)

    def place(self, value: float) -> float:
        """Where a number is on the scale, 0 to 1."""
        low, high = self.low, self.high
        if self.kind == "log":
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.kind == "log" else ticks(self.low, self.high)

    @classmethod
    def over(cls, values: Sequence[float], kind: Literal["linear", "log"] = "linear") -> Scale:
        """From the least to the largest; a logarithmic one leaves zeros below its end."""
        counted = [value for value in values if value > 0] if kind == "log" else list(values)
        if not counted:
            return cls(0, 1)
        low, high = min(counted), max(counted)
        if kind == "log":
            return cls(low, high if high > low * 1.01 else low * 1.01, kind)
        return cls(low, high if high > low else low + 1e-9, kind)


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells by column number: `cells[row][column]` is a number, None or not there; the rows of `single` have
    one cell that stands in no column.
    """

    cells: Mapping[str, Mapping[int, float | None]]
    single: Mapping[str, float | None]
    scale: Scale
    quantity: str
    columns: str = "layer"

    @property
    def numbers(self) -> list[int]:
        return sorted({number for row in self.cells.values() for number in row})


def heat_map(map_: HeatMap, label: str) -> Drawing:
    """Modules down, layers across; below them what is in no layer."""
    numbers = map_.numbers
    names = [clipped(name, _LABEL) for name in (*map_.cells, *map_.single)]
    left = max(map(width_of, names), default=0) + 12
    cell = _CELL if len(numbers) <= 40 else max(10.0, 880 / len(numbers))
    span = max(len(numbers) * cell, 300.0)
    top = 8.0
    heights = _CELL * len(map_.cells) + (34 if numbers else 0)
    apart = _CELL * len(map_.single) + (24 if map_.single and numbers else 0)
    drawing = Drawing(left + span + 10, top + heights + apart + 58, label)
    y = top
    for name, row in map_.cells.items():
        drawing.text(left - 8, y + _CELL / 2, clipped(name, _LABEL), anchor="end")
        for place, number in enumerate(numbers):
            if number in row:
                _cell(drawing, map_, left + place * cell, y, cell, row[number], f"{name}, {map_.columns} {number}")
        y += _CELL
    if numbers:
        every = max(1, math.ceil(max(24, width_of(str(numbers[-1])) + 8) / cell))
        for place in range(0, len(numbers), every):
            drawing.text(left + (place + 0.5) * cell, y + 10, str(numbers[place]), anchor="middle", css="soft small")
        drawing.text(left - 8, y + 10, map_.columns, anchor="end", css="soft small")
        y += 34
    if map_.single and numbers:
        drawing.text(left - 8, y + 2, "outside the layers", anchor="end", css="soft small")
        y += 16
    for name, value in map_.single.items():
        drawing.text(left - 8, y + _CELL / 2, clipped(name, _LABEL), anchor="end")
        _cell(drawing, map_, left, y, _CELL, value, name)
        drawing.text(left + _CELL + 8, y + _CELL / 2, shown(value), css="soft small")
        y += _CELL
    _legend(drawing, map_.scale, map_.quantity, left, drawing.height - 40, min(span, 360.0))
    return drawing


def _cell(drawing: Drawing, map_: HeatMap, x: float, y: float, width: float, value: float | None, name: str) -> None:
    title = f"{name}: {shown(value)}"
    if value is None:
        drawing.rect(x + 0.5, y + 0.5, width - 1, _CELL - 1, css="empty", title=title)
    else:
        drawing.rect(x + 0.5, y + 0.5, width - 1, _CELL - 1, map_.scale.colour(value), title=title)


def _legend(drawing: Drawing, scale: Scale, quantity: str, x: float, y: float, width: float) -> None:
    steps = 64
    for step in range(steps):
        drawing.rect(x + step * width / steps, y, width / steps + 0.4, 10, scale.shade((step + 0.5) / steps))
    last = -math.inf
    for tick in scale.ticks():
        place = x + scale.place(tick) * width
        if place - last > 34:
            drawing.line(place, y + 10, place, y + 14, css="axis")
            drawing.text(place, y + 22, shown(tick), anchor="middle", css="soft small")
            last = place
    drawing.text(x - 8, y + 5, quantity, anchor="end", css="soft small")


def matrix(names: Sequence[str], table: Sequence[Sequence[float | None]], scale: Scale, label: str) -> Drawing:
    """A square table of pairs, with its numbers."""
    size = 52.0
    left = max(width_of(f"{i + 1} {clipped(name, 28)}") for i, name in enumerate(names)) + 12
    drawing = Drawing(left + size * len(names) + 8, 26 + size * len(names) + 6, label)
    for j in range(len(names)):
        drawing.text(left + (j + 0.5) * size, 10, str(j + 1), anchor="middle", css="soft small")
    for i, name in enumerate(names):
        y = 22 + i * size
        drawing.text(left - 8, y + size / 2, f"{clipped(name, 28)} {i + 1}", anchor="end")
        for j, other in enumerate(names):
            value = table[i][j]
            title = f"{name} and {other}: {shown(value)}"
            if value is None:
                drawing.rect(left + j * size + 1, y + 1, size - 2, size - 2, css="empty", title=title)
                continue
            colour = scale.colour(value)
            drawing.rect(left + j * size + 1, y + 1, size - 2, size - 2, colour, title=title)
            drawing.text(
                left + (j + 0.5) * size, y + size / 2, _short(value), anchor="middle", css="small", fill=ink_on(colour)
            )
    return drawing


def _short(value: float) -> str:
    return "0" if abs(value) < 0.005 else f"{value:.2f}"


@dataclass(frozen=True)
class Curve:
    """One line of a plot: its points, and where it has a mark across, such as a threshold."""

    name: str
    points: Sequence[tuple[float, float]]
    mark: float | None = None


def plot(
    curves: Sequence[Curve],
    label: str,
    *,
    across: str,
    up: str,
    log_x: bool = False,
    log_y: bool = False,
    dots: bool = False,
    mark: str = "",
    from_zero: bool = False,
) -> Drawing:
    """Lines over common axes, a legend below; `mark` says what marks mean."""
    drawing = _plot_of(len(curves), label)
    points = [(x, y) for curve in curves for x, y in curve.points if y > 0 or not log_y]
    if not points:
        drawing.text(_LEFT, _TOP + 20, "nothing differs", css="soft")
        return drawing
    marks = [curve.mark for curve in curves if curve.mark]
    horizontal = _axis([x for x, _ in points] + marks, is_log=log_x)
    vertical = _axis([y for _, y in points] + ([0.0] if from_zero else []), is_log=log_y)
    at = _axes(drawing, horizontal, vertical, across, up)
    for number, curve in enumerate(curves):
        colour, dashes = of_model(number)
        if curve.mark:
            x, _ = at(curve.mark, vertical.low)
            drawing.line(x, _TOP, x, _TOP + _HEIGHT, colour=colour, dashes="4 3")
        found = [at(x, y) for x, y in curve.points if y > 0 or not log_y]
        if found:
            drawing.curve(found, colour, dashes=dashes, title=curve.name)
        if dots:
            for (x, y), (first, second) in zip(found, curve.points, strict=False):
                drawing.dot(x, y, colour, f"{curve.name}: {shown(first)} → {shown(second)}")
        y = _legend_line(number)
        drawing.swatch(_LEFT, y, colour, dashes)
        beside = f", {mark} {shown(curve.mark)}" if mark and curve.mark else ""
        drawing.text(_LEFT + 26, y, clipped(curve.name, _LABEL) + beside)
    return drawing


@dataclass(frozen=True)
class Series:
    """What belongs together in a chart: `points`, each a dot with its title where there are `titles`; a `line` through
    them, straight or in steps, where one is wanted.
    """

    name: str
    points: Sequence[tuple[float, float]]
    titles: Sequence[str] = ()
    line: Literal["", "straight", "steps"] = ""


@dataclass(frozen=True)
class Level:
    """A line across a whole chart, at what something else comes to."""

    name: str
    value: float


def chart(
    series: Sequence[Series],
    label: str,
    *,
    across: str,
    up: str,
    levels: Sequence[Level] = (),
    log_x: bool = False,
    log_y: bool = False,
    whole_x: bool = False,
) -> Drawing:
    """Dots and lines over common axes, a legend below; what comes first is drawn first, below the rest.

    `whole_x`: only whole numbers have a meaning across.
    """
    drawing = _plot_of(len(series) + len(levels), label)
    points = [point for each in series for point in each.points]
    horizontal = _roomy([x for x, _ in points], is_log=log_x)
    vertical = _roomy([y for _, y in points] + [level.value for level in levels], is_log=log_y)
    at = _axes(drawing, horizontal, vertical, across, up, whole_x=whole_x)
    for number, each in enumerate(series):
        colour, dashes = of_model(number)
        found = [at(x, y) for x, y in each.points]
        if each.line and found:
            drawing.curve(_in_steps(found) if each.line == "steps" else found, colour, dashes=dashes, title=each.name)
        for (x, y), title in zip(found, each.titles, strict=False):
            drawing.dot(x, y, colour, title)
        y = _legend_line(number)
        if each.line:
            drawing.swatch(_LEFT, y, colour, dashes)
        if each.titles or not each.line:
            drawing.dot(_LEFT + 9, y, colour, "")
        drawing.text(_LEFT + 26, y, clipped(each.name, _LABEL))
    for number, level in enumerate(levels, len(series)):
        colour, _ = of_model(number)
        _, height = at(horizontal.low, level.value)
        drawing.curve([(_LEFT, height), (_LEFT + _WIDTH, height)], colour, dashes="6 4", title=level.name)
        y = _legend_line(number)
        drawing.curve([(_LEFT, y), (_LEFT + 18, y)], colour, dashes="6 4")
        drawing.text(_LEFT + 26, y, f"{clipped(level.name, _LABEL)}: {shown(level.value)}")
    return drawing


def _in_steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners, so that each height lasts until the next point."""
    found = list(points[:1])
    for (_, before), (x, y) in pairwise(points):
        found += [(x, before), (x, y)]
    return found


def _plot_of(lines: int, label: str) -> Drawing:
    """Room for axes, and below them for a legend of so many lines."""
    return Drawing(_LEFT + _WIDTH + 16, _TOP + _HEIGHT + 52 + 22 * lines, label, is_fluid=True)


def _legend_line(number: int) -> float:
    """The middle of a line of a plot's legend."""
    return _TOP + _HEIGHT + 58 + 22 * number


def _axes(
    drawing: Drawing, horizontal: Scale, vertical: Scale, across: str, up: str, *, whole_x: bool = False
) -> Callable[[float, float], tuple[float, float]]:
    """Both axes with their names and numbers; where on the drawing a point is."""

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + horizontal.place(x) * _WIDTH, _TOP + (1 - vertical.place(y)) * _HEIGHT

    bottom = _TOP + _HEIGHT
    for tick in vertical.ticks():
        _, y = at(horizontal.low, tick)
        drawing.line(_LEFT, y, _LEFT + _WIDTH, y)
        drawing.text(_LEFT - 6, y, shown(tick), anchor="end", css="soft small")
    last = -math.inf
    for tick in horizontal.ticks():
        x, _ = at(tick, vertical.low)
        if x - last > 44 and (tick == int(tick) or not whole_x):
            drawing.line(x, bottom, x, bottom + 4, css="axis")
            drawing.text(x, bottom + 14, shown(tick), anchor="middle", css="soft small")
            last = x
    drawing.line(_LEFT, bottom, _LEFT + _WIDTH, bottom, css="axis")
    drawing.text(_LEFT + _WIDTH / 2, bottom + 34, across, anchor="middle", css="soft")
    drawing.text(14, _TOP + _HEIGHT / 2, up, anchor="middle", css="soft", turn=-90)
    return at


def _roomy(values: Sequence[float], *, is_log: bool) -> Scale:
    """From the least to the largest with some room beyond both, so that no dot is cut."""
    low, high = (max(-_LARGEST, min(_LARGEST, each)) for each in (min(values), max(values)))
    if is_log:
        ratio = max(high / low, 1.1) ** 0.05
        return Scale(low / ratio, high * ratio, "log")
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return Scale(low - room, high + room)


def _axis(values: Sequence[float], *, is_log: bool) -> Scale:
    found = Scale.over(values, "log" if is_log else "linear")
    if is_log:
        return found
    wide = 0.04 * (found.high - found.low)
    return Scale(found.low, found.high + wide)


def bars(
    names: Sequence[str], values: Sequence[Mapping[str, float | None]], asked: float, label: str, *, quantity: str
) -> Drawing:
    """For each name one bar per kind of value, and a line at what was asked."""
    kinds = list(values[0]) if values else []
    left = max(width_of(clipped(name, 28)) for name in names) + 12
    width, bar = 210.0, 15.0
    group = bar * len(kinds) + 12
    drawing = Drawing(left + width + 60, group * len(names) + 50 + 20 * len(kinds), label, is_fluid=True)
    most = max([asked, *(value or 0.0 for each in values for value in each.values())]) or 1.0
    shades = [sequential(0.2), sequential(0.62), sequential(0.85)]
    for i, (name, each) in enumerate(zip(names, values, strict=True)):
        y = 8 + i * group
        drawing.text(left - 8, y + bar * len(kinds) / 2, clipped(name, 28), anchor="end")
        for j, (kind, value) in enumerate(each.items()):
            end = (value or 0.0) / most * width
            drawing.rect(
                left, y + j * bar, end, bar - 2, shades[j % len(shades)], title=f"{name}, {kind}: {_percent(value)}"
            )
            drawing.text(left + end + 6, y + j * bar + bar / 2 - 1, _percent(value), css="soft small")
    bottom = 8 + group * len(names)
    x = left + asked / most * width
    drawing.line(x, 2, x, bottom, css="asked", dashes="4 3")
    drawing.line(left, 2, left, bottom, css="axis")
    drawing.text(x, bottom + 10, f"asked {_percent(asked)}", anchor="middle", css="soft small")
    for j, kind in enumerate(kinds):
        drawing.rect(left, bottom + 26 + 20 * j, 14, 12, shades[j % len(shades)])
        drawing.text(left + 22, bottom + 32 + 20 * j, f"{quantity}, {kind}")
    return drawing


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{shown(100 * value)} %"
