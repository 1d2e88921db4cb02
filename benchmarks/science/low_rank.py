"""EoRA (https://arxiv.org/abs/2410.21271): of a task vector reduced to few directions, which weigh the inputs gives
outputs that are nearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.digits import Digits
from benchmarks.science.harness import Experiment, Numbers, Row, at_most, mean
from benchmarks.science.nets import merged, save
from benchmarks.science.transfer import base, fine_tuned

WEIGHT = "trunk.2.weight"
RANKS = (2, 8)


def run(seed: int, folder: Path) -> Numbers:
    """Relative errors of the second layer's outputs on images that were not used to find the directions."""
    digits = Digits.load()
    start = base(seed, digits)
    tuned = fine_tuned(start, digits)
    save(start, folder / "base")
    save(tuned, folder / "tuned")
    with torch.no_grad():
        known, held_out = (tuned.trunk[:2](images) for images in (digits.images, digits.test_images))
    save_file({WEIGHT: known.T @ known / len(known)}, folder / "covariance.safetensors")
    whole = _delta(folder / "base", folder / "tuned")
    return {
        f"{method} {rank}": _error(whole, _delta(folder / "base", _reduced(folder, method, rank)), held_out)
        for method in ("low_rank", "eora")
        for rank in RANKS
    }


def _reduced(folder: Path, method: str, rank: int) -> Path:
    recipe = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "tuned"}],
        "parameters": {"rank": rank},
    }
    given = {"statistics": {"covariance": "covariance.safetensors"}} if method == "eora" else {}
    return merged(folder, f"{method}-{rank}", {**recipe, **given})


def _delta(start: Path, model: Path) -> Tensor:
    one, other = (load_file(folder / "model.safetensors")[WEIGHT].double() for folder in (start, model))
    return other - one


def _error(whole: Tensor, reduced: Tensor, inputs: Tensor) -> float:
    outputs = inputs.double() @ whole.T
    return float((inputs.double() @ reduced.T - outputs).norm() / outputs.norm())


def judge(runs: Sequence[Numbers]) -> Sequence[Row]:
    """At rank 8 EoRA's error is much the smaller one."""
    told = {name: f"{mean(runs, name):.3f}" for name in runs[0]}
    ratio = mean(runs, "eora 8") / mean(runs, "low_rank 8")
    return [
        Row("error at rank 2: SVD, EoRA", f"{told['low_rank 2']}, {told['eora 2']}"),
        at_most("rank 8: EoRA's error by SVD's", ratio, 0.7, f"  ({told['low_rank 8']} → {told['eora 8']})"),
    ]


EXPERIMENT = Experiment("Low-rank task vectors (EoRA)", "https://arxiv.org/abs/2410.21271", run, range(4), judge)
