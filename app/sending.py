"""A file of a repo as an answer: whole, in part, or not at all if the caller has it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from anyio import CapacityLimiter, to_thread
from fastapi import Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.errors import HttpProblem, answers
from app.head import IS_HEAD, is_head
from app.headers import tags
from app.ranges import wanted_parts
from app.repos import Repo, RepoFile

MEDIA_TYPE = "application/octet-stream"
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
ANSWERS: dict[int | str, dict[str, Any]] = {
    **answers("not-found", "gone", "storage-failed", "precondition-failed", "range-not-satisfiable"),
    200: {"content": {MEDIA_TYPE: _BINARY}, "headers": _HEADERS},
    206: {"content": {MEDIA_TYPE: _BINARY, "multipart/byteranges": _BINARY}, "headers": _HEADERS},
    304: {"description": "The caller has it, as `If-None-Match` says.", "headers": _HEADERS},
    307: {"description": "It is to be had there, where files are kept in S3 and may be fetched directly."},
}
"""What the OpenAPI document says of an answer that `send_file` gives."""


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


def send_file(
    request: Request, repo: Repo, file: RepoFile, headers: Mapping[str, str] = MappingProxyType({})
) -> Response:
    """The answer to a GET or HEAD of a file, as the request's Range, If-Range, If-Match and If-None-Match want it."""
    path = file.path
    etag = f'"{file.etag}"'
    headers = {
        **headers,
        "ETag": etag,
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if file.sha256 is not None:
        headers["Repr-Digest"] = f"sha-256=:{b64encode(bytes.fromhex(file.sha256)).decode()}:"
    if (wanted := tags(request, "if-match")) and not wanted & {etag, "*"}:
        raise HttpProblem("precondition-failed", f"the ETag of {path} is {etag}")
    if tags(request, "if-none-match") & {etag, f"W/{etag}", "*"}:
        return Response(status_code=304, headers=headers)
    if not is_head(request) and (link := repo.link(path)):
        return RedirectResponse(link, 307, {"Cache-Control": "no-store"})
    parts: list[tuple[int, int]] = []
    if not is_head(request) and request.headers.get("if-range", etag) == etag:
        parts = wanted_parts(request.headers.get("range", ""), file.size, path)
    gone = HttpProblem("gone", f"{path} is not in the artifact store any more")
    target = repo.local(path)
    # What is read at once says itself that it is not there; to ask before costs as much as to read.
    if (target is not None or is_head(request) or len(parts) > 1) and not repo.is_there(path):
        raise gone
    if target is not None:
        return _Download(target, parts=parts, headers=headers)
    try:
        return _streamed(repo, path, parts, file.size, is_head(request), headers)
    except FileNotFoundError:
        raise gone from None


def _streamed(
    repo: Repo,
    path: str,
    parts: Sequence[tuple[int, int]],
    size: int,
    head: bool,
    headers: Mapping[str, str],
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
        return StreamingResponse(
            _in_threads(repo.read(path, 0, size), repo.threads), headers=headers, media_type=MEDIA_TYPE
        )
    if len(parts) == 1:
        ((start, end),) = parts
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return StreamingResponse(_in_threads(repo.read(path, start, end), repo.threads), 206, headers, MEDIA_TYPE)
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

    async def body() -> AsyncIterator[bytes]:
        for head, (start, end) in zip(heads, parts, strict=True):
            yield head
            found = await to_thread.run_sync(repo.read, path, start, end)
            async for data in _in_threads(found, repo.threads):
                yield data
            yield between
        yield last

    return StreamingResponse(body(), 206, headers, f"multipart/byteranges; boundary={boundary}")


async def _in_threads(parts: Iterator[bytes], threads: CapacityLimiter | None) -> AsyncIterator[bytes]:
    """What is iterated over in threads; whoever stops listening ends it."""
    try:
        while (data := await to_thread.run_sync(next, parts, None, limiter=threads)) is not None:
            yield data
    finally:
        if (close := getattr(parts, "close", None)) is not None:
            close()
