"""`make demo`: train four small models on real data, merge them over HTTP by every method, and print how good each
merge is.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.client import Client, Job, ServiceError
from benchmarks.digits import FIRST_IMAGES, TASKS, Digits, accuracies, load_checkpoint, train_models

console = Console()
AVERAGE, ARITHMETIC, TIES = "linear: plain average", "task_arithmetic, scale 1", "ties, whole model, scale 1"


def recipes(tuned: list[str]) -> dict[str, dict[str, Any]]:
    """One recipe per method, by the name it has in the table."""
    models = [{"model": name} for name in tuned]
    on_base = {"base_model": "base", "models": models}
    return {
        AVERAGE: {"merge_method": "linear", "models": models, "parameters": {"weight": 1}},
        "slerp: digit and parity": {
            "merge_method": "slerp",
            "base_model": tuned[0],
            "models": models[1:2],
            "parameters": {"t": 0.5},
        },
        ARITHMETIC: {"merge_method": "task_arithmetic", **on_base, "parameters": {"weight": 1}},
        "task_arithmetic, scale 0.4": {
            "merge_method": "task_arithmetic",
            **on_base,
            "parameters": {"weight": 1, "lambda": 0.4},
        },
        TIES: {"merge_method": "ties", "semantics": "paper", **on_base, "parameters": {"density": 0.2, "lambda": 1}},
        "ties, per tensor": {"merge_method": "ties", **on_base, "parameters": {"weight": 1, "density": 0.2}},
        "dare_linear, drop 0.9, scale 0.4": {
            "merge_method": "dare_linear",
            "semantics": "paper",
            **on_base,
            "parameters": {"drop_rate": 0.9, "lambda": 0.4},
        },
        "dare_ties, drop 0.5": {
            "merge_method": "dare_ties",
            "semantics": "paper",
            **on_base,
            "parameters": {"drop_rate": 0.5},
        },
        "passthrough: digit": {"merge_method": "passthrough", "models": models[:1]},
    }


def main() -> int:
    """Run the demo; 0 if the merges compare as the papers say."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="weightsmith-demo-") as scratch:
        models, data, downloads = (Path(scratch) / name for name in ("models", "data", "downloads"))
        models.mkdir()
        digits = Digits.load()
        with console.status(
            f"training: one base on {FIRST_IMAGES} images, four fine-tunes on {len(digits.images):,} …"
        ):
            names = train_models(models, digits)
        console.print(f"trained {len(names)} models on scikit-learn's digits, saved as bf16 safetensors in shards")
        wanted = recipes(names[1:])
        console.print("\none of the recipes that are POSTed to /v1/merges:\n", style="bold")
        console.print(yaml.safe_dump(wanted[TIES], sort_keys=False), markup=False, highlight=False)
        with service(data, models) as url:
            try:
                merged = {title: run(url, title, recipe, downloads) for title, recipe in wanted.items()}
            except ServiceError as error:
                console.print(f"[red]error:[/red] {error}")
                return 1
        return report(digits, {name: models / name for name in names}, merged)


def run(url: str, title: str, recipe: Mapping[str, Any], downloads: Path) -> Path:
    """POST one recipe, watch its job, download the result."""
    columns = (
        TextColumn("{task.description:>34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeElapsedColumn(),
    )
    with Client(url) as client, Progress(*columns, console=console) as bar:
        shown = bar.add_task(title, total=None)
        job = client.merges.submit(recipe)

        def follow(job: Job) -> None:
            bar.update(shown, total=job.progress.tensors_total or None, completed=job.progress.tensors_done)

        client.merges.wait(job, progress=follow)
        client.merges.download(job, downloads / job.id)
    return downloads / job.id


def report(digits: Digits, alone: Mapping[str, Path], merged: Mapping[str, Path]) -> int:
    """Print the accuracies; 0 if whole-model TIES at scale 1 is ahead of plain averaging and of task arithmetic at
    scale 1.
    """
    measured = {name: accuracies(load_checkpoint(folder), digits) for name, folder in {**alone, **merged}.items()}
    own = {task: measured[task.replace(" ", "-")][task] for task in TASKS}
    score = {name: sum(found[task] / own[task] for task in TASKS) / len(TASKS) for name, found in measured.items()}
    table = Table(title=f"accuracy on {len(digits.test_images)} test images")
    table.add_column("model")
    for task in TASKS:
        table.add_column(task, justify="right")
    table.add_column("score", justify="right")
    for name, found in measured.items():
        style = "bold" if name == TIES else "" if name in merged else "dim"
        row = (name, *(f"{found[task]:.3f}" for task in TASKS), f"{score[name]:.3f}")
        table.add_row(*row, style=style, end_section=name == list(alone)[-1])
    console.print()
    console.print(table)
    console.print("score: mean over the tasks of a model's accuracy as a share of that task's own fine-tune")
    ahead = score[TIES] > max(score[AVERAGE], score[ARITHMETIC])
    verdict = "[green]ahead of[/green]" if ahead else "[red]not ahead of[/red]"
    console.print(
        f"\nwhole-model TIES at scale 1 ({score[TIES]:.3f}) is {verdict} plain averaging ({score[AVERAGE]:.3f}) "
        f"and task arithmetic at scale 1 ({score[ARITHMETIC]:.3f})"
    )
    return 0 if ahead else 1


@contextmanager
def service(data: Path, models: Path, **settings: str) -> Iterator[str]:
    """The embedded service in a process of its own; yields its URL. `settings` are environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "serve",
        "--port",
        str(port),
        "--data",
        str(data),
        "--models",
        str(models),
    ]
    log = data.with_suffix(".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=_own_environment() | settings)
    url = f"http://127.0.0.1:{port}"
    try:
        with console.status("starting the service …"):
            _wait_until_ready(url, process, log)
        console.print(f"the service answers at {url}\n")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _own_environment() -> dict[str, str]:
    """The shell's environment without settings that would lead the demo to somebody's real service."""
    ours = ("WEIGHTSMITH_", "REDIS_URL", "DATABASE_URL")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the service did not start:\n{log.read_text()}")
        try:
            if httpx2.get(f"{url}/readyz", timeout=5, trust_env=False).is_success:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the service did not become ready within a minute:\n{log.read_text()}")


if __name__ == "__main__":
    sys.exit(main())
