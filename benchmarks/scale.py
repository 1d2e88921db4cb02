"""`make bench-scale`: cost and memory as models grow, and one tensor larger than the memory limit.

From 0.1 to 8 billion parameters, in sparse files where the page cache and the disk would be too small; base and three
models, linear and TIES over the whole model. Then an embedding of 4 GB under a limit of 1 GiB, by every method.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.bench import RECIPES, measure, models_of
from benchmarks.synthetic import SHAPES, build_sparse

HERE = Path(__file__).parent
console = Console()


def main() -> None:
    """Measure and print."""
    work = Path(os.environ.get("WORK", HERE.parent / "build" / "bench")).absolute() / "scale"
    table = Table(title="sparse files, base and three models")
    for column in ("billion parameters", "method", "merge s", "s per billion", "CPU s per billion", "RSS MB"):
        table.add_column(column, justify="right")
    for size in ("0.1", "small", "large", "8"):
        for title in ("linear", "ties whole model"):
            _row(table, work, size, title, {})
        table.add_section()
    for models in (2, 6, 12):
        _row(table, work, "small", "linear", {}, models)
    console.print(table)
    table = Table(title="one embedding of 4 GB in each model, limits.memory: 1GiB")
    for column in ("billion parameters", "method", "merge s", "s per billion", "CPU s per billion", "RSS MB"):
        table.add_column(column, justify="right")
    for title in RECIPES:
        _row(table, work, "embedding", title, {"limits": {"memory": "1GiB"}})
    console.print(table)


def _row(table: Table, work: Path, size: str, title: str, keys: dict[str, object], models: int = 3) -> None:
    shape = SHAPES[size]
    build_sparse(work / size, shape, models)
    names = models_of(RECIPES[title], models)
    with console.status(f"{size}: {title}"):
        run = measure(work, size, {**RECIPES[title], **keys}, names, "compiled")
    shutil.rmtree(work / size)
    billions = shape.parameters / 1e9
    cells = (billions, run["merge_s"], run["merge_s"] / billions, run["merge_cpu_s"] / billions, run["rss_mb"])
    shown = [f"{cell:.2f}" for cell in cells]
    table.add_row(shown[0], f"{title}, {len(names)}", *shown[1:])


if __name__ == "__main__":
    main()
