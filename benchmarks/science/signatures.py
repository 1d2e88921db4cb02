"""Robust weight signatures: what training on blurred images does to the first layers makes a network that never saw one
read them better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d

from app.drawing.svg import Drawing
from benchmarks.digits import Digits
from benchmarks.science.harness import Claim, Experiment, Numbers, Row, at_least, at_most, claimed, each, exactly, mean
from benchmarks.science.nets import Cnn, accuracy, loaded, save, train
from benchmarks.science.plots import scores
from merge_core.patching import Patch, patch

FIRST_IMAGES = 300
LAYERS = 3
KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).reshape(1, 1, 3, 3) / 16


def blurred(images: Tensor) -> Tensor:
    """`[n, 1, 8, 8]`, smoothed twice."""
    return conv2d(conv2d(images, KERNEL, padding=1), KERNEL, padding=1)


def noisy(images: Tensor) -> Tensor:
    """With noise on every pixel, drawn from torch's generator."""
    return images + 0.4 * torch.randn(images.shape)


CORRUPTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "blur": blurred,
    "contrast": lambda images: 0.5 + 0.2 * (images - 0.5),
    "inversion": lambda images: 1 - images,
    "noise": noisy,
}


def run(seed: int, folder: Path) -> Numbers:
    """Train the networks, extract the signatures, put them on; that against blur is quantised too, and taken off."""
    digits = Digits.load()
    images, test = (each.reshape(-1, 1, 8, 8) for each in (digits.images, digits.test_images))
    labels, test_labels = (each["digit"] for each in (digits.labels, digits.test_labels))
    torch.manual_seed(seed)
    origin = _trained(Cnn(), images[:FIRST_IMAGES], labels[:FIRST_IMAGES], epochs=30)
    amount = torch.rand(len(images), 1, 1, 1)
    save(origin, folder / "origin")

    def begin(name: str, shown: Tensor) -> None:
        torch.manual_seed(seed)
        net = Cnn()
        net.load_state_dict(origin.state_dict())
        save(_trained(net, shown, labels, epochs=15), folder / name)

    begin("clean", images)
    numbers = {"clean": _right(folder / "clean", test, test_labels)}
    for name, corrupt in CORRUPTIONS.items():
        begin(name, images + amount * (corrupt(images) - images))
        corrupted = corrupt(test)
        extraction = {"operation": "extract", "base_model": "origin", "clean": "clean", "corrupted": [name]}
        patched(folder, f"{name}-dense", {**extraction, "layers": LAYERS, "encoding": "dense"})
        on = _applied(folder, f"{name}-dense")
        numbers |= {
            f"{name}: clean": _right(folder / "clean", corrupted, test_labels),
            f"{name}: trained": _right(folder / name, corrupted, test_labels),
            f"{name}: patched": _right(on, corrupted, test_labels),
            f"{name}: patched, clean images": _right(on, test, test_labels),
            f"{name}: shallow": _first_beside_last(folder / "clean", folder / name),
        }
        if name == "blur":
            patched(folder, "levels", {**extraction, "layers": LAYERS, "encoding": "levels", "levels": 256})
            on = _applied(folder, "levels")
            off = patched(folder, "off", {"operation": "remove", "model": on.name})
            wanted, found = (load_file(each / "model.safetensors") for each in (folder / "clean", off))
            is_same = wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)
            numbers |= {
                "blur: levels": _right(on, corrupted, test_labels),
                "blur: levels, clean images": _right(on, test, test_labels),
                "removed": float(is_same),
            }
    return numbers


def patched(folder: Path, name: str, document: Mapping[str, Any]) -> Path:
    """Extract, apply or remove, all in one folder."""
    return patch(Patch.from_data(dict(document)), folder / name, roots=[folder], threads=1).folder


def _applied(folder: Path, signature: str) -> Path:
    patches = [{"patch": signature, "strength": 1.0}]
    return patched(folder, f"on-{signature}", {"operation": "apply", "model": "clean", "patches": patches})


def _right(source: Path, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return accuracy(loaded(Cnn(), source)(images), labels)


def _first_beside_last(clean: Path, corrupted: Path) -> float:
    """How much the first layer differs, relative to its size, by how much the head does."""
    one, other = (load_file(folder / "model.safetensors") for folder in (clean, corrupted))
    first, last = (
        float((other[name] - one[name]).norm() / one[name].norm()) for name in ("convs.0.weight", "head.weight")
    )
    return first / last


def _trained(net: Cnn, images: Tensor, labels: Tensor, *, epochs: int) -> Cnn:
    train(net, images, labels, epochs=epochs, optimizer=torch.optim.Adam(net.parameters(), lr=1e-3), batch=32)
    return net


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Much better on blurred images, hardly worse on clean ones; quantised as good; off again without a trace."""
    told = (
        f"{mean(runs, 'blur: clean'):.3f} → {mean(runs, 'blur: patched'):.3f}, "
        f"trained so {mean(runs, 'blur: trained'):.3f}"
    )
    changes = [abs(mean(runs, f"blur: levels{on}") - mean(runs, f"blur: patched{on}")) for on in ("", ", clean images")]
    return [
        at_least(f"gain on blurred images, {LAYERS} layers", each(runs, "blur: patched", "blur: clean"), 0.05, told),
        at_least(
            "change on clean images",
            each(runs, "blur: patched, clean images", "clean"),
            -0.02,
            f"{mean(runs, 'clean'):.3f} → {mean(runs, 'blur: patched, clean images'):.3f}",
        ),
        at_most("what 256 levels change of either", changes, 0.005, of=max),
        exactly("removed", all(run["removed"] for run in runs), "bit for bit", "not the same"),
        *(
            claimed(f"gain against {name}, {LAYERS} layers", each(runs, f"{name}: patched", f"{name}: clean"), 0.05)
            for name in CORRUPTIONS
            if name != "blur"
        ),
        *(
            claimed(f"the first layer's change by the head's, {name}", each(runs, f"{name}: shallow"), 1.0)
            for name in CORRUPTIONS
        ),
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """What the signature does against each corruption."""
    kinds = {"clean": "as it was", "patched": "with the signature", "trained": "trained so"}
    names = {f"{name}: {kind}": f"{name}, {title}" for name in CORRUPTIONS for kind, title in kinds.items()}
    return {"corruptions": scores(runs, names, "Accuracy on corrupted images", across="accuracy")}


EXPERIMENT = Experiment(
    "signatures",
    "Robustness as a patch",
    "A network of four convolutions is begun on 300 images and trained on, once with 1,257 clean ones and once with "
    "each corrupted by an amount of its own; fully corrupted ones test. (Trained on fully blurred ones, a network "
    "forgets clean ones so much that its signature costs 0.05 to 0.10 there.)",
    run,
    range(3),
    (
        Claim(
            "Robust weight signatures",
            "https://arxiv.org/abs/2302.12480",
            "What training on corrupted data changes lies mostly in shallow layers; added to a clean model it makes "
            "that robust, and can be taken off again.",
            judge,
        ),
    ),
    plots,
)
