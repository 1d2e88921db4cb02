"""`make demo`: start the service, train four small models on real data, merge them over HTTP by every method, print how
good each merge is; train a small language model, and let its merge be learned from a few texts; and leave the page open
with larger models to play with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
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
from app.client.jobs import Jobs
from benchmarks import language
from benchmarks.digits import FIRST_IMAGES, TASKS, Digits, accuracies, load_checkpoint, train_models
from benchmarks.synthetic import SHAPES, build

console = Console()
PORT = 8000
LARGER = {
    "merge_method": "task_arithmetic",
    "base_model": "llama/base",
    "models": [{"model": f"llama/m{i}", "parameters": {"weight": 0.4}} for i in range(3)],
    "dtype": "bfloat16",
}
"""Long enough to be watched."""
SAMPLES = 10
"""Texts of each expert that coefficients are learned from."""
WEIGHT = 0.3
BY_HAND, LEARNED = f"task arithmetic at {WEIGHT}", f"Expert Merging, {2 * SAMPLES} texts"
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
    """Run the demo; 0 if the merges compare as the papers say. On a terminal the service then goes on until Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="weightsmith-demo-") as scratch:
        models, data, downloads = (Path(scratch) / name for name in ("models", "data", "downloads"))
        models.mkdir()
        with service(data, models, port=PORT) as url:
            invite(url)
            try:
                return play(url, models, downloads)
            except ServiceError as error:
                console.print(f"[red]error:[/red] {error}")
                return 1


def invite(url: str) -> None:
    """Show the way to the page; on a terminal with a screen, open it."""
    console.print(f"Open [bold]{url}[/bold] in a browser: every merge shows up there while it runs.\n")
    has_screen = sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or "WAYLAND_DISPLAY" in os.environ
    )
    if sys.stdout.isatty() and has_screen:
        webbrowser.open(url)


def play(url: str, models: Path, downloads: Path) -> int:
    """The models, the merges, and how good they are."""
    with console.status("making four checkpoints in the shape of a Llama, of 0.1 billion random weights each …"):
        build(models / "llama", SHAPES["0.1"], 3)
    run(url, "0.1 billion weights", LARGER, downloads)
    digits = Digits.load()
    with console.status(f"training: one base on {FIRST_IMAGES} images, four fine-tunes on {len(digits.images):,} …"):
        names = train_models(models, digits)
    console.print(f"\ntrained {len(names)} models on scikit-learn's digits, saved as bf16 safetensors in shards")
    wanted = recipes(names[1:])
    console.print("\none of the recipes that are POSTed to /v1/merges:\n", style="bold")
    console.print(yaml.safe_dump(wanted[TIES], sort_keys=False), markup=False, highlight=False)
    merged = {title: run(url, title, recipe, downloads) for title, recipe in wanted.items()}
    verdict = report(digits, {name: models / name for name in names}, merged)
    verdict = max(verdict, report_losses(learn(url, models, downloads)))
    if sys.stdin.isatty() and sys.stdout.isatty():
        console.print(
            f"\nThe service goes on at [bold]{url}[/bold], with these models to merge on the page. Ctrl-C ends it."
        )
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return verdict


def run(url: str, title: str, recipe: Mapping[str, Any], downloads: Path) -> Path:
    """POST one recipe, watch its job, download the result."""
    with Client(url) as client:
        job = client.merges.submit(recipe, labels={"demo": title})
        return _finished(client.merges, job, title, "tensors", downloads)


def _finished(jobs: Jobs, job: Job, title: str, counted: str, downloads: Path) -> Path:
    """Watch a job to its end and download what it made; `counted`: what its progress is told in."""
    columns = (
        TextColumn("{task.description:>34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(counted),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task(title, total=None)

        def follow(job: Job) -> None:
            done, total = (getattr(job.progress, f"{counted}_{which}") for which in ("done", "total"))
            if total:
                bar.update(shown, total=total, completed=done)

        jobs.wait(job, progress=follow)
        jobs.download(job, downloads / job.id)
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


def learn(url: str, models: Path, downloads: Path, seed: int = 0) -> dict[str, dict[str, float]]:
    """Train a language model and two fine-tunes of it, merge them by task arithmetic and with coefficients learned from
    a few texts without labels; what each loses on texts that nobody has seen, by the names of the table.
    """
    folder = models / "language"
    known = language.texts()
    with console.status("training a small language model: a base on C++, fine-tunes on Python and on English …"):
        language.train_models(folder, known, seed)
        language.write_samples(folder, known, SAMPLES, seed)
    experts = [{"model": f"language/{name}"} for name in language.EXPERTS]
    recipe = {"merge_method": "task_arithmetic", "base_model": "language/base", "models": experts}
    made = {BY_HAND: run(url, BY_HAND, recipe | {"parameters": {"weight": WEIGHT}}, downloads)}
    with Client(url) as client:
        job = client.calibrations.submit(calibration(), labels={"demo": LEARNED})
        console.print(f"its curve is drawn at [bold]{url}/jobs/{job.id}[/bold]", soft_wrap=True)
        made[LEARNED] = _finished(client.calibrations, job, LEARNED, "steps", downloads)
    alone = {name: folder / name for name in ("base", *language.EXPERTS)}
    return {name: language.losses(each, known) for name, each in {**alone, **made}.items()}


def report_losses(measured: Mapping[str, Mapping[str, float]]) -> int:
    """Print what `learn` gave; 0 if the learned coefficients are ahead of those by hand."""
    table = Table(title="loss on text that nobody has seen, in nats for each character")
    table.add_column("model")
    columns = (*language.EXPERTS, "mean")
    for name in columns:
        table.add_column(name, justify="right")
    for name, found in measured.items():
        style = "bold" if name == LEARNED else "" if name == BY_HAND else "dim"
        row = (name, *(f"{found[each]:.3f}" for each in columns))
        table.add_row(*row, style=style, end_section=name == language.EXPERTS[-1])
    console.print()
    console.print(table)
    ours, theirs = measured[LEARNED]["mean"], measured[BY_HAND]["mean"]
    verdict = "[green]ahead of[/green]" if ours < theirs else "[red]not ahead of[/red]"
    console.print(f"\n{LEARNED} without labels ({ours:.3f}) is {verdict} {BY_HAND} ({theirs:.3f})")
    return 0 if ours < theirs else 1


def calibration() -> dict[str, Any]:
    """What is POSTed to /v1/calibrations; what is held out there chooses nothing and only tells the curve."""
    names = [f"language/{name}" for name in language.EXPERTS]
    return {
        "merge_method": "expert_merging",
        "base_model": "language/base",
        "models": [{"model": name} for name in names],
        "limits": {"threads": 1},
        "calibrate": {
            "method": "expert_merging",
            "data": [{"model": name, "file": f"{name}.jsonl"} for name in names],
            "samples": SAMPLES,
            "batch": SAMPLES,
            "accumulate": len(names),
            "steps": 40,
            "rate": 0.1,
            "schedule": "cosine",
            "first": WEIGHT,
            "anchor": 0,
            "check": [{"model": name, "file": f"{name}-check.jsonl", "samples": language.CHECKED} for name in names],
            "every": 4,
            "choose": "last",
            "compare": [WEIGHT],
            "merge": True,
        },
    }


def _free_port(wanted: int) -> int:
    """That port, or another if it is taken."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise SystemExit("no port can be listened on here")


@contextmanager
def service(data: Path, models: Path, *, port: int = 0, **settings: str) -> Iterator[str]:
    """The embedded service in a process of its own; yields its URL. `settings` are environment variables."""
    port = _free_port(port)
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
    kept = "WEIGHTSMITH_KERNELS"
    return {name: value for name, value in os.environ.items() if name == kept or not name.startswith(ours)}


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
