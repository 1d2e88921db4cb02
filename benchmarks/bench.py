"""`make bench`: what merges cost, as ratios within one run.

For each method, in turns, so that a noisy machine is noisy for all: the floor (`cat` of the inputs and `cp` of as much
as is written), ours, and mergekit where `make bench-peer` made its environment; once also compiled against plain
kernels, on 0.1 billion parameters. Medians.

Environment: `SIZE` (large: 1.1 billion parameters, small: 0.3), `ROUNDS`, `OUT` (JSON rows), `WORK` (where the models
are made), `METHODS` (titles with commas between), `AGAINST` (`torch,mergekit`).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.synthetic import SHAPES, build
from merge_core.methods import find_method

HERE = Path(__file__).parent
PEER = HERE.parent / ".venv-peer" / "bin" / "mergekit-yaml"
ON_BASE = {"base_model": "base"}
WHOLE_MATRICES = {"limits": {"memory": "1650MiB"}}
"""400 and five times the largest tensor in float32, which is the embedding."""
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 1}},
    "task_arithmetic": {"merge_method": "task_arithmetic", **ON_BASE, "parameters": {"weight": 0.3}},
    "slerp": {"merge_method": "slerp", **ON_BASE, "parameters": {"t": 0.3}},
    "nuslerp": {"merge_method": "nuslerp", "parameters": {"weight": 1}},
    "nuslerp of task vectors": {"merge_method": "nuslerp", **ON_BASE, "parameters": {"weight": 1}},
    "multislerp": {"merge_method": "multislerp", **ON_BASE, "parameters": {"weight": 1}},
    "karcher": {"merge_method": "karcher"},
    "model_stock": {"merge_method": "model_stock", **ON_BASE},
    "model_stock by rows": {"merge_method": "model_stock", **ON_BASE, "parameters": {"filter_wise": True}},
    "nearswap": {"merge_method": "nearswap", **ON_BASE, "parameters": {"t": 0.001}},
    "ram": {"merge_method": "ram", **ON_BASE},
    "ramplus_tl": {"merge_method": "ramplus_tl", **ON_BASE},
    "wise_ft": {"merge_method": "wise_ft", **ON_BASE},
    "expo": {"merge_method": "expo", **ON_BASE, "parameters": {"alpha": 0.3}},
    "geometric_median": {"merge_method": "geometric_median"},
    "dare_linear": {"merge_method": "dare_linear", **ON_BASE, "parameters": {"weight": 0.3, "density": 0.5}},
    "dare_ties": {"merge_method": "dare_ties", **ON_BASE, "parameters": {"weight": 0.3, "density": 0.5}},
    "dare_linear unscaled": {
        "merge_method": "dare_linear",
        **ON_BASE,
        "parameters": {"weight": 0.3, "density": 0.5, "rescale": False},
    },
    "dare_ties unscaled": {
        "merge_method": "dare_ties",
        **ON_BASE,
        "parameters": {"weight": 0.3, "density": 0.5, "rescale": False},
    },
    "darex": {"merge_method": "darex", **ON_BASE, "parameters": {"q": 0.2}},
    "half_reset": {"merge_method": "half_reset", **ON_BASE},
    "ties": {"merge_method": "ties", **ON_BASE, "parameters": {"weight": 1, "density": 0.2}},
    "ties whole model": {
        "merge_method": "ties",
        **ON_BASE,
        "scope": "model",
        "parameters": {"weight": 1, "density": 0.2},
    },
    "widen": {"merge_method": "widen", **ON_BASE},
    "iso_c": {"merge_method": "iso_c", **ON_BASE, **WHOLE_MATRICES},
    "iso_cts": {"merge_method": "iso_cts", **ON_BASE, **WHOLE_MATRICES},
    "tsv_m": {"merge_method": "tsv_m", **ON_BASE, **WHOLE_MATRICES},
    "low_rank": {"merge_method": "low_rank", **ON_BASE, **WHOLE_MATRICES, "parameters": {"rank": 64}},
    "pcb whole model": {"merge_method": "pcb", **ON_BASE},
    "graft": {"merge_method": "graft", **ON_BASE, "parameters": {"sparsity": 0.1}},
    "arcee_fusion": {"merge_method": "arcee_fusion", **ON_BASE},
    "sce": {"merge_method": "sce", **ON_BASE, "parameters": {"select_topk": 0.2}},
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        **ON_BASE,
        "parameters": {"weight": 0.3, "density": 0.5, "gamma": 0.01},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        **ON_BASE,
        "parameters": {"weight": 0.3, "density": 0.5, "gamma": 0.01},
    },
    "breadcrumbs per row": {"merge_method": "breadcrumbs", **ON_BASE, "semantics": "paper"},
    "della": {"merge_method": "della", **ON_BASE, "parameters": {"weight": 0.3, "density": 0.5}},
    "della_linear": {"merge_method": "della_linear", **ON_BASE, "parameters": {"weight": 0.3, "density": 0.5}},
    "magnitude_prune": {"merge_method": "magnitude_prune", **ON_BASE, "parameters": {"weight": 0.3}},
    "magmax": {"merge_method": "magmax", **ON_BASE},
}
NOT_IN_MERGEKIT = {
    *("widen", "pcb whole model", "graft", "wise_ft", "expo", "geometric_median"),
    *("darex", "half_reset"),
    *("breadcrumbs per row", "magnitude_prune", "magmax"),
    *("iso_c", "iso_cts", "tsv_m", "low_rank"),
}
ROUNDS_OF = {"large": 3, "small": 1}
FOR_TORCH = "0.1"
"""The size at which compiled kernels are set against plain ones, which would take minutes for a large model."""
console = Console(width=150)
Measured = dict[str, float]


def main() -> None:
    """Measure and print; see the module."""
    size = os.environ.get("SIZE", "large")
    rounds = int(os.environ.get("ROUNDS", ROUNDS_OF[size]))
    work = Path(os.environ.get("WORK", HERE.parent / "build" / "bench")).absolute()
    chosen = os.environ.get("METHODS", ",".join(RECIPES)).split(",")
    against = os.environ.get("AGAINST", "torch,mergekit").split(",")
    recipes = {title.strip(): RECIPES[title.strip()] for title in chosen}
    shape = SHAPES[size]
    with console.status(f"making a base and three fine-tunes of {shape.parameters / 1e9:.2f} billion parameters …"):
        build(work / size, shape, 3)
        build(work / FOR_TORCH, SHAPES[FOR_TORCH], 3)
    subprocess.run([sys.executable, "-m", "merge_core.kernels"], check=True)
    first = _first_time(work, size)
    found: dict[str, dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for title, recipe in recipes.items():
            with console.status(f"round {number + 1} of {rounds}: {title}"):
                models = models_of(recipe)
                found[title]["floor"].append(_floor(work, size, models))
                found[title]["ours"].append(measure(work, size, recipe, models, "compiled"))
                if "torch" in against and not number:
                    for form in ("plain", "compiled"):
                        found[title][form].append(measure(work, FOR_TORCH, recipe, models, form))
                if "mergekit" in against and PEER.exists() and "scope" not in recipe and title not in NOT_IN_MERGEKIT:
                    found[title]["peer"].append(_peer(work, size, recipe, models))
    rows = [_row(title, of) for title, of in found.items()]
    described = f"{_machine()}; {shape.parameters / 1e9:.2f} billion parameters, bf16, base and three models (or one)"
    console.print(_table(rows, f"{described}; medians of {rounds}"))
    starts = [run["first_read_s"] for of in found.values() for run in of["ours"]]
    console.print(f"process start to first block read: {statistics.median(starts):.2f} s")
    console.print(f"linear where no input was ever hashed: merge phase {first['merge_s']:.2f} s")
    if not PEER.exists():
        console.print("no mergekit to compare with: `make bench-peer` installs one")
    if out := os.environ.get("OUT"):
        Path(out).write_text(json.dumps(rows, indent=2) + "\n")


def models_of(recipe: Mapping[str, Any], models: int = 3) -> list[str]:
    """Which of the fine-tunes a recipe merges: as many as its method takes."""
    most = find_method(recipe["merge_method"], recipe.get("semantics", "mergekit")).count[1]
    return [f"m{i}" for i in range(models)][:most]


def _first_time(work: Path, size: str) -> Measured:
    shutil.rmtree(work / "cache", ignore_errors=True)
    return measure(work, size, RECIPES["linear"], ["base", "m0", "m1", "m2"], "compiled")


def _floor(work: Path, size: str, models: Sequence[str]) -> Measured:
    """Reading the inputs and writing the output with the system's own tools, in seconds."""
    used = [str(file) for model in ["base", *models] for file in sorted((work / size / model).glob("*.safetensors"))]
    copy = work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    os.sync()
    with Path(os.devnull).open("wb") as nothing:
        read, _ = _timed(["cat", *used], stdout=nothing)
    written, _ = _timed(["cp", "-r", str(work / size / "m0"), str(copy)])
    shutil.rmtree(copy)
    return {"wall_s": read + written, "read_s": read, "write_s": written}


def measure(work: Path, size: str, recipe: Mapping[str, Any], models: Sequence[str], form: str) -> Measured:
    """One merge of ours in a process of its own, with one form of the kernels."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    text = json.dumps({**recipe, "models": [{"model": model} for model in models]})
    environment = {**os.environ, "WEIGHTSMITH_KERNELS": form, "OMP_NUM_THREADS": "1", "BENCH_STARTED": str(time.time())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode, as mergekit has
    command = [sys.executable, "-m", "benchmarks.one", str(work / size), str(out), str(work / "cache")]
    begun, before = time.perf_counter(), os.times()
    ran = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=environment)
    wall, after = time.perf_counter() - begun, os.times()
    if ran.returncode:
        raise SystemExit(f"{text}\n{ran.stderr}")
    shutil.rmtree(out)
    return {"wall_s": wall, "cpu_s": _children(after) - _children(before), **json.loads(ran.stdout)}


def _peer(work: Path, size: str, recipe: Mapping[str, Any], models: Sequence[str]) -> Measured:
    """mergekit on the same recipe."""
    out = work / "peer"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    paths = {name: str(work / size / name) for name in ("base", "m0", "m1", "m2")}
    theirs = {**recipe, "models": [{"model": paths[model]} for model in models], "dtype": "bfloat16"}
    if "base_model" in recipe:
        theirs["base_model"] = paths["base"]
    if recipe["merge_method"] == "slerp":
        theirs["models"].insert(0, {"model": paths["base"]})
    (work / "peer.yml").write_text(yaml.safe_dump(theirs))
    command = [str(PEER), str(work / "peer.yml"), str(out)]
    begun, before = time.perf_counter(), os.times()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begun
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    shutil.rmtree(out, ignore_errors=True)
    return {"wall_s": wall, "cpu_s": _children(os.times()) - _children(before), "rss_mb": used.ru_maxrss / 1024}


def _timed(command: Sequence[str], **streams: Any) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    begun, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, **streams)
    return time.perf_counter() - begun, _children(os.times()) - _children(before)


def _children(times: os.times_result) -> float:
    return times.children_user + times.children_system


def _row(title: str, of: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    def median(what: str, key: str) -> float | None:
        return statistics.median(run[key] for run in of[what]) if of.get(what) else None

    def ratio(over: str, key: str, under: str, its_key: str) -> float | None:
        pairs = zip(of.get(over, ()), of.get(under, ()), strict=False)
        ratios = [one[key] / other[its_key] for one, other in pairs]
        return round(statistics.median(ratios), 2) if ratios else None

    ours = {key: median("ours", key) for key in ("wall_s", "cpu_s", "merge_s", "merge_cpu_s", "rss_mb", "bytes")}
    return {
        "method": title,
        **{key: round(value, 2) for key, value in ours.items() if value is not None},
        "floor_s": round(median("floor", "wall_s") or 0, 2),
        "floor_write_s": round(median("floor", "write_s") or 0, 2),
        "peer_wall_s": median("peer", "wall_s"),
        "peer_rss_mb": median("peer", "rss_mb"),
        "vs_floor": ratio("ours", "merge_s", "floor", "wall_s"),
        "vs_mergekit": ratio("peer", "wall_s", "ours", "wall_s"),
        "vs_torch": ratio("plain", "merge_s", "compiled", "merge_s"),
    }


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(
        title=title, caption="whole process, then the merge phase alone; vs floor: less is better, others more"
    )
    columns = {
        "method": "method",
        "wall s": "wall_s",
        "CPU s": "cpu_s",
        "merge s": "merge_s",
        "merge CPU s": "merge_cpu_s",
        "RSS MB": "rss_mb",
        "GB": "bytes",
        "floor s": "floor_s",
        "vs floor": "vs_floor",
        "vs mergekit": "vs_mergekit",
        "its MB": "peer_rss_mb",
        "vs torch": "vs_torch",
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        shown = {**row, "bytes": row["bytes"] / 1e9}
        cells = [shown[key] for key in columns.values()]
        table.add_row(*("–" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells))
    return table


def _machine() -> str:
    with Path("/proc/cpuinfo").open() as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
