"""Files of data that you sent: what searches score candidates on, and what calibrations learn from."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Self

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from app.auth import CallerDep
from app.deps import QueueDep, SettingsDep, body_parts
from app.errors import HttpProblem, answers
from workers.tables import Upload
from workers.uploads import NAME_PATTERN, SCHEME, Uploads

router = APIRouter(prefix="/v1/data", tags=["data"])
Name = Annotated[str, Path(pattern=NAME_PATTERN, description=f"what jobs call it, after `{SCHEME}`")]
_PIECE = 2**20


def _uploads(queue: QueueDep, caller: CallerDep) -> Uploads:
    return Uploads(queue.store, caller.owner)


UploadsDep = Annotated[Uploads, Depends(_uploads)]


class DataRead(BaseModel):
    """A file that you sent."""

    name: str = Field(description=f"documents call it `{SCHEME}` and this")
    size: int = Field(description="bytes")
    sha256: str
    changed_at: datetime

    @classmethod
    def of(cls, found: Upload) -> Self:
        """The file as its resource."""
        changed = datetime.fromtimestamp(found.changed_at, UTC)
        return cls(name=found.name, size=found.size, sha256=found.sha256, changed_at=changed)


class DataPage(BaseModel):
    """Files by name; `next` is the `after` of the following page."""

    data: list[DataRead]
    has_more: bool
    next: str | None


@router.put(
    "/{name}",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    responses=answers(
        *("invalid-request", "payload-too-large", "unsupported-media-type", "quota"),
        *("insufficient-storage", "storage-failed"),
    ),
)
async def put_data(name: Name, request: Request, uploads: UploadsDep, settings: SettingsDep) -> DataRead:
    """Send a file under a name, in place of what had it: JSON lines, parquet or text, as the body is. It stays until
    you delete it, and counts as disk that you use.
    """
    with uploads.coming(name) as coming:
        async for piece in body_parts(request, settings.evaluator_data_bytes, _PIECE):
            await run_in_threadpool(coming.write, piece)
        return DataRead.of(await run_in_threadpool(coming.kept))


@router.get("")
def list_data(
    uploads: UploadsDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    after: Annotated[str, Query(max_length=100, description="the `next` of the page before")] = "",
) -> DataPage:
    """The files that you sent."""
    found = uploads.page(limit=limit + 1, after=after)
    page = [DataRead.of(each) for each in found[:limit]]
    more = len(found) > limit
    return DataPage(data=page, has_more=more, next=page[-1].name if more else None)


@router.get("/{name}", responses=answers("not-found"))
def read_data(name: Name, uploads: UploadsDep) -> DataRead:
    """What there is to tell of one."""
    if (found := uploads.find(name)) is None:
        raise _missing(name)
    return DataRead.of(found)


@router.delete("/{name}", status_code=204, responses=answers("not-found"))
def delete_data(name: Name, uploads: UploadsDep) -> None:
    """Remove it. A job that comes to need it fails."""
    if not uploads.delete(name):
        raise _missing(name)


def _missing(name: str) -> HttpProblem:
    return HttpProblem("not-found", f"there is no data {name!r}")
