"""What an experiment is, and how several of them run at once: a process for each seed, one thread in each."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from app.drawing.svg import Drawing
from merge_core.execute import share_one_heap

Numbers = Mapping[str, float]
"""What one run measured, by name."""

Verdict = Literal["met", "missed", "reproduced", "not reproduced", ""]
"""`met` and `missed`: of a bar. The next two: of something claimed that no bar holds us to. Else: for comparison."""


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, over all seeds and for each."""

    what: str
    measured: str
    by_seed: str = ""
    bar: str = ""
    verdict: Verdict = ""


@dataclass(frozen=True)
class Claim:
    """What a paper says, in a sentence, and what our numbers say to it: `judge` gets those of all seeds."""

    title: str
    paper: str
    says: str
    judge: Callable[[Sequence[Numbers]], Sequence[Row]]


@dataclass(frozen=True)
class Experiment:
    """`run(seed, folder)` measures what the claims are judged by.

    `setup` tells what is trained on what. `quick`: how many seeds are run where there is little time. `plots` draws
    what all seeds gave, by name.
    """

    name: str
    title: str
    setup: str
    run: Callable[[int, Path], Numbers]
    seeds: Sequence[int]
    claims: Sequence[Claim]
    plots: Callable[[Sequence[Numbers]], Mapping[str, Drawing]] = lambda runs: {}
    quick: int = 0


def at_least(
    what: str, values: Sequence[float], bar: float, told: str = "", *, of: Callable[[Sequence[float]], float] = fmean
) -> Row:
    """A bar that the mean over the seeds must reach, or with `of` another number of them."""
    found = of(values)
    return Row(what, _measured(found, told), _each(values), f"≥ {number(bar)}", "met" if found >= bar else "missed")


def at_most(
    what: str, values: Sequence[float], bar: float, told: str = "", *, of: Callable[[Sequence[float]], float] = fmean
) -> Row:
    """A bar that the mean over the seeds must not exceed, or with `of` another number of them."""
    found = of(values)
    return Row(what, _measured(found, told), _each(values), f"≤ {number(bar)}", "met" if found <= bar else "missed")


def exactly(what: str, is_so: bool, wanted: str, otherwise: str) -> Row:
    """A bar that is no number."""
    return Row(what, wanted if is_so else otherwise, "", wanted, "met" if is_so else "missed")


def claimed(what: str, values: Sequence[float], least: float, told: str = "") -> Row:
    """What a paper says and nobody demands of networks of this size: told either way, with the number."""
    found = fmean(values)
    is_so = found >= least
    return Row(
        what,
        _measured(found, told),
        _each(values),
        f"(≥ {number(least)})",
        "reproduced" if is_so else "not reproduced",
    )


def compared(what: str, measured: str) -> Row:
    """Numbers beside which others are read."""
    return Row(what, measured)


def number(value: float) -> str:
    """As it is printed: three digits after the point, more of a small one, and none of what float32 rounded.

    >>> number(0.0214), number(-0.0001), number(6.1e-6), number(13.04), number(0), number(-2e-8)
    ('0.021', '-0.0001', '6.1e-06', '13.0', '0.000', '0.000')
    """
    size = abs(value)
    if size < 1e-7:
        return "0.000"
    if size < 5e-5:
        return f"{value:.1e}"
    return f"{value:.4f}" if size < 5e-4 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def each(runs: Sequence[Numbers], name: str, beside: str = "") -> list[float]:
    """A number by seed, or how far it is above another one."""
    return [run[name] - (run[beside] if beside else 0.0) for run in runs]


def mean(runs: Sequence[Numbers], name: str) -> float:
    """The mean of a number over the seeds."""
    return fmean(run[name] for run in runs)


def several(runs: Sequence[Numbers], names: Mapping[str, str] | Sequence[str]) -> str:
    """The means of some numbers, each behind its name or, as a key, what it is to be called."""
    called = names if isinstance(names, Mapping) else {name: name for name in names}
    return ", ".join(f"{title}: {number(mean(runs, name))}" for title, name in called.items())


def _measured(value: float, told: str) -> str:
    return f"{number(value)} ({told})" if told else number(value)


def _each(values: Sequence[float]) -> str:
    return ", ".join(map(number, values)) if len(values) > 1 else ""


def run_all(
    experiments: Sequence[Experiment], done: Callable[[Experiment, list[Numbers], float], None], *, quick: bool = False
) -> None:
    """Run experiments with every seed, or as many as `quick` says, as many at a time as there are processors.

    `done` gets an experiment's numbers by seed, and the processors' seconds that they took in all, in the order of the
    experiments.
    """
    workers = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_quietly) as pool:
        futures = []
        for one in experiments:
            seeds = one.seeds[: one.quick] if quick else one.seeds
            futures.append([pool.submit(_timed, one.run, seed) for seed in seeds])
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
