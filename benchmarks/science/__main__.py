"""`make science`: run every experiment and print what it measured beside its bars; exit status 1 if one was missed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.science import alignment, low_rank, signatures, sizes, sparse, transfer
from benchmarks.science.harness import Experiment, Numbers, run_all

EXPERIMENTS: Sequence[Experiment] = (
    alignment.PAIR,
    alignment.FOUR,
    signatures.EXPERIMENT,
    transfer.EXPERIMENT,
    sparse.EXPERIMENT,
    low_rank.EXPERIMENT,
    sizes.EXPERIMENT,
)


def main() -> int:
    """Print a table for each experiment as soon as it is done."""
    console, begun = Console(), time.monotonic()
    missed: list[str] = []

    def done(experiment: Experiment, runs: list[Numbers], seconds: float) -> None:
        rows = experiment.judge(runs)
        seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        table = Table(
            title=f"{experiment.title} · {seeds}, {seconds:.0f} CPU s", title_justify="left", caption=experiment.paper
        )
        for column in ("", "measured", "bar", ""):
            table.add_column(column)
        for row in rows:
            met = "" if row.met is None else "[green]met[/green]" if row.met else "[red]missed[/red]"
            table.add_row(row.what, row.measured, row.bar, met)
        console.print(table)
        missed.extend(f"{experiment.title}: {row.what}" for row in rows if row.met is False)

    run_all(EXPERIMENTS, done)
    console.print(f"\n{len(EXPERIMENTS)} experiments in {time.monotonic() - begun:.0f} s")
    for what in missed:
        console.print(f"[red]missed:[/red] {what}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
