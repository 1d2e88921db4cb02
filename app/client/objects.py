"""What the service answers, as plain objects. Keys that a newer service adds are in `raw`, if they are nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Self

from app.client.errors import NotWeightsmith

FINISHED = frozenset({"succeeded", "failed", "canceled"})


@dataclass(frozen=True, kw_only=True)
class _Answer:
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Read a JSON object; what it lacks has the default. Raises `NotWeightsmith` where there is none."""
        names = {each.name for each in fields(cls)} - {"raw"}
        found = {name: value for name, value in data.items() if name in names and value is not None}
        for name in names:
            if (name == "at" or name.endswith("_at")) and isinstance(found.get(name), str):
                found[name] = datetime.fromisoformat(found[name])
        try:
            return cls(raw=dict(data), **found)
        except TypeError:
            raise NotWeightsmith(f"that is no {cls.__name__.lower()}; is it the right address?") from None


@dataclass(frozen=True, kw_only=True)
class Progress(_Answer):
    """How far a job is."""

    tensors_done: int = 0
    tensors_total: int = 0
    bytes_read: int = 0
    bytes_read_total: int = 0
    bytes_written: int = 0
    bytes_written_total: int = 0
    trials_done: int = 0
    trials_total: int = 0
    steps_done: int = 0
    steps_total: int = 0
    fraction: float = 0.0
    bytes_per_second: float = 0.0
    seconds_left: float | None = None
    tensor: str = ""


@dataclass(frozen=True, kw_only=True)
class Job(_Answer):
    """One job as it was when it was asked for."""

    id: str
    status: str
    phase: str = ""
    progress: Progress = Progress()
    attempt: int = 0
    error: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    recipe: Any = None
    plan: dict[str, Any] = field(default_factory=dict, repr=False)
    labels: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None
    deadline_at: datetime | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        found = super().of({**data, "progress": Progress.of(data.get("progress") or {})})
        return replace(found, raw=dict(data))

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED


@dataclass(frozen=True, kw_only=True)
class Event(_Answer):
    """Something that happened to a job; `seq` counts from 1, and is None for what is told but not kept."""

    kind: str
    seq: int | None = None
    at: datetime | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class File(_Answer):
    """A file of a finished job."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Plan(_Answer):
    """What a document would do, from headers alone; `plan` and `recipe` are as the API gives them."""

    plan: dict[str, Any]
    recipe: Any = None

    @property
    def warnings(self) -> list[str]:
        return list(self.plan.get("warnings", []))


@dataclass(frozen=True, kw_only=True)
class Method(_Answer):
    """A merge method with one meaning of its name; `parameters` is a JSON Schema."""

    name: str
    semantics: str = "mergekit"
    title: str = ""
    summary: str = ""
    description: str = field(default="", repr=False)
    paper: str = ""
    base: str = ""
    parameters: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class ApiKey(_Answer):
    """An API key; `secret` is the key itself, where it has just been made, and is never shown."""

    id: str
    owner: str = ""
    name: str = ""
    scopes: list[str] = field(default_factory=list)
    secret: str | None = field(default=None, repr=False)
    created_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    used_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Credential(_Answer):
    """A stored secret, without it."""

    name: str
    kind: str = ""
    created_at: datetime | None = None
    changed_at: datetime | None = None
