"""`make bench-workers`: what a second worker is worth.

Merges that compute more than they read, by one worker and by two, of one thread each, through the real service, in
turns. Seconds are those from the start of a job to its end; the files must be the same. No ratio can be better than
what two processes that share nothing come to on the same machine, which is measured too, nor where one worker keeps
all cores busy by itself: it hashes and writes beside its one thread.

Environment: `SIZE` (large: 1.1 billion parameters, small: 0.3), `ROUNDS`, `TITLES` (of `benchmarks.bench`, with commas
between), `KERNELS` (compiled, or plain), `WORK` (where models and output lie), `OUT` (JSON rows).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from app.client import Client
from benchmarks.bench import RECIPES, models_of
from benchmarks.demo import service
from benchmarks.synthetic import SHAPES, build

HERE = Path(__file__).parent
TITLES = "ties whole model,dare_ties"
WORKERS = (1, 2)
COMPUTATIONS = 500
console = Console(width=120)


def main() -> int:
    """Measure and print; 0 if every merge has the same files by any number of workers."""
    size, rounds = os.environ.get("SIZE", "large"), int(os.environ.get("ROUNDS", "3"))
    titles = os.environ.get("TITLES", TITLES).split(",")
    work = Path(os.environ.get("WORK", HERE.parent / "build" / "bench")).absolute()
    data = work / "workers"
    build(work / size, SHAPES[size], 3)
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    cores: dict[str, list[float]] = defaultdict(list)
    alone = [_worth_of_two() for _ in range(rounds)]
    files: dict[str, set[tuple[tuple[str, str], ...]]] = defaultdict(set)
    try:
        for number in range(rounds + 1):
            for workers in WORKERS if number else WORKERS[:1]:
                settings = {"WORKERS": workers, "THREADS": 1, "KERNELS": os.environ.get("KERNELS", "compiled")}
                own = {f"WEIGHTSMITH_{name}": str(value) for name, value in settings.items()}
                with service(data, work / size, **own) as url, Client(url) as client:
                    for title in titles if number else titles[:1]:
                        before, began = _cpu_seconds(), time.monotonic()
                        job = client.merges.wait(client.merges.submit(_recipe(title)))
                        busy = (_cpu_seconds() - before) / (time.monotonic() - began)
                        assert job.status == "succeeded" and job.finished_at and job.started_at, job.error
                        files[title].add(tuple(sorted((file.path, file.sha256) for file in client.merges.files(job))))
                        if number:  # the first time the inputs are hashed
                            seconds[title, workers].append((job.finished_at - job.started_at).total_seconds())
                            if workers == 1:
                                cores[title].append(busy)
                        shutil.rmtree(data / "artifacts" / job.id)
    finally:
        shutil.rmtree(data, ignore_errors=True)
    rows = [_row(title, seconds, cores[title], len(files[title]) == 1) for title in titles]
    console.print(_table(rows, f"{SHAPES[size].parameters / 1e9:.1f} billion parameters, medians of {rounds}"))
    bound = statistics.median(alone)
    console.print(
        f"two processes that share nothing, of half the work each: {bound:.2f} of the time of one with all of it"
    )
    if out := os.environ.get("OUT"):
        Path(out).write_text(
            json.dumps({"size": size, "rounds": rounds, "nothing shared": bound, "rows": rows}, indent=2) + "\n"
        )
    return 0 if all(row["same files"] for row in rows) else 1


def _recipe(title: str) -> dict[str, Any]:
    return RECIPES[title] | {"models": [{"model": name} for name in models_of(RECIPES[title])]}


def _worth_of_two() -> float:
    """The time of two processes that only compute, with half the work each, to that of one with all of it."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(_compute, [1, 1], chunksize=1)  # begun, and torch imported
        (one,) = pool.map(_compute, [2 * COMPUTATIONS], chunksize=1)
        return max(pool.map(_compute, [COMPUTATIONS, COMPUTATIONS], chunksize=1)) / one


def _compute(count: int) -> float:
    """The seconds that so many sorts of a grain take, on one thread."""
    import torch

    torch.set_num_threads(1)
    grain = torch.arange(2**16).bfloat16().flip(0)
    began = time.monotonic()
    for _ in range(count):
        grain.float().sort()
    return time.monotonic() - began


def _cpu_seconds() -> float:
    """What the processes that this one has started have used so far."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _row(title: str, seconds: dict[tuple[str, int], list[float]], cores: Sequence[float], same: bool) -> dict[str, Any]:
    one, two = (statistics.median(seconds[title, workers]) for workers in WORKERS)
    busy = statistics.median(cores)
    times = {"one worker": one, "two workers": two, "ratio": two / one}
    return {"merge": title, **times, "cores busy by one": busy, "same files": same}


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "merge" else "right")
    for row in rows:
        told = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        table.add_row(*told)
    return table


if __name__ == "__main__":
    sys.exit(main())
