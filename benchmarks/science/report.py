"""`benchmarks/science.md` and its drawings: what was measured, what papers say, and what of it came out.

The text is a function of the numbers and of the machine, and beside it the numbers are kept: a run that measures the
same writes the same, and one of a few experiments renews what is theirs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.science.harness import Claim, Experiment, Numbers, Row

_COLUMNS = "| | measured | by seed | bar | |\n| --- | --- | --- | --- | --- |"
_NUMBERS = "numbers.json"

Measured = Mapping[str, Sequence[Numbers]]
"""What each experiment gave, by its name: the numbers of each seed."""


def write(experiments: Sequence[Experiment], measured: Measured, file: Path) -> bool:
    """Write the report from these numbers, and those that are kept of other experiments; whether it could be: not
    before every experiment was run once. Beside it is a folder for the numbers and the drawings.
    """
    folder = file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = folder / _NUMBERS
    kept: dict[str, list[Numbers]] = json.loads(numbers.read_text()) if numbers.exists() else {}
    found = {one.name: measured.get(one.name, kept.get(one.name)) for one in experiments}
    there = {name: [_rounded(run) for run in runs] for name, runs in found.items() if runs}
    numbers.write_text(json.dumps(there, indent=1, ensure_ascii=False) + "\n")
    if len(there) < len(experiments):
        return False
    drawings = {
        f"{one.name}-{name}.svg": drawing for one in experiments for name, drawing in one.plots(there[one.name]).items()
    }
    for old in folder.glob("*.svg"):
        if old.name not in drawings:
            old.unlink()
    for name, drawing in drawings.items():
        (folder / name).write_text(drawing.standalone() + "\n")
    file.write_text("\n".join(_lines(experiments, there, folder.name)) + "\n")
    return True


def _rounded(run: Numbers) -> Numbers:
    """To six digits."""
    return {name: float(f"{value:.6g}") for name, value in run.items()}


def _lines(experiments: Sequence[Experiment], measured: Measured, folder: str) -> Iterator[str]:
    judged = [
        (one, runs, [(claim, claim.judge(runs)) for claim in one.claims])
        for one in experiments
        if (runs := measured[one.name])
    ]
    rows = [(claim, row) for _, _, claims in judged for claim, found in claims for row in found]
    met = sum(row.verdict == "met" for _, row in rows)
    missed = [(claim, row) for claim, row in rows if row.verdict == "missed"]
    others = [(claim, row) for claim, row in rows if row.verdict in ("reproduced", "not reproduced")]
    yield "# What papers claim, measured\n"
    yield (
        "Written by `make science`. Small networks are trained on scikit-learn's handwritten digits, merged by "
        "recipes, and what comes of it is held against\nbars. Every number is a mean over the seeds unless something "
        "else is said; seeds are fixed, and each experiment's numbers are\nthose of its last run. These networks are "
        "tiny: a bar says that an effect is there, not how large it is elsewhere.\n"
    )
    yield f"{_machine()}. Every number: [{_NUMBERS}]({folder}/{_NUMBERS}).\n"
    yield f"**{met} bars are met, {len(missed) or 'none'} {'are' if len(missed) > 1 else 'is'} missed.**\n"
    if missed:
        yield from _table("Missed", missed)
    yield (
        "What stands in parentheses is not demanded of networks of this size: effects that papers claim, told "
        "whichever way they came out.\n"
    )
    yield from _table("Not demanded", others)
    for experiment, runs, claims in judged:
        yield f"## {experiment.title}\n"
        yield f"{experiment.setup} {_seeds(runs)}\n"
        for claim, found in claims:
            yield f"### {claim.title}\n"
            yield f"> {claim.says} ([paper]({claim.paper}))\n"
            yield _COLUMNS
            for row in found:
                yield _row(row)
            yield ""
        for name, drawing in experiment.plots(runs).items():
            yield f"![{drawing.label}]({folder}/{experiment.name}-{name}.svg)\n"


def _table(title: str, rows: Sequence[tuple[Claim, Row]]) -> Iterator[str]:
    yield f"| {title} | | measured | bar | |\n| --- | --- | --- | --- | --- |"
    for claim, row in rows:
        yield f"| {claim.title} | {row.what} | {row.measured} | {row.bar} | {row.verdict} |"
    yield ""


def _row(row: Row) -> str:
    verdict = f"**{row.verdict}**" if row.verdict == "missed" else row.verdict
    return f"| {row.what} | {row.measured} | {row.by_seed} | {row.bar} | {verdict} |"


def _seeds(runs: Sequence[Numbers]) -> str:
    return "One seed." if len(runs) == 1 else f"{len(runs)} seeds."


def _machine() -> str:
    """What it ran on."""
    processors = len(os.sched_getaffinity(0))
    found = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = found[0] if found else platform.machine()
    return (
        f"Measured on {processors} processors ({name}), Python {platform.python_version()}, torch {torch.__version__}"
    )


def _cpuinfo() -> Sequence[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else ()
