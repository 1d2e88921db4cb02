"""DAREx-q: a fine-tune of which 99 % were dropped, the rest divided by the q that
changes outputs least, which is found without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from app.drawing.svg import Drawing
from benchmarks.digits import Digits, accuracies, load_checkpoint
from benchmarks.science.four_tasks import last_hidden
from benchmarks.science.harness import Claim, Experiment, Numbers, Row, at_least, compared, each, mean, several
from benchmarks.science.nets import merged, save
from benchmarks.science.plots import curves
from benchmarks.science.transfer import TASK, base, fine_tuned
from merge_core.learning import Cached, Layout, Merged, StateVectors
from merge_core.measuring import Dropped, near, search_divisor

DROP, MASKS = 0.99, 4
EPOCHS = 60
"""Far enough from the base for a hundredth of the way, made a hundred times as large, to break the model."""
DIVISORS = tuple(round((1 - DROP) * step, 4) for step in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10))
UNLABELLED = 256
CACHE = 2**26
"""Bytes: all that is left of a task vector of so small a network."""


def run(seed: int, folder: Path) -> Numbers:
    """The q whose last hidden layer is nearest to the fine-tune's, as the authors search it; and accuracies by q, each
    the mean over all masks.
    """
    digits = Digits.load()
    start = base(seed, digits)
    save(start, folder / "base", torch.bfloat16)
    save(fine_tuned(start, digits, epochs=EPOCHS), folder / TASK, torch.bfloat16)
    change = _change(folder, digits.images[:UNLABELLED])
    best = search_divisor(change, DROP).q

    def right(divisor: float) -> float:
        made = [load_checkpoint(_dropped(folder, divisor, mask)) for mask in range(MASKS)]
        return fmean(accuracies(net, digits)[TASK] for net in made)

    alone = {name: accuracies(load_checkpoint(folder / name), digits)[TASK] for name in ("base", TASK)}
    by_divisor = {divisor: right(divisor) for divisor in DIVISORS}
    return {
        "base": alone["base"],
        "tuned": alone[TASK],
        "dare": by_divisor[DIVISORS[0]],
        "darex": right(best),
        "best": max(by_divisor.values()),
        "q": best,
        **{f"right {divisor}": found for divisor, found in by_divisor.items()},
        **{f"change {divisor}": change(divisor) for divisor in DIVISORS},
    }


def _dropped(folder: Path, divisor: float, mask: int) -> Path:
    parameters = {"drop_rate": DROP, "q": divisor, "lambda": 1}
    recipe = {"merge_method": "darex", "base_model": "base", "models": [{"model": TASK}], "seed": mask}
    return merged(folder, f"{divisor}-{mask}", {**recipe, "dtype": "float32", "parameters": parameters})


def _change(folder: Path, images: Tensor) -> Callable[[float], float]:
    """How much the last hidden layer of what the method drops and divides differs from the fine-tune's, over masks."""
    start, tuned = (load_checkpoint(folder / name).state_dict() for name in ("base", TASK))
    fine = last_hidden(load_checkpoint(folder / TASK), images)
    nets = [load_checkpoint(folder / "base") for _ in range(MASKS)]
    task_vectors = StateVectors(start, [tuned])
    layout = Layout.shared({name: task_vectors.shape(name) for name in start})
    merges = [
        Merged(net, Cached(Dropped(task_vectors, DROP, seed=mask), CACHE), layout) for mask, net in enumerate(nets)
    ]

    def change(divisor: float) -> float:
        for one in merges:
            one.write(torch.tensor([[1 / divisor]], dtype=torch.float64))
        return near([float((last_hidden(net, images) - fine).abs().mean()) for net in nets])

    return change


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Far ahead of DARE, and ahead of the base."""
    return [
        at_least(f"{DROP} dropped, ahead of DARE", each(runs, "darex", "dare"), 0.2, f"{mean(runs, 'darex'):.3f}"),
        at_least("ahead of the base", each(runs, "darex", "base"), 0.0),
        compared(
            "others", several(runs, {"base": "base", "fine-tuned": "tuned", "DARE": "dare", "best q of all": "best"})
        ),
        compared("q that was found, in 1 − p", ", ".join(f"{run['q'] / (1 - DROP):.1f}" for run in runs)),
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Why the q can be found without labels: outputs change least about where accuracy is highest."""
    shares = [divisor / (1 - DROP) for divisor in DIVISORS]
    right = {"accuracy": {share: f"right {divisor}" for share, divisor in zip(shares, DIVISORS, strict=True)}}
    change = {
        "change of the last hidden layer": {
            share: f"change {divisor}" for share, divisor in zip(shares, DIVISORS, strict=True)
        }
    }
    across = "q, in 1 − p; 1 is DARE"
    return {
        "accuracy": curves(runs, right, "Accuracy by q", across=across, up="accuracy"),
        "change": curves(runs, change, "Change of the last hidden layer by q", across=across, up="change"),
    }


EXPERIMENT = Experiment(
    "darex",
    "A fine-tune of which 99 % are dropped",
    "The trunk of the four tasks learns from 40 images and is fine-tuned on 1,257 for digits, for so long that what "
    "DARE leaves of it at 99 % breaks it. q is searched as its authors do: it is the one with which the last hidden "
    "layer changes least on 256 images without labels, over four masks.",
    run,
    range(4),
    (
        Claim(
            "DAREx-q",
            "https://arxiv.org/abs/2410.09344",
            "Dividing by another q than 1 − p boosts what is left at high drop rates, by more than 30 % on COLA and "
            "SST2, and far more for decoders.",
            judge,
        ),
    ),
    plots,
    quick=1,
)
