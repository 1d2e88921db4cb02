"""The files of a finished merge: whole, in part, or not at all if the caller has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from app.deps import JobDep, SettingsDep
from app.errors import HttpProblem
from app.schemas import FileList, FileRead
from workers.jobs import Job, JobState
from workers.queue import artifact_folder

router = APIRouter(prefix="/v1/merges/{merge_id}/files", tags=["files"])


class _Download(FileResponse):
    chunk_size = 2**20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A Range that makes no sense is to be ignored (RFC 9110, 14.2), where Starlette answers 400.
        headers = scope["headers"]
        kept = [(name, value) for name, value in headers if name != b"range" or _parts(value.decode("latin-1"))]
        await super().__call__({**scope, "headers": kept}, receive, send)


@router.get("")
def list_files(job: JobDep) -> FileList:
    """Every file with its size and sha256."""
    _require_success(job)
    return FileList(data=[FileRead(**file, url=f"/v1/merges/{job.id}/files/{file['path']}") for file in job.files])


@router.head("/{path:path}", response_class=FileResponse, include_in_schema=False)
@router.get("/{path:path}", response_class=FileResponse)
def download_file(
    path: str,
    job: JobDep,
    settings: SettingsDep,
    range_: Annotated[str | None, Header(alias="Range")] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """One file. Its ETag is its sha256; `Range` and `If-Range` give a part, `If-None-Match` spares a repetition."""
    _require_success(job)
    file = next((file for file in job.files if file["path"] == path), None)
    if file is None:
        raise HttpProblem(404, "not-found", "Not found", f"merge {job.id} has no file {path[:200]!r}")
    etag = f'"{file["sha256"]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if if_none_match and any(tag.strip().removeprefix("W/") in (etag, "*") for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    parts = _parts(range_ or "")
    if parts and not _satisfiable(parts, file["size"]):
        detail = f"{path} has {file['size']:,} bytes, and {(range_ or '')[:100]!r} asks for none of them"
        raise HttpProblem(
            416, "range-not-satisfiable", "Range not satisfiable", detail, {"Content-Range": f"bytes */{file['size']}"}
        )
    target = artifact_folder(settings, job.id) / path
    if not target.is_file():
        raise HttpProblem(410, "gone", "Gone", f"{path} was removed from the service's disk")
    return _Download(target, headers=headers, filename=path, media_type="application/octet-stream")


def _require_success(job: Job) -> None:
    if job.state != JobState.SUCCEEDED:
        raise HttpProblem(
            409,
            "invalid-state",
            "The job is not in a state for that",
            f"merge {job.id} is {job.state}; it has no files yet",
        )


def _parts(written: str) -> list[tuple[str, str]]:
    """The first and last byte of each part of a Range header; nothing where it does not make sense."""
    unit, _, parts = written.partition("=")
    if unit.strip().lower() != "bytes":
        return []
    found = [part.strip().partition("-") for part in parts.split(",") if part.strip()]
    sensible = all(dash and (first + last).isdecimal() and len(first + last) <= 36 for first, dash, last in found)
    return [(first, last) for first, _, last in found] if sensible else []


def _satisfiable(parts: Sequence[tuple[str, str]], size: int) -> bool:
    """Whether any part asks for bytes that are there."""
    return any(
        (int(first) < size and (not last or int(last) >= int(first))) if first else int(last) > 0
        for first, last in parts
    )
