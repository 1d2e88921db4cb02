"""The files of a finished job: whole, in part, or not at all if the caller has them."""

# No `from __future__ import annotations`: the routes' annotations name dependencies of the function they are made in.

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.deps import QueueDep, job_of
from app.errors import HttpProblem
from app.schemas import FileList, FileRead
from workers.jobs import JobKind, JobState
from workers.queue import Queue
from workers.tables import Job

MEDIA_TYPE = "application/octet-stream"
LINK_SECONDS = 3600.0
MAX_PARTS = 32
"""Who asks for more parts than this gets the whole file: each part may be a request of its own to the store."""


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
        path: str, job: Annotated[Job, Depends(job_of(kind))], queue: QueueDep, request: Request
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
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if (wanted := _tags(request, "if-match")) and not wanted & {etag, "*"}:
        raise HttpProblem("precondition-failed", f"the ETag of {path} is {etag}")
    if _tags(request, "if-none-match") & {etag, f"W/{etag}", "*"}:
        return Response(status_code=304, headers=headers)
    artifacts = queue.artifacts
    if (
        request.method == "GET"
        and queue.store.settings.s3_redirect
        and (link := artifacts.link(job.id, path, LINK_SECONDS))
    ):
        return RedirectResponse(link, 307, {"Cache-Control": "no-store"})
    parts: list[tuple[int, int]] = []
    if request.method == "GET" and request.headers.get("if-range", etag) == etag:
        parts = _parts(request.headers.get("range", ""), file["size"], path)
    target = artifacts.local(job.id, path)
    there = target.is_file() if target else artifacts.files(job.id).get(path) == file["size"]
    if not there:
        raise HttpProblem("gone", f"{path} is not in the artifact store any more")
    if target:
        return _Download(target, parts=parts, headers=headers)
    return _streamed(partial(artifacts.read, job.id, path), parts, file["size"], request.method, headers, path)


def _streamed(
    read: Callable[[int, int], Iterator[bytes]],
    parts: Sequence[tuple[int, int]],
    size: int,
    method: str,
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
    if method == "HEAD":
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


def _tags(request: Request, header: str) -> set[str]:
    return {tag.strip() for line in request.headers.getlist(header) for tag in line.split(",") if tag.strip()}


def _parts(written: str, size: int, path: str) -> list[tuple[int, int]]:
    """The Range to serve: the parts that are there, each from a byte to before another, in order and apart. None, for
    the whole file, where it makes no sense (RFC 9110, 14.2).

    Raises `HttpProblem` 416 where it makes sense and asks for nothing that is there.
    """
    unit, _, parts = written.partition("=")
    found = [part.strip().partition("-") for part in parts.split(",") if part.strip()]
    if (
        unit.strip().lower() != "bytes"
        or not 0 < len(found) <= MAX_PARTS
        or not all(_is_range(*part) for part in found)
    ):
        return []
    there = sorted(
        (int(first), min(int(last or size) + 1, size)) if first else (max(size - int(last), 0), size)
        for first, _, last in found
        if (int(first) < size if first else int(last) > 0 and size > 0)
    )
    if not there:
        detail = f"{path} has {size:,} bytes, and {written[:100]!r} asks for none of them"
        headers = {"Content-Range": f"bytes */{size}"}
        raise HttpProblem("range-not-satisfiable", detail, headers=headers)
    apart = [there[0]]
    for start, end in there[1:]:
        if start <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((start, end))
    return apart


def _is_range(first: str, dash: str, last: str) -> bool:
    if not dash or not (first + last).isascii() or not (first + last).isdecimal() or len(first + last) > 36:
        return False
    return not first or not last or int(first) <= int(last)
