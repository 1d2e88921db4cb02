"""The kinds of jobs, their states and the legal moves between these."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class JobKind(StrEnum):
    """What a job makes. `workers.kinds` says of each how."""

    MERGE = "merge"
    ALIGNMENT = "alignment"
    PATCH = "patch"
    VERIFICATION = "verification"
    VIEW = "view"
    ANALYSIS = "analysis"
    SEARCH = "search"
    CALIBRATION = "calibration"

    @property
    def prefix(self) -> str:
        """What the ids of such jobs begin with."""
        return _PREFIXES[self]

    @property
    def plural(self) -> str:
        """Many of them, as the service's paths say it."""
        odd = {JobKind.PATCH: "patches", JobKind.VERIFICATION: "verify", JobKind.ANALYSIS: "analyses"}
        odd |= {JobKind.SEARCH: "searches"}
        return odd.get(self, f"{self}s")


_PREFIXES: Mapping[JobKind, str] = {
    JobKind.MERGE: "mrg_",
    JobKind.ALIGNMENT: "aln_",
    JobKind.PATCH: "pat_",
    JobKind.VERIFICATION: "vrf_",
    JobKind.VIEW: "viw_",
    JobKind.ANALYSIS: "anl_",
    JobKind.SEARCH: "sch_",
    JobKind.CALIBRATION: "cal_",
}


class JobState(StrEnum):
    """Where a job is. `canceling` waits for its worker to notice."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELING = "canceling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELED, JobState.FAILED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.CANCELING, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.CANCELING: frozenset({JobState.CANCELED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELED: frozenset({JobState.QUEUED}),
}
"""What finishes while it is being canceled has finished. Only a retry leads out of a finished state."""

AT_WORK = (JobState.RUNNING, JobState.CANCELING)
"""The states in which a worker holds a job."""
FINISHED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED})


class UnitState(StrEnum):
    """Where a unit of a running job is. What is `left` only whoever holds the job takes."""

    OPEN = "open"
    RUNNING = "running"
    DONE = "done"
    LEFT = "left"
