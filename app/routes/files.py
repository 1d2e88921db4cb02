"""The files of a finished job: whole, in part, or not at all if the caller has them."""

# No `from __future__ import annotations`: the routes' annotations name dependencies of the function they are made in.

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from app.deps import SettingsDep, job_of
from app.errors import HttpProblem
from app.schemas import FileList, FileRead
from workers.jobs import JobKind, JobState
from workers.queue import artifact_folder
from workers.settings import Settings
from workers.tables import Job


class _Download(FileResponse):
    """A file of which Starlette sends the part we say, not the part that the caller's header says."""

    chunk_size = 2**20

    def __init__(self, path: Path, *, part: str | None, headers: Mapping[str, str]) -> None:
        super().__init__(path, headers=headers, filename=path.name, media_type="application/octet-stream")
        self._part = part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept = [(name, value) for name, value in scope["headers"] if name not in (b"range", b"if-range")]
        if self._part:
            kept.append((b"range", self._part.encode()))
        await super().__call__({**scope, "headers": kept}, receive, send)


def files_router(kind: JobKind) -> APIRouter:
    """The routes of the files of a kind's jobs."""
    router = APIRouter(prefix=f"/v1/{kind.plural}/{{job_id}}/files", tags=["files"])

    @router.get("", name=f"list_{kind}_files")
    def list_files(job: Annotated[Job, Depends(job_of(kind))]) -> FileList:
        """Every file with its size and sha256."""
        _require_success(job)
        where = f"/v1/{kind.plural}/{job.id}/files"
        return FileList(data=[FileRead(**file, url=f"{where}/{file['path']}") for file in job.files])

    @router.head("/{path:path}", response_class=FileResponse, include_in_schema=False)
    @router.get("/{path:path}", name=f"download_{kind}_file", response_class=FileResponse)
    def download_file(
        path: str, job: Annotated[Job, Depends(job_of(kind))], settings: SettingsDep, request: Request
    ) -> Response:
        """One file. Its ETag is its sha256; `Range` and `If-Range` give a part, `If-None-Match` spares a repetition."""
        _require_success(job)
        return _download(path, job, settings, request)

    return router


def _download(path: str, job: Job, settings: Settings, request: Request) -> Response:
    file = next((file for file in job.files if file["path"] == path), None)
    if file is None:
        raise HttpProblem(404, "not-found", "Not found", f"{job.kind} {job.id} has no file {path[:200]!r}")
    etag = f'"{file["sha256"]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if (wanted := _tags(request, "if-match")) and not wanted & {etag, "*"}:
        raise HttpProblem(412, "precondition-failed", "Precondition failed", f"the ETag of {path} is {etag}")
    if _tags(request, "if-none-match") & {etag, f"W/{etag}", "*"}:
        return Response(status_code=304, headers=headers)
    part = None
    if request.method == "GET" and request.headers.get("if-range", etag) == etag:
        part = _part(request.headers.get("range", ""), file["size"], path)
    target = artifact_folder(settings, job.id) / path
    if not target.is_file():
        raise HttpProblem(410, "gone", "Gone", f"{path} was removed from the service's disk")
    return _Download(target, part=part, headers=headers)


def _require_success(job: Job) -> None:
    if job.state != JobState.SUCCEEDED:
        raise HttpProblem(
            409,
            "invalid-state",
            "The job is not in a state for that",
            f"{job.kind} {job.id} is {job.state}; it has no files yet",
        )


def _tags(request: Request, header: str) -> set[str]:
    return {tag.strip() for line in request.headers.getlist(header) for tag in line.split(",") if tag.strip()}


def _part(written: str, size: int, path: str) -> str | None:
    """The Range to serve: the parts that are there. None, for the whole file, where it makes no sense (RFC 9110, 14.2).

    Raises `HttpProblem` 416 where it makes sense and asks for nothing that is there.
    """
    unit, _, parts = written.partition("=")
    found = [part.strip().partition("-") for part in parts.split(",") if part.strip()]
    if unit.strip().lower() != "bytes" or not found or not all(_is_range(*part) for part in found):
        return None
    there = [(first, last) for first, _, last in found if (int(first) < size if first else int(last) > 0)]
    if not there:
        detail = f"{path} has {size:,} bytes, and {written[:100]!r} asks for none of them"
        headers = {"Content-Range": f"bytes */{size}"}
        raise HttpProblem(416, "range-not-satisfiable", "Range not satisfiable", detail, headers)
    return "bytes=" + ",".join(f"{first}-{last}" for first, last in there)


def _is_range(first: str, dash: str, last: str) -> bool:
    if not dash or not (first + last).isascii() or not (first + last).isdecimal() or len(first + last) > 36:
        return False
    return not first or not last or int(first) <= int(last)
