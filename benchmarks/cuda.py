"""`make bench-cuda`: merges on a CUDA device against the rate at which the host can copy to it.

Each method merges 0.3 billion parameters from files that are in the page cache; its input bytes per second are set
against those of plain pinned copies, and its output is compared with the CPU's, byte for byte. Without a CUDA device
this says so and ends well. Environment: `WORK`, `DEVICE`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench import RECIPES, models_of
from benchmarks.synthetic import SHAPES, build
from merge_core.artifact import Artifact
from merge_core.merge import merge
from merge_core.recipe import Recipe

HERE = Path(__file__).parent
COPIED = 2**28
console = Console()


def main() -> int:
    """Measure and print; 0 unless a byte differs."""
    if not torch.cuda.is_available():
        console.print("no CUDA device: skipped")
        return 0
    device = torch.device(os.environ.get("DEVICE", "cuda:0"))
    work = Path(os.environ.get("WORK", HERE.parent / "build" / "bench")).absolute()
    models = work / "small"
    build(models, SHAPES["small"], 3)
    rate = copy_rate(device)
    table = Table(title=f"{torch.cuda.get_device_name(device)}; pinned copies to it: {rate / 1e9:.1f} GB/s")
    for column in ("method", "seconds", "GB/s in", "share of the copy rate", "bytes as on the CPU"):
        table.add_column(column, justify="left" if column == "method" else "right")
    differ = False
    for title, recipe in RECIPES.items():
        names = models_of(recipe)
        wanted = Recipe.from_data({**recipe, "models": [{"model": name} for name in names]})
        expected = _merged(wanted, models, work, "cpu")[0].tensors
        artifact, seconds, read = min(
            (_merged(wanted, models, work, str(device)) for _ in range(3)), key=lambda of: of[1]
        )
        same = artifact.tensors == expected
        differ |= not same
        speed = read / seconds
        table.add_row(title, f"{seconds:.2f}", f"{speed / 1e9:.2f}", f"{speed / rate:.0%}", "yes" if same else "NO")
    console.print(table)
    return int(differ)


def copy_rate(device: torch.device) -> float:
    """Bytes per second from pinned memory to the device, the best of five."""
    host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPIED, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return COPIED / min(seconds)


def _merged(recipe: Recipe, models: Path, work: Path, device: str) -> tuple[Artifact, float, int]:
    """The artifact, the seconds it took from the first block on, and the bytes read."""
    out = work / "cuda-out"
    shutil.rmtree(out, ignore_errors=True)
    begun: list[float] = []
    read = 0

    def report(progress: object) -> None:
        nonlocal read
        begun.append(time.perf_counter())
        read = getattr(progress, "bytes_read", 0)

    artifact = merge(recipe, out, roots=[models], cache=work / "cache", device=device, report=report)
    seconds = begun[-1] - begun[0]
    shutil.rmtree(out)
    return artifact, seconds, read


if __name__ == "__main__":
    sys.exit(main())
