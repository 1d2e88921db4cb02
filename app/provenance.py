"""What a finished job was made of and by: an in-toto statement and a report, both from the artifact's own lock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from workers.artifacts import ArtifactStore
from workers.tables import Event, Job

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:weightsmith:build:v1"
MOST_BYTES = 64 * 2**20
"""The longest lock or report that is read into memory."""
MOST_DRAWN = 16 * 2**20
"""The longest report that a page draws; what is made of a longer one would take too much of the service's memory."""


def read_json(artifacts: ArtifactStore, job: Job, name: str, *, most: int = MOST_BYTES) -> dict[str, Any] | None:
    """A JSON file of a finished job, of at most so many bytes; `name` may be a suffix. None: it has no such file.

    Raises `FileNotFoundError` if the file is gone, `StorageFailed` if the store cannot be used.
    """
    file = next((file for file in job.files if file["path"].endswith(name)), None)
    if file is None or file["size"] > most:
        return None
    found = json.loads(b"".join(artifacts.read(job.id, file["path"], 0, file["size"])))
    return found if isinstance(found, dict) else None


def manifest(job: Job, lock: Mapping[str, Any]) -> dict[str, Any]:
    """An in-toto Statement: every file with its sha256, and how they were made, as SLSA's provenance says it."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file["path"], "digest": {"sha256": file["sha256"]}} for file in job.files],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{BUILD_TYPE}:{job.kind}",
                "externalParameters": {"recipe": job.recipe},
                "internalParameters": {
                    key: lock[key] for key in ("seed", "plan", "exact_on", "machine") if key in lock
                },
                "resolvedDependencies": list(_sources(lock)),
            },
            "runDetails": {
                "builder": {"id": "urn:weightsmith", "version": lock.get("made_with", {})},
                "metadata": {
                    "invocationId": job.id,
                    "startedOn": _time(job.started_at),
                    "finishedOn": _time(job.finished_at),
                },
                "byproducts": [{"name": name, "digest": digest} for name, digest in lock.get("tensors", {}).items()],
            },
        },
    }


def report(
    job: Job, events: Iterable[Event], lock: Mapping[str, Any] | None, alignment: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How it went: what was planned and what it came to, how long each phase took, what was read and left out."""
    locked = lock or {}
    return {
        "id": job.id,
        "status": job.state,
        "attempts": job.attempt,
        "workers_lost": job.deaths,
        "phases": list(_phases(events)),
        "planned": {name: job.plan.get(name) for name in _PLANNED if name in job.plan},
        "done": job.progress,
        "files": len(job.files),
        "bytes": sum(file["size"] for file in job.files),
        "sources": [_summary(source) for source in locked["sources"]] if "sources" in locked else None,
        "seed": locked.get("seed"),
        "exact_on": locked.get("exact_on"),
        "left_out": locked.get("left_out", job.plan.get("left_out", [])),
        "warnings": job.warnings,
        "alignment": alignment,
        "error": job.error,
    }


_PLANNED = ("tensors", "tensors_merged", "passes", "bytes_read", "bytes_written", "peak_memory", "threads")


def _phases(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """The phases in order, each until the next or until the job's state changed."""
    phase: dict[str, Any] | None = None
    for event in events:
        if event.kind not in ("phase", "state"):
            continue
        if phase is not None:
            yield {
                "phase": phase["phase"],
                "started_at": _time(phase["at"]),
                "seconds": round(event.at - phase["at"], 3),
            }
        phase = {"phase": event.data.get("phase", ""), "at": event.at} if event.kind == "phase" else None
    if phase is not None:
        yield {"phase": phase["phase"], "started_at": _time(phase["at"]), "seconds": None}


def _summary(source: Mapping[str, Any]) -> dict[str, Any]:
    files = source.get("files", [])
    found = {"model": source.get("model"), "commit": source.get("commit")}
    return {**found, "files": len(files), "bytes": sum(file.get("size", 0) for file in files)}


def _sources(lock: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every file that was read, as SLSA's resource descriptors."""
    for source in lock.get("sources", []):
        for file in source.get("files", []):
            annotations = {"model": source.get("model"), "commit": source.get("commit"), "size": file.get("size")}
            yield {
                "name": f"{source.get('model')}/{file['path']}",
                "digest": {"sha256": file["sha256"]},
                "annotations": {name: value for name, value in annotations.items() if value is not None},
            }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
