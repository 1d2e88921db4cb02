"""WIDEN: a model that was trained on for long is absorbed into one that hardly was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from app.drawing.svg import Drawing
from benchmarks.digits import Digits, Net, accuracies, load_checkpoint
from benchmarks.science.harness import (
    Claim,
    Experiment,
    Numbers,
    Row,
    at_least,
    claimed,
    compared,
    each,
    mean,
    number,
    several,
)
from benchmarks.science.nets import merged, save
from benchmarks.science.plots import scores
from benchmarks.science.transfer import base

TASK, OTHERS = "digit", ("parity", "at least 5", "modulo 3")
EPOCHS, BATCH = 20, 32
SMALL, LARGE = 4e-5, 4e-3
ALL = ("small", "large", "average", "TA", "TIES", "widen")


def _trained(net: Net, digits: Digits, tasks: Sequence[str], optimizer: torch.optim.Optimizer) -> Net:
    for _ in range(EPOCHS):
        for some in torch.randperm(len(digits.images)).split(BATCH):
            optimizer.zero_grad()
            losses = [cross_entropy(net(digits.images[some], task), digits.labels[task][some]) for task in tasks]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net


def run(seed: int, folder: Path) -> Numbers:
    """Train both, merge them by four methods."""
    digits = Digits.load()
    start = base(seed, digits)
    small, large = Net(), Net()
    for net in (small, large):
        net.load_state_dict(start.state_dict())
    _trained(small, digits, (TASK,), torch.optim.Adam(small.trunk.parameters(), lr=SMALL))
    _trained(large, digits, OTHERS, torch.optim.Adam(large.parameters(), lr=LARGE))
    nets = {"base": start, "small": small, "large": large}
    for name, net in nets.items():
        save(net, folder / name)
    models = [{"model": "small"}, {"model": "large"}]
    on_base = {"base_model": "base", "models": models}
    recipes = {
        "average": {"merge_method": "linear", "models": models, "parameters": {"weight": 1}},
        "TA": {"merge_method": "task_arithmetic", **on_base, "parameters": {"weight": 1}},
        "TIES": {"merge_method": "ties", "semantics": "paper", **on_base, "parameters": {"density": 0.2, "lambda": 1}},
        "widen": {"merge_method": "widen", **on_base},
    }
    made = {name: merged(folder, name, recipe) for name, recipe in recipes.items()}
    found = {}
    for name, place in {**made, "small": folder / "small", "large": folder / "large"}.items():
        right = accuracies(load_checkpoint(place), digits)
        found |= {f"{name} one": right[TASK], f"{name} others": sum(right[task] for task in OTHERS) / len(OTHERS)}
    moved = [_distance(start, nets[name]) for name in ("small", "large")]
    return found | {"ratio": moved[1] / moved[0]}


def _distance(one: Net, other: Net) -> float:
    with torch.no_grad():
        both = zip(one.parameters(), other.parameters(), strict=True)
        return float(sum((a - b).square().sum() for a, b in both)) ** 0.5


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Ahead of TIES and of the average at what either of the two had learned; of TIES at the large one's tasks it is
    ahead by less here than the bar for the other ones.
    """

    def ahead(what: str, other: str, told: str, bar: float, row: Callable[..., Row] = at_least) -> Row:
        both = f"{mean(runs, f'widen {what}'):.3f} and {mean(runs, f'{other} {what}'):.3f}"
        return row(f"{told}, ahead of {other}", each(runs, f"widen {what}", f"{other} {what}"), bar, both)

    return [
        ahead("one", "TIES", "the small one's task", 0.02),
        ahead("one", "average", "the small one's task", 0.01),
        ahead("others", "average", "the large one's tasks", 0.01),
        ahead("others", "TIES", "the large one's tasks", 0.02, claimed),
        ahead("one", "TA", "the small one's task", 0.0, claimed),
        ahead("others", "TA", "the large one's tasks", 0.0, claimed),
        compared("the small one's task", several(runs, {name: f"{name} one" for name in ALL})),
        compared("the large one's tasks", several(runs, {name: f"{name} others" for name in ALL})),
        compared("the large one moved so many times as far", number(mean(runs, "ratio"))),
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Both accuracies of each."""
    what = {"one": "the small one's task", "others": "the large one's tasks"}
    names = {f"{name} {which}": f"{name}, {told}" for which, told in what.items() for name in ALL}
    return {"accuracy": scores(runs, names, "Accuracy of a small and a large change, merged", across="accuracy")}


EXPERIMENT = Experiment(
    "absorbing",
    "A large change absorbed",
    "The trunk of the four tasks: one model is fine-tuned with small steps for digits, its trunk alone; another one "
    f"is trained on with large steps for the three other tasks, all of it, and moves several times as far. {EPOCHS} "
    "epochs each.",
    run,
    range(3),
    (
        Claim(
            "WIDEN",
            "https://arxiv.org/abs/2408.03092",
            "Weighing magnitudes and directions by column injects the abilities of a model that was pre-trained on "
            "into a chat model, where other methods lose abilities.",
            judge,
        ),
    ),
    plots,
    quick=1,
)
