"""`make science`: run the experiments, print what they measured beside their bars, write `benchmarks/science.md`.

Exit status 1 if a bar was missed. Names run these experiments alone, and renew their part of the report. `--quick` runs
a part of them with a seed or two each, in five minutes on two processors, and writes none.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.science import (
    absorbing,
    alignment,
    darex,
    forgetting,
    four_tasks,
    learned,
    low_rank,
    robustness,
    signatures,
    sizes,
    soups,
    sparse,
    transfer,
)
from benchmarks.science.harness import Claim, Experiment, Numbers, Row, run_all
from benchmarks.science.report import write

EXPERIMENTS: Sequence[Experiment] = (
    soups.EXPERIMENT,
    four_tasks.EXPERIMENT,
    learned.EXPERIMENT,
    darex.EXPERIMENT,
    robustness.EXPERIMENT,
    signatures.EXPERIMENT,
    sizes.EXPERIMENT,
    alignment.PAIR,
    alignment.FOUR,
    absorbing.EXPERIMENT,
    transfer.EXPERIMENT,
    forgetting.GRAFT,
    forgetting.RESET,
    forgetting.UNLEARNING,
    sparse.EXPERIMENT,
    low_rank.EXPERIMENT,
)
REPORT = Path(__file__).parent.with_suffix(".md")
_COLOURS = {"met": "green", "reproduced": "green", "missed": "red", "not reproduced": "yellow"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables for each experiment, and keep its numbers, as soon as it is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*(each.name for each in EXPERIMENTS), []])
    parser.add_argument("--quick", action="store_true", help="a part of the experiments, in five minutes")
    asked = parser.parse_args(arguments)
    chosen = [each for each in EXPERIMENTS if each.name in (asked.names or [each.name])]
    if asked.quick:
        chosen = [each for each in chosen if each.quick]
    console, begun = Console(), time.monotonic()
    missed: list[str] = []
    spent: list[float] = []

    def done(experiment: Experiment, runs: list[Numbers], seconds: float) -> None:
        spent.append(seconds)
        console.print(f"\n[bold]{experiment.title}[/bold] · seeds: {len(runs)}, {seconds:.0f} CPU s")
        for claim in experiment.claims:
            rows = claim.judge(runs)
            console.print(_table(claim, rows))
            missed.extend(
                f"{claim.title}: {row.what}: {row.measured}, {row.bar}" for row in rows if row.verdict == "missed"
            )
        if not asked.quick and write(EXPERIMENTS, {experiment.name: runs}, REPORT):
            console.print(f"written: {REPORT.name}")

    run_all(chosen, done, quick=asked.quick)
    console.print(f"\n{len(chosen)} experiments in {time.monotonic() - begun:.0f} s, {sum(spent):.0f} CPU s")
    for what in missed:
        console.print(f"[red]missed:[/red] {what}")
    return 1 if missed else 0


def _table(claim: Claim, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{claim.title}: {claim.says}", title_justify="left", caption=claim.paper)
    for column in ("", "measured", "bar", ""):
        table.add_column(column)
    for row in rows:
        colour = _COLOURS.get(row.verdict)
        verdict = f"[{colour}]{row.verdict}[/{colour}]" if colour else ""
        table.add_row(row.what, row.measured, row.bar, verdict)
    return table


if __name__ == "__main__":
    sys.exit(main())
