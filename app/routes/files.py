"""The files of a finished job: whole, in part, or not at all if the caller has them."""

# No `from __future__ import annotations`: the routes' annotations name dependencies of the function they are made in.

import functools
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import FileResponse

from app.deps import QueueDep, job_of
from app.errors import HttpProblem, answers
from app.repos import job_repo
from app.schemas import FileList, FileRead
from app.sending import ANSWERS, send_file
from workers.jobs import JobKind, JobState
from workers.tables import Job


@functools.cache
def files_router(kind: JobKind) -> APIRouter:
    """The routes of the files of a kind's jobs."""
    router = APIRouter(prefix=f"/v1/{kind.plural}/{{job_id}}/files", tags=["files"])

    @router.get("", name=f"list_{kind}_files", responses=answers("not-found", "invalid-state"))
    def list_files(job: Annotated[Job, Depends(job_of(kind))]) -> FileList:
        """Every file with its size and sha256."""
        _require_success(job)
        where = f"/v1/{kind.plural}/{job.id}/files"
        return FileList(data=[FileRead(**file, url=f"{where}/{file['path']}") for file in job.files])

    @router.get(
        "/{path:path}",
        name=f"download_{kind}_file",
        response_class=FileResponse,
        responses={**ANSWERS, **answers("invalid-state")},
    )
    def download_file(
        path: str,
        job: Annotated[Job, Depends(job_of(kind))],
        queue: QueueDep,
        request: Request,
        range_: Annotated[str | None, Header(alias="Range", description="`bytes=0-99`, several parts too")] = None,
        if_range: Annotated[str | None, Header(description="the ETag for which `Range` is meant")] = None,
        if_match: Annotated[str | None, Header(description="the ETag that is asked for")] = None,
        if_none_match: Annotated[str | None, Header(description="the ETag of what the caller has")] = None,
    ) -> Response:
        """One file. Its ETag is its sha256; `Range` and `If-Range` give a part, `If-None-Match` spares a repetition."""
        _require_success(job)
        repo = job_repo(queue, job)
        if (file := repo.files.get(path)) is None:
            raise HttpProblem("not-found", f"{job.kind} {job.id} has no file {path[:200]!r}")
        return send_file(request, repo, file)

    return router


def _require_success(job: Job) -> None:
    if job.state != JobState.SUCCEEDED:
        raise HttpProblem("invalid-state", f"{job.kind} {job.id} is {job.state}; it has no files yet")
