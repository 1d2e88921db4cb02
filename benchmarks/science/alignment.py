"""Weight matching: networks trained from different seeds can be averaged once their neurons are in the same order. With
it the analysis of Ito et al.: they hardly come closer, but their strong directions agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from app.drawing.svg import Drawing
from benchmarks.digits import Digits
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
    mean,
    number,
    several,
)
from benchmarks.science.nets import Mlp, accuracy, loaded, merged, save, train
from benchmarks.science.plots import curves, scores
from merge_core.alignment.derive import derive
from merge_core.alignment.matching import match
from merge_core.alignment.permutations import Permutations, Permuted
from merge_core.alignment.report import Segment, analyse, interpolation
from merge_core.alignment.spec import PermutationSpec
from merge_core.checkpoint import Checkpoint
from merge_core.weights import Weights

WIDTHS = (64, 256, 512)
WIDTH, WIDE = WIDTHS[1:]
HIDDEN = "layers.1.weight"


def _trained(width: int, seed: int, digits: Digits) -> Mlp:
    torch.manual_seed(seed)
    net = Mlp(width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    train(net, digits.images, digits.labels["digit"], epochs=40, optimizer=optimizer, batch=64)
    return net


def _models(folder: Path, width: int, seeds: Sequence[int], digits: Digits) -> list[Checkpoint]:
    return [Checkpoint.open(save(_trained(width, seed, digits), folder / f"net-{seed}")) for seed in seeds]


def _spec(model: Weights) -> PermutationSpec:
    return derive({name: info.shape for name, info in model.tensors.items()}, model.config)


def _evaluator(width: int, digits: Digits) -> Callable[[Mapping[str, Tensor]], dict[str, float]]:
    labels = digits.test_labels["digit"]

    @torch.no_grad()
    def evaluate(tensors: Mapping[str, Tensor]) -> dict[str, float]:
        outputs = loaded(Mlp(width), tensors)(digits.test_images)
        return {"loss": float(cross_entropy(outputs, labels)), "accuracy": accuracy(outputs, labels)}

    return evaluate


def run_pair(seed: int, folder: Path) -> Numbers:
    """Two networks of each width: train, match, store the permutations and read them again, walk the line."""
    digits = Digits.load()
    return {
        f"{width} {name}": value
        for width in WIDTHS
        for name, value in _matched(width, seed, folder / str(width), digits).items()
    }


def _matched(width: int, seed: int, folder: Path, digits: Digits) -> Numbers:
    evaluate = _evaluator(width, digits)
    first, second = _models(folder, width, (2 * seed, 2 * seed + 1), digits)
    spec = _spec(first)
    found = match(spec, first, second, seed=seed)
    Permutations(spec, {"second": found.indexed}).save(folder / "alignment.safetensors")
    indexed = Permutations.open(folder / "alignment.safetensors").models["second"]
    aligned = Permuted(second, spec, indexed)
    naive, line = (interpolation(evaluate, first, other) for other in (second, aligned))
    report = analyse(first, second, spec, indexed, top=10)
    (hidden,) = (one for one in report.tensors if one.tensor == HIDDEN)
    assert hidden.before is not None
    assert hidden.after is not None
    with torch.no_grad():
        before, after = (loaded(Mlp(width), _tensors(one))(digits.test_images) for one in (second, aligned))
    middle = len(line.values["accuracy"]) // 2
    return {
        "naive barrier": naive.barrier(),
        "barrier": line.barrier(),
        "naive midpoint": naive.values["accuracy"][middle],
        "midpoint": line.values["accuracy"][middle],
        "single": (line.values["accuracy"][0] + line.values["accuracy"][-1]) / 2,
        "function": float((before - after).abs().max()),
        "l2 before": found.l2_before,
        "l2 after": found.l2_after,
        "l2 drop": 1 - found.l2_after / found.l2_before,
        "overlap before": hidden.before.left,
        "overlap after": hidden.after.left,
        "R before": hidden.before.overlap,
        "R after": hidden.after.overlap,
        **{f"naive loss {place}": loss for place, loss in enumerate(naive.values["loss"])},
        **{f"loss {place}": loss for place, loss in enumerate(line.values["loss"])},
    }


def judge_line(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Hardly a barrier is left; the worst seed counts."""
    barriers = (f"{WIDTH} naive barrier", f"{WIDTH} barrier")
    midpoints = (f"{WIDTH} naive midpoint", f"{WIDTH} midpoint")
    narrow, wide = (each(runs, f"{width} barrier") for width in (WIDTHS[0], WIDTHS[-1]))
    return [
        at_most(
            "barrier by the naive one, worst seed",
            [run[f"{WIDTH} barrier"] / run[f"{WIDTH} naive barrier"] for run in runs],
            0.1,
            _from_to(runs, *barriers),
            of=max,
        ),
        at_least(
            "midpoint, beside a single network",
            each(runs, f"{WIDTH} midpoint", f"{WIDTH} single"),
            -0.015,
            _from_to(runs, *midpoints),
        ),
        at_most("change of the permuted network's outputs, worst seed", each(runs, f"{WIDTH} function"), 1e-4, of=max),
        claimed(
            f"barrier at width {WIDTHS[0]}, above that at {WIDTHS[-1]}",
            [one - other for one, other in zip(narrow, wide, strict=True)],
            0.0,
            several(runs, {str(width): f"{width} barrier" for width in WIDTHS}),
        ),
    ]


def judge_directions(runs: Sequence[Numbers]) -> Sequence[Row]:
    """The distance stays, the strong directions agree."""
    before, after = (mean(runs, f"{WIDTH} overlap {when}") for when in ("before", "after"))
    grown = [run[f"{WIDTH} overlap after"] / run[f"{WIDTH} overlap before"] for run in runs]
    return [
        at_most(
            "drop of the distance",
            each(runs, f"{WIDTH} l2 drop"),
            0.4,
            _from_to(runs, f"{WIDTH} l2 before", f"{WIDTH} l2 after"),
        ),
        at_least("growth of the ten strongest directions' overlap", [after / before], 5, f"{before:.3f} → {after:.3f}"),
        compared("the same by seed", ", ".join(map(number, grown))),
        compared("R", _from_to(runs, f"{WIDTH} R before", f"{WIDTH} R after")),
    ]


def _from_to(runs: Sequence[Numbers], before: str, after: str) -> str:
    return f"{number(mean(runs, before))} → {number(mean(runs, after))}"


def pair_plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """The line between two networks, and the barrier by width."""
    places = range(sum(name.startswith(f"{WIDTH} loss") for name in runs[0]))
    share = {place: place / (len(places) - 1) for place in places}
    lines = {
        "as they are": {share[place]: f"{WIDTH} naive loss {place}" for place in places},
        "matched": {share[place]: f"{WIDTH} loss {place}" for place in places},
    }
    widths = {
        "as they are": {float(width): f"{width} naive barrier" for width in WIDTHS},
        "matched": {float(width): f"{width} barrier" for width in WIDTHS},
    }
    return {
        "line": curves(
            runs, lines, f"Loss between two networks of width {WIDTH}", across="from one to the other", up="loss"
        ),
        "width": curves(runs, widths, "Barrier by width", across="width", up="barrier", log_x=True, log_y=True),
    }


def run_four(seed: int, folder: Path) -> Numbers:
    """Four networks, averaged by recipes: as they are, aligned to the first, and to the mean of the others."""
    digits = Digits.load()
    evaluate = _evaluator(WIDE, digits)
    models = _models(folder, WIDE, range(100 + 4 * seed, 104 + 4 * seed), digits)
    average = {
        "merge_method": "linear",
        "models": [{"model": model.path.name} for model in models],
        "parameters": {"weight": 1},
    }
    found = {"single": sum(evaluate(_tensors(model))["accuracy"] for model in models) / len(models)}
    for name, to in (("naive", None), ("to the first", "first"), ("many", "mean")):
        alignment = {"alignment": {"method": "weight_matching", "to": to, "seed": seed}} if to else {}
        with Checkpoint.open(merged(folder, name.replace(" ", "-"), {**average, **alignment})) as result:
            found[name] = evaluate(_tensors(result))["accuracy"]
    return found


def judge_four(runs: Sequence[Numbers]) -> Sequence[Row]:
    """MergeMany is far ahead of plain averaging."""
    return [
        at_least("MergeMany, ahead of the naive mean", each(runs, "many", "naive"), 0.15, f"{mean(runs, 'many'):.3f}"),
        compared(
            "others", several(runs, {"naive": "naive", "aligned to the first": "to the first", "single": "single"})
        ),
    ]


def four_plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Averages beside single networks."""
    names = {"naive": "as they are", "to the first": "aligned to the first", "many": "MergeMany", "single": "single"}
    return {"accuracy": scores(runs, names, "Accuracy of the average of four networks", across="accuracy")}


def _tensors(weights: Weights) -> Mapping[str, Tensor]:
    return Segment(weights, weights, 0.0)


_SETUP = (
    "Networks 64-w-w-10 learn 1,257 digits from different seeds: Adam at 1e-3 with a weight decay of 1e-2, 40 epochs. "
)

PAIR = Experiment(
    "pair",
    "Two networks, matched",
    f"{_SETUP}Losses are those on 540 other images, at 11 points of the line; bars hold for w = {WIDTH}.",
    run_pair,
    range(4),
    (
        Claim(
            "Git Re-Basin",
            "https://arxiv.org/abs/2209.04836",
            "Once their units are permuted, independently trained networks can be averaged: no barrier is left "
            "between wide ResNets on CIFAR-10; and the wider, the lower it is.",
            judge_line,
        ),
        Claim(
            "Analysis of weight matching",
            "https://arxiv.org/abs/2402.04051",
            "Matching does not bring networks much closer; it aligns the singular vectors of large singular values.",
            judge_directions,
        ),
    ),
    pair_plots,
    quick=1,
)
FOUR = Experiment(
    "four",
    "Four networks, matched",
    f"{_SETUP}Four of width {WIDE}, averaged by recipes.",
    run_four,
    range(4),
    (
        Claim(
            "Git Re-Basin, many models",
            "https://arxiv.org/abs/2209.04836",
            "Matching each network to the mean of the others merges several at once.",
            judge_four,
        ),
    ),
    four_plots,
)
