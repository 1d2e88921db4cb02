"""Four fine-tunes of one base in one model: task arithmetic, TIES, DARE, Breadcrumbs and PCB, each with λ searched
where its authors search it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from app.drawing.svg import Drawing
from benchmarks.digits import TASKS, Digits, accuracies, load_checkpoint, train_models
from benchmarks.science.harness import (
    Claim,
    Experiment,
    Numbers,
    Row,
    at_least,
    at_most,
    claimed,
    compared,
    each,
    exactly,
    several,
)
from benchmarks.science.nets import merged
from benchmarks.science.plots import curves, scores

VALIDATION = 300
DROPS = (0.5, 0.9, 0.99)
MASKS = 4
CRUMBS = {"density": 0.15, "gamma": 0.01}


def steps(low: float, high: float, step: float) -> list[float]:
    """From low to high, both in it.

    >>> steps(0.1, 0.4, 0.1)
    [0.1, 0.2, 0.3, 0.4]
    """
    return [round(low + step * place, 2) for place in range(round((high - low) / step) + 1)]


SCALES = {
    "task_arithmetic": steps(0.05, 1, 0.05),
    "dare_linear": steps(0.1, 1, 0.1),
    "breadcrumbs": steps(0.1, 1, 0.1),
    "ties": steps(0.3, 1.5, 0.1),
    "pcb": steps(0.8, 2.2, 0.1),
}
"""Where the authors search λ."""


def split(digits: Digits) -> tuple[Digits, Digits]:
    """The held-out images as those that λ is tuned on, and those that scores are told of."""

    def part(where: slice) -> Digits:
        labels = {task: label[where] for task, label in digits.test_labels.items()}
        return Digits(digits.images, digits.labels, digits.test_images[where], labels)

    return part(slice(VALIDATION)), part(slice(VALIDATION, None))


class Bench:
    """The models of one seed in a folder, and how good a merge of them is."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.folder = folder
        digits = Digits.load()
        self.validation, self.test = split(digits)
        self.base, *self.tuned = train_models(folder, digits, seed)
        self._alone = {
            id(part): {task: accuracies(load_checkpoint(folder / task.replace(" ", "-")), part)[task] for task in TASKS}
            for part in (self.validation, self.test)
        }
        self._made = 0

    def recipe(self, method: str, **keys: Any) -> dict[str, Any]:
        """All fine-tunes on the base; what is not `parameters` or the like is a parameter of all."""
        top = {name: keys.pop(name) for name in ("semantics", "seed", "statistics") if name in keys}
        models = [{"model": name} for name in self.tuned]
        based = {} if method == "linear" else {"base_model": self.base}
        return {"merge_method": method, **based, "models": models, "dtype": "float32", "parameters": keys, **top}

    def merge(self, recipe: Mapping[str, Any]) -> Path:
        self._made += 1
        return merged(self.folder, f"merged-{self._made}", recipe)

    def score(self, folder: Path, digits: Digits) -> float:
        """The mean over the tasks of a model's accuracy beside that of the task's own fine-tune."""
        found, alone = accuracies(load_checkpoint(folder), digits), self._alone[id(digits)]
        return fmean(found[task] / alone[task] for task in TASKS)

    def tested(self, method: str, **keys: Any) -> float:
        return self.score(self.merge(self.recipe(method, **keys)), self.test)

    def tuned_scale(self, method: str, **keys: Any) -> tuple[float, float]:
        """The λ that is best on the images for tuning, and its score on the others."""
        made = {scale: self.merge(self.recipe(method, **keys, **{"lambda": scale})) for scale in SCALES[method]}
        best = max(made, key=lambda scale: self.score(made[scale], self.validation))
        return best, self.score(made[best], self.test)


def run(seed: int, folder: Path) -> Numbers:
    """Every method once as its authors advise, and with λ tuned."""
    bench = Bench(seed, folder)
    found = {
        "base": bench.score(folder / bench.base, bench.test),
        "average": bench.tested("linear", weight=1),
        "ta": bench.tested("task_arithmetic", weight=1, **{"lambda": 1}),
        "ties": bench.tested("ties", semantics="paper", density=0.2, **{"lambda": 1}),
    }
    found["band"] = float(is_a_band(bench))
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "ta": ("task_arithmetic", {"weight": 1}),
        "ties": ("ties", {"semantics": "paper", "density": 0.2}),
        "breadcrumbs": ("breadcrumbs", {"weight": 1, **CRUMBS}),
        "pcb": ("pcb", {"mask_ratio": 0.2}),
    }
    for name, (method, keys) in ways.items():
        found[f"{name} λ"], found[f"{name} tuned"] = bench.tuned_scale(method, **keys)
    for drop in DROPS:
        masks = [{"semantics": "paper", "drop_rate": drop, "seed": MASKS * seed + mask} for mask in range(MASKS)]
        at = {"lambda": found["ta λ"]}
        found[f"dare {drop}"] = fmean(bench.tested("dare_linear", **mask, **at) for mask in masks)
        if drop == 0.9:
            found["dare"] = fmean(bench.tuned_scale("dare_linear", **mask)[1] for mask in masks)
            found["dare as it is"] = fmean(bench.tested("dare_linear", rescale=False, **mask, **at) for mask in masks)
    return found


def is_a_band(bench: Bench) -> bool:
    """Whether what Breadcrumbs adds of one fine-tune is 0 wherever a change is among the largest of its tensor, or
    among the smallest, and the change itself between them.
    """
    model = bench.tuned[0]
    recipe = bench.recipe("breadcrumbs", weight=1, **CRUMBS, **{"lambda": 1}) | {"models": [{"model": model}]}
    start, tuned, made = (
        load_checkpoint(folder).state_dict()
        for folder in (bench.folder / bench.base, bench.folder / model, bench.merge(recipe))
    )
    for name, origin in start.items():
        change, added = (tuned[name] - origin).flatten(), (made[name] - origin).flatten()
        size = change.abs()
        order = size.sort(descending=True).values
        left_out, kept = int(len(order) * CRUMBS["gamma"]), int(len(order) * CRUMBS["density"])
        largest = order[left_out - 1] if left_out else torch.inf
        inside = order[left_out : left_out + kept]
        is_outside = (size > order[left_out]) | (size < inside[-1]) if kept else size >= 0
        is_inside = (size < largest) & (size > inside[-1]) if kept else size < 0
        if added[is_outside].any() or not torch.allclose(added[is_inside], change[is_inside], atol=1e-7):
            return False
    return True


def judge_arithmetic(runs: Sequence[Numbers]) -> Sequence[Row]:
    """λ has to be chosen; then the sum is ahead."""
    return [
        at_least("λ tuned, ahead of the average", each(runs, "ta tuned", "average"), 0.02, _told(runs, "ta tuned")),
        at_least("λ tuned, ahead of the base", each(runs, "ta tuned", "base"), 0.06),
        compared("others", several(runs, {"base": "base", "average": "average", "λ = 1": "ta", "λ": "ta λ"})),
    ]


def judge_ties(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Without tuning."""
    return [
        at_least("λ = 1, ahead of the average", each(runs, "ties", "average"), 0.01, _told(runs, "ties")),
        at_least("λ = 1, ahead of task arithmetic at λ = 1", each(runs, "ties", "ta"), 0.1),
        claimed(
            "both λ tuned, ahead of task arithmetic",
            each(runs, "ties tuned", "ta tuned"),
            0.0,
            _told(runs, "ties tuned"),
        ),
    ]


def judge_dare(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Most can be dropped, if the rest is rescaled."""
    return [
        at_least(
            "0.9 dropped, both λ tuned, beside task arithmetic",
            each(runs, "dare", "ta tuned"),
            -0.02,
            _told(runs, "dare"),
        ),
        at_most("0.9 dropped, not rescaled, beside it", each(runs, "dare as it is", "ta tuned"), -0.05),
        claimed("0.99 dropped, beside task arithmetic", each(runs, "dare 0.99", "ta tuned"), -0.02),
        compared("dropped, at task arithmetic's λ", several(runs, {f"{drop}": f"dare {drop}" for drop in DROPS})),
    ]


def judge_breadcrumbs(runs: Sequence[Numbers]) -> Sequence[Row]:
    """A band of 15 % of each tensor is enough to be ahead of the average."""
    name = "breadcrumbs tuned"
    return [
        at_least("λ tuned, ahead of the average", each(runs, name, "average"), 0.005, _told(runs, name)),
        exactly(
            "the largest and the smallest changes",
            all(run["band"] for run in runs),
            "are exactly 0",
            "are not all exactly 0",
        ),
        claimed("both λ tuned, ahead of task arithmetic", each(runs, name, "ta tuned"), 0.0),
    ]


def judge_pcb(runs: Sequence[Numbers]) -> Sequence[Row]:
    """As good as TIES."""
    return [
        at_least("both λ tuned, beside TIES", each(runs, "pcb tuned", "ties tuned"), -0.005, _told(runs, "pcb tuned")),
        at_least("λ tuned, ahead of the average", each(runs, "pcb tuned", "average"), 0.02),
        claimed("both λ tuned, ahead of TIES", each(runs, "pcb tuned", "ties tuned"), 0.0),
        claimed("both λ tuned, ahead of task arithmetic", each(runs, "pcb tuned", "ta tuned"), 0.0),
    ]


def _told(runs: Sequence[Numbers], name: str) -> str:
    return f"score {fmean(each(runs, name)):.3f}"


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """How good each method is, and what dropping costs."""
    names = {
        "base": "base",
        "average": "average",
        "ta": "task arithmetic, λ = 1",
        "ties": "TIES, λ = 1",
        "ta tuned": "task arithmetic, tuned",
        "ties tuned": "TIES, tuned",
        "dare": "DARE at 0.9, tuned",
        "breadcrumbs tuned": "Breadcrumbs, tuned",
        "pcb tuned": "PCB, tuned",
    }
    dropped = {"DARE": {0.0: "ta tuned"} | {drop: f"dare {drop}" for drop in DROPS}}
    return {
        "scores": scores(runs, names, "Scores of merges of four fine-tunes by method", across="score"),
        "dropped": curves(runs, dropped, "Score by the share that DARE drops", across="drop rate", up="score"),
    }


EXPERIMENT = Experiment(
    "four-tasks",
    "Four tasks in one model",
    "A trunk 64-512-512 with four frozen heads (digit, parity, at least five, modulo three) learns from 40 images "
    "for all tasks at once; then each task fine-tunes the trunk on 1,257. A score is the mean over the tasks of the "
    "accuracy beside that of the task's own fine-tune, on 240 images; λ is tuned on 300 others, in the range that "
    "each method's authors search.",
    run,
    range(3),
    (
        Claim(
            "Task arithmetic",
            "https://arxiv.org/abs/2212.04089",
            "Task vectors that are added together make one model better at several tasks at once.",
            judge_arithmetic,
        ),
        Claim(
            "TIES-Merging",
            "https://arxiv.org/abs/2306.01708",
            "Trimming small changes and electing signs resolves interference, and outperforms earlier merging "
            "methods in many settings.",
            judge_ties,
        ),
        Claim(
            "DARE",
            "https://arxiv.org/abs/2311.03099",
            "Of a supervised fine-tune's changes 90 % or even 99 % can be dropped, if the others are rescaled.",
            judge_dare,
        ),
        Claim(
            "Model Breadcrumbs",
            "https://arxiv.org/abs/2312.06795",
            "Leaving out the largest and the smallest changes gives better multi-task models, with parameters that "
            "need no tuning for each new task.",
            judge_breadcrumbs,
        ),
        Claim(
            "PCB-Merging",
            "https://arxiv.org/abs/2410.02396",
            "Letting parameters compete, inside a task and between tasks, outperforms earlier merging methods.",
            judge_pcb,
        ),
    ),
    plots,
)


def last_hidden(net: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the trunk gives the heads: `[n, 512]`."""
    with torch.no_grad():
        return net.get_submodule("trunk")(images)  # type: ignore[no-any-return]
