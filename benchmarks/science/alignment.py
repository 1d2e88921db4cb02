"""Weight matching (https://arxiv.org/abs/2209.04836): networks trained from different seeds can be averaged once their
neurons are in the same order. With it the analysis of Ito et al. (https://arxiv.org/abs/2402.04051): they hardly come
closer, but their strong directions agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.digits import Digits
from benchmarks.science.harness import Experiment, Numbers, Row, at_least, at_most, mean
from benchmarks.science.nets import Mlp, accuracy, loaded, merged, save, train
from merge_core.alignment.derive import derive
from merge_core.alignment.matching import match
from merge_core.alignment.permutations import Permutations, Permuted
from merge_core.alignment.report import Segment, analyse, interpolation
from merge_core.alignment.spec import PermutationSpec
from merge_core.checkpoint import Checkpoint
from merge_core.weights import Weights

WIDTH, WIDE = 256, 512
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
    """Two networks: train, match, store the permutations and read them again, walk the line."""
    digits = Digits.load()
    evaluate = _evaluator(WIDTH, digits)
    first, second = _models(folder, WIDTH, (2 * seed, 2 * seed + 1), digits)
    spec = _spec(first)
    found = match(spec, first, second, seed=seed)
    Permutations(spec, {"second": found.indexed}).save(folder / "alignment.safetensors")
    indexed = Permutations.open(folder / "alignment.safetensors").models["second"]
    aligned = Permuted(second, spec, indexed)
    naive, line = (interpolation(evaluate, first, other) for other in (second, aligned))
    report = analyse(first, second, spec, indexed, top=10)
    (hidden,) = (each for each in report.tensors if each.tensor == HIDDEN)
    assert hidden.before is not None
    assert hidden.after is not None
    with torch.no_grad():
        before, after = (loaded(Mlp(WIDTH), _tensors(each))(digits.test_images) for each in (second, aligned))
    return {
        "naive barrier": naive.barrier(),
        "barrier": line.barrier(),
        "naive midpoint": naive.values["accuracy"][5],
        "midpoint": line.values["accuracy"][5],
        "single": (line.values["accuracy"][0] + line.values["accuracy"][-1]) / 2,
        "function": float((before - after).abs().max()),
        "l2 before": found.l2_before,
        "l2 after": found.l2_after,
        "overlap before": hidden.before.left,
        "overlap after": hidden.after.left,
        "R before": hidden.before.overlap,
        "R after": hidden.after.overlap,
    }


def judge_pair(runs: Sequence[Numbers]) -> Sequence[Row]:
    """The table's bars, the worst seed where it says so."""
    one = {name: mean(runs, name) for name in runs[0]}
    drop = 1 - one["l2 after"] / one["l2 before"]
    grown = one["overlap after"] / one["overlap before"]
    turned = f"R {one['R before']:.3f} → {one['R after']:.3f}"
    ratio = max(run["barrier"] / run["naive barrier"] for run in runs)
    return [
        at_most(
            "barrier by the naive one, worst seed", ratio, 0.1, f"  ({one['naive barrier']:.3f} → {one['barrier']:.3f})"
        ),
        at_least(
            "midpoint, beside a single network",
            one["midpoint"] - one["single"],
            -0.015,
            f"  ({one['naive midpoint']:.3f} → {one['midpoint']:.3f}; single {one['single']:.3f})",
        ),
        at_most("change of the permuted network's outputs", max(run["function"] for run in runs), 1e-4),
        at_most("drop of the distance", drop, 0.4, f"  ({one['l2 before']:.1f} → {one['l2 after']:.1f})"),
        at_least(
            "growth of the strong subspaces' overlap",
            grown,
            5,
            f"  ({one['overlap before']:.3f} → {one['overlap after']:.3f}; {turned})",
        ),
    ]


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
    one = {name: mean(runs, name) for name in runs[0]}
    told = f"  ({one['naive']:.3f} → {one['many']:.3f}; single {one['single']:.3f})"
    return [
        Row("mean of four aligned to the first", f"{one['to the first']:.3f}"),
        at_least("MergeMany, beside the naive mean", one["many"] - one["naive"], 0.15, told),
    ]


def _tensors(weights: Weights) -> Mapping[str, Tensor]:
    return Segment(weights, weights, 0.0)


PAIR = Experiment(
    f"Two networks of width {WIDTH}, matched", "https://arxiv.org/abs/2209.04836", run_pair, range(4), judge_pair
)
FOUR = Experiment(
    f"Four networks of width {WIDE}, matched", "https://arxiv.org/abs/2209.04836", run_four, range(2), judge_four
)
