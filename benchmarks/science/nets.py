"""The small networks that are trained on scikit-learn's digits, and how they become files and come back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from merge_core.merge import merge
from merge_core.recipe import Recipe


class Mlp(nn.Module):
    """64 pixels → two hidden layers → ten digits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (64, width, width, 10)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, images: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            images = layer(images).relu()
        return last(images)  # type: ignore[no-any-return]


class Cnn(nn.Module):
    """8 × 8 pixels → four convolutions, a pooling after every other → ten digits."""

    def __init__(self, channels: Iterable[int] = (16, 32, 32, 64)) -> None:
        super().__init__()
        sizes = [1, *channels]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.head = nn.Linear(4 * sizes[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            images = conv(images).relu()
            if i % 2:
                images = nn.functional.max_pool2d(images, 2)
        return self.head(images.flatten(1))  # type: ignore[no-any-return]


def train(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    batch: int,
    smoothing: float = 0.0,
    mixing: float = 0.0,
) -> None:
    """Minimise the cross entropy, images in a new random order in every epoch; with smoothed labels, or with each image
    mixed with another one (Mixup; the share of the first is drawn from Beta(mixing, mixing)).
    """
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            shown, known = images[chosen], labels[chosen]
            if mixing:
                share = float(torch.distributions.Beta(mixing, mixing).sample())
                other = torch.randperm(len(chosen))
                outputs = net(share * shown + (1 - share) * shown[other])
                loss = share * cross_entropy(outputs, known) + (1 - share) * cross_entropy(outputs, known[other])
            else:
                loss = cross_entropy(net(shown), known, label_smoothing=smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of the images that are named right."""
    return float((outputs.argmax(1) == labels).float().mean())


def save(net: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """One safetensors file and a config."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in net.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "digits"}))
    return folder


def loaded(net: nn.Module, source: Path | Mapping[str, Tensor]) -> nn.Module:
    """The network with the tensors of a folder, or with these."""
    tensors = load_file(source / "model.safetensors") if isinstance(source, Path) else source
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return net.eval()


def merged(folder: Path, name: str, recipe: Mapping[str, Any]) -> Path:
    """Merge by a recipe whose models are folders beside the result."""
    return merge(Recipe.from_data(dict(recipe)), folder / name, roots=[folder], threads=1).folder
