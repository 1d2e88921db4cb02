"""What a calibration came to (`calibration.json`): losses step by step, and the coefficients that were learned."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.drawing import charts
from app.drawing.charts import HeatMap, Level, Scale, Series
from app.drawing.svg import Drawing, shown

HELD_OUT = "check"
"""What the names of curves of data that are held out end with."""
LOSS, LABELS = "loss", "labels"
_MOST_POINTS = 600
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Compared:
    """A row beside others: what something loses on the data that are held out; `labels`: by the right answers."""

    name: str
    loss: float
    labels: float | None


class Calibrated:
    """A report, to be drawn; `models`: the recipe's."""

    def __init__(self, report: Mapping[str, Any], models: Sequence[str]) -> None:
        self.report, self.models = report, models
        self.curves: Sequence[Mapping[str, Any]] = [each for each in report.get("curves", ()) if each["points"]]
        self.lines: Sequence[Mapping[str, Any]] = report.get("lines", ())
        self.held_out = [each for each in self.curves if each["name"].endswith(HELD_OUT)]

    @property
    def compared(self) -> list[Compared]:
        """The result, and what it is compared with, on the data that are held out. Empty where there are none."""
        if not self.held_out:
            return []
        points = self.held_out[-1]["points"]
        step = self.report.get("best_step")
        point = next((each for each in points if each["step"] == step), points[-1])
        ours = Compared(f"learned, after step {point['step']}", point[LOSS], point.get(LABELS))
        return [ours, *(Compared(each["name"], each[LOSS], each.get(LABELS)) for each in self.lines)]

    def drawings(self) -> Iterator[tuple[str, str, str, Drawing]]:
        """Each with its name, heading, and what it means."""
        if any(LABELS in point for each in self.held_out for point in each["points"]):
            about = (
                "What the merge loses on data that are held out, by the right answers, from which nothing was learned."
            )
            yield "labels", "Held out, by the right answers", about, self.course(self.held_out, LABELS)
        if self.curves:
            about = "What was minimised, " + ("by what was tried" if "across" in self.report else "in each step")
            about += " and on data that are held out." if self.held_out else "."
            yield "loss", "What was minimised", about, self.course(self.curves, LOSS)
        for number, name in enumerate(self.models):
            if (map_ := self.coefficients(number)) is not None:
                about = "How much of this model's difference was added to each tensor"
                about += ", in the mean over its parts." if self._has_parts else "."
                label = f"Heat map: coefficients of {name}, from {shown(map_.scale.low)} to {shown(map_.scale.high)}"
                yield f"model-{number}", f"Coefficients of {name}", about, charts.heat_map(map_, label)

    def course(self, curves: Sequence[Mapping[str, Any]], quantity: str) -> Drawing:
        """A quantity over the steps, and what else comes to as lines across."""
        series = []
        for each in curves:
            points = [(point["step"], point[quantity]) for point in each["points"] if quantity in point]
            series.append(Series(_named(each["name"]), _thinned(points), line="straight"))
        levels = [Level(each["name"], each[quantity]) for each in self.lines if quantity in each]
        ends = [f"{each.name} from {shown(each.points[0][1])} to {shown(each.points[-1][1])}" for each in series]
        across = str(self.report.get("across", "step"))
        label = f"Loss by {across}: {', '.join([*ends, *(f'{each.name} {shown(each.value)}' for each in levels)])}"
        values = [value for each in series for _, value in each.points]
        is_wide = min(values) > 0 and max(values) / min(values) > 100
        return charts.chart(
            series, label, across=across, up="loss", levels=levels, whole_x=across == "step", log_y=is_wide
        )

    def coefficients(self, model: int) -> HeatMap | None:
        """What was learned of a model, by module and layer, on the scale of all models. None: it is not told."""
        cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        single: dict[str, list[float]] = defaultdict(list)
        every: list[float] = []
        for each in self.report.get("tensors", ()):
            if not isinstance(told := each.get("coefficients"), list) or not all(told):
                continue
            means = [math.fsum(parts) / len(parts) for parts in told]
            every += means
            if model >= len(means):
                continue
            found = _NUMBER.search(each["tensor"])
            name = _NUMBER.sub("*", each["tensor"]).removesuffix(".weight")
            if found:
                cells[name][int(found[1])].append(means[model])
            else:
                single[name].append(means[model])
        if not cells and not single:
            return None
        scale = (
            Scale.over(every) if min(every) >= 0 else Scale(-max(map(abs, every)), max(map(abs, every)), "diverging")
        )
        rows = {name: {layer: _mean(values) for layer, values in row.items()} for name, row in cells.items()}
        return HeatMap(rows, {name: _mean(values) for name, values in single.items()}, scale, "coefficient")

    @property
    def _has_parts(self) -> bool:
        return any(len(parts) > 1 for each in self.report.get("tensors", ()) for parts in each.get("coefficients", ()))


def _named(curve: str) -> str:
    """A curve's name as people read it."""
    return "held out" if curve == HELD_OUT else curve.replace(f", {HELD_OUT}", ", held out")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Of very many an even selection, the last among them."""
    step = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:step], points[-1]] if step > 1 else points
