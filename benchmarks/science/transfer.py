"""Fine-tuning transfer (https://arxiv.org/abs/2503.20110): what a fine-tune learned on an old base helps a newer one.

The old base knows 40 images for four tasks at once, the new one was trained on with 80; the fine-tune saw every image,
for one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.digits import TASKS, Digits, Net, accuracies
from benchmarks.science.harness import Experiment, Numbers, Row, at_least, mean
from benchmarks.science.nets import loaded, merged, save, train

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
    gain = mean(runs, "transferred") - mean(runs, "new")
    others = mean(runs, "transferred, others") - mean(runs, "new, others")
    told = f"  ({mean(runs, 'new'):.3f} → {mean(runs, 'transferred'):.3f}; fine-tuned {mean(runs, 'new-tuned'):.3f})"
    return [at_least("gain at the task", gain, 0.03, told), at_least("change at the other tasks", others, -0.03)]


EXPERIMENT = Experiment("Fine-tuning transfer", "https://arxiv.org/abs/2503.20110", run, range(4), judge)
