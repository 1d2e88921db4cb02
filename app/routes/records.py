"""What is kept of a job beside its files: events, log, recipe, manifest, report."""

# No `from __future__ import annotations`: the routes' annotations name dependencies of the function they are made in.

import functools
import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse

from app import provenance
from app.deps import QueueDep, SettingsDep, WatchDep, job_of
from app.documents import written
from app.errors import HttpProblem, answers
from app.events import line, stream
from app.head import is_head
from app.headers import is_known, next_link, preferred_type
from app.ranges import wanted_parts
from app.schemas import EventPage, EventRead, Report, TensorsRead
from workers.artifacts import LOCK_SUFFIX
from workers.jobs import FINISHED, JobKind, JobState
from workers.tables import Job

STREAM_TYPE = "text/event-stream"
MANIFEST_TYPE = "application/vnd.in-toto+json"
MOST_LINES = 50_000
_DOCUMENT: dict[str, Any] = {"schema": {"type": ["object", "array"]}}
_TEXT: dict[str, Any] = {"schema": {"type": "string"}}


@functools.cache
def records_router(kind: JobKind) -> APIRouter:
    """The routes of what is kept of a kind's jobs."""
    router = APIRouter(prefix=f"/v1/{kind.plural}/{{job_id}}", tags=[kind.plural])
    JobDep = Annotated[Job, Depends(job_of(kind))]  # noqa: N806

    @router.get(
        "/events",
        name=f"list_{kind}_events",
        response_model=EventPage,
        responses={
            **answers("not-found", "invalid-request"),
            200: {
                "content": {STREAM_TYPE: _TEXT},
                "headers": {"Link": {"description": "the page after this", **_TEXT}},
            },
            204: {"description": "A stream that is opened again after its end: there is nothing more to come."},
        },
    )
    def list_events(
        job: JobDep,
        queue: QueueDep,
        settings: SettingsDep,
        watch: WatchDep,
        request: Request,
        response: Response,
        after: Annotated[int, Query(ge=0, le=2**31 - 1, description="the number of an event, which is not sent")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000, description="of a page; a stream has none")] = 100,
        last_event_id: Annotated[
            str | None, Header(description="where a stream broke off: the same as `after`")
        ] = None,
        accept: Annotated[str | None, Header(description=f"`{STREAM_TYPE}` for a stream instead of a page")] = None,
    ) -> Any:
        """What happened to a job, oldest first: as a page, or as a stream (Server-Sent Events) that goes on until the
        job has ended. The stream's events are `state`, `phase`, `warning`, `log`, `progress` and at the end `done`.
        """
        if last_event_id and last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) < 10:
            after = max(after, int(last_event_id))
        response.headers["Vary"] = "Accept"
        response.headers["Cache-Control"] = "no-store"
        if preferred_type(request, "application/json", STREAM_TYPE) == STREAM_TYPE:
            if after >= job.events and JobState(job.state) in FINISHED:
                return Response(status_code=204, headers=response.headers)
            headers = {**response.headers, "X-Accel-Buffering": "no"}
            if is_head(request):
                return Response(headers=headers, media_type=STREAM_TYPE)
            events = stream(queue.store, watch, job.id, after, settings.max_stream)
            return EventSourceResponse(events, headers=headers)
        found = queue.store.events(job.id, after=after, limit=limit + 1)
        page = [EventRead.of(event) for event in found[:limit]]
        last = page[-1].seq if page else after
        if len(found) > limit:
            response.headers["Link"] = next_link(request, last)
        return EventPage(data=page, has_more=len(found) > limit, next=last)

    @router.get(
        "/logs",
        name=f"read_{kind}_log",
        response_class=Response,
        responses={
            **answers("not-found", "range-not-satisfiable"),
            200: {"content": {"text/plain": _TEXT}, "description": "One line for each event."},
            206: {"content": {"text/plain": _TEXT}, "description": "The part that `Range` asks for."},
            304: {"description": "It is still as `If-None-Match` says."},
        },
    )
    def read_log(
        job: JobDep,
        queue: QueueDep,
        request: Request,
        range_: Annotated[str | None, Header(alias="Range", description="`bytes=1000-`: what came after")] = None,
        if_range: Annotated[str | None, Header(description="the ETag for which `Range` is meant")] = None,
        if_none_match: Annotated[str | None, Header(description="the ETag of what the caller has")] = None,
    ) -> Response:
        """The events as text, which only grows: `Range: bytes=N-` gives what came since N bytes."""
        text = "".join(line(event) for event in queue.store.events(job.id, limit=MOST_LINES)).encode()
        headers = {"ETag": f'"{job.events}"', "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
        if is_known(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        parts: list[tuple[int, int]] = []
        if not is_head(request) and (if_range is None or if_range == headers["ETag"]):
            parts = wanted_parts(range_ or "", len(text), "the log")
        if len(parts) != 1:
            return Response(text, headers=headers, media_type="text/plain")
        ((start, end),) = parts
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(text)}"
        return Response(text[start:end], 206, headers, "text/plain")

    @router.get(
        "/recipe",
        name=f"read_{kind}_recipe",
        response_class=Response,
        responses={
            **answers("not-found"),
            200: {"content": dict.fromkeys(("application/yaml", "application/json"), _DOCUMENT)},
        },
    )
    def read_recipe(
        job: JobDep,
        request: Request,
        accept: Annotated[str | None, Header(description="`application/json` instead of YAML")] = None,
    ) -> Response:
        """The document that was sent, tidied: as YAML, or as JSON. POSTed again it makes the same."""
        kinds = ("application/yaml", "application/json")
        headers = {"Vary": "Accept"}
        if preferred_type(request, *kinds) == kinds[1]:
            return _json(job.recipe, kinds[1], headers)
        return Response(written(job.recipe), headers=headers, media_type=kinds[0])

    @router.get(
        "/manifest",
        name=f"read_{kind}_manifest",
        response_class=Response,
        responses={
            **answers("not-found", "invalid-state", "gone", "storage-failed"),
            200: {"content": {MANIFEST_TYPE: {"schema": {"$ref": "#/components/schemas/Manifest"}}}},
        },
    )
    def read_manifest(job: JobDep, queue: QueueDep) -> Response:
        """What a finished job made, of what, how and by what: an in-toto statement with the sha256 of every file."""
        if job.state != JobState.SUCCEEDED:
            raise HttpProblem(
                "invalid-state", f"{job.kind} {job.id} is {job.state}; only what succeeded has a manifest"
            )
        try:
            lock = provenance.read_json(queue.artifacts, job, LOCK_SUFFIX)
        except FileNotFoundError:
            raise HttpProblem("gone", f"the files of {job.id} are not in the artifact store any more") from None
        return _json(provenance.manifest(job, lock or {}), MANIFEST_TYPE)

    @router.get(
        "/report",
        name=f"read_{kind}_report",
        response_model=Report,
        responses=answers("not-found", "storage-failed"),
    )
    def read_report(job: JobDep, queue: QueueDep) -> Any:
        """How a job went, also while it runs or if it failed: phases and their times, what was planned and what it came
        to, what was read, what was left out, how far each tensor of an alignment was.
        """
        events = queue.store.events(job.id, limit=MOST_LINES, kinds=("state", "phase"))
        try:
            lock = provenance.read_json(queue.artifacts, job, LOCK_SUFFIX)
            alignment = provenance.read_json(queue.artifacts, job, "report.json")
            verification = provenance.read_json(queue.artifacts, job, "verification.json")
        except FileNotFoundError:
            lock, alignment, verification = None, None, None
        return {**provenance.report(job, events, lock, alignment), "verification": verification}

    @router.get("/tensors", name=f"list_{kind}_tensors", responses=answers("not-found"))
    def list_tensors(job: JobDep, queue: QueueDep) -> TensorsRead:
        """Which tensors a job writes and which of them are whole. The names stay the same while it runs; what is whole
        then is in its `progress` too.
        """
        return TensorsRead(names=queue.store.order(job.id), finished=job.progress.get("tensors_finished") or [])

    return router


def _json(data: Any, media_type: str, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
    return Response(text, headers=headers, media_type=media_type)
