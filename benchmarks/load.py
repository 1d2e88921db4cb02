"""`make load`: many small jobs queued at once by many clients, on a real service.

Counts what must be none: jobs that were accepted and are gone, jobs that ran twice, files with a wrong sha256. Then how
long a POST and a list took while all this went on, what a job costs, and what the service costs when it has nothing to
do. Exit status 1 where something is lost, doubled or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from app.client import Client, Job
from benchmarks.synthetic import Shape, build
from tests.services import Service, running_redis, running_service

SHAPE = Shape(layers=2, hidden=64, intermediate=128, key_value=64, vocabulary=256)
METHODS = ("linear", "task_arithmetic", "slerp", "ties")
BROKERS = ("filesystem", "redis")
LIST_SECONDS, SETTLE_SECONDS, IDLE_SECONDS = 0.1, 5.0, 20.0
console = Console()
Recipe = dict[str, Any]


@dataclass
class Posted:
    """What one client did: the ids it was given by recipe, and how long each POST took."""

    jobs: list[tuple[str, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Measured:
    """What a run came to."""

    title: str
    accepted: int = 0
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    posts: list[float] = field(default_factory=list)
    lists: list[float] = field(default_factory=list)
    posting_seconds: float = 0
    wall_seconds: float = 0
    cpu_seconds: float = 0
    idle_share: float = 0

    @property
    def is_right(self) -> bool:
        return not (self.lost or self.twice or self.wrong) and self.states == {"succeeded": self.accepted}


def main() -> int:
    """Run what was asked for; 0 if nothing was lost, doubled or wrong."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--jobs", type=int, default=1000)
    arguments.add_argument("--clients", type=int, default=16)
    arguments.add_argument("--on", action="append", choices=BROKERS, help="one broker only; repeatable")
    asked = arguments.parse_args()
    measured = []
    with tempfile.TemporaryDirectory(prefix="weightsmith-load-") as scratch:
        folder = Path(scratch)
        models = folder / "models"
        names = [path.name for path in build(models, SHAPE, models=3)]
        wanted = recipes(names[1:])
        expected = [digests(recipe, models, folder / "expected" / str(i)) for i, recipe in enumerate(wanted)]
        for title in asked.on or BROKERS:
            with environment(title, folder) as settings:
                measured.append(
                    run(title, folder / title, models, settings, wanted, expected, asked.jobs, asked.clients)
                )
    report(measured, asked.clients)
    return 0 if all(each.is_right for each in measured) else 1


def recipes(tuned: Sequence[str]) -> list[Recipe]:
    """A few recipes of each method; what comes out of each is another file."""
    found: list[Recipe] = []
    for i in range(3):
        weights = {"weight": 0.2 + 0.1 * i}
        models = [{"model": name} for name in tuned]
        on_base = {"base_model": "base", "models": models}
        found += [
            {"merge_method": "linear", "models": [{"model": name, "parameters": weights} for name in tuned]},
            {"merge_method": "task_arithmetic", **on_base, "parameters": weights},
            {
                "merge_method": "slerp",
                "base_model": "base",
                "models": models[:1],
                "parameters": {"t": weights["weight"]},
            },
            {"merge_method": "ties", **on_base, "parameters": {**weights, "density": 0.5}},
        ]
    return found


def digests(recipe: Recipe, models: Path, out: Path) -> dict[str, str]:
    """sha256 of the files of tensors that a recipe makes, made here."""
    from merge_core.merge import merge
    from merge_core.recipe import Recipe as Parsed

    artifact = merge(Parsed.from_data(recipe), out, roots=[models])
    return {file.path: file.sha256 for file in artifact.files if file.path.endswith(".safetensors")}


@contextmanager
def environment(title: str, folder: Path) -> Iterator[dict[str, str]]:
    """The settings of a service with this broker, which is started."""
    with ExitStack() as stack:
        settings: dict[str, str] = {}
        if title == "redis":
            settings["REDIS_URL"] = stack.enter_context(running_redis(folder / "redis-server"))
        yield settings


def run(
    title: str,
    data: Path,
    models: Path,
    settings: dict[str, str],
    wanted: Sequence[Recipe],
    expected: Sequence[dict[str, str]],
    jobs: int,
    clients: int,
) -> Measured:
    """One service, from its start until it is idle again."""
    found = Measured(title)
    with running_service(data, models, **settings) as service, Client(service.url, timeout=120) as client:
        before, started = cpu_seconds(service), time.monotonic()
        with listing(service.url) as lists:
            posted = post_at_once(service.url, wanted, jobs, clients)
            found.posting_seconds = time.monotonic() - started
            wait_until_ended(client, jobs)
            found.wall_seconds = time.monotonic() - started
            found.cpu_seconds = cpu_seconds(service) - before
        found.posts = [seconds for each in posted for seconds in each.seconds]
        found.lists = list(lists)
        audit(found, client, dict(job for each in posted for job in each.jobs), expected)
        time.sleep(SETTLE_SECONDS)
        before = cpu_seconds(service)
        time.sleep(IDLE_SECONDS)
        found.idle_share = (cpu_seconds(service) - before) / IDLE_SECONDS
    return found


def post_at_once(url: str, wanted: Sequence[Recipe], jobs: int, clients: int) -> list[Posted]:
    """Every client in a process of its own; all begin at the same moment."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(clients)
    shares = [range(number, jobs, clients) for number in range(clients)]
    with context.Pool(clients, initializer=_begin_together, initargs=(ready,)) as pool:
        return pool.starmap(_post, [(url, wanted, share) for share in shares], chunksize=1)


def _begin_together(ready: Any) -> None:
    globals()["_ready"] = ready


def _post(url: str, wanted: Sequence[Recipe], share: range) -> Posted:
    done = Posted()
    with Client(url, timeout=120) as client:
        client.system.is_ready()
        globals()["_ready"].wait()
        for number in share:
            which = number % len(wanted)
            started = time.monotonic()
            job = client.merges.submit(wanted[which])
            done.seconds.append(time.monotonic() - started)
            done.jobs.append((job.id, which))
    return done


@contextmanager
def listing(url: str) -> Iterator[Sequence[float]]:
    """Ask for the newest jobs again and again, in a process of its own; how long each answer took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_list, args=(url, theirs), daemon=True)
    process.start()
    found: list[float] = []
    try:
        yield found
    finally:
        ours.send(None)
        found += ours.recv()
        process.join()


def _list(url: str, stop: Any) -> None:
    seconds: list[float] = []
    with Client(url, timeout=120) as client:
        while not stop.poll(LIST_SECONDS):
            started = time.monotonic()
            for _ in zip(range(50), client.merges.list(page=50), strict=False):
                pass
            seconds.append(time.monotonic() - started)
    stop.send(seconds)


def wait_until_ended(client: Client, jobs: int) -> None:
    """Until no job is queued or running, and as many as were asked for have ended."""
    with console.status("") as status:
        while True:
            left = sum(1 for _ in client.merges.list(status=("running", "canceling", "queued")))
            status.update(f"{jobs - left:,} of {jobs:,} jobs ended")
            if not left:
                return
            time.sleep(min(2.0, 0.2 + 0.01 * left))


def audit(found: Measured, client: Client, posted: dict[str, int], expected: Sequence[dict[str, str]]) -> None:
    """Compare what was accepted with what there is."""
    found.accepted = len(posted)
    there = {job.id: job for job in client.merges.list()}
    found.lost = sorted(set(posted) - set(there))
    found.twice = sorted(set(there) - set(posted))
    found.states = Counter(job.status for job in there.values())
    for job in there.values():
        if job.id in posted and ran_twice(client, job):
            found.twice.append(job.id)
        if job.status == "succeeded":
            files = {file.path: file.sha256 for file in client.merges.files(job)}
            if {path: sha for path, sha in files.items() if path.endswith(".safetensors")} != expected[posted[job.id]]:
                found.wrong.append(job.id)


def ran_twice(client: Client, job: Job) -> bool:
    """By the row, and by what happened to it."""
    states = [event.data.get("status") for event in client.merges.events(job) if event.kind == "state"]
    return job.attempt != 1 or states != ["queued", "running", "succeeded"]


def cpu_seconds(service: Service) -> float:
    """What all processes of a service have used, those that have ended included."""
    total = 0.0
    top = psutil.Process(service.process.pid)
    for process in [top, *top.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def at(share: float, seconds: Sequence[float]) -> float:
    """A quantile, in milliseconds."""
    return 1000 * statistics.quantiles(seconds, n=1000, method="inclusive")[round(share * 1000) - 1]


def report(measured: Sequence[Measured], clients: int) -> None:
    """Print the table."""
    table = Table(
        title=f"{measured[0].accepted:,} merges of {SHAPE.parameters:,} parameters, POSTed at once by {clients} clients"
    )
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for each in measured:
        table.add_column(each.title, justify="right")
        told = {
            "accepted": f"{each.accepted:,}",
            "lost": str(len(each.lost)),
            "run twice": str(len(each.twice)),
            "succeeded": f"{each.states['succeeded']:,}",
            "wrong sha256": str(len(each.wrong)),
            "POST p50, p99": f"{at(0.5, each.posts):,.0f}, {at(0.99, each.posts):,.0f} ms",
            "list of 50 p50, p99": f"{at(0.5, each.lists):,.0f}, {at(0.99, each.lists):,.0f} ms",
            "POSTs": f"{len(each.posts) / each.posting_seconds:,.1f} /s",
            "jobs": f"{each.accepted / each.wall_seconds:,.1f} /s",
            "wall": f"{each.wall_seconds:,.0f} s",
            "CPU": f"{each.cpu_seconds:,.0f} s, {1000 * each.cpu_seconds / each.accepted:,.0f} ms a job",
            "idle afterwards": f"{100 * each.idle_share:.2f} % of a core",
        }
        for name, value in told.items():
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    console.print(
        f"{cores} cores, shared by the service, its worker and the clients; load average {load:.1f} at the end"
    )
    for each in measured:
        if not each.is_right:
            console.print(f"[red]{each.title}:[/red] {json.dumps({'states': each.states, 'lost': each.lost[:5]})}")
            console.print(json.dumps({"run twice": each.twice[:5], "wrong": each.wrong[:5]}))


if __name__ == "__main__":
    sys.exit(main())
