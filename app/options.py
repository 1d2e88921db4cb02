"""What is asked of a job beside its document, which stays as others write it: labels, priority, deadline, a Hub."""

# No `from __future__ import annotations`: FastAPI reads the annotations of dependencies.

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query
from pydantic import StringConstraints

from app.errors import HttpProblem
from workers.credentials import NAME_PATTERN
from workers.hub.opening import HubOptions

MAX_LABELS = 32
MAX_PRIORITY = 100
MAX_DEADLINE_SECONDS = 30 * 24 * 3600
LABEL = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}:[^\x00-\x1f\x7f]{0,100}$"

Label = Annotated[str, StringConstraints(pattern=LABEL)]
LABEL_TEXT = "`name:value`, of at most 63 letters, digits and `._/-`, and at most 100 characters; may be repeated"
DeadlineQuery = Annotated[
    int | None,
    Query(ge=1, le=MAX_DEADLINE_SECONDS, description="seconds from now; a job that is not done then has failed"),
]


@dataclass(frozen=True)
class JobOptions:
    """Columns of a job that its document says nothing of."""

    labels: Mapping[str, str]
    priority: int = 0
    deadline: int | None = None

    def fields(self) -> dict[str, Any]:
        """As `JobStore.add` takes them."""
        return {"labels": dict(self.labels), "priority": self.priority, "deadline_at": deadline_at(self.deadline)}


def deadline_at(seconds: int | None) -> float | None:
    """The moment that is so many seconds from now."""
    return None if seconds is None else time.time() + seconds


def _labels(
    label: Annotated[list[Label], Query(max_length=MAX_LABELS, description=LABEL_TEXT, examples=["team:vision"])] = [],  # noqa: B006
) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in label:
        name, _, value = each.partition(":")
        if found.setdefault(name, value) != value:
            place = {"pointer": "#/query/label", "detail": f"{name} has two values"}
            raise HttpProblem("invalid-request", f"label: {name} has two values; a job has one of each", errors=[place])
    return found


LabelsDep = Annotated[dict[str, str], Depends(_labels)]


def _hub(
    hub_credential: Annotated[
        str | None,
        Query(pattern=NAME_PATTERN, description="your credential for the Hub (default: the one named `hub`, if any)"),
    ] = None,
    hub_endpoint: Annotated[
        str | None, Query(max_length=2000, description="another Hub than the usual, of those that the service allows")
    ] = None,
) -> HubOptions:
    return HubOptions(hub_credential, hub_endpoint)


HubDep = Annotated[HubOptions, Depends(_hub)]


def _options(
    labels: LabelsDep,
    priority: Annotated[
        int, Query(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="which queued job is taken first: the highest")
    ] = 0,
    deadline: DeadlineQuery = None,
) -> JobOptions:
    return JobOptions(labels, priority, deadline)


JobOptionsDep = Annotated[JobOptions, Depends(_options)]
