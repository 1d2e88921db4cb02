"""What an experiment is, and how several of them run at once: a process for each seed, one thread in each."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from merge_core.execute import share_one_heap

Numbers = Mapping[str, float]
"""What one run measured, by name."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `met` is None where there is no bar, only something to compare with."""

    what: str
    measured: str
    bar: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Experiment:
    """`run(seed, folder)` measures, `judge` holds what all seeds gave against the bars; `paper` is where the claim is
    from.
    """

    title: str
    paper: str
    run: Callable[[int, Path], Numbers]
    seeds: Sequence[int]
    judge: Callable[[Sequence[Numbers]], Sequence[Row]]


def at_least(what: str, value: float, bar: float, told: str = "") -> Row:
    """A bar that a number must reach."""
    return Row(what, f"{value:.3f}{told}", f"≥ {bar:.3f}", value >= bar)


def at_most(what: str, value: float, bar: float, told: str = "") -> Row:
    """A bar that a number must not exceed."""
    return Row(what, f"{value:.3g}{told}", f"≤ {bar:.3g}", value <= bar)


def mean(runs: Sequence[Numbers], name: str) -> float:
    """The mean of a number over the seeds."""
    return sum(run[name] for run in runs) / len(runs)


def run_all(experiments: Sequence[Experiment], done: Callable[[Experiment, list[Numbers], float], None]) -> None:
    """Run every experiment with every seed, as many at a time as there are processors; `done` gets an experiment's
    numbers by seed, and the processors' seconds that they took in all, in the order of the experiments.
    """
    workers = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_quietly) as pool:
        futures = [[pool.submit(_timed, each.run, seed) for seed in each.seeds] for each in experiments]
        for experiment, runs in zip(experiments, futures, strict=True):
            found = [future.result() for future in runs]
            done(experiment, [numbers for numbers, _ in found], sum(seconds for _, seconds in found))


def _quietly() -> None:
    torch.set_num_threads(1)
    share_one_heap()


def _timed(run: Callable[[int, Path], Numbers], seed: int) -> tuple[Numbers, float]:
    begun = time.process_time()
    with TemporaryDirectory(prefix="weightsmith-science-") as folder:
        return run(seed, Path(folder)), time.process_time() - begun
