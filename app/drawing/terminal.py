"""The same drawings for a terminal: in as many colours as it has, and in shades where it has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from app.drawing.analyses import Analysis, Figure
from app.drawing.charts import HeatMap, Scale
from app.drawing.svg import clipped, shown

_SHADES = " ░▒▓█"
_MOST_LABEL = 32
_LEGEND = 24


def print_analysis(console: Console, analysis: Analysis, figure: Figure) -> None:
    """What was found of all tensors together, and a heat map: of each model, of each pair, or of all."""
    console.print(_summary(analysis))
    if len(analysis.models) > 1:
        console.print(_cosines(analysis))
    count = len(analysis.models)
    chosen = {
        "model": [(model, model) for model in range(count)],
        "pair": [(model, other) for other in range(count) for model in range(other)],
        "all": [(0, 0)],
    }[figure.of]
    for model, other in chosen:
        names = {"model": f" of {analysis.models[model]}", "all": ""}
        of = names.get(figure.of, f" of {analysis.models[model]} and {analysis.models[other]}")
        console.print(Text(f"\n{figure.title}{of}", style="bold"))
        for line in _lines(console, analysis.heat(figure, model, other)):
            console.print(line, no_wrap=True, overflow="crop")


def _summary(analysis: Analysis) -> Table:
    asked = 100 * analysis.report["density"]
    table = Table("model", "‖δ‖/‖base‖", "changed %", "threshold", f"kept % (of {shown(asked)})", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, each in zip(analysis.models, analysis.report["whole"]["models"], strict=True):
        changed, kept = 100 * each["changed"], 100 * each["kept"]
        table.add_row(Text(name), shown(each["relative"]), shown(changed), shown(each["threshold"]), shown(kept))
    return table


def _cosines(analysis: Analysis) -> Table:
    numbers = [str(number) for number, _ in enumerate(analysis.models, 1)]
    table = Table("\ncosine of task vectors", *(f"\n{number}" for number in numbers), box=None)
    for number, name, row in zip(numbers, analysis.models, analysis.report["whole"]["cosine"], strict=True):
        table.add_row(
            Text(f"{number} {name}"),
            *map(_angle, row),
        )
    return table


def _angle(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def _lines(console: Console, map_: HeatMap) -> Iterator[Text]:
    numbers = map_.numbers
    label = max((len(clipped(name, _MOST_LABEL)) for name in (*map_.cells, *map_.single)), default=0)
    wide = 2 if label + 1 + 2 * len(numbers) <= console.width else 1
    has_colours = console.color_system is not None
    for name, row in map_.cells.items():
        yield _row(name, label, row, numbers, wide, map_.scale, has_colours)
    if numbers:
        axis = [" "] * (wide * len(numbers) + len(str(numbers[-1])))
        for place in range(0, len(numbers), max(1, 10 // wide)):
            text = str(numbers[place])
            axis[wide * place : wide * place + len(text)] = text
        yield Text(f"{map_.columns:>{label}} {''.join(axis).rstrip()}", style="dim")
    for name, value in map_.single.items():
        line = _row(name, label, {0: value}, [0], 2, map_.scale, has_colours)
        yield line.append(f" {shown(value)}", style="dim")
    legend = Text(f"{map_.quantity:>{label}} ", style="dim")
    low, high = map_.scale.ticks()[0], map_.scale.ticks()[-1]
    legend.append(f"{shown(low)} ")
    places = [map_.scale.place(low), map_.scale.place(high)]
    for step in range(_LEGEND):
        share = places[0] + (places[1] - places[0]) * step / (_LEGEND - 1)
        legend.append_text(_cell(share, map_.scale, 1, has_colours))
    yield legend.append(f" {shown(high)}")


def _row(
    name: str,
    label: int,
    row: Mapping[int, float | None],
    numbers: list[int],
    wide: int,
    scale: Scale,
    has_colours: bool,
) -> Text:
    line = Text(f"{clipped(name, _MOST_LABEL):>{label}} ")
    for number in numbers:
        value = row.get(number)
        if value is None:
            line.append("·" * wide if number in row else " " * wide, style="dim")
        else:
            line.append_text(_cell(scale.place(value), scale, wide, has_colours))
    return line


def _cell(share: float, scale: Scale, wide: int, has_colours: bool) -> Text:
    if has_colours:
        return Text("█" * wide, style=Style(color=scale.shade(share)))
    return Text(_SHADES[min(len(_SHADES) - 1, int(share * len(_SHADES)))] * wide)
