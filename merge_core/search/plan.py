"""What a search takes, from headers alone: its candidates' plan, so many times."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core import __version__
from merge_core.documents import canonical_json
from merge_core.errors import WeightsmithError
from merge_core.merge import plan_only
from merge_core.plan import Plan
from merge_core.search.document import Search

_PER_TRIAL = 4096
"""Bytes of the report, about."""


@dataclass(frozen=True)
class SearchPlan:
    """What will be tried. `candidate`: the plan of one trial; the others differ in numbers."""

    document: Search
    candidate: Plan
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> Sequence[str]:
        return (*self.candidate.warnings, *self.notes)

    @property
    def digest(self) -> str:
        """The same for the same search among the same models."""
        told = [__version__, self.document.to_data(), self.candidate.sources_digest]
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()

    @property
    def output_bytes(self) -> int:
        """What a search writes at most at a time: a worker's candidates, and what it finds."""
        keys = self.document.keys
        candidates = 0 if keys.evaluator.kind == "http" else keys.at_a_time
        return (candidates + int(keys.merge)) * self.candidate.output_bytes + _PER_TRIAL * self.document.most_trials

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]:
        """The plan for people and for JSON: that of a candidate, and how often."""
        keys, one = self.document.keys, self.candidate.to_dict(steps=steps)
        trials = self.document.most_trials
        return {
            **one,
            "search": keys.method,
            "evaluator": keys.evaluator.kind,
            "metrics": dict(keys.wanted),
            "trials": trials,
            "bytes_read": one["bytes_read"] * trials,
            "bytes_written": one["bytes_written"] * (0 if keys.evaluator.kind == "http" else trials),
            "bytes_on_disk": self.output_bytes,
            "warnings": list(self.warnings),
        }


def plan_search(
    document: Search, *, roots: Sequence[Path] | None = None, memory: int | None = None, threads: int | None = None
) -> SearchPlan:
    """The plan alone: headers are read. Raises `WeightsmithError` where the usual trial cannot be made, or one of the
    choices; that others may not is a warning.
    """

    def plan(values: Any) -> Plan:
        return plan_only(document.candidate(values), roots=roots, memory=memory, threads=threads)

    usual = plan(document.usual)
    for values in document.each_choice:
        plan(values)
    plan_only(document.candidate(document.usual, whole=False), roots=roots, memory=memory, threads=threads)
    notes = []
    for values in document.ends:
        try:
            plan(values)
        except WeightsmithError as error:
            told = ", ".join(f"{name} = {value}" for name, value in values.items())
            notes.append(f"trials that cannot be planned are passed over, such as {told}: {str(error)[:500]}")
    return SearchPlan(document, usual, tuple(notes))
