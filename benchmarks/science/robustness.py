"""WiSE-FT: half way between a robust base and its fine-tune one has most of both. BANG: more so where the fine-tune is
not over-confident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from app.drawing.svg import Drawing
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
    several,
)
from benchmarks.science.nets import Mlp, accuracy, loaded, merged, save, train
from benchmarks.science.plots import curves
from benchmarks.science.soups import images

WIDTH, FIRST = 512, 150
ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))
"""As the authors go from one to the other."""
COPIES, NOISE = 20, 0.2
TUNED = {"plain": (0.0, 0.0), "smoothed": (0.2, 0.0), "mixed": (0.0, 0.2)}
"""How much the fine-tunes' labels are smoothed, and α of Mixup."""


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by one pixel at most in each direction, with noise."""
    square = pixels.reshape(-1, 8, 8)
    moves = torch.randint(-1, 2, (len(square), 2), generator=generator).tolist()
    moved = torch.stack([image.roll(tuple(move), (0, 1)) for image, move in zip(square, moves, strict=True)])
    return (moved + NOISE * torch.randn(moved.shape, generator=generator)).reshape(pixels.shape)


def run(seed: int, folder: Path) -> Numbers:
    """Train the base and the fine-tunes, merge the plain one at each α and the others half way."""
    pixels, labels = images()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    base = Mlp(WIDTH)
    many = torch.cat([shifted(pixels[:FIRST], generator) for _ in range(COPIES)])
    adam = torch.optim.Adam(base.parameters())
    train(base, many, labels[:FIRST].repeat(COPIES), epochs=4, optimizer=adam, batch=64)
    save(base, folder / "base")
    for name, (smoothing, mixing) in TUNED.items():
        tuned = Mlp(WIDTH)
        tuned.load_state_dict(base.state_dict())
        adam = torch.optim.Adam(tuned.parameters(), lr=1e-3)
        ways = {"smoothing": smoothing, "mixing": mixing}
        train(tuned, pixels[:1000], labels[:1000], epochs=100, optimizer=adam, batch=64, **ways)
        save(tuned, folder / name)
    clean, known = pixels[1000:], labels[1000:]
    other = shifted(clean, generator)
    found: dict[str, float] = {}

    def measure(name: str, source: Path) -> None:
        net = loaded(Mlp(WIDTH), source)
        with torch.no_grad():
            found[f"clean {name}"], found[f"shifted {name}"] = accuracy(net(clean), known), accuracy(net(other), known)
            found[f"confidence {name}"] = _confidence(net, other)

    for alpha in ALPHAS:
        measure(f"{alpha}", _half_way(folder, "plain", alpha))
    for name in ("smoothed", "mixed"):
        measure(name, folder / name)
        measure(f"half {name}", _half_way(folder, name, 0.5))
    return found


def _half_way(folder: Path, tuned: str, alpha: float) -> Path:
    recipe = {"merge_method": "wise_ft", "base_model": "base", "models": [{"model": tuned}]}
    return merged(folder, f"{tuned}-at-{alpha}", recipe | {"parameters": {"alpha": alpha}})


def _confidence(net: nn.Module, pixels: Tensor) -> float:
    """The mean probability that is given to what is found the likeliest."""
    return float(net(pixels).softmax(1).max(1).values.mean())


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """At α = ½ much more robust than the fine-tune, hardly worse on clean images."""
    best = max(ALPHAS[1:-1], key=lambda alpha: mean(runs, f"shifted {alpha}"))
    ends = max(mean(runs, f"shifted {alpha}") for alpha in (0.0, 1.0))
    return [
        at_least(
            "α = ½ beside the fine-tune, shifted images",
            each(runs, "shifted 0.5", "shifted 1.0"),
            0.05,
            f"{mean(runs, 'shifted 0.5'):.3f}",
        ),
        at_least(
            "α = ½ beside the fine-tune, clean images",
            each(runs, "clean 0.5", "clean 1.0"),
            -0.015,
            f"{mean(runs, 'clean 0.5'):.3f}",
        ),
        at_least(
            f"the best α ({best:g}) beside both ends, shifted images", [mean(runs, f"shifted {best}") - ends], 0.0
        ),
        claimed("α = ½ beside the fine-tune, clean images", each(runs, "clean 0.5", "clean 1.0"), 0.0),
    ]


def judge_balanced(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Smoothed labels make it less sure of itself, and no worse half way."""
    return [
        at_most(
            "confidence on shifted images, labels smoothed, beside plain",
            each(runs, "confidence smoothed", "confidence 1.0"),
            -0.2,
            f"{mean(runs, 'confidence 1.0'):.3f} → {mean(runs, 'confidence smoothed'):.3f}",
        ),
        at_least(
            "half way, shifted images, labels smoothed, beside plain",
            each(runs, "shifted half smoothed", "shifted 0.5"),
            -0.005,
            f"{mean(runs, 'shifted half smoothed'):.3f}",
        ),
        claimed(
            "half way, shifted images, labels smoothed, ahead of plain",
            each(runs, "shifted half smoothed", "shifted 0.5"),
            0.0,
        ),
        claimed(
            "half way, shifted images, Mixup, ahead of plain",
            each(runs, "shifted half mixed", "shifted 0.5"),
            0.0,
            f"{mean(runs, 'shifted half mixed'):.3f}",
        ),
        compared(
            "half way, clean images",
            several(runs, {"plain": "clean 0.5", "smoothed": "clean half smoothed", "Mixup": "clean half mixed"}),
        ),
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Both accuracies along the way."""
    lines = {f"{kind} images": {alpha: f"{kind} {alpha}" for alpha in ALPHAS} for kind in ("clean", "shifted")}
    label = "Accuracy on clean and on shifted images between the base and its fine-tune"
    return {"way": curves(runs, lines, label, across="α: 0 is the base, 1 the fine-tune", up="accuracy")}


EXPERIMENT = Experiment(
    "robustness",
    "Between a robust base and its fine-tune",
    f"A network 64-512-512-10 learns from 150 digits, each moved and made noisy in {COPIES} ways, and is fine-tuned on "
    "1,000 clean ones. Shifted images are moved by up to a pixel and noisy; 797 of either kind test.",
    run,
    range(4),
    (
        Claim(
            "WiSE-FT",
            "https://arxiv.org/abs/2109.01903",
            "Interpolating between a zero-shot model and its fine-tune is better by 4 to 6 points under five shifts "
            "of ImageNet than earlier work, and by 1.6 points on ImageNet itself.",
            judge,
        ),
        Claim(
            "BANG",
            "https://arxiv.org/abs/2309.17230",
            "Fine-tunes are over-confident on shifted data; with label smoothing or Mixup against that, WiSE-FT is "
            "better there.",
            judge_balanced,
        ),
    ),
    plots,
)
