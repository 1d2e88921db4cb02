"""The files of a finished merge: whole, in part, or not at all if the caller has them."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.responses import FileResponse

from app.deps import JobDep, SettingsDep
from app.errors import HttpProblem
from app.schemas import FileList, FileRead
from workers.jobs import Job, JobState
from workers.queue import artifact_folder

router = APIRouter(prefix="/v1/merges/{merge_id}/files", tags=["files"])
_RANGE = re.compile(r"\s*bytes\s*=\s*(?:\d{0,18}-\d{0,18}\s*,?\s*)+", re.IGNORECASE)


class _Download(FileResponse):
    chunk_size = 2**20


@router.get("")
def list_files(job: JobDep) -> FileList:
    """Every file with its size and sha256."""
    _require_success(job)
    return FileList(data=[FileRead(**file, url=f"/v1/merges/{job.id}/files/{file['path']}") for file in job.files])


@router.api_route("/{path:path}", methods=["GET", "HEAD"], response_class=FileResponse, operation_id="download_file")
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
    if range_ and _RANGE.fullmatch(range_) and not _satisfiable(range_, file["size"]):
        detail = f"{path} has {file['size']:,} bytes, and {range_[:100]!r} asks for none of them"
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


def _satisfiable(range_: str, size: int) -> bool:
    """Whether any of the ranges asks for bytes that are there."""
    parts = [part.strip().partition("-") for part in range_.partition("=")[2].split(",") if part.strip()]
    return any(
        (int(first) < size and (not last or int(last) >= int(first))) if first else int(last or 0) > 0
        for first, _, last in parts
    )
