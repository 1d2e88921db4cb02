"""A job's events as a stream (Server-Sent Events) and as lines of a log."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any

from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from app.watching import Watch
from workers.jobs import FINISHED, JobStore, Pulse
from workers.tables import Event

PROGRESS_SECONDS = 1.0
KEEPALIVE_SECONDS = 15.0
RETRY_MILLISECONDS = 2000
_AT_ONCE = 200


async def stream(store: JobStore, watch: Watch, job_id: str, after: int, seconds: float) -> AsyncIterator[bytes]:
    """What happened to a job since its event number `after`, and what happens from now on, until it has ended or so
    many seconds are over.

    An event's id is its number. `progress` has none: it is not kept, comes at most once a second, and who missed it has
    missed nothing; the newest is told when its second has come. The last is `done`.
    """
    yield format_sse_event(retry=RETRY_MILLISECONDS, comment=job_id)
    until, spoken = time.monotonic() + seconds, time.monotonic()
    progress: Mapping[str, Any] | None = None
    version, told_progress, told_at = -1, progress, 0.0
    while (left := until - time.monotonic()) > 0:
        wait = KEEPALIVE_SECONDS if progress == told_progress else told_at + PROGRESS_SECONDS - time.monotonic()
        pulse = await watch.changed(job_id, version, min(left, wait))
        if watch.is_closed or (pulse is not None and pulse.is_deleted):
            return
        if pulse is not None:
            version, progress = pulse.version, _progress(pulse)
            while after < pulse.events and (
                found := await run_in_threadpool(store.events, job_id, after=after, limit=_AT_ONCE)
            ):
                for event in found:
                    yield _written(event)
                after = found[-1].seq
                spoken = time.monotonic()
        is_over = pulse is not None and pulse.state in FINISHED
        if progress != told_progress and (is_over or time.monotonic() - told_at >= PROGRESS_SECONDS):
            told_progress, told_at = progress, time.monotonic()
            spoken = told_at
            yield format_sse_event(event="progress", data_str=_json(progress))
        if pulse is not None and is_over:
            yield format_sse_event(event="done", data_str=_json({"status": pulse.state}))
            return
        if time.monotonic() - spoken >= KEEPALIVE_SECONDS:
            spoken = time.monotonic()
            yield KEEPALIVE_COMMENT


def line(event: Event) -> str:
    """An event as a line of the job's log. It never changes, so that a log only grows."""
    data, at = dict(event.data), datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds")
    if event.kind == "log":
        told = f"{data.get('level', 'info')}: {data.get('message', '')}"
    elif event.kind == "state":
        error = data.get("error") or {}
        told = data.get("status", "") + "".join(
            f": {each}" for each in (data.get("because"), error.get("detail")) if each
        )
    else:
        told = str(data.get(event.kind) or _json(data))
    return f"{at} {event.kind:7} " + told.replace("\r", " ").replace("\n", "\n    ") + "\n"


def _written(event: Event) -> bytes:
    data = {"at": datetime.fromtimestamp(event.at, UTC).isoformat(), **event.data}
    return format_sse_event(event=event.kind, data_str=_json(data), id=str(event.seq))


def _progress(pulse: Pulse) -> Mapping[str, Any]:
    return {"status": pulse.state, "phase": pulse.phase, **pulse.progress}


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)
