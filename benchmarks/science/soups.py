"""Model soups: the average of fine-tunes of one base, trained at other rates, for
other times and with wrong labels, beside each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from app.drawing.svg import Drawing
from benchmarks.science.harness import Claim, Experiment, Numbers, Row, at_least, claimed, compared, each, mean
from benchmarks.science.nets import Mlp, accuracy, loaded, merged, save, train
from benchmarks.science.plots import scores
from merge_core.coefficients.greedy_soup import greedy_soup

WIDTH, MODELS, NOISE, FIRST = 256, 8, 0.3, 100
RATES, EPOCHS = (3e-4, 1e-3), (5, 10, 20)


def images() -> tuple[Tensor, Tensor]:
    """Digits `[n, 64]` and their labels `[n]`, in one order for all seeds."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data / 16.0, dtype=torch.float32)[order], torch.tensor(found.target)[order]


def run(seed: int, folder: Path) -> Numbers:
    """Train the base and the fine-tunes; average all, and those that a greedy soup takes."""
    pixels, labels = images()
    parts = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}
    torch.manual_seed(seed)
    base = Mlp(WIDTH)
    train(base, pixels[:FIRST], labels[:FIRST], epochs=40, optimizer=torch.optim.Adam(base.parameters()), batch=32)
    for model in range(MODELS):
        net = Mlp(WIDTH)
        net.load_state_dict(base.state_dict())
        known = labels[parts["train"]].clone()
        is_wrong = torch.rand(len(known)) < NOISE
        known[is_wrong] = torch.randint(10, (int(is_wrong.sum()),))
        rate, epochs = RATES[model % len(RATES)], EPOCHS[model % len(EPOCHS)]
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        train(net, pixels[parts["train"]], known, epochs=epochs, optimizer=optimizer, batch=32)
        save(net, folder / str(model))

    def score(source: Path, part: str) -> float:
        net = loaded(Mlp(WIDTH), source)
        with torch.no_grad():
            return accuracy(net(pixels[parts[part]]), labels[parts[part]])

    def soup(chosen: Sequence[int]) -> Path:
        name = "soup-" + "-".join(map(str, chosen))
        if len(chosen) == 1:
            return folder / str(chosen[0])
        if (folder / name).exists():
            return folder / name
        models = [{"model": str(model), "parameters": {"weight": 1}} for model in chosen]
        return merged(folder, name, {"merge_method": "linear", "models": models, "dtype": "float32"})

    greedy = greedy_soup(MODELS, lambda chosen: score(soup(chosen), "validation"))
    alone = [score(folder / str(model), "test") for model in range(MODELS)]
    return {
        "single": sum(alone) / MODELS,
        "best": alone[greedy.order[0]],
        "uniform": score(soup(range(MODELS)), "test"),
        "greedy": score(soup(greedy.ingredients), "test"),
        "ingredients": len(greedy.ingredients),
    }


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """The average of all is better than most, the greedy one no worse than the best; on every seed."""
    uniform, greedy = (f"{mean(runs, name):.3f} in the mean" for name in ("uniform", "greedy"))
    return [
        at_least(
            "all averaged, ahead of a single one, worst seed", each(runs, "uniform", "single"), 0.01, uniform, of=min
        ),
        at_least(
            "greedy, beside the best on validation, worst seed", each(runs, "greedy", "best"), -0.005, greedy, of=min
        ),
        claimed("greedy, ahead of the best on validation", each(runs, "greedy", "best"), 0.0),
        compared("ingredients of the greedy ones", ", ".join(f"{run['ingredients']:.0f}" for run in runs)),
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Soups beside what they are made of."""
    names = {
        "single": "a single one, mean",
        "best": "the best on validation",
        "uniform": "all averaged",
        "greedy": "greedy",
    }
    return {"accuracy": scores(runs, names, "Accuracy of soups and of their ingredients", across="accuracy")}


EXPERIMENT = Experiment(
    "soups",
    "Soups of fine-tunes",
    "A network 64-256-256-10 learns from 100 images; eight fine-tunes on 1,000 differ in rate and length, each with "
    "30 % labels of its own that are drawn anew. Chosen on 300 images, tested on 497.",
    run,
    range(4),
    (
        Claim(
            "Model soups",
            "https://arxiv.org/abs/2203.05482",
            "Averaging the weights of fine-tunes with different hyperparameters often improves accuracy: a soup of "
            "ViT-G models reached 90.94 % on ImageNet, a new best.",
            judge,
        ),
    ),
    plots,
    quick=2,
)
