"""What the report of an analysis (`merge_core/analysis/report.py`) looks like."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from app.drawing import charts
from app.drawing.charts import Curve, HeatMap, Scale
from app.drawing.svg import Drawing, arranged, shown

Tensor = Mapping[str, Any]
_NUMBERED = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Figure:
    """A number that every tensor has: of one model, of a pair of models, or of all together."""

    name: str
    title: str
    quantity: str
    of: Literal["model", "pair", "all"]
    kind: Literal["linear", "log", "diverging"]
    about: str


FIGURES = {
    figure.name: figure
    for figure in (
        Figure(
            "relative",
            "Distance from the base",
            "‖δ‖ / ‖base‖",
            "model",
            "log",
            "How long a model's task vector is beside the base's weights.",
        ),
        Figure("changed", "Changed entries", "share", "model", "linear", "How many entries differ from the base."),
        Figure(
            "sign_conflicts",
            "Sign conflicts",
            "share",
            "all",
            "linear",
            "Of the entries that several models changed, how many they changed in opposite directions.",
        ),
        Figure(
            "kept_by_model",
            "Kept under one threshold",
            "share",
            "model",
            "linear",
            "What each tensor keeps where one threshold holds for the whole model.",
        ),
        Figure(
            "kept",
            "Kept under its own threshold",
            "share",
            "model",
            "linear",
            "What each tensor keeps under a threshold of its own: more than was asked where entries tie.",
        ),
        Figure("cosine", "Cosine between two", "cosine", "pair", "diverging", "The angle between two task vectors."),
        Figure(
            "sign_conflicts_of_pairs",
            "Sign conflicts of two",
            "share",
            "pair",
            "linear",
            "Of the entries that both models changed, how many they changed in opposite directions.",
        ),
        Figure(
            "overlap",
            "Subspace overlap of two",
            "share",
            "pair",
            "linear",
            "Which part of one task vector's strong directions lies in the other's.",
        ),
        Figure(
            "stable_rank",
            "Stable rank",
            "‖δ‖² / σ₁²",
            "model",
            "log",
            "About how many directions a task vector has; 1 where there is one.",
        ),
    )
}


class Analysis:
    """A report, to be drawn."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = report
        self.models: list[str] = list(report["models"])
        self.tensors: list[Tensor] = list(report["tensors"])

    @property
    def figures(self) -> list[Figure]:
        """Those that can be drawn of these models."""
        is_decomposed = any("overlap" in tensor for tensor in self.tensors)
        of_spectra = ("overlap", "stable_rank")
        return [
            figure
            for figure in FIGURES.values()
            if (figure.of == "model" or len(self.models) > 1) and (is_decomposed or figure.name not in of_spectra)
        ]

    def heat(self, figure: Figure, model: int = 0, other: int = 1) -> HeatMap:
        """A figure by module and layer; what stands in the same place, as experts do, together."""
        cells: dict[str, dict[int, float | None]] = defaultdict(dict)
        single: dict[str, float | None] = {}
        for (row, layer), tensors in self._places.items():
            value = _together(tensors, figure, model, other)
            if layer is None:
                single[row] = value
            else:
                cells[row][layer] = value
        # Of all models, so that their drawings can be compared.
        chosen = range(len(self.models)) if figure.of == "model" else (model,)
        everything = [_together(tensors, figure, each, other) for each in chosen for tensors in self._places.values()]
        values = [value for value in everything if value is not None]
        if figure.kind == "diverging":
            most = max((abs(value) for value in values), default=1.0) or 1.0
            scale = Scale(-most, most, "diverging")
        else:
            scale = Scale.over(values, figure.kind)
        return HeatMap(cells, single, scale, figure.quantity)

    def heat_map(self, figure: Figure, model: int = 0, other: int = 1) -> Drawing:
        """The same as a drawing."""
        map_ = self.heat(figure, model, other)
        of = {"model": f" of {self.models[model]}", "pair": f" of {self._pair(model, other)}", "all": ""}[figure.of]
        low, high = map_.scale.low, map_.scale.high
        label = f"Heat map: {figure.title.lower()}{of}, {len(map_.cells)} modules by {len(map_.numbers)} layers"
        return charts.heat_map(map_, f"{label}, from {shown(low)} to {shown(high)}")

    def cosines(self) -> Drawing:
        """The cosine between task vectors, over all tensors."""
        label = f"Cosines between the task vectors of {', '.join(self.models)}"
        return charts.matrix(self.models, self.report["whole"]["cosine"], Scale(-1, 1, "diverging"), label)

    def conflicts(self) -> Drawing:
        """Sign conflicts of pairs, over all tensors."""
        label = f"Sign conflicts between the task vectors of {', '.join(self.models)}"
        table = [
            [None if i == j else value for j, value in enumerate(row)]
            for i, row in enumerate(self.report["whole"]["sign_conflicts_of_pairs"])
        ]
        return charts.matrix(self.models, table, Scale(0, 1), label)

    def histogram(self) -> Drawing:
        """How large |δ| is, with each model's threshold."""
        whole = self.report["whole"]
        told = whole["histogram"]
        per_octave = told["per_octave"]
        curves = []
        for name, counts, each in zip(self.models, told["counts"], whole["models"], strict=True):
            used = [place for place, count in enumerate(counts) if count]
            points = [
                (2.0 ** (told["first_octave"] + (place + 0.5) / per_octave), 100 * counts[place] / whole["elements"])
                for place in (range(used[0], used[-1] + 1) if used else ())
            ]
            curves.append(Curve(name, points, each["threshold"]))
        across, up = "|δ|", f"% of entries, per 1/{per_octave} octave"
        label = f"Histogram of the magnitudes of {', '.join(self.models)}, with thresholds"
        return charts.plot(curves, label, across=across, up=up, log_x=True, mark="threshold", from_zero=True)

    def singular_values(self, tensor: Tensor) -> Drawing:
        """The largest singular values of the models' task vectors of a matrix."""
        curves = [
            Curve(name, [(number, value) for number, value in enumerate(each.get("singular_values", ()), 1)])
            for name, each in zip(self.models, tensor["models"], strict=True)
        ]
        label = f"Largest singular values of the task vectors of {tensor['tensor']}"
        return charts.plot(curves, label, across="number", up="singular value", dots=True, from_zero=True)

    def kept(self) -> Drawing:
        """What a density keeps of the whole model, by thresholds of tensors and by one of the model."""
        label = f"Share kept against {shown(100 * self.report['density'])} % asked, of {', '.join(self.models)}"
        return charts.bars(self.models, self.kept_shares, self.report["density"], label, quantity="kept")

    @cached_property
    def kept_shares(self) -> list[dict[str, float | None]]:
        """What is kept of each model, by the kind of threshold."""
        return [
            {"a threshold per tensor": self._kept_by_tensor(model), "one threshold for the model": each["kept"]}
            for model, each in enumerate(self.report["whole"]["models"])
        ]

    @cached_property
    def matrices(self) -> list[Tensor]:
        """The tensors that were decomposed, those first that moved furthest."""
        found = [tensor for tensor in self.tensors if "overlap" in tensor]
        return sorted(found, key=lambda tensor: -max(each["relative"] or 0.0 for each in tensor["models"]))

    def drawings(self, model: int | None = None) -> Iterator[tuple[str, Drawing]]:
        """Everything worth seeing at first, each with its heading; heat maps of one model or of each."""
        for number in range(len(self.models)) if model is None else (model,):
            yield f"‖δ‖/‖base‖ of {self.models[number]}", self.heat_map(FIGURES["relative"], number)
        if len(self.models) > 1:
            yield "Sign conflicts between all models", self.heat_map(FIGURES["sign_conflicts"])
            yield "Cosine between task vectors", self.cosines()
            yield "Sign conflicts of pairs", self.conflicts()
        yield "Magnitudes and thresholds", self.histogram()
        yield "Kept against asked", self.kept()
        if self.matrices:
            yield f"Singular values of δ, {self.matrices[0]['tensor']}", self.singular_values(self.matrices[0])

    def poster(self, model: int | None = None) -> Drawing:
        """All of them in one."""
        return arranged(f"{', '.join(self.models)}, compared with {self.report['base_model']}", self.drawings(model))

    def _pair(self, model: int, other: int) -> str:
        return f"{self.models[model]} and {self.models[other]}"

    def _kept_by_tensor(self, model: int) -> float:
        kept = math.fsum(tensor["models"][model]["kept"] * tensor["elements"] for tensor in self.tensors)
        return kept / math.fsum(tensor["elements"] for tensor in self.tensors)

    @cached_property
    def _places(self) -> dict[tuple[str, int | None], list[Tensor]]:
        """Row and layer of each cell, and the tensors in it."""
        stacks = {tensor["stack"] for tensor in self.tensors if tensor["stack"] is not None}
        found: dict[tuple[str, int | None], list[Tensor]] = defaultdict(list)
        for tensor in self.tensors:
            row = _NUMBERED.sub("*", tensor["module"]).removesuffix(".weight")
            if tensor["stack"] is not None and len(stacks) > 1:
                row = f"{tensor['stack']} · {row}"
            found[row, tensor["layer"]].append(tensor)
        return found


def _together(tensors: Sequence[Tensor], figure: Figure, model: int, other: int) -> float | None:
    """A figure of some tensors together: by their sums where it is made of sums, else in the mean of entries."""
    if figure.name == "relative":
        base = math.fsum(tensor["base_norm"] ** 2 for tensor in tensors)
        return math.sqrt(math.fsum(tensor["models"][model]["norm"] ** 2 for tensor in tensors) / base) if base else None
    if figure.name == "cosine":
        ours, theirs = ([tensor["models"][each]["norm"] for tensor in tensors] for each in (model, other))
        length = math.sqrt(math.fsum(each**2 for each in ours) * math.fsum(each**2 for each in theirs))
        products = [
            (tensor["cosine"][model][other] or 0.0) * one * two
            for tensor, one, two in zip(tensors, ours, theirs, strict=True)
        ]
        return math.fsum(products) / length if length else None
    of: Mapping[str, Callable[[Tensor], Any]] = {
        "model": lambda tensor: tensor["models"][model].get(figure.name),
        "pair": lambda tensor: tensor[figure.name][model][other] if figure.name in tensor else None,
        "all": lambda tensor: tensor[figure.name],
    }
    weighed = [(value, tensor["elements"]) for tensor in tensors if (value := of[figure.of](tensor)) is not None]
    total = sum(weight for _, weight in weighed)
    return math.fsum(value * weight for value, weight in weighed) / total if total else None
