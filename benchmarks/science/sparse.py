"""Sparse updates: reinforcement learning at its low rates leaves most numbers of a bfloat16 model as they were, so that
the difference can be stored small and without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from app.drawing.svg import Drawing
from benchmarks.digits import Digits, Net
from benchmarks.science.harness import (
    Claim,
    Experiment,
    Numbers,
    Row,
    at_most,
    claimed,
    compared,
    each,
    exactly,
    several,
)
from benchmarks.science.nets import loaded, merged, save
from benchmarks.science.plots import curves
from benchmarks.science.transfer import TASK, base

RATES = (1e-6, 3e-6, 1e-5, 1e-4)
STEPS, BATCH = 200, 64


def run(seed: int, folder: Path) -> Numbers:
    """Train at each rate, store the difference as a sparse delta, put it back on."""
    digits = Digits.load()
    start = save(base(seed, digits), folder / "base", torch.bfloat16)
    found: dict[str, float] = {}
    for rate in RATES:
        tuned = save(_reinforced(start, rate, seed, digits), folder / f"tuned-{rate}", torch.bfloat16)
        size, is_same = round_trip(folder, start.name, tuned.name)
        found |= {
            f"unchanged {rate}": _unchanged(start, tuned),
            f"size {rate}": size,
            f"same {rate}": float(is_same),
        }
    return found


def _reinforced(start: Path, rate: float, seed: int, digits: Digits) -> Net:
    torch.manual_seed(seed)
    net = loaded(Net(), start)
    assert isinstance(net, Net)
    optimizer = torch.optim.Adam(net.trunk.parameters(), lr=rate)
    for _ in range(STEPS):
        chosen = torch.randint(len(digits.images), (BATCH,))
        policy = torch.distributions.Categorical(logits=net(digits.images[chosen], TASK))
        guesses = policy.sample()
        rewards = (guesses == digits.labels[TASK][chosen]).float()
        optimizer.zero_grad()
        (-(rewards - rewards.mean()) * policy.log_prob(guesses)).mean().backward()
        optimizer.step()
    return net


def round_trip(folder: Path, start: str, tuned: str) -> tuple[float, bool]:
    """The size of a sparse delta beside that of the model, and whether base and delta are the model, bit for bit."""
    recipe = {"merge_method": "passthrough", "base_model": start, "models": [{"model": tuned}]}
    delta = merged(folder, f"{tuned}-delta", {**recipe, "outputs": {"kind": "delta", "encoding": "sparse"}})
    patched = {"merge_method": "passthrough", "models": [{"model": f"{start}+{delta.name}"}]}
    again = load_file(merged(folder, f"{tuned}-again", patched) / "model.safetensors")
    wanted = load_file(folder / tuned / "model.safetensors")
    is_same = again.keys() == wanted.keys() and all(_same_bits(again[name], wanted[name]) for name in wanted)
    size = (delta / "delta.safetensors").stat().st_size / (folder / tuned / "model.safetensors").stat().st_size
    return size, is_same


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _unchanged(start: Path, tuned: Path) -> float:
    """The share of the trained matrices' numbers that stayed."""
    one, other = (load_file(folder / "model.safetensors") for folder in (start, tuned))
    same = [one[name] == other[name] for name in one if name.startswith("trunk.") and one[name].dim() > 1]
    return sum(int(each.sum()) for each in same) / sum(each.numel() for each in same)


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """The higher the rate the fewer stay; nothing is lost; small where two thirds stay."""
    shares, sizes = (several(runs, {f"{rate:g}": f"{what} {rate}" for rate in RATES}) for what in ("unchanged", "size"))
    falls = all(run[f"unchanged {low}"] > run[f"unchanged {high}"] for run in runs for low, high in pairwise(RATES))
    is_same = all(run[f"same {rate}"] for run in runs for rate in RATES)
    small = [run[f"size {rate}"] for run in runs for rate in RATES if run[f"unchanged {rate}"] > 2 / 3]
    return [
        exactly("what stays unchanged, as the rate grows", falls, "falls on every seed", "does not fall"),
        exactly("base and delta", is_same, "are the model, bit for bit", "are not the model"),
        at_most("the largest of those with more than 2/3 unchanged, beside the model", small, 0.999, of=max),
        claimed(f"unchanged at a rate of {RATES[0]:g}", each(runs, f"unchanged {RATES[0]}"), 0.7),
        compared("unchanged, by rate", shares),
        compared("size beside the model, by rate", sizes),
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """What stays, and what the difference takes."""
    lines = {
        "unchanged": {rate: f"unchanged {rate}" for rate in RATES},
        "size of the sparse delta": {rate: f"size {rate}" for rate in RATES},
    }
    return {"rate": curves(runs, lines, "What stays by learning rate", across="learning rate", up="share", log_x=True)}


EXPERIMENT = Experiment(
    "sparse",
    "Reinforcement learning changes little",
    "The trunk of the four tasks goes on by policy gradients, one digit guessed and one reward for each of 64 "
    f"images in {STEPS} steps: Adam on a float32 copy, stored in bfloat16.",
    run,
    range(3),
    (
        Claim(
            "Sparse updates",
            "https://arxiv.org/abs/2505.11711",
            "Reinforcement learning updates just 5 % to 30 % of a language model's parameters; the others stay as "
            "they are.",
            judge,
        ),
    ),
    plots,
    quick=1,
)
