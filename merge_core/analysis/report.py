"""The report of an analysis, as JSON.

`whole`, each of `layers` and each of `tensors` say the same of more or fewer entries:

- `elements`, and `base_norm`, ‖θ₀‖;
- `models`, in the document's order, each with `norm`, ‖δᵢ‖; `relative`, ‖δᵢ‖/‖θ₀‖, null where the base is 0; `changed`,
  the share of entries that differ from the base;
- `cosine` `[k][k]`: δᵢ·δⱼ/(‖δᵢ‖ ‖δⱼ‖), null where one of them is 0;
- `sign_conflicts`: of the entries that two models or more changed, the share that go both ways; null where there are
  none; `sign_conflicts_of_pairs` `[k][k]`: the same of two models.

Of a tensor each model also has

- `threshold`, the k-th largest |δ| for k = max(1, int(density · entries)), and `ties`, how many entries equal it;
- `kept`: the share of entries that are not 0 and reach it. Where entries tie at the threshold this is more than was
  asked, as the official TIES has it, while mergekit cuts to k; where fewer entries changed it is less;
- `kept_by_model`: the share that reaches the one threshold of the whole model, as where a recipe's scope is the model;
- of a matrix `singular_values`, the largest of δ, descending; `effective_rank`, e^H of σ/Σσ, null where `is_sketched`;
  `stable_rank`, ‖δ‖²/σ₁²;

and the tensor itself `overlap` `[k][k]`, the part of one model's strong subspace that lies in the other's (of the
matrix's short side), and `overlap_by_chance`.

`whole` and the layers have a `histogram` of |δ|: `counts` per model in steps from 2^`first_octave` on, `per_octave` of
them in each; what is smaller or larger counts in the outermost steps, what is 0 in none. The whole model's `threshold`
is where the finest histogram's step begins that the k-th largest entry is in, of `steps_per_octave`; `kept` is what
reaches it.

Numbers have six digits.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from merge_core.analysis.spectra import Spectrum, overlap
from merge_core.analysis.survey import OCTAVES, SMALLEST_OCTAVE, Figures, coarser, lower_edge
from merge_core.analysis.suspicion import suspicions
from merge_core.dtypes import DType
from merge_core.layers import layer_of
from merge_core.method import Known
from merge_core.statistics import Counters

if TYPE_CHECKING:
    from merge_core.analysis.document import AnalysisDocument

VERSION = 1
_SHOWN_BITS = 2
"""Histograms are told in so many halvings of an octave."""
HISTOGRAM_NUMBERS = OCTAVES << _SHOWN_BITS
"""The most counts of one model that are told of a layer, or of all tensors together."""
Table = list[list[float | None]]


@dataclass(frozen=True)
class TensorFigures:
    """Everything about one tensor. `formats`: the base's number format, then the models'; `thresholds`, `ties` and
    `reaching` (how many entries reach the threshold) per model; `spectra` per model, or none; `overlaps` of them.
    """

    name: str
    shape: tuple[int, ...]
    formats: tuple[DType, ...]
    figures: Figures
    thresholds: tuple[float, ...]
    ties: tuple[int, ...]
    reaching: tuple[int, ...]
    spectra: tuple[tuple[tuple[float, ...], float | None, bool], ...]
    overlaps: Table

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...],
        formats: tuple[DType, ...],
        figures: Figures,
        known: Known,
        spectra: Sequence[Spectrum],
    ) -> TensorFigures:
        """From what a survey came to; the singular vectors themselves are not kept."""
        reaching = []
        for model, threshold in enumerate(known["threshold"]):
            equal = known["wanted"][model] - known["ties_kept"][model] + known["ties"][model]
            reaching.append(equal if threshold else int(figures.changed[model]))
        return cls(
            name,
            shape,
            formats,
            figures,
            tuple(known["threshold"]),
            tuple(known["ties"]),
            tuple(reaching),
            tuple((each.values, each.effective_rank, each.is_sketched) for each in spectra),
            _pairs(len(spectra), lambda i, j: overlap(spectra[i], spectra[j])),
        )


@dataclass(frozen=True)
class AnalysisReport:
    """What an analysis found; `others` are the tensors that were not measured, and why."""

    document: AnalysisDocument
    tensors: Sequence[TensorFigures]
    others: Mapping[str, str]
    bits: int
    alignment: Mapping[str, Any] | None = None

    def to_data(self) -> dict[str, Any]:
        """The report as JSON has it."""
        names = [str(model) for model in self.document.models]
        whole = functools.reduce(operator.add, (tensor.figures for tensor in self.tensors))
        steps = [self._threshold_step(whole, model) for model in range(len(names))]
        layers: dict[tuple[str, int], list[TensorFigures]] = defaultdict(list)
        for tensor in self.tensors:
            if (place := layer_of(tensor.name)) is not None:
                layers[place[:2]].append(tensor)
        return {
            "version": VERSION,
            "base_model": str(self.document.base_model),
            "models": names,
            "density": self.document.density,
            "exact_up_to": self.document.exact_up_to,
            "steps_per_octave": 1 << self.bits,
            "suspicions": [
                {"rule": each.rule, "models": list(each.models), "value": _told(each.value), "words": each.words}
                for each in suspicions(names, whole, self._roundoff())
            ],
            "whole": self._whole(whole, steps),
            "layers": [
                {"stack": stack, "layer": number, **self._many(self._sum(found))}
                for (stack, number), found in sorted(layers.items())
            ],
            "alignment": None if self.alignment is None else _rounded(self.alignment),
            "not_measured": [{"tensor": name, "why": why} for name, why in self.others.items()],
            "tensors": [self._tensor(tensor, steps) for tensor in self.tensors],
        }

    def to_json(self) -> str:
        """The report as text: a line for each key, layer and tensor."""
        lines = []
        for key, value in self.to_data().items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                text = "[\n  " + ",\n  ".join(map(_json, value)) + "\n ]"
            else:
                text = _json(value)
            lines.append(f" {_json(key)}: {text}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def _sum(self, tensors: Iterable[TensorFigures]) -> Figures:
        return functools.reduce(operator.add, (tensor.figures for tensor in tensors))

    def _threshold_step(self, whole: Figures, model: int) -> int:
        """The histogram's step that holds the k-th largest entry of a model, or its lowest where fewer changed."""
        wanted = max(1, int(self.document.density * whole.entries))
        from_top = np.cumsum(whole.magnitudes[model][::-1])
        place = int(np.searchsorted(from_top, wanted))
        return max(0, len(from_top) - 1 - place)

    def _roundoff(self) -> list[float]:
        """Of each model, the unit roundoff of the coarser format, where most of its entries are stored in another
        format than the base's.
        """
        found = []
        for model in range(len(self.document.models)):
            differing: dict[float, int] = defaultdict(int)
            for tensor in self.tensors:
                base, theirs = tensor.formats[0].torch, tensor.formats[1 + model].torch
                coarser = max(torch.finfo(base).eps, torch.finfo(theirs).eps) / 2
                differing[coarser if base != theirs else 0.0] += tensor.figures.entries
            found.append(max(differing, key=lambda roundoff: differing[roundoff]))
        return found

    def _whole(self, figures: Figures, steps: Sequence[int]) -> dict[str, Any]:
        told = self._many(figures)
        for model, (each, step) in enumerate(zip(told["models"], steps, strict=True)):
            each["threshold"] = _told(lower_edge(step, self.bits))
            each["kept"] = _share(int(figures.reaching(step)[model]), figures.entries)
        return told

    def _many(self, figures: Figures) -> dict[str, Any]:
        return {**_said_of(figures), "histogram": self._histogram(figures.magnitudes)}

    def _histogram(self, magnitudes: Counters) -> dict[str, Any]:
        shown = min(self.bits, _SHOWN_BITS)
        counts = coarser(magnitudes, self.bits - shown)
        used = np.flatnonzero(counts.sum(axis=0))
        first = int(used[0]) >> shown if len(used) else -SMALLEST_OCTAVE
        last = (int(used[-1]) >> shown) + 1 if len(used) else first
        return {
            "first_octave": first + SMALLEST_OCTAVE,
            "per_octave": 1 << shown,
            "counts": counts[:, first << shown : last << shown].tolist(),
        }

    def _tensor(self, tensor: TensorFigures, steps: Sequence[int]) -> dict[str, Any]:
        figures, place = tensor.figures, layer_of(tensor.name)
        told = {
            "tensor": tensor.name,
            "stack": place and place[0],
            "layer": place and place[1],
            "module": place[2] if place else tensor.name,
            "shape": list(tensor.shape),
            **_said_of(figures),
        }
        for model, each in enumerate(told["models"]):
            each["dtype"] = str(tensor.formats[1 + model])
            each["threshold"] = _told(tensor.thresholds[model])
            each["ties"] = tensor.ties[model]
            each["kept"] = _share(tensor.reaching[model], figures.entries)
            each["kept_by_model"] = _share(int(figures.reaching(steps[model])[model]), figures.entries)
            if tensor.spectra:
                values, effective, is_sketched = tensor.spectra[model]
                each["singular_values"] = list(map(_told, values))
                each["effective_rank"] = _told(effective)
                each["stable_rank"] = _told(float(figures.gram[model, model]) / values[0] ** 2 if values else None)
                each["is_sketched"] = is_sketched
        if tensor.spectra:
            told["overlap"] = tensor.overlaps
            short = min(tensor.shape[0], math.prod(tensor.shape[1:]))
            counts = [len(values) for values, _, _ in tensor.spectra if values]
            told["overlap_by_chance"] = _told(min(counts) / short if counts else None)
        return told


def _said_of(figures: Figures) -> dict[str, Any]:
    """What is said of any number of entries together."""
    norms = [math.sqrt(max(0.0, square)) for square in figures.gram.diagonal().tolist()]
    base = math.sqrt(figures.base)

    def cosine(i: int, j: int) -> float | None:
        length = norms[i] * norms[j]
        return max(-1.0, min(1.0, float(figures.gram[i, j]) / length)) if length else None

    def conflicts(i: int, j: int) -> float | None:
        both = int(figures.both[i, j])
        return int(figures.opposed[i, j]) / both if both else None

    return {
        "elements": figures.entries,
        "base_norm": _told(base),
        "models": [
            {
                "norm": _told(norm),
                "relative": _told(norm / base if base else None),
                "changed": _share(int(changed), figures.entries),
            }
            for norm, changed in zip(norms, figures.changed, strict=True)
        ],
        "cosine": _pairs(len(norms), cosine),
        "sign_conflicts": _share(figures.conflicts, figures.shared) if figures.shared else None,
        "sign_conflicts_of_pairs": _pairs(len(norms), conflicts),
    }


def _pairs(count: int, of: Callable[[int, int], float | None]) -> Table:
    """A symmetric table of pairs."""
    return [[_told(of(max(i, j), min(i, j))) for j in range(count)] for i in range(count)]


def _share(part: int, whole: int) -> float | None:
    return _told(part / whole) if whole else None


def _told(value: float | None) -> float | None:
    """A number as it is told: six digits, and none that JSON has not."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _rounded(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _rounded(value) for key, value in data.items()}
    return _told(data) if isinstance(data, float) else data


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
