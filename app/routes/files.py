"""The files of a finished job: whole, in part, or not at all if the caller has them."""

# No `from __future__ import annotations`: the routes' annotations name dependencies of the function they are made in.

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.deps import QueueDep, job_of
from app.errors import HttpProblem, answers
from app.head import IS_HEAD, is_head
from app.headers import tags
from app.ranges import wanted_parts
from app.schemas import FileList, FileRead
from workers.jobs import JobKind, JobState
from workers.queue import Queue
from workers.tables import Job

MEDIA_TYPE = "application/octet-stream"
LINK_SECONDS = 3600.0
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_HEADERS = {
    name: {"description": meaning, "schema": {"type": "string"}}
    for name, meaning in {
        "ETag": "the file's sha256",
        "Repr-Digest": "the same as in RFC 9530",
        "Accept-Ranges": "`bytes`",
        "Content-Disposition": "the file's name",
    }.items()
}


class _Download(FileResponse):
    """A file of which Starlette sends the part we say, not the part that the caller's header says."""

    chunk_size = 2**20

    def __init__(self, path: Path, *, parts: Sequence[tuple[int, int]], headers: Mapping[str, str]) -> None:
        super().__init__(path, headers=headers, filename=path.name, media_type=MEDIA_TYPE)
        self._part = "bytes=" + ",".join(f"{start}-{end - 1}" for start, end in parts) if parts else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept = [(name, value) for name, value in scope["headers"] if name not in (b"range", b"if-range")]
        if self._part:
            kept.append((b"range", self._part.encode()))
        method = "HEAD" if scope.get(IS_HEAD) else scope["method"]
        await super().__call__({**scope, "headers": kept, "method": method}, receive, send)


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
        responses={
            **answers("not-found", "invalid-state", "gone", "precondition-failed", "range-not-satisfiable"),
            200: {"content": {MEDIA_TYPE: _BINARY}, "headers": _HEADERS},
            206: {"content": {MEDIA_TYPE: _BINARY, "multipart/byteranges": _BINARY}, "headers": _HEADERS},
            304: {"description": "The caller has it, as `If-None-Match` says.", "headers": _HEADERS},
            307: {"description": "It is to be had there, where files are kept in S3 and may be fetched directly."},
        },
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
        return _download(path, job, queue, request)

    return router


def _download(path: str, job: Job, queue: Queue, request: Request) -> Response:
    file = next((file for file in job.files if file["path"] == path), None)
    if file is None:
        raise HttpProblem("not-found", f"{job.kind} {job.id} has no file {path[:200]!r}")
    etag = f'"{file["sha256"]}"'
    headers = {
        "ETag": etag,
        "Repr-Digest": f"sha-256=:{b64encode(bytes.fromhex(file['sha256'])).decode()}:",
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if (wanted := tags(request, "if-match")) and not wanted & {etag, "*"}:
        raise HttpProblem("precondition-failed", f"the ETag of {path} is {etag}")
    if tags(request, "if-none-match") & {etag, f"W/{etag}", "*"}:
        return Response(status_code=304, headers=headers)
    artifacts = queue.artifacts
    if (
        not is_head(request)
        and queue.store.settings.s3_redirect
        and (link := artifacts.link(job.id, path, LINK_SECONDS))
    ):
        return RedirectResponse(link, 307, {"Cache-Control": "no-store"})
    parts: list[tuple[int, int]] = []
    if not is_head(request) and request.headers.get("if-range", etag) == etag:
        parts = wanted_parts(request.headers.get("range", ""), file["size"], path)
    target = artifacts.local(job.id, path)
    there = target.is_file() if target else artifacts.files(job.id).get(path) == file["size"]
    if not there:
        raise HttpProblem("gone", f"{path} is not in the artifact store any more")
    if target:
        return _Download(target, parts=parts, headers=headers)
    return _streamed(partial(artifacts.read, job.id, path), parts, file["size"], is_head(request), headers, path)


def _streamed(
    read: Callable[[int, int], Iterator[bytes]],
    parts: Sequence[tuple[int, int]],
    size: int,
    head: bool,
    headers: Mapping[str, str],
    path: str,
) -> Response:
    """What is not on this machine, read as it is sent."""
    name = quote(path.rpartition("/")[2])
    headers = {
        **headers,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=utf-8''{name}",
        "Content-Length": str(sum(end - start for start, end in parts) or size),
    }
    if head:
        return Response(headers=headers, media_type=MEDIA_TYPE)
    if not parts:
        return StreamingResponse(read(0, size), headers=headers, media_type=MEDIA_TYPE)
    if len(parts) == 1:
        ((start, end),) = parts
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return StreamingResponse(read(start, end), 206, headers, MEDIA_TYPE)
    boundary = token_hex(16)
    heads = [
        f"--{boundary}\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Range: bytes {start}-{end - 1}/{size}\r\n\r\n".encode()
        for start, end in parts
    ]
    last = f"--{boundary}--\r\n".encode()
    between = b"\r\n"
    headers["Content-Length"] = str(
        sum(len(head) + end - start + len(between) for head, (start, end) in zip(heads, parts, strict=True)) + len(last)
    )

    def body() -> Iterator[bytes]:
        for head, (start, end) in zip(heads, parts, strict=True):
            yield head
            yield from read(start, end)
            yield between
        yield last

    return StreamingResponse(body(), 206, headers, f"multipart/byteranges; boundary={boundary}")


def _require_success(job: Job) -> None:
    if job.state != JobState.SUCCEEDED:
        raise HttpProblem("invalid-state", f"{job.kind} {job.id} is {job.state}; it has no files yet")
