"""How large small artifacts are: a signature of a real network's first layers, and sparse deltas by what changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from app.drawing.svg import Drawing
from benchmarks.science.harness import Claim, Experiment, Numbers, Row, at_least, at_most, compared, each, several
from benchmarks.science.plots import curves
from benchmarks.science.signatures import patched
from benchmarks.science.sparse import round_trip

STAGES = ((64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3))
"""Of ResNet-50: channels inside and between the blocks, and how many blocks."""
LAYERS = 7
"""Its first convolution and six of its blocks, as many as the authors take."""
CHANGED = (0.01, 0.05, 0.1, 0.2, 0.33, 0.5)
ELEMENTS = (1024, 2048)


def resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as torchvision has them."""

    def conv(name: str, norm: str, outputs: int, inputs: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs, size, size)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            yield f"{norm}.{tensor}", (outputs,)

    yield from conv("conv1", "bn1", 64, 3, 7)
    channels = 64
    for stage, (inside, outside, blocks) in enumerate(STAGES, 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            yield from conv(f"{at}.conv1", f"{at}.bn1", inside, channels, 1)
            yield from conv(f"{at}.conv2", f"{at}.bn2", inside, inside, 3)
            yield from conv(f"{at}.conv3", f"{at}.bn3", outside, inside, 1)
            if not block:
                yield from conv(f"{at}.downsample.0", f"{at}.downsample.1", outside, channels, 1)
            channels = outside
    yield from (("fc.weight", (1000, channels)), ("fc.bias", (1000,)))


def run(seed: int, folder: Path) -> Numbers:
    """The size of a model beside its signature, and of sparse deltas beside a model."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("origin", "clean", "corrupted"):
        (folder / name).mkdir()
        tensors = {tensor: torch.randn(shape, generator=generator) for tensor, shape in resnet50()}
        save_file(tensors, folder / name / "model.safetensors")
    signature = patched(
        folder,
        "signature",
        {
            "operation": "extract",
            "base_model": "origin",
            "clean": "clean",
            "corrupted": ["corrupted"],
            "layers": LAYERS,
            "levels": 256,
        },
    )
    stored = sum(file.stat().st_size for file in signature.glob("*.safetensors"))
    found = {"signature": (folder / "clean" / "model.safetensors").stat().st_size / stored}
    numbers = torch.randn(ELEMENTS, generator=generator).bfloat16()
    (folder / "base").mkdir()
    save_file({"weight": numbers}, folder / "base" / "model.safetensors")
    for share in CHANGED:
        is_changed = torch.rand(ELEMENTS, generator=generator) < share
        (folder / f"changed-{share}").mkdir()
        save_file(
            {"weight": torch.where(is_changed, 2 * numbers, numbers)}, folder / f"changed-{share}" / "model.safetensors"
        )
        size, is_same = round_trip(folder, "base", f"changed-{share}")
        assert is_same
        found[f"size {share}"] = size
    return found


def judge_signature(runs: Sequence[Numbers]) -> Sequence[Row]:
    """A thirteenth at most."""
    return [at_least(f"ResNet-50 by its first {LAYERS} layers at 256 levels", each(runs, "signature"), 13)]


def judge_sparse(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Smaller than the model wherever less than a third changed."""
    small = [run[f"size {share}"] for run in runs for share in CHANGED if share < 1 / 3]
    sizes = several(runs, {f"{share:g}": f"size {share}" for share in CHANGED})
    return [
        at_most("the largest of those with less than 1/3 changed, beside dense", small, 0.999, of=max),
        compared("sparse beside dense, by the share that changed", sizes),
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Where a sparse delta stops being smaller."""
    sizes = {"sparse delta of bfloat16": {share: f"size {share}" for share in CHANGED}}
    return {"sparse": curves(runs, sizes, "Size by what changed", across="share that changed", up="size beside dense")}


EXPERIMENT = Experiment(
    "sizes",
    "Sizes of small artifacts",
    "Random numbers in the shapes of ResNet-50, and in a matrix of 1024 × 2048 of which a part was changed.",
    run,
    range(1),
    (
        Claim(
            "Size of a signature",
            "https://arxiv.org/abs/2302.12480",
            "Signatures of the first layers, quantised, are up to 13 times smaller than the model.",
            judge_signature,
        ),
        Claim(
            "Size of a sparse delta",
            "https://arxiv.org/abs/2505.11711",
            "Reinforcement learning updates just 5 % to 30 % of the parameters.",
            judge_sparse,
        ),
    ),
    plots,
    quick=1,
)
