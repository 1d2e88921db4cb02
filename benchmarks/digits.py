"""Four tasks on scikit-learn's handwritten digits: one base, four fine-tunes, real data, under a minute.

A trunk 64-512-512 with four frozen heads (digit, parity, at least five, modulo three) is trained on 40 images for all
tasks at once; each task then fine-tunes the trunk alone on the training set. Everything is seeded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

TASKS = {"digit": 10, "parity": 2, "at least 5": 2, "modulo 3": 3}
FIRST_IMAGES = 40
SHARD_BYTES = 300_000


class Net(nn.Module):
    """64 pixels → two hidden layers → one head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        self.heads = nn.ModuleDict({task.replace(" ", "_"): nn.Linear(512, classes) for task, classes in TASKS.items()})

    def forward(self, images: Tensor, task: str) -> Tensor:
        return self.heads[task.replace(" ", "_")](self.trunk(images))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Digits:
    """Training and test images `[n, 64]`, and for each task their labels `[n]`."""

    images: Tensor
    labels: Mapping[str, Tensor]
    test_images: Tensor
    test_labels: Mapping[str, Tensor]

    @classmethod
    def load(cls, seed: int = 0) -> Digits:
        found = load_digits()
        images = torch.tensor(found.data / 16.0, dtype=torch.float32)
        digit = torch.tensor(found.target)
        order = torch.randperm(len(digit), generator=torch.Generator().manual_seed(seed))
        train, test = order[: len(order) * 7 // 10], order[len(order) * 7 // 10 :]
        labels = {"digit": digit, "parity": digit % 2, "at least 5": (digit >= 5).long(), "modulo 3": digit % 3}
        known, held_out = ({task: label[part] for task, label in labels.items()} for part in (train, test))
        return cls(images[train], known, images[test], held_out)


def train_models(folder: Path, digits: Digits, seed: int = 0) -> list[str]:
    """Train base and fine-tunes and save each as sharded bf16 safetensors; the folder names, base first."""
    base = _train_base(digits, seed)
    save_checkpoint(base, folder / "base")
    names = ["base"]
    for task in TASKS:
        tuned = _fine_tune(base, digits, task, seed)
        names.append(task.replace(" ", "-"))
        save_checkpoint(tuned, folder / names[-1])
    return names


def save_checkpoint(net: Net, folder: Path) -> None:
    """The Hugging Face layout: shards of bf16 tensors and an index."""
    folder.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in net.state_dict().items():
        stored = tensor.to(torch.bfloat16).contiguous()
        if shards[-1] and sum(kept.nbytes for kept in shards[-1].values()) + stored.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = stored
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "digits-mlp", "torch_dtype": "bfloat16"}))


def load_checkpoint(folder: Path) -> Net:
    """A saved network, in float32."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            state |= {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    net = Net()
    net.load_state_dict(state)
    return net


@torch.no_grad()
def accuracies(net: Net, digits: Digits) -> dict[str, float]:
    """Share of the test images that each task gets right."""
    return {
        task: float((net(digits.test_images, task).argmax(1) == digits.test_labels[task]).float().mean())
        for task in TASKS
    }


def _train_base(digits: Digits, seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    images = digits.images[:FIRST_IMAGES]
    for _ in range(200):
        optimizer.zero_grad()
        losses = [nn.functional.cross_entropy(net(images, task), digits.labels[task][:FIRST_IMAGES]) for task in TASKS]
        torch.stack(losses).sum().backward()
        optimizer.step()
    return net


def _fine_tune(base: Net, digits: Digits, task: str, seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net()
    net.load_state_dict(base.state_dict())
    optimizer = torch.optim.Adam(net.trunk.parameters(), lr=3e-4)
    for _ in range(20):
        for batch in torch.randperm(len(digits.images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(digits.images[batch], task), digits.labels[task][batch]).backward()
            optimizer.step()
    return net
