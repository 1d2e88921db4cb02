"""What a fine-tune forgets, and how to have it back or make it forget more: half reset, selective synaptic dampening,
grafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from app.drawing.svg import Drawing
from benchmarks.digits import Digits, accuracies, load_checkpoint
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
from benchmarks.science.plots import curves, scores
from benchmarks.science.soups import images
from benchmarks.science.transfer import TASK, base, fine_tuned
from merge_core.measuring import Examples, importances

WIDTH, FIRST, TRAINED = 256, 150, 1000
FORGOTTEN, BATCH = 3, 64
GRAFTED = (0.0001, 0.01, 0.05, 0.1)


def turned(pixels: Tensor) -> Tensor:
    """The old task: the same digits, rows for columns and dark for bright."""
    return 1 - pixels.reshape(-1, 8, 8).transpose(1, 2).reshape(pixels.shape)


def run_reset(seed: int, folder: Path) -> Numbers:
    """A base that knows an old task and a little of a new one; a fine-tune on the new one; half of it taken back."""
    pixels, labels = images()
    torch.manual_seed(seed)
    start = Mlp(WIDTH)
    both = torch.cat([pixels[:FIRST], turned(pixels[:FIRST])])
    adam = torch.optim.Adam(start.parameters())
    train(start, both, labels[:FIRST].repeat(2), epochs=40, optimizer=adam, batch=32)
    tuned = Mlp(WIDTH)
    tuned.load_state_dict(start.state_dict())
    adam = torch.optim.Adam(tuned.parameters())
    train(tuned, pixels[:TRAINED], labels[:TRAINED], epochs=20, optimizer=adam, batch=32)
    save(start, folder / "base")
    save(tuned, folder / "tuned")
    recipe = {
        "merge_method": "half_reset",
        "base_model": "base",
        "models": [{"model": "tuned"}],
        "parameters": {"unit": "element", "fraction": 0.5},
        "seed": seed,
    }
    found = {}
    for name in ("base", "tuned", merged(folder, "reset", recipe).name):
        net = loaded(Mlp(WIDTH), folder / name)
        with torch.no_grad():
            found[f"{name} new"] = accuracy(net(pixels[TRAINED:]), labels[TRAINED:])
            found[f"{name} old"] = accuracy(net(turned(pixels[TRAINED:])), labels[TRAINED:])
    return found


def judge_reset(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Much of what was forgotten is back, most of what was learned stays."""
    at = {name: mean(runs, name) for name in runs[0]}
    back = (at["reset old"] - at["tuned old"]) / (at["base old"] - at["tuned old"])
    kept = (at["reset new"] - at["base new"]) / (at["tuned new"] - at["base new"])
    old, new = (
        several(runs, {name: f"{name} {what}" for name in ("base", "tuned", "reset")}) for what in ("old", "new")
    )
    return [
        at_least("share of what was forgotten that is back", [back], 0.4, old),
        at_least("share of what was learned that stays", [kept], 0.5, new),
    ]


def examples(pixels: Tensor, labels: Tensor) -> list[Examples]:
    """In batches, as the authors measure importances."""
    return [Examples(*each) for each in zip(pixels.split(BATCH), labels.split(BATCH), strict=True)]


def run_unlearning(seed: int, folder: Path) -> Numbers:
    """Forget one digit."""
    pixels, labels = images()
    torch.manual_seed(seed)
    net = Mlp(WIDTH)
    adam = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    train(net, pixels[:TRAINED], labels[:TRAINED], epochs=15, optimizer=adam, batch=BATCH)
    save(net, folder / "net")
    known, is_forgotten = labels[:TRAINED], labels[:TRAINED] == FORGOTTEN
    measured = {
        "all": examples(pixels[:TRAINED], known),
        "forget": examples(pixels[:TRAINED][is_forgotten], known[is_forgotten]),
    }
    for name, batches in measured.items():
        save_file(dict(importances(net, net, batches)), folder / f"{name}.safetensors")
    recipe = {
        "merge_method": "ssd",
        "models": [{"model": "net"}],
        "parameters": {"alpha": 10, "lambda": 1},
        "statistics": {"importance": "all.safetensors", "forget_importance": "forget.safetensors"},
    }
    found = {}
    to_forget = labels[TRAINED:] == FORGOTTEN
    for name in ("net", merged(folder, "dampened", recipe).name):
        with torch.no_grad():
            given = loaded(Mlp(WIDTH), folder / name)(pixels[TRAINED:])
        found[f"{name} forget"] = accuracy(given[to_forget], labels[TRAINED:][to_forget])
        found[f"{name} retain"] = accuracy(given[~to_forget], labels[TRAINED:][~to_forget])
    return found


def judge_unlearning(runs: Sequence[Numbers]) -> Sequence[Row]:
    """The digit is gone on every seed, the others are hardly touched."""
    was = f"was {mean(runs, 'net forget'):.3f} in the mean"
    told = f"{mean(runs, 'net retain'):.3f} → {mean(runs, 'dampened retain'):.3f}"
    return [
        at_most("accuracy on the digit, worst seed", each(runs, "dampened forget"), 0.1, was, of=max),
        at_least("change on the others", each(runs, "dampened retain", "net retain"), -0.06, told),
    ]


def run_graft(seed: int, folder: Path) -> Numbers:
    """The entries that changed the most, and as many at random, put back on the base."""
    digits = Digits.load()
    start = base(seed, digits)
    tuned = fine_tuned(start, digits)
    save(start, folder / "base")
    save(tuned, folder / "tuned")
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: (torch.rand(tensor.shape, generator=generator) < GRAFTED[-1]).float()
        for name, tensor in tuned.state_dict().items()
    }
    save_file(masks, folder / "mask.safetensors")
    recipe = {"merge_method": "graft", "base_model": "base", "models": [{"model": "tuned"}]}
    made = {
        f"top {share}": merged(folder, f"top-{share}", {**recipe, "parameters": {"sparsity": share}})
        for share in GRAFTED
    }
    given = {"parameters": {"entries": "given"}, "statistics": {"mask": "mask.safetensors"}}
    made |= {"random": merged(folder, "random", {**recipe, **given})}
    made |= {name: folder / name for name in ("base", "tuned")}
    return {name: accuracies(load_checkpoint(place), digits)[TASK] for name, place in made.items()}


def judge_graft(runs: Sequence[Numbers]) -> Sequence[Row]:
    """More than at random. The authors' own figure, a hundredth of a percent, is one of far larger models."""
    top = mean(runs, f"top {GRAFTED[-1]}")
    gained = (top - mean(runs, "base")) / (mean(runs, "tuned") - mean(runs, "base"))
    recovered = [run[f"top {GRAFTED[0]}"] / run["tuned"] for run in runs]
    shares = several(runs, {f"{share:.2%}": f"top {share}" for share in GRAFTED})
    return [
        at_least("a tenth, ahead of a random tenth", each(runs, f"top {GRAFTED[-1]}", "random"), 0.05, f"{top:.3f}"),
        at_least("share of the fine-tune's gain", [gained], 0.4),
        claimed(f"{GRAFTED[0]:.2%} of the entries: accuracy, of the fine-tune's", recovered, 0.95),
        compared("grafted, of all entries", f"{shares}; {several(runs, ['base', 'tuned'])}"),
    ]


def graft_plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """What grafts of more and more entries recover."""
    lines = {"the largest changes": {share: f"top {share}" for share in GRAFTED} | {1.0: "tuned"}}
    return {
        "share": curves(
            runs, lines, "Accuracy by what is grafted", across="share of all entries", up="accuracy", log_x=True
        )
    }


def reset_plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Old and new accuracy of the base, the fine-tune and the half of it."""
    names = {f"{name} {what}": f"{name}, {what} task" for what in ("old", "new") for name in ("base", "tuned", "reset")}
    return {"accuracy": scores(runs, names, "Accuracy at the old and the new task", across="accuracy")}


def unlearning_plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Before and after."""
    names = {
        "net forget": "the digit, before",
        "dampened forget": "the digit, after",
        "net retain": "the others, before",
        "dampened retain": "the others, after",
    }
    return {"accuracy": scores(runs, names, "Accuracy on the digit to forget and on others", across="accuracy")}


RESET = Experiment(
    "reset",
    "A fine-tune of which half is taken back",
    "A network 64-256-256-10 learns 150 digits as they are and turned (rows for columns, dark for bright), is "
    "fine-tuned on 1,000 as they are, and has a random half of its entries set back. The old task is the turned "
    "digits, the new one those as they are.",
    run_reset,
    range(4),
    (
        Claim(
            "Half reset",
            "https://arxiv.org/abs/2404.18466",
            "Resetting a part of a fine-tune's parameters restores some of what was known before.",
            judge_reset,
        ),
    ),
    reset_plots,
    quick=4,
)
UNLEARNING = Experiment(
    "unlearning",
    "A digit forgotten",
    "A network 64-256-256-10 learns 1,000 digits for 15 epochs and is to forget threes; importances are the "
    "authors', over batches of 64, α = 10.",
    run_unlearning,
    range(5),
    (
        Claim(
            "Selective synaptic dampening",
            "https://arxiv.org/abs/2308.07707",
            "Dampening what matters to the data to forget unlearns them, as well as methods that train again.",
            judge_unlearning,
        ),
    ),
    unlearning_plots,
    quick=5,
)
GRAFT = Experiment(
    "graft",
    "A part of a fine-tune, grafted",
    "The trunk of the four tasks, fine-tuned for digits; of 300,000 entries those that changed the most are put on "
    "the base.",
    run_graft,
    range(4),
    (
        Claim(
            "Skill grafting",
            "https://arxiv.org/abs/2302.06600",
            "About 0.01 % of the parameters are responsible for more than 95 % of a fine-tuned model's performance.",
            judge_graft,
        ),
    ),
    graft_plots,
    quick=1,
)
