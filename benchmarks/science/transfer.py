"""Fine-tuning transfer: what a fine-tune learned on an old base helps a newer one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from app.drawing.svg import Drawing
from benchmarks.digits import TASKS, Digits, Net, accuracies
from benchmarks.science.harness import Claim, Experiment, Numbers, Row, at_least, claimed, each, mean
from benchmarks.science.nets import loaded, merged, save, train
from benchmarks.science.plots import scores

OLD_IMAGES, NEW_IMAGES = 40, 80
TASK = "digit"


def _learn(net: Net, digits: Digits, images: int, steps: int) -> Net:
    """All tasks at once, on the first images."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [cross_entropy(net(digits.images[:images], task), digits.labels[task][:images]) for task in TASKS]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net


class _OneTask(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images, TASK)  # type: ignore[no-any-return]


def fine_tuned(base: Net, digits: Digits, *, epochs: int = 20) -> Net:
    """The trunk trained for one task on all images."""
    net = Net()
    net.load_state_dict(base.state_dict())
    optimizer = torch.optim.Adam(net.trunk.parameters(), lr=3e-4)
    train(_OneTask(net), digits.images, digits.labels[TASK], epochs=epochs, optimizer=optimizer, batch=32)
    return net


def base(seed: int, digits: Digits) -> Net:
    """The old base."""
    torch.manual_seed(seed)
    return _learn(Net(), digits, OLD_IMAGES, 200)


def run(seed: int, folder: Path) -> Numbers:
    """Train the four models, transfer by a recipe, evaluate."""
    digits = Digits.load()
    old = base(seed, digits)
    new = Net()
    new.load_state_dict(old.state_dict())
    _learn(new, digits, NEW_IMAGES, 200)
    nets = {"old": old, "old-tuned": fine_tuned(old, digits), "new": new, "new-tuned": fine_tuned(new, digits)}
    for name, net in nets.items():
        save(net, folder / name, torch.bfloat16)
    transferred = merged(
        folder,
        "transferred",
        {"merge_method": "transfer", "base_model": "new", "models": [{"model": "old-tuned", "base_model": "old"}]},
    )
    found = {name: accuracies(_net(folder / name), digits) for name in (*nets, transferred.name)}
    numbers = {name: measured[TASK] for name, measured in found.items()}
    return numbers | {f"{name}, others": _others(measured) for name, measured in found.items()}


def _net(folder: Path) -> Net:
    net = loaded(Net(), folder)
    assert isinstance(net, Net)
    return net


def _others(measured: Numbers) -> float:
    return sum(value for task, value in measured.items() if task != TASK) / (len(measured) - 1)


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Better than the new base at the task, hardly worse at the others."""
    told = f"{mean(runs, 'new'):.3f} → {mean(runs, 'transferred'):.3f}"
    return [
        at_least("gain at the task", each(runs, "transferred", "new"), 0.03, told),
        at_least("change at the other tasks", each(runs, "transferred, others", "new, others"), -0.03),
        claimed(
            "beside the new base's own fine-tune",
            each(runs, "transferred", "new-tuned"),
            0.0,
            f"{mean(runs, 'new-tuned'):.3f}",
        ),
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Bases, fine-tunes, and what was carried over."""
    names = {
        "old": "old base",
        "old-tuned": "old base, fine-tuned",
        "new": "new base",
        "transferred": "new base, with the old fine-tune",
        "new-tuned": "new base, fine-tuned",
    }
    return {"accuracy": scores(runs, names, "Accuracy at the task", across="accuracy")}


EXPERIMENT = Experiment(
    "transfer",
    "A fine-tune carried to a new base",
    "The trunk of the four tasks: the old base knows 40 images for all tasks at once, the new one was trained on "
    "with 80; the fine-tune of the old one saw 1,257, for digits alone. All of it is bfloat16.",
    run,
    range(4),
    (
        Claim(
            "Fine-tuning transfer",
            "https://arxiv.org/abs/2503.20110",
            "The changes of Llama 3.0 8B's fine-tune, added to Llama 3.1 8B, improve it by 46.9 % on IFEval without "
            "training, beyond its own fine-tune.",
            judge,
        ),
    ),
    plots,
    quick=1,
)
