"""Robust weight signatures (https://arxiv.org/abs/2302.12480): what training on blurred images does to the first layers
makes a network that never saw one read them better.

One network is begun on few images and trained on, once with clean and once with blurred images, each blurred by an
amount of its own. Tested is with images blurred entirely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks.digits import Digits
from benchmarks.science.harness import Experiment, Numbers, Row, at_least, at_most, mean
from benchmarks.science.nets import Cnn, accuracy, loaded, save, train
from merge_core.patching import Patch, patch

FIRST_IMAGES = 300
LAYERS = 3
KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).reshape(1, 1, 3, 3) / 16


def blurred(images: Tensor) -> Tensor:
    """`[n, 1, 8, 8]`, smoothed twice."""
    return conv2d(conv2d(images, KERNEL, padding=1), KERNEL, padding=1)


def run(seed: int, folder: Path) -> Numbers:
    """Train the three networks, extract the signature, put it on and take it off, evaluate."""
    digits = Digits.load()
    images, test = (each.reshape(-1, 1, 8, 8) for each in (digits.images, digits.test_images))
    labels, test_labels = (each["digit"] for each in (digits.labels, digits.test_labels))
    torch.manual_seed(seed)
    origin = _trained(Cnn(), images[:FIRST_IMAGES], labels[:FIRST_IMAGES], epochs=30)
    amount = torch.rand(len(images), 1, 1, 1)
    seen = {"clean": images, "blurred": images + amount * (blurred(images) - images)}
    save(origin, folder / "origin")
    for name, shown in seen.items():
        torch.manual_seed(seed)
        net = Cnn()
        net.load_state_dict(origin.state_dict())
        save(_trained(net, shown, labels, epochs=15), folder / name)
    extraction = {"operation": "extract", "base_model": "origin", "clean": "clean", "corrupted": ["blurred"]}
    for name, stored in (("whole", {"encoding": "dense"}), ("levels", {"encoding": "levels", "levels": 256})):
        patched(folder, name, {**extraction, "layers": LAYERS, **stored})
        patches = [{"patch": name, "strength": 1.0}]
        patched(folder, f"on-{name}", {"operation": "apply", "model": "clean", "patches": patches})
    off = patched(folder, "off", {"operation": "remove", "model": "on-levels"})
    wanted, found = (load_file(each / "model.safetensors") for each in (folder / "clean", off))
    is_same = wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    numbers = {"removed": float(is_same)}
    for name in ("clean", "blurred", "on-whole", "on-levels"):
        with torch.no_grad():
            net = loaded(Cnn(), folder / name)
            numbers[name] = accuracy(net(test), test_labels)
            numbers[f"{name}, blurred"] = accuracy(net(blurred(test)), test_labels)
    return numbers


def patched(folder: Path, name: str, document: Mapping[str, Any]) -> Path:
    """Extract, apply or remove, all in one folder."""
    return patch(Patch.from_data(dict(document)), folder / name, roots=[folder], threads=1).folder


def _trained(net: Cnn, images: Tensor, labels: Tensor, *, epochs: int) -> Cnn:
    train(net, images, labels, epochs=epochs, optimizer=torch.optim.Adam(net.parameters(), lr=1e-3), batch=32)
    return net


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Much better on blurred images, hardly worse on clean ones; quantised as good; off again without a trace."""
    one = {name: mean(runs, name) for name in runs[0]}
    gain, loss = one["on-whole, blurred"] - one["clean, blurred"], one["on-whole"] - one["clean"]
    blur = f"  ({one['clean, blurred']:.3f} → {one['on-whole, blurred']:.3f}; trained so {one['blurred, blurred']:.3f})"
    quantised = max(abs(one[f"on-levels{on}"] - one[f"on-whole{on}"]) for on in ("", ", blurred"))
    is_same = all(run["removed"] for run in runs)
    return [
        at_least(f"gain on blurred images, {LAYERS} layers", gain, 0.05, blur),
        at_least("change on clean images", loss, -0.02, f"  ({one['clean']:.3f} → {one['on-whole']:.3f})"),
        at_most("what 256 levels change of either", quantised, 0.005),
        Row("removed", "bit for bit" if is_same else "not the same", "bit for bit", is_same),
    ]


EXPERIMENT = Experiment(
    "Robust weight signature against blur", "https://arxiv.org/abs/2302.12480", run, range(3), judge
)
